"""Constant arithmetic behind a linear layer becomes part of its parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qdqtool.passes.fold_batchnorm import FoldBatchnorm
from qdqtool.passes.fold_scale_shift import FoldScaleShift
from qdqtool.passes.infer_shapes import InferShapes

PASSES = (InferShapes(), FoldScaleShift())
LAYERS: dict[str, dict[str, tuple[int, ...]]] = {
    "Conv(x, w)": {"w": (8, 4, 3, 3)},
    "Conv <group = 2> (x, w, b)": {"w": (8, 2, 3, 3), "b": (8,)},
    "ConvTranspose <group = 2> (x, w, b)": {"w": (4, 4, 3, 3), "b": (8,)},
}
STEPS = ["Add(c, k)", "Sub(c, k)", "Sub(k, c)", "Mul(k, c)", "Div(c, k)"]


def normal(*shape: int, dtype: str = "float32") -> Any:
    values = np.random.default_rng(0).standard_normal(shape) / 2
    return np.where(np.abs(values) < 0.1, 0.5, values).astype(dtype)


def model(body: str, inputs: str = "float[N, 4, 6, 6] x", output: str = "float[N, C, H, W] y") -> str:
    return f'<ir_version: 8, opset_import: ["" : 13]> g ({inputs}) => ({output}) {{ {body} }}'


@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (8, 1, 1), (1,), ()])
def test_convolutions(passes: Any, layer: str, step: str, shape: tuple[int, ...]) -> None:
    weights = {name: normal(*extents) for name, extents in LAYERS[layer].items()}
    proto, state = passes(
        model(f"[conv] c = {layer} [step] y = {step}"), *PASSES, weights={**weights, "k": normal(*shape)}
    )
    assert len(proto.graph.node) == 1
    assert proto.graph.node[0].output[0] == "y"
    assert state.origins == {"conv": ("conv", "step")}
    assert not state.skipped


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize(
    ("layer", "weight"),
    [
        ("Gemm <alpha = 0.5, beta = 2.0> (x, w, b)", (4, 5)),
        ("Gemm <transB = 1> (x, w)", (5, 4)),
        ("MatMul(x, w)", (4, 5)),
    ],
)
@pytest.mark.parametrize("shape", [(5,), (1, 5), ()])
def test_matrix_products(passes: Any, layer: str, weight: tuple[int, ...], step: str, shape: tuple[int, ...]) -> None:
    proto, _ = passes(
        model(f"c = {layer} y = {step}", "float[N, 4] x", "float[N, 5] y"),
        *PASSES,
        weights={"w": normal(*weight), "b": normal(5), "k": normal(*shape)},
    )
    (node,) = proto.graph.node
    assert node.op_type == ("MatMul" if layer.startswith("MatMul") and step[:3] in ("Mul", "Div") else "Gemm")


def test_a_chain_folds_completely(passes: Any) -> None:
    proto, state = passes(
        model(
            "[conv] c = Conv(x, w) [a] d = Mul(c, k) [b] e = Add(d, one) [s] f = Sub(one, e) [d] h = Div(f, k)"
            " y = Relu(h)"
        ),
        *PASSES,
        weights={"w": normal(8, 4, 3, 3), "k": normal(1, 8, 1, 1), "one": np.ones((), np.float32)},
    )
    assert passes.ops(proto) == ["Conv", "Relu"]
    assert state.origins == {"conv": ("conv", "a", "b", "s", "d")}


def test_behind_a_batchnorm_the_record_of_it_moves_along(passes: Any) -> None:
    bn = {"gamma": normal(8), "beta": normal(8)[::-1].copy(), "mean": normal(8), "var": np.abs(normal(8))}
    scale, shift = normal(8, 1, 1), np.full((), 3, np.float32)
    proto, state = passes(
        model("c = Conv(x, w) d = BatchNormalization(c, gamma, beta, mean, var) e = Mul(d, k) y = Add(e, three)"),
        InferShapes(),
        FoldBatchnorm(),
        FoldScaleShift(),
        weights={"w": normal(8, 4, 3, 3), "k": scale, "three": shift, **bn},
    )
    assert passes.ops(proto) == ["Conv"]
    assert list(state.batchnorms) == ["y"]
    beta, gamma = state.batchnorms["y"]
    factor = scale.reshape(-1).astype(np.float64)
    np.testing.assert_allclose(beta, bn["beta"] * factor + 3, rtol=1e-12)
    np.testing.assert_allclose(gamma, np.abs(bn["gamma"] * factor), rtol=1e-12)


def test_a_zero_scale_is_mathematics_too(passes: Any) -> None:
    scale = normal(8, 1, 1)
    scale[3] = 0
    proto, _ = passes(
        model("c = Conv(x, w, b) y = Mul(c, k)"), *PASSES, weights={"w": normal(8, 4, 3, 3), "b": normal(8), "k": scale}
    )
    assert passes.ops(proto) == ["Conv"]
    assert passes.constant(proto, "b")[3] == 0


@pytest.mark.parametrize(
    ("steps", "kept"),
    [
        ("d = Mul(c, k) y = Add(d, b)", ["MatMul", "Add"]),
        ("d = Add(b, c) y = Mul(k, d)", ["MatMul", "Add"]),
        ("d = Sub(b, c) e = Div(d, k) f = Add(e, one) y = Mul(f, k)", ["MatMul", "Add"]),
        ("y = Sub(c, b)", ["MatMul", "Add"]),
        ("d = Mul(c, one) y = Mul(d, k)", ["MatMul"]),
        ("d = Add(c, one) y = Sub(d, one)", ["MatMul"]),
    ],
)
def test_a_product_of_rank_3_keeps_one_add(passes: Any, steps: str, kept: list[str]) -> None:
    proto, _ = passes(
        model(f"c = MatMul(x, w) {steps}", "float[N, 3, 4] x", "float[N, 3, 5] y"),
        *PASSES,
        weights={"w": normal(4, 5), "k": normal(5), "b": normal(1, 1, 5), "one": np.ones((), np.float32)},
    )
    assert passes.ops(proto) == kept
    assert proto.graph.node[-1].output[0] == "y"
    if "Add" in kept:
        product, bias = proto.graph.node[-1].input
        assert product == proto.graph.node[0].output[0]
        assert passes.constant(proto, bias).shape == (5,)


def test_a_product_with_its_add_is_in_form_already(passes: Any) -> None:
    proto, state = passes(
        model("c = MatMul(x, w) y = Add(c, b)", "float[N, 3, 4] x", "float[N, 3, 5] y"),
        *PASSES,
        weights={"w": normal(4, 5), "b": normal(5)},
    )
    assert passes.ops(proto) == ["MatMul", "Add"]
    assert not state.skipped
    assert not state.origins
    assert FoldScaleShift().run(state) == 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (
            "c = Conv(x, w) [step] y = Mul(c, map)",
            "its constant of shape (4, 4) is not one value for each of the 8 channels",
        ),
        ("c = Conv(x, w) [step] y = Add(c, row)", "its constant of shape (1, 4)"),
        ("c = Conv(x, w) [step] y = Div(one, c)", "it divides a constant by the result"),
        ("c = Conv(x, w) [step] y = Div(c, zero)", "its constant is zero or not finite"),
        ("c = Conv(x, w) [step] y = Mul(c, huge)", "would not be finite float32 values"),
        ("c = Conv(x, w, q) [step] y = Mul(c, one)", "the bias of 'Conv_0' is computed at run time"),
        ("c = Conv(x, w) [step] d = Mul(c, one) e = Relu(c) y = Add(d, e)", "'c' is read elsewhere too"),
    ],
)
def test_reasons(passes: Any, body: str, reason: str) -> None:
    weights = {
        "w": normal(8, 4, 3, 3),
        "map": normal(4, 4),
        "row": normal(1, 4),
        "one": np.array(2, np.float32),
        "zero": np.zeros(1, np.float32),
        "huge": np.array(3e38, np.float32),
    }
    weights["w"][0] = 4
    state = passes.state(passes.parse(model(body, "float[N, 4, 6, 6] x, float[8] q"), **weights))
    InferShapes().run(state)
    assert FoldScaleShift().run(state) == 0
    assert reason in passes.reasons(state)["step"]


def test_outputs_and_bodies_that_read_between_are_counted(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (bool f, float[N, 4, 6, 6] x) => (float[N, 8, H, W] c,
                float[N, 8, H, W] y, float[N, 8, H, W] z)
        <float two = {2}> {
            c = Conv(x, w) [one] y = Mul(c, two) d = Conv(x, w)
            z = If (f) <then_branch = t () => (float[N, 8, H, W] p) { [two] p = Mul(d, two) },
                        else_branch = e () => (float[N, 8, H, W] q) { h = Conv(x, w) [three] q = Mul(h, two) }>
        }""",
        *PASSES,
        weights={"w": normal(8, 4, 3, 3)},
        feeds={"f": np.array(False)},
    )
    assert passes.reasons(state) == {
        "one": "'c' is read elsewhere too, or is a graph output",
        "two": "it is in a control-flow body, 'Conv_2' outside",
    }
    branch = next(node for node in proto.graph.node if node.op_type == "If")
    assert [[node.op_type for node in a.g.node] for a in branch.attribute] == [["Mul"], ["Conv"]]


def test_an_intermediate_graph_output_ends_the_chain(passes: Any) -> None:
    proto, state = passes(
        model("c = Conv(x, w) d = Mul(c, k) [late] y = Add(d, k)", output="float[N, C, H, W] y, float[N, C, H, W] d"),
        *PASSES,
        weights={"w": normal(8, 4, 3, 3), "k": np.array(2, np.float32)},
    )
    assert passes.ops(proto) == ["Conv", "Add"]
    assert list(passes.reasons(state)) == ["late"]


def test_float16(passes: Any) -> None:
    proto, _ = passes(
        model("c = Conv(x, w) d = Mul(c, k) y = Add(d, k)", "float16[N, 4, 6, 6] x", "float16[N, C, H, W] y"),
        *PASSES,
        weights={"w": normal(8, 4, 3, 3, dtype="float16"), "k": normal(8, 1, 1, dtype="float16")},
        tolerance=4e-3,
    )
    assert passes.ops(proto) == ["Conv"]
    assert {t.data_type for t in proto.graph.initializer} == {10}

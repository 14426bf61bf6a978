"""BatchNormalization disappears into the linear layer before it."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from qdqtool.passes.fold_batchnorm import FoldBatchnorm
from qdqtool.passes.infer_shapes import InferShapes

PASSES = (InferShapes(), FoldBatchnorm())


def parameters(channels: int, seed: int = 1, dtype: str = "float32", prefix: str = "") -> dict[str, Any]:
    """gamma, beta, mean, var of both signs where that is allowed."""
    rng = np.random.default_rng(seed)
    values = {name: rng.standard_normal(channels).astype(dtype) for name in ("gamma", "beta", "mean")}
    return {
        prefix + name: value for name, value in {**values, "var": rng.uniform(0.5, 2, channels).astype(dtype)}.items()
    }


def normal(*shape: int, dtype: str = "float32") -> Any:
    return (np.random.default_rng(0).standard_normal(shape) / 4).astype(dtype)


def conv_model(layer: str, opset: int = 13, dtype: str = "float", outputs: str = "y") -> str:
    out = ", ".join(f"{dtype}[N, C, H, W] {name}" for name in outputs.split())
    return f"""<ir_version: 8, opset_import: ["" : {opset}]> g ({dtype}[N, 4, 6, 6] x) => ({out}) {{
        [conv] c = {layer} [bn] y = BatchNormalization <epsilon = 0.01> (c, gamma, beta, mean, var)
    }}"""


@pytest.mark.parametrize("opset", [9, 13, 17])
@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        ("Conv(x, w)", {"w": normal(8, 4, 3, 3)}),
        ("Conv(x, w, b)", {"w": normal(8, 4, 3, 3), "b": normal(8)}),
        ("Conv <group = 2> (x, w, b)", {"w": normal(8, 2, 3, 3), "b": normal(8)}),
        ("Conv <group = 4> (x, w)", {"w": normal(8, 1, 3, 3)}),
        ("ConvTranspose(x, w)", {"w": normal(4, 8, 3, 3)}),
        ("ConvTranspose <group = 2, strides = [2, 2]> (x, w, b)", {"w": normal(4, 4, 2, 2), "b": normal(8)}),
        ("ConvTranspose <group = 4> (x, w)", {"w": normal(4, 2, 3, 3)}),
    ],
)
def test_convolutions(passes: Any, layer: str, weights: dict[str, Any], opset: int) -> None:
    bn = parameters(8)
    proto, state = passes(conv_model(layer, opset), *PASSES, weights={**weights, **bn})
    (node,) = proto.graph.node
    assert (node.name, node.output[0]) == ("conv", "y")
    assert layer.startswith(node.op_type)
    assert state.origins == {"conv": ("conv", "bn")}
    beta, gamma = state.batchnorms["y"]
    np.testing.assert_array_equal(beta, bn["beta"].astype(np.float64))
    np.testing.assert_array_equal(gamma, np.abs(bn["gamma"]).astype(np.float64))
    assert beta.dtype == gamma.dtype == np.float64
    assert not state.skipped


@pytest.mark.parametrize("rank", [1, 3])
@pytest.mark.parametrize("layer", ["Conv(x, w)", "ConvTranspose(x, v, b)", "ConvTranspose <group = 2> (x, u)"])
def test_one_and_three_axes(passes: Any, layer: str, rank: int) -> None:
    kernel = (2,) * rank
    weights = {"w": normal(8, 4, *kernel), "v": normal(4, 8, *kernel), "u": normal(4, 4, *kernel), "b": normal(8)}
    proto, state = passes(
        f"""<ir_version: 8, opset_import: ["" : 15]> g (float[N, 4{", 5" * rank}] x) => (float y, float z) {{
            c = {layer} [bn] y = BatchNormalization(c, gamma, beta, mean, var) r = Relu(y) e = Exp(y) z = Add(r, e)
        }}""",
        *PASSES,
        weights={**weights, **parameters(8)},
    )
    assert "BatchNormalization" not in passes.ops(proto)
    assert list(state.batchnorms) == ["y"]


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        ("Gemm(x, w, b)", {"w": normal(4, 5), "b": normal(5)}),
        ("Gemm <alpha = 0.5, beta = 3.0> (x, w, b)", {"w": normal(4, 5), "b": normal(5)}),
        ("Gemm <transB = 1, alpha = 2.0> (x, w)", {"w": normal(5, 4)}),
        ("Gemm <transA = 1, beta = 0.5> (t, w, b)", {"w": normal(4, 5), "b": normal(1, 5)}),
        ("Gemm <beta = 0.0> (x, w, b)", {"w": normal(4, 5), "b": normal(1)}),
        ("MatMul(x, w)", {"w": normal(4, 5)}),
    ],
)
def test_matrix_products(passes: Any, layer: str, weights: dict[str, Any]) -> None:
    proto, state = passes(
        f"""<ir_version: 8, opset_import: ["" : 13]> g (float[N, 4] x) => (float[N, 5] y) {{
            t = Transpose(x) [fc] c = {layer} y = BatchNormalization(c, gamma, beta, mean, var)
        }}""",
        *PASSES,
        weights={**weights, **parameters(5)},
    )
    node = proto.graph.node[-1]
    assert node.op_type == "Gemm"
    assert node.name == "fc"
    assert not state.skipped
    assert {a.name for a in node.attribute} <= {"transA", "transB"}


def test_float16_is_computed_in_higher_precision(passes: Any) -> None:
    bn = parameters(8, dtype="float16")
    weight = normal(8, 4, 3, 3, dtype="float16")
    proto, _ = passes(conv_model("Conv(x, w)", dtype="float16"), *PASSES, weights={"w": weight, **bn}, tolerance=4e-3)
    scale = bn["gamma"].astype(np.float64) / np.sqrt(bn["var"].astype(np.float64) + np.float64(np.float32(0.01)))
    expected = (weight.astype(np.float64) * scale[:, None, None, None]).astype(np.float16)
    np.testing.assert_array_equal(passes.constant(proto, "w"), expected)


def test_arithmetic_between_layer_and_batchnorm_folds_along(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[N, 4, 6, 6] x) => (float[N, C, H, W] y) <float two = {2}> {
            [conv] c = Conv(x, w) [bias] d = Add(b, c) [half] e = Div(d, two) [bn]
                y = BatchNormalization(e, gamma, beta, mean, var)
        }""",
        *PASSES,
        weights={"w": normal(8, 4, 3, 3), "b": normal(8, 1, 1), **parameters(8)},
    )
    assert passes.ops(proto) == ["Conv"]
    assert state.origins == {"conv": ("conv", "bias", "half", "bn")}


def test_two_batchnorms_fold_into_one_layer(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[N, 4, 6, 6] x) => (float[N, C, H, W] y) {
            [conv] c = Conv(x, w) [a] d = BatchNormalization(c, gamma, beta, mean, var) [b]
                y = BatchNormalization(d, beta, gamma, mean, var)
        }""",
        *PASSES,
        weights={"w": normal(8, 4, 3, 3), **parameters(8)},
    )
    assert passes.ops(proto) == ["Conv"]
    assert list(state.batchnorms) == ["y"]
    assert state.origins == {"conv": ("conv", "a", "b")}


def test_layers_that_share_a_weight_get_their_own(passes: Any) -> None:
    weight = normal(8, 4, 3, 3)
    proto, _state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[N, 4, 6, 6] x) => (float[N, C, H, W] y,
                float[N, C, H, W] z, float[N, C, H, W] u) {
            [one] c = Conv(x, w, b) y = BatchNormalization(c, gamma, beta, mean, var)
            [two] d = Conv(x, w, b) z = BatchNormalization(d, other_gamma, other_beta, other_mean, other_var)
            [three] u = Conv(x, w, b)
        }""",
        *PASSES,
        weights={"w": weight, "b": normal(8), **parameters(8), **parameters(8, 2, prefix="other_")},
    )
    assert passes.ops(proto) == ["Conv"] * 3
    inputs = {node.name: list(node.input[1:]) for node in proto.graph.node}
    assert inputs == {"one": ["one.weight", "one.bias"], "two": ["two.weight", "two.bias"], "three": ["w", "b"]}
    np.testing.assert_array_equal(passes.constant(proto, "w"), weight)


def test_the_conv_output_is_also_a_graph_output(passes: Any) -> None:
    proto, state = passes(
        conv_model("Conv(x, w)", outputs="y c"), *PASSES, weights={"w": normal(8, 4, 3, 3), **parameters(8)}
    )
    assert passes.ops(proto) == ["Conv", "BatchNormalization"]
    assert passes.reasons(state) == {"bn": "the result of 'conv' is read elsewhere too, or is a graph output"}
    assert not state.batchnorms
    assert not state.origins


def test_the_conv_output_is_read_by_a_body(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (bool f, float[N, 4, 6, 6] x) => (float[N, C, H, W] y,
                float[N, C, H, W] z) {
            [conv] c = Conv(x, w) [bn] y = BatchNormalization(c, gamma, beta, mean, var)
            z = If (f) <then_branch = t () => (float[N, C, H, W] p) { p = Relu(c) },
                        else_branch = e () => (float[N, C, H, W] q) { q = Neg(c) }>
        }""",
        *PASSES,
        weights={"w": normal(8, 4, 3, 3), **parameters(8)},
    )
    assert "BatchNormalization" in passes.ops(proto)
    assert list(passes.reasons(state)) == ["bn"]


def test_inside_a_body_and_across_its_border(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (bool f, float[N, 4, 6, 6] x) => (float[N, 8, H, W] z) {
            [outer] o = Conv(x, w)
            z = If (f) <then_branch = t () => (float[N, 8, H, W] p) { [inner] c = Conv(x, w) [bn1]
                p = BatchNormalization(c, gamma, beta, mean, var) },
                        else_branch = e () => (float[N, 8, H, W] q) { [bn2]
                            q = BatchNormalization(o, gamma, beta, mean, var) }>
        }""",
        *PASSES,
        weights={"w": normal(8, 4, 3, 3), **parameters(8)},
        feeds={"f": np.array(True)},
    )
    branch = next(node for node in proto.graph.node if node.op_type == "If")
    assert [[node.op_type for node in a.g.node] for a in branch.attribute] == [["Conv"], ["BatchNormalization"]]
    assert passes.reasons(state) == {"bn2": "its input is a graph input or comes from outside the control-flow body"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("[bn] y = BatchNormalization(x, gamma, beta, mean, var)", "its input is a graph input"),
        ("r = Relu(x) [bn] y = BatchNormalization(r, gamma, beta, mean, var)", "its input comes from Relu 'Relu_0'"),
        (
            "c = Conv(x, r) [bn] y = BatchNormalization(c, gamma, beta, mean, var)",
            "the weight of 'Conv_0' is computed at run time",
        ),
        (
            "c = Conv(x, w, q) [bn] y = BatchNormalization(c, gamma, beta, mean, var)",
            "the bias of 'Conv_0' is computed",
        ),
        (
            "c = Conv(x, w) [bn] y = BatchNormalization(c, q, beta, mean, var)",
            "its scale, bias, mean or variance is computed",
        ),
        (
            "c = Conv(x, w) [bn] y, m, v = BatchNormalization <training_mode = 1> (c, gamma, beta, mean, var)",
            "it is in training mode",
        ),
        (
            "c = Conv(x, w) [bn] y = BatchNormalization <epsilon = 0.0> (c, gamma, beta, mean, zero)",
            "a factor that is not finite",
        ),
        (
            "c = Conv(x, w) d = Add(c, map) [bn] y = BatchNormalization(d, gamma, beta, mean, var)",
            "'Add_1' lies between",
        ),
    ],
)
def test_reasons(passes: Any, body: str, reason: str) -> None:
    source = f"""<ir_version: 8, opset_import: ["" : 14]> g (float[N, 4, 6, 6] x, float[4] q, float[4, 4, 3, 3] r)
        => (float[N, 4, H, W] y) {{ {body} }}"""
    tensors = {"w": normal(4, 4, 3, 3), "zero": np.zeros(4, np.float32), "map": normal(4, 4), **parameters(4)}
    state = passes.state(passes.parse(source, **tensors))
    InferShapes().run(state)
    assert FoldBatchnorm().run(state) == 0
    assert reason in passes.reasons(state)["bn"]


def test_values_beyond_float16_are_refused(passes: Any) -> None:
    bn = {**parameters(8, dtype="float16"), "gamma": np.full(8, 6e4, np.float16), "var": np.full(8, 1e-3, np.float16)}
    state = passes.state(
        passes.parse(conv_model("Conv(x, w)", dtype="float16"), w=normal(8, 4, 3, 3, dtype="float16"), **bn)
    )
    InferShapes().run(state)
    assert FoldBatchnorm().run(state) == 0
    assert passes.reasons(state)["bn"] == "the folded parameters of 'conv' would not be finite float16 values"


def test_a_matmul_of_higher_rank_has_other_channels(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[N, 5, 4] x) => (float[N, 5, 5] y) {
            c = MatMul(x, w) [bn] y = BatchNormalization(c, gamma, beta, mean, var)
        }""",
        *PASSES,
        weights={"w": normal(4, 5), **parameters(5)},
    )
    assert passes.ops(proto) == ["MatMul", "BatchNormalization"]
    assert "not known to be of rank 2" in passes.reasons(state)["bn"]


def test_nodes_that_share_constants_are_not_compared_with_each_other(passes: Any, monkeypatch: Any) -> None:
    """The library finds a node among the readers of a tensor with ``==``: with shared constants that is quadratic."""
    compared = []
    equal = gs.Node.__eq__
    body = "\n".join(
        f"""c{i} = Conv(x{i}, w) d{i} = Mul(c{i}, k) [bn{i}] e{i} = BatchNormalization(d{i}, gamma, beta, mean, var)
        r{i} = Relu(e{i}) x{i + 1} = Add(r{i}, k)"""
        for i in range(400)
    )
    source = f"""<ir_version: 8, opset_import: ["" : 13]> g (float[1, 2, 4, 4] x0) => (float[1, 2, 4, 4] x400)
    <float k = {{2}}> {{ {body} }}"""
    state = passes.state(passes.parse(source, w=normal(2, 2, 1, 1), **parameters(2)))

    def counted(one: Any, other: Any) -> bool:
        compared.append(1)
        return bool(equal(one, other))

    monkeypatch.setattr(gs.Node, "__eq__", counted)
    InferShapes().run(state)
    assert FoldBatchnorm().run(state) == 400
    assert len(state.graph.nodes) == 1200
    assert len(compared) < 1200

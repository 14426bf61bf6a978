"""Per-channel arithmetic in front of linear layers becomes part of their parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qdqtool import chains
from qdqtool.graphs import model as models
from qdqtool.passes.fold_batchnorm import FoldBatchnorm
from qdqtool.passes.fold_input_scale import FoldInputScale
from qdqtool.passes.infer_shapes import InferShapes
from tests.passes.scaled_layers import BATCHNORM, CONVOLUTIONS, PADDED, PRODUCTS, normal, source, values

PASSES = (InferShapes(), FoldInputScale())


@pytest.mark.parametrize("opset", [9, 13, 17])
@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_batchnorm_in_front_of_convolutions(passes: Any, layer: str, opset: int) -> None:
    weight = CONVOLUTIONS[layer]
    body = f"r = Relu(x0) [bn] x = {BATCHNORM.format(x='r')} [layer] y = {layer}"
    outputs = weight[1] * (2 if "group = 2" in layer else 1) if "Transpose" in layer else weight[0]
    proto, state = passes(source(body, opset=opset), *PASSES, weights=values(weight, outputs))
    assert passes.ops(proto) == ["Relu", layer.partition("(")[0].split()[0]]
    assert state.origins == {"layer": ("layer", "bn")}
    assert not state.skipped


@pytest.mark.parametrize(("opset", "layer"), [(13, name) for name in PRODUCTS])
def test_batchnorm_in_front_of_products(passes: Any, layer: str, opset: int) -> None:
    body = f"r = Relu(x0) [bn] x = {BATCHNORM.format(x='r')} [layer] y = {layer}"
    proto, _ = passes(source(body, opset=opset, shape="[N, 4]"), *PASSES, weights=values(PRODUCTS[layer]))
    assert passes.ops(proto) == ["Relu", "Gemm"]
    assert {a.name for a in proto.graph.node[1].attribute} <= {"alpha", "transB"}


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_along_one_and_three_axes(passes: Any, rank: int) -> None:
    body = f"r = Relu(x0) x = {BATCHNORM.format(x='r')} [layer] y = Conv(x, w, b)"
    shape = f"[N, 4{', 5' * rank}]"
    proto, _ = passes(source(body, shape=shape), *PASSES, weights=values((6, 4, *(2,) * rank)))
    assert passes.ops(proto) == ["Relu", "Conv"]


@pytest.mark.parametrize("step", ["Mul(r, kc)", "Div(r, kc)", "Add(tc, r)", "Sub(r, tc)", "Sub(tc, r)", "Mul(two, r)"])
def test_arithmetic(passes: Any, step: str) -> None:
    body = f"r = Relu(x0) [step] x = {step} [layer] y = Conv(x, w, b)"
    proto, state = passes(source(body), *PASSES, weights=values((6, 4, 3, 3)))
    assert passes.ops(proto) == ["Relu", "Conv"]
    assert state.origins == {"layer": ("layer", "step")}


def test_a_chain_folds_completely(passes: Any) -> None:
    body = f"""[a] c = Mul(x0, kc) [b] d = Add(c, tc) [bn] e = {BATCHNORM.format(x="d")} [s] f = Sub(two, e)
        [d] x = Div(f, kc) [layer] y = Conv(x, w, b)"""
    proto, state = passes(source(body), *PASSES, weights=values((6, 4, 3, 3)))
    assert passes.ops(proto) == ["Conv"]
    assert state.origins == {"layer": ("layer", "a", "b", "bn", "s", "d")}


def test_a_padded_convolution_takes_the_scale_and_leaves_one_add(passes: Any) -> None:
    body = f"""r = Relu(x0) [m] d = Mul(r, kc) [bn] x = {BATCHNORM.format(x="d")}
        [layer] y = Conv <pads = [1, 1, 1, 1]> (x, w, b)"""
    proto, state = passes(source(body), *PASSES, weights=values((6, 4, 3, 3)))
    assert passes.ops(proto) == ["Relu", "Add", "Conv"]
    assert proto.graph.node[1].name == "bn"
    assert passes.constant(proto, proto.graph.node[1].input[1]).shape == (4, 1, 1)
    assert state.origins == {"bn": ("bn", "m")}
    assert passes.reasons(state) == {"bn": f"its shift stays: {PADDED}"}
    InferShapes().run(state)
    state.skipped.clear()
    assert FoldInputScale().run(state) == 0
    assert passes.reasons(state) == {"bn": PADDED}


def test_a_padded_convolution_takes_a_scale_without_shift(passes: Any) -> None:
    body = "r = Relu(x0) c = Mul(r, kc) x = Div(c, two) [layer] y = Conv <pads = [1, 1, 1, 1]> (x, w, b)"
    proto, state = passes(source(body), *PASSES, weights=values((6, 4, 3, 3)))
    assert passes.ops(proto) == ["Relu", "Conv"]
    assert not state.skipped


@pytest.mark.parametrize(
    ("layer", "weight"),
    [
        ('Conv <auto_pad = "SAME_LOWER"> (x, w, b)', (6, 4, 3, 3)),
        ("ConvTranspose(x, w, b)", (4, 6, 3, 3)),
        ("ConvTranspose <output_shape = [6, 6]> (x, w, b)", (4, 6, 1, 1)),
        ("ConvTranspose <strides = [2, 2]> (x, w, b)", (4, 6, 1, 1)),
        ("ConvTranspose <strides = [2, 2], output_padding = [1, 1]> (x, w, b)", (4, 6, 2, 2)),
    ],
)
def test_layers_whose_border_sees_less(passes: Any, layer: str, weight: tuple[int, ...]) -> None:
    body = f"r = Relu(x0) [bn] x = {BATCHNORM.format(x='r')} [layer] y = {layer}"
    proto, state = passes(source(body), *PASSES, weights=values(weight))
    assert passes.ops(proto) == ["Relu", "Add", layer.partition("(")[0].split()[0]]
    assert passes.reasons(state) == {"bn": f"its shift stays: {PADDED}"}


def test_a_scale_of_zero_leaves_nothing_to_add_the_shift_to(passes: Any) -> None:
    body = f"r = Relu(x0) [bn] x = {BATCHNORM.format(x='r')} [layer] y = Conv{{pads}}(x, w, b)"
    weights = values((6, 4, 3, 3))
    weights["gamma"][1] = 0
    proto, _ = passes(source(body.format(pads="")), *PASSES, weights=weights)
    assert passes.ops(proto) == ["Relu", "Conv"]
    proto, state = passes(source(body.format(pads=" <pads = [1, 1, 1, 1]> ")), *PASSES, weights=weights)
    assert "BatchNormalization" in passes.ops(proto)
    assert passes.reasons(state) == {"bn": PADDED}


def test_several_layers_read_the_result(passes: Any) -> None:
    body = f"""r = Relu(x0) [bn] x = {BATCHNORM.format(x="r")} [one] y = Conv(x, w, b)
        [two] z = Conv <strides = [2, 2]> (x, w) [three] u = Conv(r, w, b)"""
    proto, state = passes(source(body, outputs="y z u"), *PASSES, weights=values((6, 4, 3, 3)))
    assert passes.ops(proto) == ["Relu", "Conv", "Conv", "Conv"]
    assert state.origins == {"one": ("one", "bn"), "two": ("two", "bn")}
    inputs = {node.name: list(node.input[1:]) for node in proto.graph.node[1:]}
    assert inputs == {"one": ["one.weight", "one.bias"], "two": ["two.weight", "two.bias"], "three": ["w", "b"]}


def test_one_of_several_layers_pads(passes: Any) -> None:
    body = f"""r = Relu(x0) [bn] x = {BATCHNORM.format(x="r")} [plain] y = Conv(x, w, b)
        [layer] z = Conv <pads = [1, 1, 1, 1]> (x, w)"""
    proto, state = passes(source(body, outputs="y z"), *PASSES, weights=values((6, 4, 3, 3)))
    assert passes.ops(proto) == ["Relu", "Add", "Conv", "Conv"]
    assert passes.reasons(state) == {"bn": f"its shift stays: {PADDED}"}


@pytest.mark.parametrize("behind", ["[add] y = Add(m, b)", "[add] y = Add(b, m)"])
def test_a_product_of_rank_3_hands_the_shift_to_its_add(passes: Any, behind: str) -> None:
    body = f"r = Relu(x0) [s] c = Mul(r, k) [t] x = Add(c, t) [layer] m = MatMul(x, w) {behind}"
    proto, state = passes(source(body, shape="[N, 3, 4]"), *PASSES, weights=values((4, 6)))
    assert passes.ops(proto) == ["Relu", "MatMul", "Add"]
    assert state.origins == {"layer": ("layer", "s", "t")}


def test_a_product_of_rank_3_without_bias_keeps_the_add_in_front(passes: Any) -> None:
    body = "r = Relu(x0) [s] c = Mul(r, k) [t] x = Add(c, t) [layer] y = MatMul(x, w)"
    proto, state = passes(source(body, shape="[N, 3, 4]"), *PASSES, weights=values((4, 6)))
    assert passes.ops(proto) == ["Relu", "Add", "MatMul"]
    assert passes.constant(proto, proto.graph.node[1].input[1]).shape == (4,)
    assert passes.reasons(state) == {"t": "its shift stays: 'layer' has no bias that could take up the shift"}


def test_what_was_said_of_a_folded_batchnorm_is_forgotten(passes: Any) -> None:
    body = f"""r = Relu(x0) [bn] x = {BATCHNORM.format(x="r")} [layer] y = Conv(x, w, b)
        [late] z = {BATCHNORM.format(x="r")}"""
    proto, state = passes(
        source(body, outputs="y z"), InferShapes(), FoldBatchnorm(), FoldInputScale(), weights=values((6, 4, 3, 3))
    )
    assert sorted(passes.ops(proto)) == ["BatchNormalization", "Conv", "Relu"]
    assert list(passes.reasons(state)) == ["late"]
    assert not state.batchnorms


def test_the_record_of_a_batchnorm_before_it_stays(passes: Any) -> None:
    body = f"""c = Conv(x0, v) n = {BATCHNORM.format(x="c")} r = Relu(n) s = Mul(r, kc) [layer] y = Conv(s, w, b)"""
    weights = {**values((6, 4, 1, 1)), "v": normal(4, 4, 1, 1)}
    proto, state = passes(source(body), InferShapes(), FoldBatchnorm(), FoldInputScale(), weights=weights)
    assert passes.ops(proto) == ["Conv", "Relu", "Conv"]
    assert list(state.batchnorms) == ["n"]


def test_a_scalar_needs_no_shape(passes: Any) -> None:
    proto, _ = passes(
        source("x = Mul(x0, two) y = Conv(x, w)", shape="[N, C, H, W]"),
        *PASSES,
        weights=values((6, 4, 3, 3)),
        feeds={"x0": normal(2, 4, 6, 6)},
    )
    assert passes.ops(proto) == ["Conv"]


def test_bodies(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (bool f, float[N, 4, 6, 6] x0) => (float[N, 6, 4, 4] z) {
            [out] x = Mul(x0, kc) [read] u = Mul(x0, two)
            z = If (f) <then_branch = t () => (float[N, 6, 4, 4] p) { [one] p = Conv(x, w) },
                        else_branch = e () => (float[N, 6, 4, 4] q) { [in] v = Add(u, tc) [two] c = Conv(v, w)
                            [other] h = Conv(u, w) q = Add(c, h) }>
        }""",
        *PASSES,
        weights=values((6, 4, 3, 3)),
        feeds={"f": np.array(False)},
    )
    branch = next(node for node in proto.graph.node if node.op_type == "If")
    assert [[node.op_type for node in a.g.node] for a in branch.attribute] == [["Conv"], ["Conv", "Conv", "Add"]]
    assert passes.reasons(state) == {"read": "'u' is read elsewhere too, or is a graph output"}


def test_float16_is_rounded_once(passes: Any) -> None:
    weights = values((6, 4, 1, 1), dtype="float16")
    body = "a = Mul(x0, kc) b1 = Div(a, tc) x = Mul(b1, kc) y = Conv(x, w)"
    proto, _ = passes(source(body, dtype="float16"), *PASSES, weights=weights, tolerance=4e-3)
    exact = weights["k"].astype(np.float64) ** 2 / weights["t"].astype(np.float64)
    expected = (weights["w"].astype(np.float64) * exact[:, None, None]).astype(np.float16)
    np.testing.assert_array_equal(passes.constant(proto, "w"), expected)


def test_float64(passes: Any) -> None:
    text = source("c = Mul(x0, k) x = Sub(t, c) y = Gemm(x, w, b)", dtype="double", shape="[N, 4]")
    proto, _ = passes(text, *PASSES, weights=values((4, 6), dtype="float64"), tolerance=1e-14)
    assert passes.ops(proto) == ["Gemm"]


def test_running_the_preparation_twice_changes_nothing_more(passes: Any) -> None:
    body = f"r = Relu(x0) [bn] x = {BATCHNORM.format(x='r')} [layer] y = Conv(x, w, b)"
    proto, _ = passes(source(body), *chains.preparation(), weights=values((6, 4, 3, 3)))
    again = passes.state(proto)
    InferShapes().run(again)
    assert FoldInputScale().run(again) == 0
    assert models.to_proto(again.graph, again.header) == models.to_proto(*models.to_graph(proto))

"""Matrix product and bias in one form."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qdqtool.passes.fuse_linear_bias import FuseLinearBias
from qdqtool.passes.infer_shapes import InferShapes

PASSES = (InferShapes(), FuseLinearBias())


def normal(*shape: int, dtype: str = "float32") -> Any:
    return (np.random.default_rng(0).standard_normal(shape) / 2).astype(dtype)


def model(body: str, inputs: str = "float[N, 4] x", output: str = "float[N, 5] y") -> str:
    return f'<ir_version: 8, opset_import: ["" : 13]> g ({inputs}) => ({output}) {{ {body} }}'


@pytest.mark.parametrize("shape", [(5,), (1, 5), (), (1,)])
@pytest.mark.parametrize(
    "body", ["[fc] c = MatMul(x, w) [bias] y = Add(c, b)", "[fc] c = MatMul(x, w) [bias] y = Add(b, c)"]
)
def test_a_product_of_rank_2_becomes_a_gemm(passes: Any, body: str, shape: tuple[int, ...]) -> None:
    proto, state = passes(model(body), *PASSES, weights={"w": normal(4, 5), "b": normal(*shape)})
    (node,) = proto.graph.node
    assert (node.op_type, node.name, node.output[0], list(node.attribute)) == ("Gemm", "fc", "y", [])
    assert passes.constant(proto, node.input[2]).shape == (5,)
    assert state.origins == {"fc": ("fc", "bias")}
    assert not state.skipped


@pytest.mark.parametrize("shape", [(5,), (1, 5), (1, 1, 5), (), (1, 1)])
def test_a_product_of_rank_3_stays_a_pair_in_one_form(passes: Any, shape: tuple[int, ...]) -> None:
    proto, state = passes(
        model("[fc] c = MatMul(x, w) [bias] y = Add(b, c)", "float[N, 3, 4] x", "float[N, 3, 5] y"),
        *PASSES,
        weights={"w": normal(4, 5), "b": normal(*shape)},
    )
    product, add = proto.graph.node
    assert (product.op_type, add.op_type, add.input[0]) == ("MatMul", "Add", "c")
    assert passes.constant(proto, add.input[1]).shape == (5,)
    assert not state.origins


def test_the_form_is_not_made_twice(passes: Any) -> None:
    source = model("c = MatMul(x, w) y = Add(b, c)", "float[N, 3, 4] x", "float[N, 3, 5] y")
    state = passes.state(passes.parse(source, w=normal(4, 5), b=normal(5)))
    InferShapes().run(state)
    assert FuseLinearBias().run(state) == 1
    assert FuseLinearBias().run(state) == 0


def test_a_product_of_unknown_rank_is_not_made_a_gemm(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[N, 4] z, int64[K] s) => (float[N, T, 5] y) {
            x = Reshape(z, s) c = MatMul(x, w) y = Add(b, c)
        }""",
        *PASSES,
        weights={"w": normal(4, 5), "b": normal(5)},
        feeds={"s": np.array([2, 1, 4])},
    )
    assert passes.ops(proto) == ["Reshape", "MatMul", "Add"]


def test_a_bias_that_widens_the_result_is_not_taken(passes: Any) -> None:
    proto, state = passes(
        model("c = MatMul(x, w) [wide] y = Add(c, b)", output="float[N, K] y"),
        *PASSES,
        weights={"w": normal(4, 1), "b": normal(5)},
    )
    assert passes.ops(proto) == ["MatMul", "Add"]
    assert "is not one value for each of the 1 channels" in passes.reasons(state)["wide"]


@pytest.mark.parametrize(
    ("layer", "weights"),
    [
        ("Gemm <alpha = 0.25, beta = 4.0> (x, w, b)", {"w": normal(4, 5), "b": normal(5)}),
        ("Gemm <alpha = 0.25, transB = 1> (x, w, b)", {"w": normal(5, 4), "b": normal(1, 5)}),
        ("Gemm <beta = 2.0> (x, w, b)", {"w": normal(4, 5), "b": normal()}),
        ("Gemm <beta = 2.0, transA = 1> (t, w, b)", {"w": normal(4, 5), "b": normal(1, 1)}),
        ("Gemm <beta = 0.0> (x, w, b)", {"w": normal(4, 5), "b": normal(5)}),
        ("Gemm <beta = 3.0, alpha = 2.0> (x, w)", {"w": normal(4, 5)}),
    ],
)
def test_factors_go_into_the_values(passes: Any, layer: str, weights: dict[str, Any]) -> None:
    proto, _ = passes(model(f"t = Transpose(x) y = {layer}"), *PASSES, weights=weights)
    node = proto.graph.node[-1]
    assert {a.name for a in node.attribute} <= {"transA", "transB"}
    assert len(node.input) == 2 or passes.constant(proto, node.input[2]).shape == (5,)


def test_a_bias_for_each_row_keeps_its_shape(passes: Any) -> None:
    proto, _ = passes(
        model("y = Gemm <beta = 2.0> (x, w, b)", "float[3, 4] x", "float[3, 5] y"),
        *PASSES,
        weights={"w": normal(4, 5), "b": normal(3, 5)},
    )
    assert passes.constant(proto, "b").shape == (3, 5)
    assert not proto.graph.node[0].attribute


def test_factors_of_computed_operands_stay(passes: Any) -> None:
    proto, state = passes(
        model("[fc] y = Gemm <alpha = 2.0, beta = 3.0> (x, w, b)", "float[N, 4] x, float[5] b, float[4, 5] w"), *PASSES
    )
    assert {a.name for a in proto.graph.node[0].attribute} == {"alpha", "beta"}
    assert [skip.reason for skip in state.skipped] == [
        "alpha = 2 stays: input 1 is computed or no float",
        "beta = 3 stays: input 2 is computed or no float",
    ]


def test_factors_beyond_float16_stay(passes: Any) -> None:
    source = model("[fc] y = Gemm <alpha = 1e6> (x, w)", "float16[N, 4] x", "float16[N, 5] y")
    state = passes.state(passes.parse(source, w=normal(4, 5, dtype="float16")))
    assert FuseLinearBias().run(state) == 0
    assert passes.reasons(state) == {"fc": "alpha = 1e+06 stays: the product would not be finite"}


def test_an_add_behind_a_gemm_is_its_bias(passes: Any) -> None:
    proto, state = passes(
        model("[fc] c = Gemm <alpha = 2.0> (x, w) [bias] y = Add(c, b)"),
        *PASSES,
        weights={"w": normal(4, 5), "b": normal(5)},
    )
    assert passes.ops(proto) == ["Gemm"]
    assert state.origins == {"fc": ("fc", "bias")}


def test_transposed_input_and_other_readers_are_left(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[4, N] x, float[N, 4] z) => (float[N, 5] y, float[N, 5] u,
                float[N, 5] d) {
            c = Gemm <transA = 1> (x, w) [one] y = Add(c, b) d = MatMul(z, w) [two] u = Add(d, b)
        }""",
        *PASSES,
        weights={"w": normal(4, 5), "b": normal(5)},
    )
    assert sorted(passes.ops(proto)) == ["Add", "Add", "Gemm", "MatMul"]
    assert passes.reasons(state) == {
        "one": "'Gemm_0' has transA = 1",
        "two": "'d' is read elsewhere too, or is a graph output",
    }


def test_layers_that_share_weight_and_bias_keep_their_own(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[N, 4] x) => (float[N, 5] y, float[N, 5] z, float[N, 5] u) {
            [one] y = Gemm <alpha = 2.0, beta = 2.0> (x, w, b) [two] z = Gemm <alpha = 3.0, beta = 3.0> (x, w, b)
                [three] u = Gemm(x, w, b)
        }""",
        *PASSES,
        weights={"w": normal(4, 5), "b": normal(5)},
    )
    inputs = {node.name: list(node.input[1:]) for node in proto.graph.node}
    assert inputs == {"one": ["one.weight", "one.bias"], "two": ["two.weight", "two.bias"], "three": ["w", "b"]}


def test_control_flow_bodies(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (bool f, float[N, 4] x) => (float[N, 5] y) {
            o = MatMul(x, w)
            y = If (f) <then_branch = t () => (float[N, 5] p) { c = MatMul(x, w) p = Add(c, b) },
                        else_branch = e () => (float[N, 5] q) { q = Add(o, b) }>
        }""",
        *PASSES,
        weights={"w": normal(4, 5), "b": normal(5)},
        feeds={"f": np.array(True)},
    )
    assert [[node.op_type for node in a.g.node] for a in proto.graph.node[-1].attribute] == [["Gemm"], ["Add"]]

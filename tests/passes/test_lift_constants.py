"""Constant nodes become initializers."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool.passes.fuse_linear_bias import FuseLinearBias
from qdqtool.passes.infer_shapes import InferShapes
from qdqtool.passes.lift_constants import LiftConstants


def test_every_numeric_form_becomes_an_initializer(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[2] x) => (float[2] y, int64[2] i) {
            a = Constant <value = float[2] {1, 2}> ()
            b = Constant <value_float = 3.0> ()
            c = Constant <value_floats = [4.0, 5.0]> ()
            d = Constant <value_int = 6> ()
            e = Constant <value_ints = [7, 8]> ()
            p = Add(x, a) q = Mul(p, b) y = Sub(q, c) i = Add(d, e)
        }""",
        LiftConstants(),
    )
    assert passes.ops(proto) == ["Add", "Mul", "Sub", "Add"]
    assert passes.constant(proto, "b").shape == ()
    assert passes.constant(proto, "d").dtype == np.int64
    np.testing.assert_array_equal(passes.constant(proto, "e"), [7, 8])


def test_constants_in_control_flow_bodies_are_lifted(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (bool c, float[2] x) => (float[2] y, float[2] w) {
            k = Constant <value = float[2] {1, 2}> ()
            w = Add(x, k)
            y = If (c) <then_branch = t () => (float[2] p) { h = Constant <value = float[2] {3, 4}> () p = Add(h, k) },
                        else_branch = e () => (float[2] q) { q = Mul(x, k) }>
        }""",
        LiftConstants(),
    )
    assert passes.ops(proto) == ["Add", "If"]
    then = next(a.g for a in proto.graph.node[1].attribute if a.name == "then_branch")
    assert [node.op_type for node in then.node] == ["Add"]
    assert not state.skipped


def test_a_constant_read_only_by_a_body_is_there(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (bool c, float[2] x) => (float[2] y) {
            k = Constant <value = float[2] {1, 2}> ()
            y = If (c) <then_branch = t () => (float[2] p) { p = Add(x, k) },
                        else_branch = e () => (float[2] q) { q = Mul(x, k) }>
        }""",
        LiftConstants(),
    )
    assert passes.ops(proto) == ["If"]


def test_text_sparse_values_and_graph_outputs_stay(passes: Any) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[2] x) => (float[2] y, float[2] k) {
            k = Constant <value = float[2] {1, 2}> ()
            t = Constant <value_string = "text"> ()
            y = Add(x, k)
        }"""
    )
    sparse = onnx.helper.make_sparse_tensor(
        onnx.helper.make_tensor("", onnx.TensorProto.FLOAT, [1], [5.0]),
        onnx.helper.make_tensor("", onnx.TensorProto.INT64, [1], [1]),
        [2],
    )
    proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], ["s"], "sparse", sparse_value=sparse))
    state = passes.state(proto)
    assert LiftConstants().run(state) == 0
    assert passes.reasons(state) == {
        "Constant_1": "it is a graph output itself",
        "Constant_2": "its value (value_string) is no dense numeric tensor",
        "sparse": "its value (none) is no dense numeric tensor",
    }


@pytest.mark.parametrize("dtype", [onnx.TensorProto.BFLOAT16, onnx.TensorProto.INT4, onnx.TensorProto.FLOAT8E4M3FN])
def test_narrow_types_keep_their_bytes(passes: Any, dtype: int) -> None:
    value = onnx.helper.make_tensor("v", dtype, [3], [1, -2, 3])
    node = onnx.helper.make_node("Constant", [], ["k"], "k", value=value)
    cast = onnx.helper.make_node("Cast", ["k"], ["f"], "f", to=onnx.TensorProto.FLOAT)
    add = onnx.helper.make_node("Add", ["x", "f"], ["y"], "y")
    info = onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [node, cast, add], "g", [info("x", onnx.TensorProto.FLOAT, [3])], [info("y", onnx.TensorProto.FLOAT, [3])]
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 21)], ir_version=10)
    state = passes.state(proto)
    assert LiftConstants().run(state) == 1
    result, _ = passes(proto, LiftConstants())
    lifted = result.graph.initializer[0]
    assert lifted.data_type == dtype
    assert list(onnx.numpy_helper.to_array(lifted).astype(np.float32)) == [1, -2, 3]


def test_an_initializer_given_out_can_be_replaced_inside(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[2, 2] x) => (float[2, 2] y, float[2, 2] w)
        <float[2, 2] w = {1, 2, 3, 4}> { y = Gemm <alpha = 2.0> (x, w) }""",
        LiftConstants(),
        InferShapes(),
        FuseLinearBias(),
    )
    assert sorted(passes.ops(proto)) == ["Gemm", "Identity"]
    assert [value.name for value in proto.graph.output] == ["y", "w"]
    assert not proto.graph.node[-1].attribute

"""Shapes found by inference are written to the graph, and never lost."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from qdqtool.graphs import graph as graphs
from qdqtool.passes.infer_shapes import InferShapes


def shapes(state: Any) -> dict[str, Any]:
    return {name: tensor.shape for _, g in graphs.all_graphs(state.graph) for name, tensor in g.tensors().items()}


def test_types_and_shapes_of_all_tensors(passes: Any) -> None:
    _, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[N, 3, 8, 8] x) => (float[N, 4, 6, 6] y) {
            a = Conv(x, w) b = Relu(a) c = Shape(b) y = Reshape(b, c)
        }""",
        InferShapes(),
        weights={"w": np.ones((4, 3, 3, 3), np.float32)},
    )
    assert shapes(state)["a"] == ["N", 4, 6, 6] == shapes(state)["b"]
    assert state.graph.tensors()["c"].dtype == np.int64


def test_weights_too_large_to_be_read_still_tell_their_shape(passes: Any) -> None:
    _, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[N, 64] x) => (float[N, 64] y) { a = MatMul(x, w)
                y = Relu(a) }""",
        InferShapes(),
        weights={"w": np.ones((64, 64), np.float32)},
    )
    assert shapes(state)["a"] == ["N", 64]


def test_control_flow_bodies(passes: Any) -> None:
    _, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (bool c, float[2, 3] x) => (float[3, 2] y) {
            y = If (c) <then_branch = t () => (float[3, 2] p) { h = Transpose(x) p = Relu(h) },
                        else_branch = e () => (float[3, 2] q) { q = Transpose(x) }>
        }""",
        InferShapes(),
    )
    assert shapes(state)["h"] == [3, 2]


def test_results_of_custom_operators_keep_what_the_model_says(passes: Any) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 13, "my.domain" : 1]> g (float[N, 3] x) => (float[3, N] y)
        <float[N, 3] b> { a = Relu(x) b = my.domain.Magic(a) c = Transpose(b) y = Relu(c) }"""
    )
    state = passes.state(proto)
    InferShapes().run(state)
    assert shapes(state) == {"x": ["N", 3], "a": ["N", 3], "b": ["N", 3], "c": [3, "N"], "y": [3, "N"]}
    assert not state.notes


def test_wrong_value_info_is_replaced_and_unknown_does_not_replace_known(passes: Any) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[N, 3] x, int64[2] s) => (float[M, 3] y)
        <float[N, 7] a, float[K, 3] b> { a = Relu(x) b = Reshape(a, s) y = Relu(b) }"""
    )
    state = passes.state(proto)
    InferShapes().run(state)
    assert shapes(state)["a"] == ["N", 3]
    assert shapes(state)["b"] == ["K", 3]
    assert shapes(state)["y"] == ["M", 3]


def test_a_model_that_cannot_be_inferred_goes_on(passes: Any, monkeypatch: Any) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 13]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    state = passes.state(proto)

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no schema for this")

    monkeypatch.setattr(onnx.shape_inference, "infer_shapes", fail)
    assert InferShapes().run(state) == 0
    assert state.notes == ["shape inference failed, shapes stay as the model gives them: no schema for this"]


def test_running_twice_changes_nothing(passes: Any) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 13]> g (float[N, 3] x) => (float[N, 3] y) { a = Relu(x) y = Neg(a) }'
    )
    state = passes.state(proto)
    assert InferShapes().run(state) > 0
    assert InferShapes().run(state) == 0

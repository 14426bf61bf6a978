"""The structure of a model without its weights, and letting go of the float model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.lazy import Derived
from qdqtool.graphs.light import light_proto, release_float, restore
from qdqtool.passes_api import State
from qdqtool.planning.target import target
from qdqtool.recipe import Recipe
from tests.builders import constants, normal, parse, run

BODY = "[a] t = MatMul(x, w) [b] y = Add(t, b)"
VALUES = {"w": normal(64, 64), "b": normal(64)}
SHAPES = ("float[N, 64] x", "float[N, 64] y")


def graph_of(proto: onnx.ModelProto) -> tuple[gs.Graph, models.Header]:
    return models.to_graph(models.load(proto))


def test_large_constants_become_inputs_of_their_type_and_shape() -> None:
    graph, header = graph_of(parse(BODY, *SHAPES, VALUES))
    before = models.to_proto(graph, header)
    light, large = light_proto(graph, header)
    assert set(constants(light)) == {"b"}
    (given,) = [value for value in light.graph.input if value.name == "w"]
    assert given.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    assert [d.dim_value for d in given.type.tensor_type.shape.dim] == [64, 64]
    assert large.keys() == {"w"}
    assert light.ByteSize() < 2000
    onnx.checker.check_model(light, full_check=True)
    assert models.to_proto(graph, header) == before  # the graph itself is as it was


def test_values_are_not_read() -> None:
    graph, header = graph_of(parse(BODY, *SHAPES, VALUES))

    def never(values: Any) -> Any:
        raise AssertionError

    weight = graph.tensors()["w"]
    weight.values = Derived(weight, (64, 64), np.dtype(np.float32), never)
    assert set(light_proto(graph, header)[1]) == {"w"}


def test_a_failing_export_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    graph, header = graph_of(parse(BODY, *SHAPES, VALUES))
    values = graph.tensors()["w"]._values
    monkeypatch.setattr(models, "to_proto", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        light_proto(graph, header)
    assert graph.tensors()["w"]._values is values


def test_restored_it_is_the_model() -> None:
    body = """[a] t = MatMul(x, w) y = If (f) <then_branch = t () => (float[N, 64] p) { p = MatMul(t, w) },
        else_branch = e () => (float[N, 64] q) { q = Add(t, b) }>"""
    proto = parse(body, f"{SHAPES[0]}, bool f", SHAPES[1], VALUES)
    graph, header = graph_of(proto)
    light, large = light_proto(graph, header)
    again, header = models.to_graph(light)
    restore(again, large)
    result = models.to_proto(again, header)
    onnx.checker.check_model(result, full_check=True)
    assert [value.name for value in result.graph.input] == ["x", "f"]
    for flag in (True, False):
        fed = {"x": normal(3, 64), "f": np.array(flag)}
        np.testing.assert_array_equal(run(result, fed)["y"], run(proto, fed)["y"])


def test_packed_and_short_types_pass() -> None:
    codes = onnx.helper.make_tensor("c", onnx.TensorProto.INT4, [128, 128], bytes(8192), raw=True)
    short = onnx.helper.make_tensor("s", onnx.TensorProto.BFLOAT16, [64, 64], bytes(8192), raw=True)
    body = "[a] y = DequantizeLinear(c, one) [b] z = Cast <to = 1> (s)"
    proto = parse(body, "float[1] x", "float[128, 128] y, float[64, 64] z", {"one": np.array(1, np.float32)}, opset=21)
    proto.ir_version = 10
    proto.graph.initializer.extend([codes, short])
    graph, header = graph_of(proto)
    light, large = light_proto(graph, header)
    assert large.keys() == {"c", "s"}
    again, header = models.to_graph(light)
    restore(again, large)
    assert {t.name: t.raw_data for t in models.to_proto(again, header).graph.initializer}["c"] == bytes(8192)


def test_the_quantized_graph_lives_on_without_the_float_model() -> None:
    proto = models.load(parse(BODY, *SHAPES, VALUES))
    wanted = run(proto, {"x": normal(3, 64)})["y"]
    graph, header = models.to_graph(proto)
    state = State(graph, header, Recipe(), target("cpu"), original=proto)
    state.quantized = graphs.copy(graph)
    weight = state.quantized.tensors()["w"]
    weight.values = Derived(graph.tensors()["w"], (64, 64), np.dtype(np.float32), np.array)
    release_float(state)
    assert state.graph is state.quantized
    assert state.original is not None
    assert not state.original.graph.initializer
    assert isinstance(weight._values, np.ndarray)
    assert graph.tensors()["b"]._values.tensor is not state.quantized.tensors()["b"]._values.tensor
    shapes = [t.shape for t in state.quantized.tensors().values() if isinstance(t, gs.Variable)]
    assert {type(shape) for shape in shapes if shape is not None} == {list}
    np.testing.assert_array_equal(run(models.to_proto(state.quantized, header), {"x": normal(3, 64)})["y"], wanted)

"""Sequences and optionals keep their types on the trip through the graph in memory."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qdqtool.graphs import model
from tests.builders import normal, quantized, run

BRANCHES = """y = If (c) <
    then_branch = t () => (seq(float[5]) p) { p = SequenceConstruct(x) },
    else_branch = e () => (seq(float[5]) q) { a = Neg(x) q = SequenceConstruct(a, x) }>"""
HEAD = '<ir_version: 8, opset_import: ["": 17]>'


def parsed(inputs: str, outputs: str, body: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(f"{HEAD} g ({inputs}) => ({outputs}) {{ {body} }}")


def types(graph: onnx.GraphProto) -> dict[str, onnx.TypeProto]:
    inner = [a.g for node in graph.node for a in node.attribute if a.HasField("g")]
    return {value.name: value.type for each in (graph, *inner) for value in (*each.input, *each.output)}


@pytest.mark.parametrize(
    ("inputs", "outputs", "body"),
    [
        ("seq(float[5]) x", "seq(float[5]) y", "y = Identity(x)"),
        ("optional(seq(float[5])) x", "optional(seq(float[5])) y", "y = Identity(x)"),
        ("optional(float[5]) x", "bool y", "y = OptionalHasElement(x)"),
        ("bool c, float[5] x", "seq(float[5]) y", BRANCHES),
    ],
)
def test_types_survive(inputs: str, outputs: str, body: str) -> None:
    proto = parsed(inputs, outputs, body)
    result = model.to_proto(*model.to_graph(model.load(proto)))
    assert types(result.graph) == types(proto.graph)
    onnx.checker.check_model(result, full_check=True)


def test_an_attribute_that_holds_a_type_survives() -> None:
    proto = parsed("float[2] x", "bool y", "o = Identity(x) y = Identity(b)")
    kind = onnx.helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [2])
    proto.graph.node[0].CopyFrom(onnx.helper.make_node("Optional", [], ["o"], type=kind))
    proto.graph.node[1].CopyFrom(onnx.helper.make_node("OptionalHasElement", ["o"], ["y"]))
    result = model.to_proto(*model.to_graph(model.load(proto)))
    assert not run(result, {"x": np.zeros(2, np.float32)})["y"]
    assert [attribute.tp for attribute in result.graph.node[0].attribute] == [kind]


def test_layers_of_a_model_that_gives_out_sequences_and_text_are_quantized() -> None:
    body = """m = MatMul(x, w) n = MatMul(m, w) y = SequenceConstruct(m, n) t = Identity(s)
        z = Identity(n)"""
    proto = parsed("float[N, 16] x, string[N] s", "seq(float[N, 16]) y, string[N] t, float[N, 16] z", body)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(normal(16, 16, scale=0.25), "w"))
    fed = {"x": normal(8, 16), "s": np.array([f"text {i}" for i in range(8)])}
    result = quantized(proto, fed)
    assert result.report.verification is not None
    assert set(result.report.verification.fused) == {"z"}
    assert result.report.verification.worst_db > 30
    got, wanted = run(result.model, fed), run(proto, fed)
    assert [one.shape for one in got["y"]] == [one.shape for one in wanted["y"]]
    np.testing.assert_array_equal(got["t"], wanted["t"])

"""Names of tensors in control-flow bodies, and which tensors leave the graph that makes them."""

from __future__ import annotations

import numpy as np
import onnx

from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.scopes import bodies, hoist_shared_constants, make_names_unique
from tests.builders import normal, parse, run

TEXT = """
    a = Relu(x)
    y = If (flag) <
        then_branch = then () => (float[N] t) {
            a_1 = Neg(a)
            t = If (flag) <
                then_branch = inner () => (float[N] t) { b = Exp(a_1) t = Add(b, a) },
                else_branch = last () => (float[N] t) { t = Identity(a_1) }
            >
        },
        else_branch = other () => (float[N] t) { b = Tanh(a) t = Mul(b, a) }
    >
"""


def model() -> onnx.ModelProto:
    """Nested branches that use the same names."""
    return parse(TEXT, "float[N] x, bool flag", "float[N] y", {})


def defined(graph: onnx.GraphProto) -> list[str]:
    """Names that nodes of one graph give to tensors."""
    return [name for node in graph.node for name in node.output]


def test_every_name_is_defined_once() -> None:
    proto, before = model(), model()
    make_names_unique(proto.graph)
    names = [name for graph in (proto.graph, *bodies(proto.graph)) for name in defined(graph)]
    assert len(names) == len(set(names)) == 9
    assert defined(proto.graph) == ["a", "y"]
    for flag in (True, False):
        fed = {"x": normal(4), "flag": np.array(flag)}
        np.testing.assert_array_equal(run(proto, fed)["y"], run(before, fed)["y"])


def test_a_model_with_unique_names_stays() -> None:
    proto = model()
    make_names_unique(proto.graph)
    once = proto.SerializeToString(deterministic=True)
    make_names_unique(proto.graph)
    assert proto.SerializeToString(deterministic=True) == once


def test_constants_of_one_name_are_told_apart_unless_they_are_equal() -> None:
    proto = model()
    values = [normal(1, seed=seed) for seed in (0, 1, 0)]
    inner = list(bodies(proto.graph))
    for body, value in zip((inner[1], inner[2], inner[3]), values, strict=True):
        body.initializer.append(onnx.numpy_helper.from_array(value, "c"))
        body.initializer.append(onnx.numpy_helper.from_array(values[0], "same"))
    hoist_shared_constants(proto.graph)
    make_names_unique(proto.graph)
    assert [tensor.name for tensor in proto.graph.initializer] == ["same"]
    assert len({t.name for body in bodies(proto.graph) for t in body.initializer}) == 3


def test_what_a_body_reads_leaves_its_graph() -> None:
    graph, _ = models.to_graph(model())
    tensors = graphs.all_tensors(graph)
    leaving = graphs.leaving_ids(graph)
    found = {name for name, tensor in tensors.items() if id(tensor) in leaving}
    given = {tensor.name for _, inner in graphs.all_graphs(graph) for tensor in inner.outputs}
    assert found - given == {"a", "a_1"}
    assert graphs.single_use(tensors["a_1"], leaving) is None

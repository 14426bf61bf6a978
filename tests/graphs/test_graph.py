"""What sweeping a graph drops, keeps and sorts."""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from qdqtool.errors import PipelineError
from qdqtool.graphs import graph as graphs


def variable(name: str) -> gs.Variable:
    return gs.Variable(name, np.float32, (2,))


def relu(source: gs.Tensor, name: str) -> gs.Node:
    return gs.Node("Relu", name, inputs=[source], outputs=[variable(name)])


def test_what_nothing_reads_goes_and_leaves_its_source() -> None:
    x = variable("x")
    used, unused = relu(x, "a"), relu(x, "b")
    behind = relu(unused.outputs[0], "c")
    graph = gs.Graph([used, unused, behind], [x], [used.outputs[0]])
    graphs.sweep(graph)
    assert [node.name for node in graph.nodes] == ["a"]
    assert [node.name for node in x.outputs] == ["a"]


def test_order_changes_only_where_it_is_wrong() -> None:
    x = variable("x")
    first, second = relu(x, "first"), relu(x, "second")
    late = relu(x, "late")
    early = relu(late.outputs[0], "early")
    outputs = [node.outputs[0] for node in (first, second, early)]
    graph = gs.Graph([early, second, first, late], [x], outputs)
    graphs.sweep(graph)
    assert [node.name for node in graph.nodes] == ["second", "first", "late", "early"]


def test_a_body_keeps_what_it_reads_alive_and_before_it() -> None:
    x, condition = variable("x"), gs.Variable("c", np.bool_, ())
    outer = relu(x, "outer")
    inner = relu(outer.outputs[0], "inner")
    spare = relu(outer.outputs[0], "spare")
    branch = gs.Graph([inner, spare], [], [inner.outputs[0]])
    direct = gs.Graph([], [], [outer.outputs[0]])
    choice = gs.Node("If", "if", {"then_branch": branch, "else_branch": direct}, [condition], [variable("y")])
    graph = gs.Graph([choice, outer], [x, condition], [choice.outputs[0]])
    graphs.sweep(graph)
    assert [node.name for node in graph.nodes] == ["outer", "if"]
    assert [node.name for node in branch.nodes] == ["inner"]


def test_a_circle_is_an_error() -> None:
    a, b = variable("a"), variable("b")
    nodes = [gs.Node("Relu", "one", inputs=[a], outputs=[b]), gs.Node("Relu", "two", inputs=[b], outputs=[a])]
    with pytest.raises(PipelineError, match="cycle"):
        graphs.sweep(gs.Graph(nodes, [], [b]))

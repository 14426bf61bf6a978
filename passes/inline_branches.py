"""Replace an If whose condition is a constant by the nodes of the branch that runs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.passes_api import GRAPH_FACTS, Fact, State


@dataclass(frozen=True)
class InlineBranches:
    """Replace an If whose condition is a constant by the nodes of the branch that runs."""

    name: ClassVar[str] = "inline-branches"
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS

    def run(self, state: State) -> int:
        """Inline wherever the condition is known; returns at how many places."""
        taken = graphs.node_names(state.graph)
        count = _inline(state.graph, taken)
        if count:
            graphs.sweep(state.graph)
        return count


def _inline(graph: gs.Graph, taken: set[str]) -> int:
    """Inline in a graph and the bodies under it; what a branch gives out reaches its readers through an Identity."""
    nodes: list[gs.Node] = []
    count = 0
    for node in graph.nodes:
        count += sum(_inline(body, taken) for body in node.attrs.values() if isinstance(body, gs.Graph))
        condition = graphs.constant(node.inputs[0]) if node.op == "If" else None
        if condition is None:
            nodes.append(node)
            continue
        count += 1
        taken_branch = "then_branch" if condition.reshape(-1)[0] else "else_branch"
        body, results = node.attrs[taken_branch], list(node.outputs)
        for other in node.subgraphs():
            if other is not body:
                for gone in graphs.all_nodes(other):  # they read tensors of outer graphs no more
                    graphs.unlink(gone)
        graphs.unlink(node)
        nodes += body.nodes
        for given, result in zip(body.outputs, results, strict=True):
            name = graphs.fresh_name(f"{result.name}.identity", taken)
            nodes.append(gs.Node("Identity", name, inputs=[given], outputs=[result]))
    graph.nodes = nodes
    return count

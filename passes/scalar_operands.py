"""Turns operands of one element into scalars where the operator wants scalars (Range).

The runtime lets an operand of shape [1] pass while its value is not known; once a folded constant tells the value, it
refuses the model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.passes_api import GRAPH_FACTS, Fact, State


@dataclass(frozen=True)
class ScalarOperands:
    """Turn start, limit and delta of a Range into scalars where they have the shape [1]."""

    name: ClassVar[str] = "scalar-operands"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES}

    def run(self, state: State) -> int:
        """Put a Reshape before each such operand; returns the number of operands."""
        taken = graphs.tensor_names(state.graph) | graphs.node_names(state.graph)
        changes = 0
        for _, graph in graphs.all_graphs(state.graph):
            nodes: list[gs.Node] = []
            for node in graph.nodes:
                wrong = [i for i, t in enumerate(node.inputs) if t.shape is not None and list(t.shape) == [1]]
                for index in wrong if node.op == "Range" and not node.domain else ():
                    nodes.append(_scalar(node, index, taken))
                    changes += 1
                nodes.append(node)
            graph.nodes = nodes
        return changes


def _scalar(node: gs.Node, index: int, taken: set[str]) -> gs.Node:
    operand = node.inputs[index]
    name = graphs.fresh_name(f"{operand.name}_scalar", taken)
    result = gs.Variable(name, operand.dtype, [])
    graphs.set_input(node, index, result)
    shape = gs.Constant(graphs.fresh_name(f"{name}_shape", taken), np.zeros(0, np.int64))
    return gs.Node("Reshape", graphs.fresh_name(f"{name}_Reshape", taken), inputs=[operand, shape], outputs=[result])

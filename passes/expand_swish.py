"""Takes Swish apart into x sigmoid(alpha x), which the runtime fuses and quantizes.

No provider of ONNX Runtime has a kernel for Swish: it runs the operator's definition, whose factor alpha, most often 1,
is cast and multiplied at every run. Written with Sigmoid and Mul, and alpha only where it is not 1, it becomes one
QuickGelu in float, and two integer kernels behind a convolution on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.pattern import Rewriter, is_op
from qdqtool.passes_api import GRAPH_FACTS, Fact, State


@dataclass(frozen=True)
class ExpandSwish:
    """Write Swish as x sigmoid(alpha x), which the runtime fuses in float and quantizes."""

    name: ClassVar[str] = "expand-swish"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES}

    def run(self, state: State) -> int:
        """Rewrite every Swish; returns how many."""
        rewriter, changes = Rewriter(state), 0
        for _, graph in graphs.all_graphs(state.graph):
            for node in graph.nodes:
                if not is_op(node, "Swish"):
                    continue
                x, alpha = node.inputs[0], float(node.attrs.get("alpha", 1.0))
                if x.dtype is None:
                    state.skip(self.name, node.name, f"the type of {x.name!r} is not known")
                    continue
                scaled = x
                if alpha != 1.0:
                    factor = rewriter.constant(f"{node.name}.alpha", alpha, x)
                    scaled = rewriter.node("Mul", f"{node.name}.scale", [x, factor], x)
                gate = rewriter.node("Sigmoid", f"{node.name}.sigmoid", [scaled], x)
                rewriter.replace(node, "Mul", [x, gate], [node])
                changes += 1
            rewriter.place(graph)
        graphs.sweep(state.graph)
        return changes

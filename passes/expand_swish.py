"""Takes Swish apart into x sigmoid(alpha x), which the runtime fuses and quantizes.

No provider of ONNX Runtime has a kernel for Swish: it runs the operator's definition, whose factor alpha, most often 1,
is cast and multiplied at every run. Written with Sigmoid and Mul, and alpha only where it is not 1, it becomes one
QuickGelu in float, and two integer kernels behind a convolution on the CPU.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

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
        rewriter = Rewriter(state)

        def rewrite(node: gs.Node, graph: gs.Graph) -> str | bool:
            if not is_op(node, "Swish"):
                return False
            x, alpha = node.inputs[0], float(node.attrs.get("alpha", 1.0))
            if x.dtype is None:
                return f"the type of {x.name!r} is not known"
            scaled = x
            if alpha != 1.0:
                factor = rewriter.constant(f"{node.name}.alpha", alpha, x)
                scaled = rewriter.node("Mul", f"{node.name}.scale", [x, factor], x)
            gate = rewriter.node("Sigmoid", f"{node.name}.sigmoid", [scaled], x)
            rewriter.replace(node, "Mul", [x, gate], [node])
            return True

        return rewriter.each(self.name, rewrite)

"""Name the activations whose ranges must be known to tell what fits into float16."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.float16 import Slots, is_float32, slots
from qdqtool.passes_api import Fact, State
from qdqtool.planning.plan import Plan


@dataclass(frozen=True)
class PlanFloat16:
    """Name the activations to observe before a model is turned into float16; nothing is quantized."""

    name: ClassVar[str] = "plan-float16"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAN})
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS, Fact.PARAMS, Fact.QDQ})

    def run(self, state: State) -> int:
        """Set ``state.plan`` to a plan without entries; returns the number of tensors to observe."""
        watched: dict[str, None] = {}
        for node in state.graph.nodes:
            if isinstance(slots(node, state.graph.opset), Slots):
                touched = (t for t in (*node.inputs, *node.outputs) if is_float32(t) and not graphs.is_constant(t))
                watched |= dict.fromkeys(tensor.name for tensor in touched)
        state.plan = Plan(watched=tuple(watched))
        return len(watched)

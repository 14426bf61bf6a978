"""Leave nodes float whose branch or loop never ran on the calibration data: nothing is known of their activations."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from qdqtool.graphs import graph as graphs
from qdqtool.observation import bodies
from qdqtool.passes_api import Fact, State
from qdqtool.planning.plan import Use


@dataclass(frozen=True)
class LeaveUnrun:
    """Leave nodes float whose branch or loop never ran on the calibration data."""

    name: ClassVar[str] = "leave-unrun"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAN, Fact.STATISTICS})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.PARAMS, Fact.QDQ})

    def run(self, state: State) -> int:
        """Take such nodes out of ``state.plan``; returns how many were to be quantized."""
        assert state.plan is not None
        assert state.statistics is not None
        plan = state.plan
        reasons = bodies.never_ran(state.graph, plan, state.statistics)
        nodes = {node.name: node for node in graphs.all_nodes(state.graph) if node.name in reasons}
        made = {tensor.name for node in nodes.values() for tensor in node.outputs}
        gone = {key for key in plan.entries if (key.node in nodes if isinstance(key, Use) else key.tensor in made)}
        left = [name for name in (*plan.kernels, *sorted(plan.weight_only)) if name in nodes]
        for name in left:
            state.skip(self.name, name, reasons[name])
        state.plan = replace(
            plan,
            entries={key: entry for key, entry in plan.entries.items() if key not in gone},
            tensors={key: tensor for key, tensor in plan.tensors.items() if key not in gone},
            constants=plan.constants - gone,
            kernels={name: op for name, op in plan.kernels.items() if name not in nodes},
            weight_only=plan.weight_only.difference(nodes),
        )
        return len(left)

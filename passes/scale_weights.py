"""Choose the scales of weights that are stored in integers, block by block; their codes are made on insertion."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from qdqtool.arithmetic.blockwise import weight_params
from qdqtool.graphs import graph as graphs
from qdqtool.graphs.lazy import peek
from qdqtool.passes_api import Fact, State
from qdqtool.planning.plan import Key, Use
from qdqtool.spec import QuantParams, QuantSpec


@dataclass(frozen=True)
class ScaleWeights:
    """Choose the scale and zero point of every block of every planned weight."""

    name: ClassVar[str] = "scale-weights"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAN})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.PARAMS})
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})

    def run(self, state: State) -> int:
        """Set ``state.params``; returns the number of weights. One with NaN or Inf leaves the plan, and stays float."""
        assert state.plan is not None
        tensors = graphs.all_tensors(state.graph)
        made: dict[tuple[str, QuantSpec], QuantParams | None] = {}
        params: dict[Key, QuantParams] = {}
        bad: set[Key] = set()
        for key, spec in state.plan.specs():
            name = state.plan.tensors[key]
            if (name, spec) not in made:
                made[name, spec] = weight_params(peek(tensors[name]), spec, tensors[name].dtype)
            found = made[name, spec]
            if found is not None:
                params[key] = found
                continue
            bad.add(key)
            if isinstance(key, Use):
                state.skip(self.name, key.node, f"its weight {name!r} holds NaN or infinite values")
        if bad:
            nodes = {key.node for key in bad if isinstance(key, Use)}
            state.plan = replace(
                state.plan,
                entries={key: entry for key, entry in state.plan.entries.items() if key not in bad},
                constants=state.plan.constants - bad,
                kernels={name: op for name, op in state.plan.kernels.items() if name not in nodes},
                weight_only=state.plan.weight_only - nodes,
            )
        state.params = params
        return len(params)

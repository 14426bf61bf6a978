"""Observe every planned activation over the calibration data, in one pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdqtool import model as models
from qdqtool.observe import observe
from qdqtool.passes_api import Fact, State


@dataclass(frozen=True)
class Observe:
    """Observe every planned activation over the calibration data, in one pass."""

    name: ClassVar[str] = "observe"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.DATA, Fact.PLAN})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS})
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.PARAMS})

    def run(self, state: State) -> int:
        """Set ``state.statistics`` and ``state.held``; returns the number of tensors observed."""
        assert state.plan is not None
        assert state.data is not None
        tensors = state.plan.observed()
        proto = models.to_proto(state.graph, state.header)
        seen = observe(
            proto, tensors, state.data, samples=state.recipe.samples, provider=state.provider, progress=state.progress
        )
        state.statistics, state.held, state.batching = seen.statistics, seen.held, seen.batching
        for name in tensors:
            stats = seen.statistics[name]
            if stats.first_non_finite is not None:
                position = stats.first_non_finite[0]
                state.notes.append(
                    f"tensor {name!r} held {stats.nan} NaN and {stats.inf} infinite values, first in sample "
                    f"{position}; its range comes from the finite ones"
                )
        return len(tensors)

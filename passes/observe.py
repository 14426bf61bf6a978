"""Observe every planned activation over the calibration data, as far as no earlier run has."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdqtool.graphs import model as models
from qdqtool.observation.collect import collect
from qdqtool.passes_api import Fact, State


@dataclass(frozen=True)
class Observe:
    """Observe every planned activation over the calibration data, as far as no earlier run has."""

    name: ClassVar[str] = "observe"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.DATA, Fact.PLAN})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS})
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.PARAMS})

    def run(self, state: State) -> int:
        """Set ``state.statistics``, ``state.held`` and ``state.batching``; returns the number of tensors."""
        assert state.plan is not None
        assert state.data is not None
        tensors = state.plan.observed()
        found = collect(
            models.to_proto(state.graph, state.header),
            tensors,
            state.data,
            axes=state.plan.channel_axes(),
            samples=state.recipe.samples,
            provider=state.provider,
            options=state.observing,
            cache=state.cache,
            progress=state.progress,
        )
        state.calibration, state.held = found.calibration, found.held
        state.statistics, state.batching = found.calibration.statistics, found.calibration.batching
        state.notes += found.notes
        return len(tensors)

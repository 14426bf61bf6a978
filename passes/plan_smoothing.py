"""Ask for statistics of the channels of activations that may be smoothed."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from qdqtool.passes_api import Fact, State
from qdqtool.planning.smoothing import channel_tensors
from qdqtool.planning.smoothing_sites import Site, sites


@dataclass(frozen=True)
class PlanSmoothing:
    """Ask for statistics of the channels of activations that may be smoothed."""

    name: ClassVar[str] = "plan-smoothing"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES, Fact.PLAN})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS, Fact.PARAMS, Fact.QDQ})

    def run(self, state: State) -> int:
        """Add to ``state.plan``; returns the number of tensors whose channels are to be observed."""
        assert state.plan is not None
        found: dict[str, int] = {}
        observed = frozenset(state.plan.observed())
        for site in sites(state):
            if isinstance(site, Site):
                found |= channel_tensors(site.path, observed)
            else:
                state.skip(self.name, *site)
        watched = tuple(dict.fromkeys([*state.plan.watched, *found]))
        state.plan = replace(state.plan, watched=watched, channels=found)
        return len(found)

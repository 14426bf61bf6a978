"""Take the statistics of planned activations from a calibration made before, instead of observing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdqtool.data.batching import choose
from qdqtool.graphs import model as models
from qdqtool.observation import observe
from qdqtool.observation.calibration import ModelKey
from qdqtool.passes_api import Fact, State


@dataclass(frozen=True)
class UseStatistics:
    """Take the statistics of planned activations from a calibration made before.

    Attributes:
        where: the calibration's file, for messages; "" where there is none.
    """

    where: str = ""

    name: ClassVar[str] = "use-statistics"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAN})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS})
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.PARAMS})

    def run(self, state: State) -> int:
        """Set ``state.statistics``, and ``state.held`` where there are data; returns the number of tensors used.

        Raises:
            StatisticsError: the statistics belong to another model, or lack a tensor.
        """
        assert state.plan is not None
        assert state.calibration is not None
        given, tensors = state.calibration, state.plan.observed()
        key = ModelKey.of(models.to_proto(state.graph, state.header))
        given.require(key, tensors, state.plan.channel_axes(), self.where or given.description)
        state.calibration = given.of(tensors)
        state.statistics, state.batching = state.calibration.statistics, state.calibration.batching
        wanted = state.recipe.samples
        if wanted is not None and wanted < given.statistics.samples:
            state.notes.append(
                f"ranges come from all {given.statistics.samples} samples of the statistics, not from {wanted} of them"
            )
        if state.data is not None:
            count = observe.HELD if wanted is None else min(observe.HELD, wanted)
            state.held = tuple(choose(given.batching.samples(state.data), count))
        return len(tensors)

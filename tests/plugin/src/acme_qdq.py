"""A calibrator and a pass of a third party; they use nothing but what qdqtool documents for them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qdqtool.calibrator_api import Stat
from qdqtool.graphs import graph as graphs
from qdqtool.passes_api import GRAPH_FACTS, Fact, State
from qdqtool.spec import FloatArray, QuantSpec, Range
from qdqtool.statistics.tensor import TensorStatistics


@dataclass(frozen=True)
class PowerOfTwo:
    """Ends at powers of two, the greatest that were seen."""

    halvings: int = 0

    name: ClassVar[str] = "power_of_two"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES})

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the range, both ends divided by 2 as often as the option says."""
        del spec
        ends: FloatArray = np.array([min(stats.lo, 0.0), max(stats.hi, 0.0)])
        sizes = np.where(ends == 0, 0, 0.5 ** (self.halvings + 1.0) * 2.0 ** np.frexp(ends)[1])
        lo, hi = np.copysign(sizes, ends)
        return Range(lo, hi)


@dataclass(frozen=True)
class RemoveDoubleNeg:
    """Read the input of two Neg nodes in a row instead of their output."""

    name: ClassVar[str] = "remove-double-neg"
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS

    def run(self, state: State) -> int:
        """Redirect every reader behind a second Neg; returns how many there were."""
        outputs, changes = graphs.output_ids(state.graph), 0
        for _, graph in graphs.all_graphs(state.graph):
            for node in graph.nodes:
                first = graphs.producer(node.inputs[0]) if node.op == "Neg" else None
                if first is None or first.op != "Neg":
                    continue
                if id(node.outputs[0]) in outputs:
                    state.skip(self.name, node.name, "it makes a graph output")
                    continue
                graphs.redirect(node.outputs[0], first.inputs[0])
                changes += 1
        graphs.sweep(state.graph)
        return changes

"""Insert the Q/DQ nodes of the plan into a copy of the float graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.light import release_float
from qdqtool.passes_api import Fact, State
from qdqtool.planning.insert import insert


@dataclass(frozen=True)
class InsertQdq:
    """Insert the Q/DQ nodes of the plan into a copy of the float graph."""

    name: ClassVar[str] = "insert-qdq"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAN, Fact.PARAMS})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})
    drops: ClassVar[frozenset[Fact]] = frozenset()

    def run(self, state: State) -> int:
        """Set ``state.quantized``; returns the number of nodes added."""
        assert state.plan is not None
        assert state.params is not None
        state.quantized = insert(state.graph, state.plan, state.params)
        added = len(graphs.node_names(state.quantized)) - len(graphs.node_names(state.graph))
        if state.data is None:
            release_float(state)
        return added

"""Bias correction of weights, its scale part: every output channel of a quantized weight keeps its norm.

What rounding takes from a channel's norm is a factor of its scale; what it takes from the mean is an offset, which
``correct-bias`` makes up for together with all else that moves the layer's mean output (see
:func:`qdqtool.arithmetic.weight_scale.norm_kept`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

from qdqtool.arithmetic.weight_scale import norm_kept
from qdqtool.graphs import graph as graphs
from qdqtool.graphs.graph import Array
from qdqtool.passes_api import Fact, State
from qdqtool.planning.plan import Use
from qdqtool.planning.precision import FEW_BITS, width
from qdqtool.spec import QuantizedWeight


@dataclass(frozen=True)
class CorrectWeights:
    """Scale each channel of a weight of up to 4 bits so that it keeps its norm."""

    name: ClassVar[str] = "correct-weights"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAN, Fact.PARAMS})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})

    def run(self, state: State) -> int:
        """Change scales in ``state.params``; returns the number of weights."""
        assert state.plan is not None
        assert state.params is not None
        tensors, changed = graphs.all_tensors(state.graph), {}
        for key, value in state.params.items():
            weight = isinstance(key, Use) and key.index == 1 and key in state.plan.constants
            if weight and isinstance(value, QuantizedWeight) and width(value.params.spec) <= FEW_BITS:
                values = cast(Array, graphs.constant(tensors[state.plan.tensors[key]]))
                changed[key] = norm_kept(values, value)
        state.params = {**state.params, **changed}
        return len(changed)

"""Smoothing: move what sets an activation's channels apart into the weights that multiply them.

An activation has one scale for all channels, which the greatest of them takes up; a weight has one for each output, and
takes different inputs well (Xiao et al., SmoothQuant, ICML 2023). The factors of :mod:`qdqtool.planning.smoothing` go
into the parameters of what makes the activation, a LayerNormalization, MatMul or Gemm, and their inverses into the
layers behind it, so that nothing is added. A model input has no such place: where the recipe allows it, and noise falls
to a quarter, as if the input had a bit more, a Mul is put behind it.

Convolutions are left to :mod:`qdqtool.passes.equalize_layers`: many of their channels are rarely active, and made as
large as the others they are clipped on new data.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Final

from qdqtool.graphs import graph as graphs
from qdqtool.passes_api import Fact, State
from qdqtool.planning.plan import Plan
from qdqtool.planning.smoothing import HEADROOM, channel_tensors, choose
from qdqtool.planning.smoothing_sites import Site, sites
from qdqtool.spec import FloatArray
from qdqtool.statistics.rescale import rescaled

_GAIN: Final = 2.0  # half the noise: an expectation is not that exact
_GAIN_OF_MUL: Final = 4.0


@dataclass(frozen=True)
class SmoothActivations:
    """Make the channels of activations alike by factors that the layers around them take up."""

    name: ClassVar[str] = "smooth-activations"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES, Fact.PLAN, Fact.STATISTICS})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.PARAMS, Fact.QDQ})

    def run(self, state: State) -> int:
        """Change parameters, plan and statistics together; returns the number of activations smoothed."""
        assert state.plan is not None
        assert state.statistics is not None
        outputs, taken = graphs.output_ids(state.graph), graphs.tensor_names(state.graph)
        observed = frozenset(state.plan.observed())
        names: dict[str, str] = {}
        seen = dict(state.statistics.tensors)
        count = 0
        for site in [site for site in sites(state) if isinstance(site, Site)]:
            result = _smooth(site, state, outputs, taken)
            if isinstance(result, str):
                state.skip(self.name, site.source.name, result)
                continue
            count += 1
            moved = {old: result.start if old == site.start else old for old in channel_tensors(site.path, observed)}
            seen |= {new: rescaled(state.statistics[old], result.factors) for old, new in moved.items()}
            names |= moved
        state.plan = _planned(state.plan, names)
        state.statistics = replace(state.statistics, tensors=seen)
        return count


@dataclass(frozen=True)
class _Smoothed:
    """Factors that were put in, and the name that the path's first tensor now has."""

    factors: FloatArray
    start: str


def _smooth(site: Site, state: State, outputs: set[int], taken: set[str]) -> _Smoothed | str:
    """Smooth one activation in the graph; a reason where it stays."""
    assert state.plan is not None
    assert state.statistics is not None
    chosen = choose(site.path, state.plan, state.statistics)
    least = _GAIN if site.free else _GAIN_OF_MUL
    if chosen.gain < least:
        return f"expected noise would not fall to 1/{least:g}"
    weights = site.path.divided(chosen.factors, outputs)
    if weights is None:
        return "a layer's parameters would not be finite"
    node, index = graphs.uses(site.source.tensor)[0]
    reason = site.source.multiply(chosen.factors, state, taken)
    if reason is not None:
        return reason
    site.path.store(weights, outputs, taken)
    return _Smoothed(chosen.factors, node.inputs[index].name)


def _planned(plan: Plan, names: dict[str, str]) -> Plan:
    """The plan with the tensors' new names and wider ranges."""
    entries = dict(plan.entries)
    for key, spec in plan.specs():
        if plan.tensors[key] in names:
            entries[key] = replace(spec, headroom=HEADROOM)
    tensors = {key: names.get(tensor, tensor) for key, tensor in plan.tensors.items()}
    return replace(plan, entries=entries, tensors=tensors)

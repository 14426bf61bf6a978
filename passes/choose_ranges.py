"""Choose scale and zero point for everything planned: activations by the recipe's calibrator, weights from their values.

A weight's scale is raised where the layer's int32 bias would overflow otherwise: S_w >= |b| / (S_x * 2^31), per channel.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np

from qdqtool import affine, registry
from qdqtool import graph as graphs
from qdqtool.calibrator_api import Calibrator
from qdqtool.graph import Array
from qdqtool.passes_api import Fact, State
from qdqtool.plan import DerivedFrom, Key, Use
from qdqtool.spec import QuantizedWeight, QuantParams, QuantSpec, Range
from qdqtool.statistics import TensorStatistics

_BIAS_LIMIT = 2.0**30  # half of int32, so that products have room in the accumulator


@dataclass(frozen=True)
class ChooseRanges:
    """Choose scale and zero point for everything planned."""

    name: ClassVar[str] = "choose-ranges"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAN, Fact.STATISTICS})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.PARAMS})
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})

    def run(self, state: State) -> int:
        """Set ``state.params``; returns the number of keys that got numbers."""
        assert state.plan is not None
        assert state.statistics is not None
        choice = state.recipe.calibrator
        calibrator: Calibrator = registry.make("calibrators", choice.name, choice.options)
        params: dict[Key, QuantParams | QuantizedWeight] = {}
        cache: dict[tuple[str, QuantSpec], QuantParams] = {}
        for key, spec in state.plan.specs():
            if key not in state.plan.constants:
                tensor = state.plan.tensors[key]
                if (tensor, spec) not in cache:
                    stats = state.statistics[tensor] if spec.fixed is None else None
                    cache[tensor, spec] = activation_params(calibrator, stats, spec)
                params[key] = cache[tensor, spec]
        tensors = state.graph.tensors()
        for key, spec in state.plan.specs():
            if key in state.plan.constants:
                values = cast(Array, graphs.constant(tensors[state.plan.tensors[key]]))
                params[key] = quantize_weight(values, spec)
        state.params = params
        self._make_room_for_biases(state, params, tensors)
        return len(params)

    def _make_room_for_biases(self, state: State, params: dict[Key, QuantParams | QuantizedWeight], tensors: dict[str, object]) -> None:
        assert state.plan is not None
        for key, entry in state.plan.entries.items():
            if not isinstance(entry, DerivedFrom):
                continue
            bias = cast(Array, graphs.constant(tensors[state.plan.tensors[key]])).astype(np.float64)
            activation = cast(QuantParams, params[state.plan.resolve(entry.activation)])
            weight = cast(QuantizedWeight, params[state.plan.resolve(entry.weight)])
            least = np.abs(bias) / (_BIAS_LIMIT * float(activation.scale))
            if weight.params.scale.ndim == 0:
                least = least.max(initial=0.0)
            if np.any(least > weight.params.scale):
                values = cast(Array, graphs.constant(tensors[state.plan.tensors[entry.weight]]))
                scale = np.maximum(weight.params.scale, least).astype(np.float32)
                changed = replace(weight.params, scale=scale, method=f"{weight.params.method}, widened for the bias")
                params[entry.weight] = QuantizedWeight(affine.quantize(values, changed), changed)
                node = entry.weight.node if isinstance(entry.weight, Use) else str(entry.weight)
                state.notes.append(
                    f"weight scales of {node!r} were widened in {int(np.sum(least > weight.params.scale))} channels, "
                    f"so that its large bias fits into int32"
                )


def activation_params(calibrator: Calibrator, stats: TensorStatistics | None, spec: QuantSpec) -> QuantParams:
    """Scale and zero point of an activation: the user's range, or the calibrator's, kept inside the spec's bound."""
    if spec.fixed is not None or stats is None:
        assert spec.fixed is not None
        return affine.params_from_range(Range(*map(np.float64, spec.fixed)), spec, "set by the user")
    chosen = calibrator.choose(stats, spec)
    if spec.bound is not None:
        chosen = Range(np.maximum(chosen.lo, spec.bound[0]), np.minimum(chosen.hi, spec.bound[1]))
    return affine.params_from_range(chosen, spec, calibrator.name)


def quantize_weight(values: Array, spec: QuantSpec) -> QuantizedWeight:
    """Codes of a constant whose range covers all its values, or is the user's."""
    chosen = affine.tensor_range(values, spec) if spec.fixed is None else Range(*map(np.float64, spec.fixed))
    params = affine.params_from_range(chosen, spec, "minmax" if spec.fixed is None else "set by the user")
    return QuantizedWeight(affine.quantize(values, params), params)



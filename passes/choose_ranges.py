"""Choose scale and zero point for everything planned: activations by the calibrator, weights from their values.

A weight's scale is raised where the layer's int32 bias would overflow otherwise: S_w >= |b| / (S_x * 2^30), per
channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import numpy as np

from qdqtool import registry
from qdqtool.arithmetic import affine
from qdqtool.arithmetic.weight_scale import least_squares
from qdqtool.calibrator_api import Calibrator, choose
from qdqtool.errors import RecipeError
from qdqtool.graphs import graph as graphs
from qdqtool.graphs.graph import Array
from qdqtool.graphs.linear import bias_place
from qdqtool.passes_api import Fact, State
from qdqtool.planning.plan import Key, Use, params_of
from qdqtool.planning.precision import width
from qdqtool.spec import FloatArray, QuantizedWeight, QuantParams, QuantSpec, Range
from qdqtool.statistics.tensor import TensorStatistics

_TERNARY = 2  # bits of which a range that covers all values uses three codes at best
_BIAS_LIMIT = 2.0**30  # half of int32, so that products have room in the accumulator
_TINY = float(np.finfo(np.float32).tiny)  # least S_x * S_w: a smaller one would be flushed to 0 by some kernels


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
        cache: dict[tuple[str, QuantSpec], tuple[QuantParams, Mapping[str, float]]] = {}
        for key, spec in state.plan.specs():
            if key not in state.plan.constants:
                tensor = state.plan.tensors[key]
                if (tensor, spec) not in cache:
                    stats = state.statistics[tensor] if spec.fixed is None else None
                    cache[tensor, spec] = activation_params(calibrator, stats, spec)
                params[key], errors = cache[tensor, spec]
                state.compared |= {key: errors} if errors else {}
        tensors = graphs.all_tensors(state.graph)
        for key, spec in state.plan.specs():
            if key in state.plan.constants:
                values = cast(Array, graphs.constant(tensors[state.plan.tensors[key]]))
                wanted = state.recipe.weight_calibrator
                automatic = "mse" if width(spec) <= _TERNARY else "minmax"
                params[key] = quantize_weight(values, spec, automatic if wanted == "auto" else wanted)
        state.params = params
        _make_room_for_biases(state, params)
        return len(params)


def _make_room_for_biases(state: State, params: dict[Key, QuantParams | QuantizedWeight]) -> None:
    """Raise weight scales until every bias fits into int32; lower those of all-zero channels, to keep their bias exact.

    A bias that the plan leaves in float counts too: the runtime makes int32 of it by itself.
    """
    assert state.plan is not None
    outputs, nodes = graphs.leaving_ids(state.graph), {node.name: node for node in graphs.all_nodes(state.graph)}
    for key in [key for key in params if isinstance(key, Use) and key.index == 1 and key in state.plan.constants]:
        node, place = nodes[key.node], bias_place(nodes[key.node], outputs)
        source = state.plan.activation_of(node.name, 0, node.inputs[0].name)
        if place is None or source is None:
            continue
        activation, weight = params_of(params[state.plan.resolve(source)]), params_of(params[key])
        if activation.scale.ndim:
            continue  # its bias stays float
        bias = cast(Array, graphs.constant(nodes[place.node].inputs[place.index])).astype(np.float64)
        values = cast(Array, graphs.constant(node.inputs[1]))
        scale = _scale_with_room(values, weight, bias, float(activation.scale))
        if np.array_equal(scale, weight.scale):
            continue
        raised = int(np.sum(scale > weight.scale))
        method = f"{weight.method}, widened for the bias" if raised else weight.method
        changed = replace(weight, scale=scale, method=method)
        params[key] = QuantizedWeight(affine.quantize(values, changed), changed)
        if raised:
            state.notes.append(
                f"weight scales of {node.name!r} were widened in {raised} channels, so that its bias fits into int32"
            )


def _scale_with_room(values: Array, weight: QuantParams, bias: FloatArray, activation_scale: float) -> Array:
    """The weight's scale, changed where the bias needs it; float32 of the same shape."""
    least = np.maximum(np.abs(bias) / _BIAS_LIMIT, _TINY) / activation_scale
    ends = affine.tensor_range(values, weight.spec)
    if weight.scale.ndim == 0:
        least = least.max(initial=0.0)
    empty = (ends.lo == 0) & (ends.hi == 0)
    return np.where(empty, least, np.maximum(weight.scale, least)).astype(np.float32)


def activation_params(
    calibrator: Calibrator, stats: TensorStatistics | None, spec: QuantSpec
) -> tuple[QuantParams, Mapping[str, float]]:
    """Scale and zero point of an activation: the user's range, or the calibrator's, kept inside the spec's bound.

    Also gives the expected squared error of each calibrator where one chose among others.
    """
    if spec.fixed is not None or stats is None:
        assert spec.fixed is not None
        return affine.params_from_range(_fixed(spec.fixed), spec, "set by the user"), {}
    chosen = choose(calibrator, stats, spec)
    if spec.granularity.axis is not None and chosen.lo.ndim == 0:
        raise RecipeError(
            f"calibrator {calibrator.name!r} chooses one range for a whole tensor, not one for each channel; "
            "name one that does: minmax, aciq_laplace, aciq_gauss or aciq"
        )
    method = f"{calibrator.name}: {chosen.winner}" if chosen.errors else calibrator.name
    kept = chosen if spec.headroom == 1.0 else Range(chosen.lo * spec.headroom, chosen.hi * spec.headroom)
    if spec.bound is not None:
        kept = Range(np.maximum(kept.lo, spec.bound[0]), np.minimum(kept.hi, spec.bound[1]))
    return affine.params_from_range(kept, spec, method), chosen.errors


def _fixed(ends: tuple[float, float]) -> Range:
    return Range(np.asarray(ends[0], np.float64), np.asarray(ends[1], np.float64))


def quantize_weight(values: Array, spec: QuantSpec, calibrator: str = "minmax") -> QuantizedWeight:
    """Codes of a constant whose range covers all its values, or with "mse" makes the least error, or is the user's."""
    chosen = affine.tensor_range(values, spec) if spec.fixed is None else _fixed(spec.fixed)
    params = affine.params_from_range(chosen, spec, "minmax" if spec.fixed is None else "set by the user")
    if calibrator == "mse" and spec.fixed is None:
        params = least_squares(values, params)
    return QuantizedWeight(affine.quantize(values, params), params)

"""Choose scale and zero point for everything planned: activations by the calibrator, weights from their values.

A weight's scale is raised where the layer's int32 bias would overflow otherwise: S_w >= |b| / (S_x * 2^30), per
channel.
"""

from __future__ import annotations

from collections.abc import Mapping, Set
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, cast

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
from qdqtool.planning import channel_widths
from qdqtool.planning.plan import Key, Use, params_of
from qdqtool.planning.precision import width
from qdqtool.recipe import Recipe
from qdqtool.spec import FloatArray, QuantizedWeight, QuantParams, QuantSpec, Range
from qdqtool.statistics.distribution import channels_of
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
        calibrator, own = _calibrators(state.recipe)
        params: dict[Key, QuantParams | QuantizedWeight] = {}
        cache: dict[tuple[str, QuantSpec], tuple[QuantParams, Mapping[str, float]]] = {}
        for key, spec in state.plan.specs():
            if key not in state.plan.constants:
                tensor = state.plan.tensors[key]
                if (tensor, spec) not in cache:
                    stats = state.statistics[tensor] if spec.fixed is None else None
                    cache[tensor, spec] = activation_params(own.get(tensor, calibrator), stats, spec)
                params[key], errors = cache[tensor, spec]
                state.compared |= {key: errors} if errors else {}
        _check_used(own, {tensor for tensor, spec in cache if spec.fixed is None})
        tensors = graphs.all_tensors(state.graph)
        for key, spec in state.plan.specs():
            if key in state.plan.constants:
                values = cast(Array, graphs.constant(tensors[state.plan.tensors[key]]))
                params[key] = _weight(values, spec, state.recipe)
        state.params = params
        _make_room_for_biases(state, params)
        if state.recipe.bits_per_channel != "off":
            self._tell_of_channels(state, params)
        return len(params)

    def _tell_of_channels(self, state: State, params: Mapping[Key, QuantParams | QuantizedWeight]) -> None:
        """Record what has the same bits in all channels against the recipe, and which kernels that leaves."""
        assert state.plan is not None
        kernels = dict(state.plan.kernels)
        for key, spec in state.plan.specs():
            what: Literal["weights", "activations"] = "weights" if key in state.plan.constants else "activations"
            stored = params_of(params[key]).spec.format
            if spec.allocation is None and width(spec) < channel_widths.GREATEST and state.recipe.allocates(what):
                state.skip(self.name, _place(key), f"{what}: {_why_alike(spec)}, so every channel has the same bits")
            if spec.allocation is not None and stored != spec.format and _place(key) in kernels:
                del kernels[_place(key)]
                kept = f"no channel needs more bits, so its weight is stored as {stored.name}"
                state.skip(self.name, _place(key), f"{kept} (storage int8: the same codes in 8 bits)")
        if any(spec.allocation is not None and key not in state.plan.constants for key, spec in state.plan.specs()):
            state.notes.append(
                "activations have bits of their own in every channel: Max and Min keep them there before "
                "QuantizeLinear, an emulation in float that no kernel fuses"
            )
        state.plan = replace(state.plan, kernels=kernels)


def _place(key: Key) -> str:
    return key.node if isinstance(key, Use) else key.tensor


def _why_alike(spec: QuantSpec) -> str:
    if spec.fixed is not None:
        return "the range is the user's"
    return "there is one scale" if spec.granularity.axis is None else "the type is the user's"


def _calibrators(recipe: Recipe) -> tuple[Calibrator, dict[str, Calibrator]]:
    """The recipe's calibrator, and by tensor those that it overrides it with."""
    own = {name: one.calibrator for name, one in recipe.tensors.items() if one.calibrator is not None}
    made = {name: registry.make("calibrators", one.name, one.options) for name, one in own.items()}
    return registry.make("calibrators", recipe.calibrator.name, recipe.calibrator.options), made


def _check_used(own: Mapping[str, Calibrator], chosen: Set[str]) -> None:
    """Refuse a calibrator for a tensor whose range no calibrator chooses."""
    for name in own:
        if name not in chosen:
            raise RecipeError(
                f"tensors override {name!r}: calibrator has no effect, because this tensor is a constant, has a range "
                f"of its own, or was renamed when smoothing put a Mul behind it; leave it out"
            )


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
    if spec.allocation is not None:
        seen = channels_of(stats)
        return channel_widths.activation(lambda one: _range(calibrator, stats, one), seen, spec, calibrator.name), {}
    chosen = _range(calibrator, stats, spec)
    method = f"{calibrator.name}: {chosen.winner}" if chosen.errors else calibrator.name
    return affine.params_from_range(chosen, spec, method), chosen.errors


def _range(calibrator: Calibrator, stats: TensorStatistics, spec: QuantSpec) -> Range:
    """The calibrator's range with the spec's headroom, inside the spec's bound."""
    chosen = choose(calibrator, stats, spec)
    if spec.granularity.axis is not None and chosen.lo.ndim == 0:
        raise RecipeError(
            f"calibrator {calibrator.name!r} chooses one range for a whole tensor, not one for each channel; "
            "name one that does: minmax, mse, aciq_laplace, aciq_gauss or aciq"
        )
    kept = replace(chosen, lo=chosen.lo * spec.headroom, hi=chosen.hi * spec.headroom)
    if spec.bound is not None:
        kept = replace(kept, lo=np.maximum(kept.lo, spec.bound[0]), hi=np.minimum(kept.hi, spec.bound[1]))
    return kept


def _fixed(ends: tuple[float, float]) -> Range:
    return Range(np.asarray(ends[0], np.float64), np.asarray(ends[1], np.float64))


def _weight(values: Array, spec: QuantSpec, recipe: Recipe) -> QuantizedWeight:
    """Codes of a constant by the recipe's calibrator of weights."""
    wanted: str = recipe.weight_calibrator
    if wanted == "auto":
        wanted = "mse" if width(spec) <= _TERNARY and spec.allocation is None else "minmax"
    if spec.allocation is None:
        return quantize_weight(values, spec, wanted)
    most = channel_widths.REDUCED if recipe.reduce_range else channel_widths.GREATEST
    found = channel_widths.weight(values, spec, wanted, most)
    return found if recipe.storage == "int8" else channel_widths.packed(found)


def quantize_weight(values: Array, spec: QuantSpec, calibrator: str = "minmax") -> QuantizedWeight:
    """Codes of a constant whose range covers all its values, or with "mse" makes the least error, or is the user's."""
    chosen = affine.tensor_range(values, spec) if spec.fixed is None else _fixed(spec.fixed)
    params = affine.params_from_range(chosen, spec, "minmax" if spec.fixed is None else "set by the user")
    if calibrator == "mse" and spec.fixed is None:
        params = least_squares(values, params)
    return QuantizedWeight(affine.quantize(values, params), params)

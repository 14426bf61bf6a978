"""Factors that make the channels of an activation alike, weighed by the noise that quantization then adds.

    X W = (X diag(f)) (diag(1/f) W),    f_j = max|W_j|^(1-alpha) / max|X_j|^alpha

(Xiao et al., SmoothQuant, ICML 2023, equation 4, with f = 1/s). To the sums of output o, rounding X with step d adds
noise of variance d²/12 Σ_j W_oj², rounding row o of W with step d_o adds d_o²/12 Σ_j E[X_j²]; both are known for
every f from what was seen of the channels. The alpha with the least noise is taken, or none at all.
"""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Final, cast

import numpy as np

from qdqtool.graphs.channel_paths import ChannelPath
from qdqtool.graphs.layer_input import LayerInput
from qdqtool.graphs.weight_matrix import WeightMatrix
from qdqtool.planning.plan import Plan, Use
from qdqtool.spec import FloatArray, QuantSpec
from qdqtool.statistics.tensor import Statistics

ALPHAS: Final = (0.25, 0.5)
"""Higher ones leave rarely active channels no room for what new data hold."""
HEADROOM: Final = 1.125
"""By this a smoothed tensor's range is widened: all its channels come near the ends, so more new values do, too."""
_LEAST: Final = 1 / 32
"""A channel is taken to reach at least this share of the greatest one's magnitude: it may have been seen too rarely."""


@dataclass(frozen=True)
class Smoothing:
    """What was chosen for one tensor.

    Attributes:
        factors: what its channels are multiplied by, float64 (channels,).
        gain: noise without them, divided by that with them.
    """

    factors: FloatArray
    gain: float


@dataclass(frozen=True)
class _Product:
    """A layer with what was seen of the channels it reads, and how both are quantized."""

    weight: WeightMatrix
    positions: int
    lo: FloatArray
    hi: FloatArray
    square: FloatArray
    activation: QuantSpec
    coded: QuantSpec

    def noise(self, factors: FloatArray, headroom: float) -> float:
        """Variance added to all outputs."""
        lo, hi = float((self.lo * factors).min()), float((self.hi * factors).max())
        width = 2 * max(-lo, hi) if self.activation.symmetric else max(hi, 0.0) - min(lo, 0.0)
        step = headroom * width / self.activation.steps
        weight = self.weight.scaled(1 / factors)
        peaks = weight.peak.max(axis=2)
        if self.coded.granularity.axis is None:
            peaks = np.full_like(peaks, peaks.max())
        squares = (self.square * factors**2).reshape(len(peaks), 1, -1).sum(axis=2) * self.positions
        steps = 2 * peaks / self.coded.steps
        return float((weight.power.sum() * step**2 + (steps**2 * squares).sum()) / 12)


def choose(path: ChannelPath, plan: Plan, statistics: Statistics, *, alphas: Sequence[float] = ALPHAS) -> Smoothing:
    """The factors with the least expected noise; all 1 where none help."""
    products = [one for layer in path.layers if (one := _product(layer, plan, statistics)) is not None]
    best = Smoothing(np.ones(path.channels), 1.0)
    plain = sum(one.noise(best.factors, 1.0) for one in products)
    for alpha in alphas:
        factors = _factors(products, path.channels, alpha)
        noise = sum(one.noise(factors, HEADROOM) for one in products)
        gain = plain / noise if noise > 0 else 1.0
        if gain > best.gain:
            best = Smoothing(factors, gain)
    return best


def _product(layer: LayerInput, plan: Plan, statistics: Statistics) -> _Product | None:
    """A layer that runs in integers, as far as its input was observed."""
    node = layer.layer.node
    source, weight = specs(layer, plan)
    seen = statistics[node.inputs[0].name].channels
    if source is None or weight is None or seen is None or not seen.channels:
        return None
    positions = int(np.prod(layer.layer.weight.shape[2:])) if layer.axis == 1 else 1
    matrix = WeightMatrix.of(layer.layer)
    return _Product(matrix, positions, seen.lo, seen.hi, seen.second_moment, source, weight)


def specs(layer: LayerInput, plan: Plan) -> tuple[QuantSpec | None, QuantSpec | None]:
    """How a layer's input and weight are quantized; None where they are not."""
    node = layer.layer.node
    key, weight = plan.activation_of(node.name, 0, node.inputs[0].name), Use(node.name, 1)
    found = [plan.entries[plan.resolve(each)] if each in plan.entries else None for each in (key or weight, weight)]
    source, coded = (cast("QuantSpec | None", entry) for entry in found)
    return (None if key is None else source), coded


def _factors(products: Sequence[_Product], channels: int, alpha: float) -> FloatArray:
    """Equation 4, over all layers that read the tensor; the geometric mean of the factors is 1."""
    values, weights = np.zeros(channels), np.zeros(channels)
    for one in products:
        values = np.maximum(values, np.maximum(-one.lo, one.hi))
        weights = np.maximum(weights, one.weight.inputs())
    used = (values > 0) & (weights > 0)
    if not used.any():
        return np.ones(channels)
    values = np.maximum(values, _LEAST * values.max())
    factors = np.divide(weights ** (1 - alpha), values**alpha, out=np.zeros(channels), where=used)
    factors[~used] = factors[used].min()
    return cast(FloatArray, factors / np.exp(np.log(factors).mean()))


def channel_tensors(path: ChannelPath, observed: Container[str]) -> dict[str, int]:
    """Tensors on a path whose channels must be observed -> their axis: those layers read, and all observed anyway."""
    read = {layer.layer.node.inputs[0].name for layer in path.layers}
    return {name: axis for name, axis in path.axes.items() if name in read or name in observed}

"""Scales of a weight that make the least squared error, and those that keep a channel's norm.

For given codes q (zero point taken off) the best scale is S = Σ w q / Σ q², for a given scale the best codes are the
nearest: turn by turn both only lower Σ (w - S q)² (Lloyd, Least squares quantization in PCM, 1982). The start is the
best of a grid below the scale that covers all values, as there are several minima.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final, cast

import numpy as np

from qdqtool.graphs.graph import Array
from qdqtool.spec import FloatArray, QuantizedWeight, QuantParams, Scheme

_GRID: Final = np.geomspace(1.0, 1 / 16, 33)
"""Scales tried, as shares of that which covers all values; a Gaussian's best one is above a third even at 2 bits."""
_TURNS: Final = 4
_ROOM: Final = 2.0
"""Largest change of a scale that keeps its norm: half of int32 is left free for the bias, whose unit it changes too."""


def least_squares(values: Array, params: QuantParams) -> QuantParams:
    """The parameters with scales of least squared error in every group that shares one; per block they stay.

    Args:
        values: the float weight.
        params: scales that cover all its values, and zero points, which stay.
    """
    if params.spec.granularity.scheme is Scheme.PER_BLOCK:
        return params
    rows = _groups(values, params)
    start = params.scale.astype(np.float64).reshape(-1)
    ends = zip(*((end - params.zero_point).reshape(-1).tolist() for end in (params.qmin, params.qmax)), strict=True)
    found = np.array([_best(row, scale, *limits) for row, scale, limits in zip(rows, start, ends, strict=True)])
    return replace(params, scale=found.reshape(params.scale.shape).astype(np.float32), method="mse")


def _best(row: FloatArray, start: float, least: float, greatest: float) -> float:
    """The scale of one group."""

    def error(scale: float) -> float:
        return float(((row - scale * np.clip(np.rint(row / scale), least, greatest)) ** 2).sum())

    scale = start * float(min(_GRID, key=lambda share: error(start * share)))
    for _ in range(_TURNS):
        codes = np.clip(np.rint(row / scale), least, greatest)
        power = float(codes @ codes)
        if power == 0:  # a group of zeros
            return start
        scale = float(row @ codes) / power
    return min(scale, start)


def norm_kept(values: Array, weight: QuantizedWeight) -> QuantizedWeight:
    """The codes with scales by which each group keeps its norm about its mean.

        S_c <- ξ_c S_c,    ξ_c = ||w_c - E w_c|| / ||w^q_c - E w^q_c||

    (Banner et al., Post training 4-bit quantization of convolutional networks, NeurIPS 2019, section 4; the mean's
    offset is a bias, which the means of the layer's outputs tell better.) Per block, and where all codes of a group are
    equal, scales stay.
    """
    params = weight.params
    if params.spec.granularity.scheme is Scheme.PER_BLOCK:
        return weight
    wanted, codes = _groups(values, params), _groups(weight.codes, params)
    scale = params.scale.astype(np.float64).reshape(-1)
    norms = scale * np.linalg.norm(codes - codes.mean(axis=1, keepdims=True), axis=1)
    whole = np.linalg.norm(wanted - wanted.mean(axis=1, keepdims=True), axis=1)
    factor = np.divide(whole, norms, out=np.ones_like(norms), where=(norms > 0) & (whole > 0))
    changed = (scale * np.clip(factor, 1 / _ROOM, _ROOM)).reshape(params.scale.shape).astype(np.float32)
    return QuantizedWeight(weight.codes, replace(params, scale=changed, method=f"{params.method}, norm kept"))


def _groups(values: Array, params: QuantParams) -> FloatArray:
    """Values as float64 rows, one for each scale."""
    axis = params.spec.granularity.axis
    moved = values if axis is None else np.moveaxis(values, axis, 0)
    return cast(FloatArray, moved.reshape(max(params.scale.size, 1), -1).astype(np.float64))

"""Expected squared error of every channel of a tensor, and the ranges of least error.

Of an observed activation it is read off the channels' coarse histograms, of a weight it is that of the values
themselves. Both are asked for many ranges and widths at once, so all channels are done together.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Final, cast

import numpy as np

from qdqtool.arithmetic import affine
from qdqtool.spec import FloatArray, QuantParams, QuantSpec, Range
from qdqtool.statistics.channel_statistics import ChannelStatistics
from qdqtool.statistics.histogram import Bins

_SHARES: Final = np.geomspace(1.0, 1 / 16, 19)
"""Ranges tried, as shares of that which covers all; at 2 bits a Gaussian's best one is above a third."""
_AROUND: Final = np.geomspace(0.6, 1.5, 8)
_PIECE: Final = 1 << 18  # values of a weight looked at together
_POINTS: Final = 512
"""Values that stand for a longer channel of a weight: one from each of so many quantiles."""

Errors = Callable[[Range], FloatArray]


def of_statistics(stats: ChannelStatistics, chosen: Range, spec: QuantSpec) -> FloatArray:
    """Mean squared error of each channel quantized by its own range, float64 (channels,)."""
    return _scored(Bins(*stats.bins), stats, spec)(chosen)


def least_of_statistics(stats: ChannelStatistics, spec: QuantSpec) -> Range:
    """The range of least expected error of each channel, its ends searched together and then apart."""
    return _least(Range(stats.lo, stats.hi), _scored(Bins(*stats.bins), stats, spec), apart=not spec.symmetric)


def _scored(bins: Bins, stats: ChannelStatistics, spec: QuantSpec) -> Errors:
    each = replace(spec, bound=None)

    def errors(chosen: Range) -> FloatArray:
        params = affine.params_from_range(chosen, each)
        least = (each.qmin - params.zero_point)[:, None]
        total = affine.error_by_bin(bins, params.scale.astype(np.float64)[:, None], least, each.steps)
        return np.maximum(total, 0) / np.maximum(stats.count, 1)

    return errors


def _least(whole: Range, errors: Errors, *, apart: bool) -> Range:
    """The best of some shares of ``whole`` in each channel."""
    best, lo, hi = errors(whole), whole.lo.copy(), whole.hi.copy()

    def attempt(new_lo: FloatArray, new_hi: FloatArray) -> None:
        found = errors(Range(new_lo, new_hi))
        better = found < best
        best[better], lo[better], hi[better] = found[better], new_lo[better], new_hi[better]

    for share in _SHARES[1:].tolist():
        attempt(whole.lo * share, whole.hi * share)
    if apart and ((whole.lo < 0) & (whole.hi > 0)).any():
        middle = lo.copy(), hi.copy()
        for factor in _AROUND.tolist():
            attempt(np.maximum(middle[0] * factor, whole.lo), hi.copy())
        for factor in _AROUND.tolist():
            attempt(lo.copy(), np.minimum(middle[1] * factor, whole.hi))
    return Range(lo, hi)


def of_weight(rows: FloatArray, spec: QuantSpec, *, least: bool) -> FloatArray:
    """Mean squared error of each channel of a weight, rounded to nearest, float64 (channels,).

    Args:
        rows: float64 (channels, values of a channel).
        spec: codes of every channel.
        least: by the range of least error; else by that which covers all values.
    """
    step = max(1, _PIECE // max(rows.shape[1], 1))
    parts = [_weight_errors(rows[i : i + step], spec, least=least) for i in range(0, len(rows), step)]
    return np.concatenate(parts) if parts else np.empty(0)


def _weight_errors(rows: FloatArray, spec: QuantSpec, *, least: bool) -> FloatArray:
    points = _representative(rows)

    def errors(chosen: Range) -> FloatArray:
        return _rounding_error(points, affine.params_from_range(chosen, spec))

    whole = Range(rows.min(axis=1, initial=0.0), rows.max(axis=1, initial=0.0))
    return errors(_least(whole, errors, apart=False)) if least else errors(whole)


def _rounding_error(rows: FloatArray, params: QuantParams) -> FloatArray:
    scale = params.scale.astype(np.float64)[:, None]
    low, high = ((end - params.zero_point)[:, None] for end in (params.qmin, params.qmax))
    left = rows - scale * np.clip(np.rint(rows / scale), low, high)
    return cast(FloatArray, np.mean(left * left, axis=1)) if rows.shape[1] else np.zeros(len(rows))


def _representative(rows: FloatArray) -> FloatArray:
    """The rows, or of long ones the middles of as many quantiles as stand for them."""
    size = rows.shape[1]
    if size <= _POINTS:
        return rows
    places = ((np.arange(_POINTS) + 0.5) * size / _POINTS).astype(np.int64)
    return np.sort(rows, axis=1)[:, places]

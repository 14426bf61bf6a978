"""Statistics of a tensor whose channels have been multiplied by factors, from those of the tensor before.

Extremes follow exactly. A histogram follows from those of the channels, whose bins are an eighth to a sixteenth of a
power of two wide and spread evenly here. What single samples held of each channel is not known: their extremes are
scaled as those of all.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from qdqtool.errors import StatisticsError
from qdqtool.spec import FloatArray
from qdqtool.statistics.channel_statistics import ChannelStatistics
from qdqtool.statistics.histogram import Histogram
from qdqtool.statistics.tensor import TensorStatistics

_PARTS: Final = 4  # values that stand for those of a bin
_FRACTIONS: Final = (np.arange(_PARTS) + 0.5) / _PARTS
_BIN_SHIFT: Final = 19  # of a channel's bins: sign, exponent and four mantissa bits
_HISTOGRAM_SHIFT: Final = 13  # of a tensor's bins: six mantissa bits more


def rescaled(source: TensorStatistics, factors: FloatArray) -> TensorStatistics:
    """Statistics after a multiplication of the channels by positive factors, float64 (channels,).

    Those of the channels do not come along.

    Raises:
        StatisticsError: the channels were not observed.
    """
    channels = source.channels
    if channels is None or channels.channels not in (0, factors.size):
        raise StatisticsError("the channels of the tensor were not observed; observe the data again")
    if channels.channels == 0:
        return source
    records = source.records.copy()
    for name, end, before in (
        ("lo", float((channels.lo * factors).min()), source.lo),
        ("hi", float((channels.hi * factors).max()), source.hi),
    ):
        records[name] *= np.float32(end / before if before else 1.0)
    return TensorStatistics.of(
        _histogram(channels, factors),
        records,
        nan=source.nan,
        inf=source.inf,
        first_non_finite=source.first_non_finite,
    )


def _histogram(channels: ChannelStatistics, factors: FloatArray) -> Histogram:
    """The histogram of all channels together."""
    arrays = channels.arrays()
    values, counts = [], []
    for page, bins in zip(arrays["pages"].tolist(), arrays["bins"].astype(np.int64), strict=True):
        sign = -1.0 if page >= 256 else 1.0
        edges = (np.arange(17, dtype=np.uint32) + np.uint32(page % 256 * 16)) << np.uint32(_BIN_SHIFT)
        low = np.minimum(edges.view(np.float32), np.finfo(np.float32).max).astype(np.float64)
        centers = low[:-1, None] + np.diff(low)[:, None] * _FRACTIONS
        channel, place = np.nonzero(bins)
        found = sign * centers[place]
        found = np.clip(found, channels.lo[channel, None], channels.hi[channel, None]) * factors[channel, None]
        share, rest = np.divmod(bins[channel, place], _PARTS)
        values.append(found)
        counts.append(share[:, None] + (np.arange(_PARTS) < rest[:, None]))
    if not values:
        return Histogram.from_arrays(int(channels.count.sum()), np.empty(0, np.uint32), np.empty(0, np.int64))
    flat, number = np.concatenate(values).reshape(-1), np.concatenate(counts).reshape(-1)
    keys = flat[number > 0].astype(np.float32).view(np.uint32) >> np.uint32(_HISTOGRAM_SHIFT)
    zeros = int(channels.count.sum() - number.sum())
    return Histogram.from_arrays(zeros, keys, number[number > 0])

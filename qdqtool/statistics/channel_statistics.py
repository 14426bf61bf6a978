"""Mergeable statistics of a tensor's channels: counts, extremes, sums of x, x² and |x|, and a coarse histogram.

All of it merges bit for bit in any order, batch size and partition. Counts are integers, extremes are values that were
seen, and of sums of floats each *sample's* own is added exactly (:mod:`qdqtool.statistics.exact_sum`). A sample's sum
is a tree of elementwise additions whose form depends on the sample's shape alone: the values of a channel lie along the
first axis, and its last half is added onto its first until one row is left. numpy's own sums may run in another order
where another axis is longer; elementwise additions cannot.

With m the mean, N the number of values and N₊ that of values with m's sign,

    Σ|x - m| = Σ|x| + |m|(N - 2N₊) + 2 Σ_{x between 0 and m} (|m| - |x|)

where only the last sum is read off the histogram; values elsewhere enter through the sums.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qdqtool.errors import StatisticsError
from qdqtool.spec import FloatArray, IntArray
from qdqtool.statistics.exact_sum import CoarseBins, ExactSum

_CHUNK: Final = 1 << 16  # elements looked at together; their temporaries stay in the cache
_RUN: Final = 16  # channels taken together where they are neighbours in memory
_ARRAYS: Final = ("count", "lo", "hi", "pages", "bins")  # that are saved beside those of the sums

Float32 = npt.NDArray[np.float32]


class ChannelStatistics:
    """What was seen of each channel of one tensor; ``observe`` adds to it, ``|`` merges two exactly.

    NaN and Inf are left out of everything; float64 values beyond float32 count as Inf. What is asked of a channel
    that had no value to tell it is 0.

    Args:
        axis: the channel axis, which may be negative; every axis before it belongs to the samples.
    """

    def __init__(self, axis: int) -> None:
        self.axis = axis
        self._start(0)

    def _start(self, channels: int) -> None:
        self._count = np.zeros(channels, np.int64)
        self._lo = np.full(channels, np.inf, np.float32)
        self._hi = np.full(channels, -np.inf, np.float32)
        self._sums = ExactSum(3 * channels)  # of x, of x² and of |x|, one after the other
        self._bins = CoarseBins(channels)

    def observe(self, values: npt.NDArray[Any], rows: int) -> None:
        """Add a batch.

        Args:
            values: float array, sample after sample in memory order; the product of the extents before the channel
                axis is a multiple of ``rows``.
            rows: number of samples.

        Raises:
            StatisticsError: there is no such axis, it holds the samples, or it had another number of channels before.
        """
        if values.size == 0:
            return
        block = self._arranged(values, rows)
        channels = block.shape[2]
        if self.channels not in (0, channels):
            raise StatisticsError(
                f"axis {self.axis} has {channels} channels, and had {self.channels} in samples before; "
                "a tensor whose channels vary has no statistics for each of them: quantize it per tensor"
            )
        if not self.channels:
            self._start(channels)
        self._bins.widen(int(self._count.max()) + values.size // channels)
        sums = np.empty((rows, 3, channels))
        for some, few in _chunks(block.shape):
            sums[some, :, few] = self._add(block[some, :, few], few)
        self._sums.add(sums.reshape(rows, -1))
        self.__dict__.pop("_moments", None)

    def _arranged(self, values: npt.NDArray[Any], rows: int) -> Float32:
        """The values as float32 (samples, positions before the channels, channels, positions after them)."""
        if not -values.ndim <= self.axis < values.ndim:
            raise StatisticsError(
                f"a tensor of shape {values.shape} has no axis {self.axis}; name one it has, or quantize it per tensor"
            )
        axis = self.axis % values.ndim
        before, after = math.prod(values.shape[:axis]), math.prod(values.shape[axis + 1 :])
        if before % rows:
            raise StatisticsError(
                f"axis {self.axis} of a tensor of shape {values.shape} holds its {rows} samples; "
                "name the axis of its channels, or quantize it per tensor"
            )
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes Inf
            flat = np.ascontiguousarray(values, np.float32)
        return flat.reshape(rows, before // rows, values.shape[axis], after)

    def _add(self, part: Float32, few: slice) -> FloatArray:
        """Add a part of a batch, with all positions of its channels; returns each sample's sums (samples, 3, few)."""
        samples, before, channels, after = part.shape
        lo, hi = part.min(axis=(0, 1, 3)), part.max(axis=(0, 1, 3))
        count = np.full(channels, samples * before * after)
        if not (np.isfinite(lo).all() and np.isfinite(hi).all()):
            finite = np.isfinite(part)
            count = finite.sum(axis=(0, 1, 3))
            lo = np.where(finite, part, np.float32(np.inf)).min(axis=(0, 1, 3))
            hi = np.where(finite, part, np.float32(-np.inf)).max(axis=(0, 1, 3))
            part = np.where(finite, part, np.float32(0))  # adds nothing, and zeros have no bin
        self._count[few] += count
        self._lo[few] = np.minimum(self._lo[few], lo + np.float32(0))  # -0.0 becomes 0.0
        self._hi[few] = np.maximum(self._hi[few], hi + np.float32(0))
        self._bins.add(part, few.start)
        return _sums(part, signed=bool(lo.min() < 0))

    @property
    def channels(self) -> int:
        """Number of channels; 0 before anything was seen."""
        return self._count.size

    @property
    def count(self) -> IntArray:
        """Number of finite values, int64 (channels,)."""
        return self._count.copy()

    @property
    def positive(self) -> IntArray:
        """Number of values above 0, int64 (channels,)."""
        return self._bins.total(negative=False)

    @property
    def lo(self) -> FloatArray:
        """Least value, exact, float64 (channels,)."""
        return np.where(self._count > 0, self._lo, 0).astype(np.float64)

    @property
    def hi(self) -> FloatArray:
        """Greatest value, exact, float64 (channels,)."""
        return np.where(self._count > 0, self._hi, 0).astype(np.float64)

    @cached_property
    def _moments(self) -> FloatArray:
        """Σx, Σx² and Σ|x|, float64 (3, channels), rounded once."""
        return self._sums.value().reshape(3, -1)

    @property
    def bins(self) -> tuple[FloatArray, FloatArray, IntArray]:
        """The coarse histogram of non-zero values: lower and upper edges (bins,) and counts (channels, bins)."""
        return self._bins.signed()

    @property
    def mean(self) -> FloatArray:
        """E[X], float64 (channels,)."""
        return np.clip(_ratio(self._moments[0], self._count), self.lo, self.hi)

    @property
    def second_moment(self) -> FloatArray:
        """E[X²], float64 (channels,)."""
        return _ratio(self._moments[1], self._count)

    @property
    def mean_abs(self) -> FloatArray:
        """E|X|, float64 (channels,)."""
        return _ratio(self._moments[2], self._count)

    @property
    def variance(self) -> FloatArray:
        """E[X²] - E[X]², float64 (channels,); its error is some 1e-15 of E[X²], and a constant channel has 0.

        It is held to 0 <= variance <= (hi - mean)(mean - lo) (Bhatia and Davis: A better bound on the variance, 2000).
        """
        mean = self.mean
        return np.clip(self.second_moment - mean**2, 0, (self.hi - mean) * (mean - self.lo))

    @property
    def b(self) -> FloatArray:
        """Mean deviation E|X - E[X]|, float64 (channels,), the scale of a Laplace prior; never above √variance.

        Exact but for values between 0 and the mean, which are taken as spread evenly over their bins.
        """
        mean = self.mean
        near = np.where(mean >= 0, self._bins.total(negative=False), self._bins.total(negative=True))
        between = self._bins.shortfall(mean, negative=False) + self._bins.shortfall(-mean, negative=True)
        total = self._moments[2] + np.abs(mean) * (self._count - 2 * near) + 2 * between
        return np.clip(_ratio(total, self._count), 0, np.sqrt(self.variance))

    @property
    def mean_positive(self) -> FloatArray:
        """E[X | X > 0], float64 (channels,): behind a ReLU, b of the tensor before it where that has mean 0."""
        return _ratio((self._moments[2] + self._moments[0]) / 2, self.positive)

    @property
    def rms_positive(self) -> FloatArray:
        """√E[X² | X > 0], float64 (channels,): behind a ReLU, σ of the tensor before it where that has mean 0.

        Exact in channels without negative values; elsewhere the histogram says which share of Σx² is theirs.
        """
        above, below = self._bins.squares(negative=False), self._bins.squares(negative=True)
        share = np.divide(above, above + below, out=np.zeros(self.channels), where=above > 0)
        return np.sqrt(_ratio(self._moments[1] * share, self.positive))

    def __or__(self, other: ChannelStatistics) -> ChannelStatistics:
        if self.axis != other.axis or (self.channels and other.channels and self.channels != other.channels):
            raise StatisticsError(
                f"statistics of {self.channels} channels on axis {self.axis} do not merge with those of "
                f"{other.channels} on axis {other.axis}; observe both with one model and one plan"
            )
        merged = ChannelStatistics(self.axis)
        merged._start(max(self.channels, other.channels))
        for source in (s for s in (self, other) if s.channels):
            merged._count += source._count
            np.minimum(merged._lo, source._lo, out=merged._lo)
            np.maximum(merged._hi, source._hi, out=merged._hi)
            merged._sums |= source._sums
            merged._bins.include(*source._bins.ordered(), int(merged._count.max()))
        return merged

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ChannelStatistics):
            return NotImplemented
        mine, theirs = self.arrays(), other.arrays()
        return self.axis == other.axis and all(np.array_equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]  # a counter that changes is no key

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The state, to be saved: exact, and the same for equal statistics.

        Returns:
            ``count``: int64 (channels,). ``lo``, ``hi``: float32 (channels,), infinite where nothing was seen.
            ``addends``, ``windows``, ``counters``: as :meth:`ExactSum.arrays` of 3 * channels sums. ``pages``: int64
            (n,), ascending, and ``bins``: (n, channels, 16), the counts of :class:`CoarseBins`, uint32 where every
            ``count`` is below 2^32, else int64.
        """
        pages, bins = self._bins.ordered()
        bins = bins.astype(np.int64 if (self._count >> 32).any() else np.uint32, copy=False)
        state = (self._count.copy(), self._lo.copy(), self._hi.copy(), pages, bins)
        return self._sums.arrays() | dict(zip(_ARRAYS, state, strict=True))

    @classmethod
    def from_arrays(cls, axis: int, arrays: Mapping[str, npt.NDArray[Any]]) -> ChannelStatistics:
        """The statistics that :meth:`arrays` described.

        Raises:
            StatisticsError: an array is missing, or they do not fit each other.
        """
        sums = ExactSum.from_arrays(arrays)
        if not _fit(arrays, sums.channels):
            raise StatisticsError("saved statistics of channels are damaged; observe the data again")
        made = cls(axis)
        made._start(sums.channels // 3)
        made._sums = sums
        made._count[:], made._lo[:], made._hi[:] = arrays["count"], arrays["lo"], arrays["hi"]
        made._bins.include(arrays["pages"], arrays["bins"], int(made._count.max(initial=0)))
        return made


def _fit(arrays: Mapping[str, npt.NDArray[Any]], sums: int) -> bool:
    """Whether all arrays are there and can be those of one tensor's channels, beside so many sums."""
    if not arrays.keys() >= set(_ARRAYS):
        return False
    count, lo, hi, pages, bins = (arrays[name] for name in _ARRAYS)
    if count.dtype != np.int64 or lo.dtype != np.float32 or hi.dtype != np.float32:
        return False
    whole = count.shape == lo.shape == hi.shape and count.ndim == 1 and 3 * count.size == sums
    return whole and CoarseBins.are_pages(pages, bins, count)


def _chunks(shape: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Samples and channels to look at together; the positions of a channel in a sample are never parted."""
    samples, before, channels, after = shape
    some = max(_CHUNK // (before * channels * after), 1)
    few = min(max(_CHUNK // (before * after), _RUN // after, 1), channels)
    for sample in range(0, samples, some):
        for channel in range(0, channels, few):
            yield slice(sample, min(sample + some, samples)), slice(channel, min(channel + few, channels))


def _sums(part: Float32, signed: bool) -> FloatArray:
    """Σx, Σx² and Σ|x| of each sample's channels, float64 (samples, 3, channels); see the module's docstring."""
    samples, before, channels, after = part.shape
    rows = before * after
    table = np.empty((3 if signed else 2, rows, samples * channels))
    table[0].reshape(before, after, samples, channels)[...] = part.transpose(1, 3, 0, 2)
    np.multiply(table[0], table[0], out=table[1])
    if signed:
        np.abs(table[0], out=table[2])
    while rows > 1:
        half = rows // 2
        table[:, :half] += table[:, rows - half : rows]
        rows -= half
    sums = table[[0, 1, 2 if signed else 0], 0]
    return sums.reshape(3, samples, channels).swapaxes(0, 1)


def _ratio(total: FloatArray, count: IntArray) -> FloatArray:
    """The mean of what was counted, 0 where nothing was."""
    return np.divide(total, count, out=np.zeros(count.size), where=count > 0)

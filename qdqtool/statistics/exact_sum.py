"""Counters for each channel of a tensor that add exactly: one state, in any order, partition and merge tree.

:class:`ExactSum`: a float64 v = m * 2^e (as numpy's frexp has it, m of 53 bits) belongs to the window w = e // 8 of
eight exponents. There it is an integer of at most 60 bits, v = (h * 2^30 + l) * 2^(8w - 53) with 0 <= l < 2^30 and
-2^30 <= h < 2^30. Both halves are added to int64 counters of the window. They depend on nothing but the values, and
are rounded once, when the sum is asked for. (A sum of correctly rounded sums, as fsum gives them, is not the correctly
rounded sum, and would depend on the partition.) A counter holds 2^33 halves before it could overflow: addends are
counted, and more of them are an error.

:class:`CoarseBins` counts values by sign, exponent and four mantissa bits of the float32.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qdqtool.errors import StatisticsError
from qdqtool.spec import FloatArray, IntArray

CAPACITY: Final = 1 << 33
"""Greatest number of values that an :class:`ExactSum` adds in each channel."""

BINS: Final = 16
"""Number of bins between two powers of two in :class:`CoarseBins`."""

_MANTISSA: Final = 53
_WINDOW: Final = 8  # exponents that share counters
_HALF: Final = (_MANTISSA + _WINDOW - 1) // 2  # bits of the lower half
_SCALES: Final = 2.0 ** (_MANTISSA + np.arange(_WINDOW))
_CHUNK: Final = 1 << 16  # values added at once; their temporaries stay in the cache
_SHIFT: Final = 19  # leaves a float32's sign, exponent and four mantissa bits
_SIGN: Final = 1 << 31 - _SHIFT
_PAGES: Final = np.flatnonzero(np.arange(512) % 256 < 255)  # numbers a page can have; exponent 255: NaN and Inf
_EDGES: Final = np.append(
    (np.arange(255 * BINS, dtype=np.uint32) << _SHIFT).view(np.float32).astype(np.float64), 2.0**128
)


class ExactSum:
    """One exact sum of float64 values for each of ``channels`` channels; ``|`` merges two.

    Attributes:
        channels: number of channels.
        addends: number of values added in each channel, at most :data:`CAPACITY`.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.addends = 0
        self._windows: dict[int, IntArray] = {}  # e // 8 -> sums of the lower and of the upper halves (2, channels)

    def add(self, values: FloatArray) -> None:
        """Add one value to each channel, float64 (channels,), or several, (rows, channels).

        Raises:
            ValueError: a value is NaN or infinite, or the shape does not fit.
            StatisticsError: these are more than :data:`CAPACITY` values in each channel.
        """
        rows = np.atleast_2d(values)
        if rows.ndim != 2 or rows.shape[1] != self.channels:
            raise ValueError(f"values of shape {np.shape(values)} cannot be added to sums of {self.channels} channels")
        if not np.isfinite(rows).all():
            raise ValueError("NaN and infinite values have no exact sum; leave them out")
        self.addends = _within_capacity(self.addends + len(rows))
        step = max(_CHUNK // max(self.channels, 1), 1)
        for start in range(0, len(rows), step):
            self._add(rows[start : start + step])

    def _add(self, rows: FloatArray) -> None:
        fraction, exponent = np.frexp(rows)
        nonzero = fraction != 0
        if not nonzero.any():
            return
        exponent = np.where(nonzero, exponent, exponent[nonzero].min())  # a zero's own could lie far from the others
        window = exponent // _WINDOW
        first, last = int(window.min()), int(window.max())
        lower = fraction * _SCALES[exponent % _WINDOW]
        upper = np.floor(lower * 2.0**-_HALF)
        lower -= upper * 2.0**_HALF
        counter = ((window - first) * np.int64(self.channels) + np.arange(self.channels)).reshape(-1)
        shape = (last - first + 1, self.channels)
        # float64 sums of up to 2^16 halves stay under 2^53, and so are exact
        tables = [np.bincount(counter, half.reshape(-1), shape[0] * shape[1]) for half in (lower, upper)]
        for number, sums in enumerate(np.stack([t.reshape(shape) for t in tables], axis=1).astype(np.int64), first):
            self._add_window(number, sums)

    def _add_window(self, number: int, sums: IntArray) -> None:
        if number in self._windows:
            self._windows[number] += sums
        elif sums.any():
            self._windows[number] = sums.copy()

    def value(self) -> FloatArray:
        """The sums, each rounded once to nearest (ties to even); float64 (channels,), infinite beyond float64."""
        total = np.zeros(self.channels, object)
        least = above = max(self._windows, default=0)
        for least in sorted(self._windows, reverse=True):
            lower, upper = self._windows[least].astype(object)
            total = (total << _WINDOW * (above - least)) + (upper << _HALF) + lower
            above = least
        unit = _WINDOW * least - _MANTISSA
        return np.array([_rounded(integer, unit) for integer in total], np.float64)

    def __or__(self, other: ExactSum) -> ExactSum:
        if self.channels != other.channels:
            raise StatisticsError(
                f"sums of {self.channels} and of {other.channels} channels do not merge; observe both with one model"
            )
        merged = ExactSum(self.channels)
        merged.addends = _within_capacity(self.addends + other.addends)
        for source in (self, other):
            for number, sums in source._windows.items():
                merged._add_window(number, sums)
        return merged

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, ExactSum):
            return NotImplemented
        mine, theirs = self.arrays(), other.arrays()
        return all(np.array_equal(mine[name], theirs[name]) for name in mine)

    __hash__ = None  # type: ignore[assignment]  # a counter that changes is no key

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """The state, to be saved: exact, and the same for equal sums.

        Returns:
            ``addends``: int64 (). ``windows``: int64 (n,), ascending, those with counts. ``counters``: int64
            (n, 2, channels), each window's sums of lower and of upper halves.
        """
        numbers = sorted(number for number, sums in self._windows.items() if sums.any())  # x and -x leave zeros
        counters = np.zeros((len(numbers), 2, self.channels), np.int64)
        for index, number in enumerate(numbers):
            counters[index] = self._windows[number]
        return {
            "addends": np.array(self.addends, np.int64),
            "windows": np.array(numbers, np.int64),
            "counters": counters,
        }

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> ExactSum:
        """The sums that :meth:`arrays` described.

        Raises:
            StatisticsError: an array is missing, or they do not fit each other.
        """
        if not _are_sums(arrays):
            raise StatisticsError("saved sums are damaged; observe the data again")
        made = cls(arrays["counters"].shape[2])
        made.addends = int(arrays["addends"])
        for number, sums in zip(arrays["windows"].tolist(), arrays["counters"], strict=True):
            made._add_window(number, sums)
        return made


class CoarseBins:
    """Counts of a tensor's non-zero float32 values by sign, exponent and four mantissa bits, for each channel.

    A key is the float's upper 13 bits, rounded up, so that zeros alone have the keys of zeros: the magnitudes in a bin
    lie above its lower edge and up to its upper one. A page is one power of two of one sign, made on first use, and
    its number is the exponent field, with 256 added for negative values.

    Attributes:
        channels: number of channels.
        pages: int64 (pages,), their numbers in the order of their first use.
    """

    def __init__(self, channels: int) -> None:
        self.channels = channels
        self.pages: IntArray = np.empty(0, np.int64)
        # the first two are for zeros and for values that have no page yet, and empty between calls; pages follow
        self._counts: npt.NDArray[Any] = np.zeros((2, channels, BINS), np.uint32)
        self._index = np.full(2 * _SIGN, channels * BINS, np.int64)  # by key, of channel 0's counter in the flat counts
        self._index[::_SIGN] = 0

    def widen(self, most: int) -> None:
        """Make room for ``most`` values in a channel: counts are uint32, and int64 from 2^32 values on."""
        if most >= 1 << 32:
            self._counts = self._counts.astype(np.int64, copy=False)

    def add(self, values: npt.NDArray[np.float32], first: int) -> None:
        """Count finite values (..., channels, positions), whose channels are those from ``first`` on."""
        keys = ((values.view(np.uint32) + np.uint32((1 << _SHIFT) - 1)) >> np.uint32(_SHIFT)).astype(np.int64)
        place = self._index[keys]
        place += np.arange(first, first + values.shape[-2])[:, None] * BINS
        self._count(place.reshape(-1))
        if self._counts[1].any():
            size = self.channels * BINS
            late = place // size == 1
            found = keys[late]
            self._make(np.flatnonzero(np.bincount((found - 1) // BINS)))
            self._count(place[late] - size + self._index[found])
        self._counts[:2] = 0

    def _count(self, place: IntArray) -> None:
        np.add.at(self._counts.reshape(-1), place, self._counts.dtype.type(1))

    def _make(self, pages: IntArray) -> None:
        size = self.channels * BINS
        for number, page in enumerate(pages.tolist(), len(self._counts)):
            self._index[page * BINS + 1 : (page + 1) * BINS + 1] = number * size + np.arange(BINS)
        self.pages = np.concatenate([self.pages, pages])
        made = np.zeros((pages.size, self.channels, BINS), self._counts.dtype)
        self._counts = np.concatenate([self._counts, made])

    def include(self, pages: IntArray, bins: npt.NDArray[Any], most: int) -> None:
        """Add the counts (pages, channels, 16) of others, which makes up to ``most`` values in a channel."""
        self.widen(most)
        self._make(np.setdiff1d(pages, self.pages))
        order = np.argsort(self.pages)
        self._counts[2 + order[np.searchsorted(self.pages, pages, sorter=order)]] += bins.astype(self._counts.dtype)

    def ordered(self) -> tuple[IntArray, npt.NDArray[Any]]:
        """Numbers of the pages, ascending, and their counts (pages, channels, 16)."""
        order = np.argsort(self.pages)
        return self.pages[order], self._counts[2 + order]

    def total(self, negative: bool) -> IntArray:
        """Number of values of one sign, int64 (channels,)."""
        counts: IntArray = self._counts[2:][self.pages // 256 == negative].sum(axis=(0, 2), dtype=np.int64)
        return counts

    def _side(self, negative: bool) -> Iterator[tuple[FloatArray, FloatArray, FloatArray]]:
        """Edges of magnitudes (16,) and counts (channels, 16) of each page of one sign, in ascending order."""
        for index in np.argsort(self.pages):
            if self.pages[index] // 256 == negative:
                first = self.pages[index] % 256 * BINS
                edges = _EDGES[first : first + BINS + 1]
                yield edges[:-1], edges[1:], self._counts[2 + index].astype(np.float64)

    def shortfall(self, size: FloatArray, negative: bool) -> FloatArray:
        """Σ(size - |x|) over the values of one sign with |x| < size, float64 (channels,), spread evenly in a bin."""
        total = np.zeros(self.channels)
        for lo, hi, count in self._side(negative):
            if lo[0] >= size.max(initial=0):
                break
            reach = size[:, None] - lo
            share = np.clip(reach / (hi - lo), 0, 1)
            total += (count * share * (reach - share * (hi - lo) / 2)).sum(axis=1)
        return total

    def squares(self, negative: bool) -> FloatArray:
        """Σx² over the values of one sign, float64 (channels,), spread evenly in a bin."""
        total = np.zeros(self.channels)
        for lo, hi, count in self._side(negative):
            total += (count * (lo**2 + lo * hi + hi**2) / 3).sum(axis=1)
        return total

    def signed(self) -> tuple[FloatArray, FloatArray, IntArray]:
        """Edges of the values in every bin, lower and upper, float64 (bins,), and int64 counts (channels, bins)."""
        below = [(-hi, -lo, count) for lo, hi, count in self._side(negative=True)]
        sides = [(np.empty(0), np.empty(0), np.empty((self.channels, 0))), *below, *self._side(negative=False)]
        lo, hi, count = (np.concatenate(part, axis=-1) for part in zip(*sides, strict=True))
        return lo, hi, count.astype(np.int64)

    @staticmethod
    def are_pages(pages: npt.NDArray[Any], bins: npt.NDArray[Any], count: IntArray) -> bool:
        """Whether these can be pages and their counts in channels of ``count`` values, int64 (channels,)."""
        if pages.dtype != np.int64 or bins.dtype not in (np.uint32, np.int64):
            return False
        if pages.ndim != 1 or np.setdiff1d(pages, _PAGES).size or np.unique(pages).size != pages.size:
            return False
        if bins.shape != (pages.size, count.size, BINS) or bins.min(initial=0) < 0:
            return False
        return bool((bins.sum(axis=(0, 2), dtype=np.int64) <= count).all())


def _are_sums(arrays: Mapping[str, npt.NDArray[Any]]) -> bool:
    """Whether these arrays can be those of an exact sum: no counter is beyond what its addends can make."""
    if not arrays.keys() >= {"addends", "windows", "counters"}:
        return False
    addends, windows, counters = arrays["addends"], arrays["windows"], arrays["counters"]
    if any(array.dtype != np.int64 for array in (addends, windows, counters)) or addends.ndim or windows.ndim != 1:
        return False
    if counters.ndim != 3 or counters.shape[:2] != (windows.size, 2) or np.unique(windows).size != windows.size:
        return False
    # as Python's integers, for the greatest of these magnitudes does not fit int64
    greatest = max(-int(counters.min(initial=0)), int(counters.max(initial=0)))
    return int(addends) <= CAPACITY and greatest <= int(addends) << _HALF


def _within_capacity(addends: int) -> int:
    if addends > CAPACITY:
        raise StatisticsError(f"{addends} samples are more than exact sums hold ({CAPACITY}); observe fewer")
    return addends


def _rounded(integer: int, exponent: int) -> float:
    """The float64 nearest to integer * 2^exponent; Python's conversion and its quotient of integers round once."""
    try:
        return float(integer << exponent) if exponent >= 0 else integer / (1 << -exponent)
    except OverflowError:
        return float("inf") if integer > 0 else float("-inf")

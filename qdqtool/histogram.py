"""Histograms keyed by the float32's own bits: they need no range, and two of them merge by adding counts.

A bin is a sign, an exponent and ten mantissa bits, at most 0.1 % of its value wide. Counts are kept in pages of one
power of two, made on first use: a dense table of 2^19 counters for each tensor would cost more than the inference.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from qdqtool.spec import FloatArray, IntArray

MANTISSA_BITS: Final = 10
_SHIFT: Final = 23 - MANTISSA_BITS
_PAGE: Final = 1 << MANTISSA_BITS  # bins of one power of two
_LEAST: Final = np.array(1 << _SHIFT, np.uint32).view(np.float32)[()]  # least magnitude with a bin of its own
_WINDOW: Final = 10  # pages counted at once, so that the table stays in the cache; the few smaller values come after
_FEW: Final = 1 << 14  # values that are sorted rather than tabled
_CHUNK: Final = 1 << 15  # elements; a chunk's temporaries stay in the second-level cache


@dataclass(frozen=True)
class Bins:
    """The occupied bins of a histogram, in ascending order of value.

    Attributes:
        lo, hi: float64 edges (n,); the bin of exact zeros has lo = hi = 0.
        count: int64 counts (n,).
    """

    lo: FloatArray
    hi: FloatArray
    count: IntArray

    @cached_property
    def center(self) -> FloatArray:
        """Middle of every bin, float64 (n,)."""
        return (self.lo + self.hi) / 2

    @cached_property
    def total(self) -> int:
        """Number of values counted."""
        return int(self.count.sum())

    @property
    def zeros(self) -> int:
        """Number of exact zeros."""
        return int(self.count[(self.lo == 0) & (self.hi == 0)].sum())

    @cached_property
    def prefix(self) -> FloatArray:
        """Sums of 1, x and x² over the non-zero values between 0 and each bin, float64 (3, n + 1), negative below 0.

        Column i belongs to the gap before bin i. Values are spread evenly over their bin. Summing outwards from 0
        keeps the sums of small values exact beside an outlier of any size; exact zeros are left out, as no range
        makes an error there.
        """
        sums = np.empty((3, self.count.size))
        np.copyto(sums[0], self.count)
        sums[0, (self.lo == 0) & (self.hi == 0)] = 0
        np.multiply(sums[0], self.center, out=sums[1])
        np.multiply(sums[0], (self.lo**2 + self.lo * self.hi + self.hi**2) / 3, out=sums[2])
        split = int(np.count_nonzero(self.hi <= 0))
        prefix = np.zeros((3, self.count.size + 1))
        np.cumsum(sums[:, split:], axis=1, out=prefix[:, split + 1 :])
        np.cumsum(-sums[:, :split][:, ::-1], axis=1, out=prefix[:, :split][:, ::-1])
        return prefix

    def mean(self, values: FloatArray) -> float:
        """Mean of ``values`` (one a bin) weighted by the counts; 0 for an empty histogram."""
        return (
            float((values * self.count).sum() / self.total) if self.total else 0.0
        )  # no BLAS: one result on any threads


class Histogram:
    """Counts by (sign, exponent, ten mantissa bits) in pages of one power of two, made on first use."""

    def __init__(self) -> None:
        self.pages: dict[int, IntArray] = {}  # exponent + 1, negative for negative values -> counts
        self.zeros = 0

    def add(self, values: npt.NDArray[np.float32], amax: float, negative: bool) -> None:
        """Count finite ``values`` (flat, contiguous) of greatest magnitude ``amax``; ``negative``: some are below 0."""
        top = int(np.float32(amax).view(np.uint32)) >> _SHIFT >> MANTISSA_BITS
        floor = max(top - _WINDOW, 0) << MANTISSA_BITS
        width = (top + 1 << MANTISSA_BITS) - floor
        table = np.zeros(2 * width if negative else width, np.int64)
        least, edge = _value_of(np.array([floor, floor + 1])).astype(np.float32)
        buffers = np.empty((2, min(values.size, _CHUNK)), np.float32)
        small = []  # zeros apart, what the window's first bin gathers is counted by a window of its own
        for start in range(0, values.size, _CHUNK):
            chunk = values[start : start + _CHUNK]
            magnitude = np.abs(chunk, out=buffers[0, : chunk.size]) if negative else chunk
            keys = np.maximum(magnitude, least, out=buffers[1, : chunk.size]).view(np.int32)
            keys >>= _SHIFT
            keys -= np.int32(floor)
            few = np.flatnonzero((magnitude < edge) & (magnitude >= _LEAST))
            small.append(chunk[few])
            if negative:
                signs = np.right_shift(chunk.view(np.int32), 31, out=buffers[0, : chunk.size].view(np.int32))
                signs &= np.int32(width)
                keys += signs
            table += np.bincount(keys, minlength=table.size)
        self._finish(table, width, floor, np.concatenate(small) if small else values)

    def _finish(self, table: IntArray, width: int, floor: int, small: npt.NDArray[np.float32]) -> None:
        """Store a counted window; its first bin holds zeros and the ``small`` values."""
        self.zeros += int(table[::width].sum()) - small.size  # subnormals under 1.2e-41 count as zeros
        table[::width] = 0
        self._store(table[:width], floor, 1)
        self._store(table[width:], floor, -1)
        if small.size > _FEW:
            self.add(small, float(np.abs(small).max()), bool(small.min() < 0))
        elif small.size:
            self._add_few(small)

    def _add_few(self, values: npt.NDArray[np.float32]) -> None:
        """Count values that are too few for a table of their own."""
        bits = values.view(np.int32)
        keys = (bits & 0x7FFFFFFF) >> _SHIFT
        pages = (keys >> MANTISSA_BITS) + 1
        keys = (np.where(bits < 0, -pages, pages) << MANTISSA_BITS) | (keys & (_PAGE - 1))
        found, counts = np.unique(keys, return_counts=True)
        starts = [0, *(np.flatnonzero(np.diff(found >> MANTISSA_BITS)) + 1), found.size]
        for start, end in itertools.pairwise(starts):
            page = self.pages.setdefault(int(found[start]) >> MANTISSA_BITS, np.zeros(_PAGE, np.int64))
            page[found[start:end] & (_PAGE - 1)] += counts[start:end]

    def _page(self, exponent: int, sign: int) -> IntArray:
        return self.pages.setdefault(sign * (exponent + 1), np.zeros(_PAGE, np.int64))

    def _store(self, table: IntArray, floor: int, sign: int) -> None:
        pages = table.reshape(-1, _PAGE)
        for index in np.flatnonzero(pages.any(axis=1)):
            counts = self._page((floor >> MANTISSA_BITS) + int(index), sign)
            counts += pages[index]

    def __or__(self, other: Histogram) -> Histogram:
        merged = Histogram()
        merged.zeros = self.zeros + other.zeros
        for source in (self, other):
            for number, counts in source.pages.items():
                merged.pages[number] = merged.pages[number] + counts if number in merged.pages else counts.copy()
        return merged

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        same = self.zeros == other.zeros and self.pages.keys() == other.pages.keys()
        return same and all(np.array_equal(counts, other.pages[n]) for n, counts in self.pages.items())

    __hash__ = None  # type: ignore[assignment]  # a counter that changes is no key

    def bins(self) -> Bins:
        """The occupied bins in ascending order."""
        negative, positive = (self._side(sorted(n for n in self.pages if (n > 0) == sign)) for sign in (False, True))
        lo, hi, count = (np.concatenate(c) for c in zip(negative, self._zero(), positive, strict=True))
        return Bins(lo, hi, count)

    def _side(self, numbers: list[int]) -> tuple[FloatArray, FloatArray, IntArray]:
        """Edges and counts of the occupied bins of pages of one sign, in ascending order of value."""
        if not numbers:
            return np.zeros(0), np.zeros(0), np.zeros(0, np.int64)
        table = np.concatenate([self.pages[n] for n in numbers])
        firsts = (np.abs(numbers) - 1) << MANTISSA_BITS
        if numbers[0] < 0:  # within a page of negative values the greatest magnitude comes last
            table = table.reshape(-1, _PAGE)[:, ::-1].ravel()
            inside = np.arange(_PAGE)[::-1]
        else:
            inside = np.arange(_PAGE)
        used = np.flatnonzero(table)
        keys, counts = (firsts[:, None] + inside).ravel()[used], table[used]
        near, far = _value_of(keys), _value_of(keys + 1)
        return (near, far, counts) if numbers[0] > 0 else (-far, -near, counts)

    def _zero(self) -> tuple[FloatArray, FloatArray, IntArray]:
        count = np.array([self.zeros] if self.zeros else [], np.int64)
        return np.zeros(count.size), np.zeros(count.size), count


def _value_of(keys: IntArray) -> FloatArray:
    """Lower edges of magnitude bins, float64; the bin after the greatest float32 ends there."""
    edges = (np.minimum(keys, 0x7F7FFFFF >> _SHIFT) << _SHIFT).astype(np.uint32).view(np.float32).astype(np.float64)
    return np.where(keys > 0x7F7FFFFF >> _SHIFT, float(np.finfo(np.float32).max), edges)

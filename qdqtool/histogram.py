"""Histograms keyed by the float32's own bits: they need no range, and two of them merge by adding counts.

A bin is a sign, an exponent and ten mantissa bits, at most 0.1 % of its value wide: the upper 19 bits of the float32.
While values come they are counted in a table of all 2^19 bins, of whose memory the system provides only what is
touched (some 15 powers of two, 8 KiB each and sign); afterwards counts are kept in pages of one power of two.
"""

from __future__ import annotations

import contextlib
import itertools
import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import numpy.typing as npt

from qdqtool.spec import FloatArray, IntArray

MANTISSA_BITS: Final = 10
_CHUNK: Final = 1 << 15  # elements; a chunk's temporaries stay in the cache beside what the model computes there
_SHIFT: Final = 23 - MANTISSA_BITS
_PAGE: Final = 1 << MANTISSA_BITS  # bins of one power of two
_SIGN: Final = 1 << 18  # the first bin of negative values
_SETTLED: Final = 16  # powers of two looked through at once
_FEW: Final = 1 << 10  # values that are sorted rather than tabled
_ZEROS: Final = 8  # bins next to 0 that count as zeros
# Zeros go to _ZEROS counters in turn, as each increment of one counter has to wait for the one before.
_SPREAD: Final = (np.arange(_CHUNK, dtype=np.uint32) % _ZEROS) << _SHIFT


class _Scratch(threading.local):
    """Each thread's temporaries; new ones for every call would cost a page fault every 1,024 elements."""

    def __init__(self) -> None:
        self.keys = np.empty(_CHUNK, np.int64)
        self.spread = np.empty(_CHUNK, np.uint32)


_SCRATCH: Final = _Scratch()


def _lazy_table() -> IntArray:
    """A zero for each bin there is, 4 MiB, in small pages of memory that the system provides when they are touched."""
    size = 2 * _SIGN * np.dtype(np.int64).itemsize
    # Private pages: shared ones, the default, cost three times as much when they are first touched.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages does not know the advice
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.int64)


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
        self._pages: dict[int, IntArray] = {}  # exponent + 1, negative for negative values -> counts
        self._zeros = 0
        self._table: IntArray | None = None  # a counter for every bin there is, while values come
        self._tabled = 0  # values in the table
        self._top = 0  # greatest exponent among them

    @property
    def pages(self) -> dict[int, IntArray]:
        """Counts by page: exponent + 1, negative for negative values -> int64 (1024,), ascending in magnitude."""
        self._settle()
        return self._pages

    @property
    def zeros(self) -> int:
        """Number of exact zeros (and of magnitudes below 9.2e-41)."""
        self._settle()
        return self._zeros

    @property
    def total(self) -> int:
        """Number of values."""
        self._settle()
        return self._zeros + sum(int(counts.sum()) for counts in self._pages.values())

    def __getstate__(self) -> dict[str, object]:
        """Settled: the table takes ten times the room of the pages."""
        self._settle()
        return self.__dict__

    def add(self, values: npt.NDArray[np.float32], least: float, greatest: float) -> None:
        """Count finite ``values`` (flat, contiguous), the extremes of which are ``least`` and ``greatest``."""
        if self._table is None and values.size <= _FEW:
            self._add_few(values)
            return
        if self._table is None:
            self._table = _lazy_table()
        self._top = max(self._top, int(np.float32(max(-least, greatest)).view(np.uint32)) >> 23)
        self._tabled += values.size
        bits = values.view(np.uint32)
        keys, spread = _SCRATCH.keys, _SCRATCH.spread
        for start in range(0, bits.size, _CHUNK):
            chunk = bits[start : start + _CHUNK]
            if least >= 0:
                chunk = np.maximum(chunk, _SPREAD[: chunk.size], out=spread[: chunk.size])
            np.add.at(self._table, np.right_shift(chunk, _SHIFT, out=keys[: chunk.size]), 1)

    def _settle(self) -> None:
        """Move the table's counts to pages, and let the table go."""
        table, self._table = self._table, None
        if table is None:
            return
        halves = table.reshape(2, -1, _PAGE)
        zeros = halves[:, 0, :_ZEROS]
        left, self._tabled = self._tabled - int(zeros.sum()), 0
        self._zeros += int(zeros.sum())
        zeros[:] = 0
        for end in range(self._top + 1, 0, -_SETTLED):  # downwards, and no further than there are counts
            if not left:
                break
            first = max(end - _SETTLED, 0)
            sums = halves[:, first:end].sum(axis=2)
            left -= int(sums.sum())
            for half, page in np.argwhere(sums):
                number = first + int(page) + 1
                self._add_page(-number if half else number, halves[half, first + page])

    def _add_page(self, number: int, counts: IntArray) -> None:
        if number in self._pages:
            self._pages[number] += counts
        else:
            self._pages[number] = counts.copy()

    def _add_few(self, values: npt.NDArray[np.float32]) -> None:
        """Count values that are too few for a table of their own."""
        bits = values.view(np.uint32)
        found, counts = np.unique(bits >> _SHIFT, return_counts=True)
        zero = (found & (_SIGN - 1)) < _ZEROS
        self._zeros += int(counts[zero].sum())
        self._add_keys(found[~zero], counts[~zero])

    def _add_keys(self, keys: npt.NDArray[np.uint32], counts: IntArray) -> None:
        """Add counts of bins by the upper 19 bits of their values, ascending."""
        keys = keys.astype(np.int64)
        starts = [0, *(np.flatnonzero(np.diff(keys >> MANTISSA_BITS)) + 1), keys.size]
        for start, end in itertools.pairwise(starts if keys.size else ()):
            number = ((int(keys[start]) & (_SIGN - 1)) >> MANTISSA_BITS) + 1
            page = self._pages.setdefault(-number if keys[start] >= _SIGN else number, np.zeros(_PAGE, np.int64))
            page[keys[start:end] & (_PAGE - 1)] += counts[start:end]

    def arrays(self) -> tuple[npt.NDArray[np.uint32], IntArray]:
        """Occupied bins as the upper 19 bits of their float32 values, uint32 (n,), and their counts, int64 (n,)."""
        keys, counts = [np.empty(0, np.uint32)], [np.empty(0, np.int64)]
        for number in sorted(self.pages, key=lambda n: (n < 0, abs(n))):
            used = np.flatnonzero(self.pages[number])
            first = (abs(number) - 1 << MANTISSA_BITS) + (_SIGN if number < 0 else 0)
            keys.append((used + first).astype(np.uint32))
            counts.append(self.pages[number][used])
        return np.concatenate(keys), np.concatenate(counts)

    @classmethod
    def from_arrays(cls, zeros: int, keys: npt.NDArray[np.uint32], counts: IntArray) -> Histogram:
        """The histogram that :meth:`arrays` told, with its number of zeros; ValueError where a key is no bin."""
        if keys.shape != counts.shape or (keys >= 2 * _SIGN).any() or (counts < 0).any() or zeros < 0:
            raise ValueError("bins and counts do not fit together")
        made = cls()
        made._zeros = zeros
        made._add_keys(keys, counts)
        return made

    def mapped(self, function: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]) -> Histogram:
        """The histogram with each bin's counts moved to the bin that ``function`` moves its edge next to 0 to."""
        keys, counts = self.arrays()
        moved = function((keys << _SHIFT).view(np.float32)).view(np.uint32) >> _SHIFT
        found, places = np.unique(moved, return_inverse=True)
        sums = np.zeros(found.size, np.int64)
        np.add.at(sums, places, counts)
        zero = (found & (_SIGN - 1)) < _ZEROS
        return Histogram.from_arrays(self.zeros + int(sums[zero].sum()), found[~zero], sums[~zero])

    @classmethod
    def of_table(cls, table: IntArray) -> Histogram:
        """The histogram of counts by the upper 19 bits of float32 values, int64 (2^19,); NaN and Inf are left out."""
        zeros = int(table.reshape(2, -1)[:, :_ZEROS].sum())
        keys = np.flatnonzero(table)
        magnitudes = keys & (_SIGN - 1)
        keys = keys[(magnitudes >= _ZEROS) & (magnitudes < 0x7F800000 >> _SHIFT)]
        return cls.from_arrays(zeros, keys.astype(np.uint32), table[keys])

    def __or__(self, other: Histogram) -> Histogram:
        merged = Histogram()
        merged._zeros = self.zeros + other.zeros
        for source in (self, other):
            for number, counts in source.pages.items():
                merged._add_page(number, counts)
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

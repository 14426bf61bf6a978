"""Histograms keyed by the float32's own bits: they need no range, and two of them merge by adding counts.

A bin is a sign, an exponent and ten mantissa bits, at most 0.1 % of its value wide: the upper 19 bits of the float32.
While values come they are counted in a table of all 2^19 bins, of whose memory the system provides only what is
touched (some 15 powers of two, 4 KiB each and sign); afterwards those of the bins that hold any are kept.
"""

from __future__ import annotations

import contextlib
import mmap
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qdqtool.spec import FloatArray, IntArray
from qdqtool.statistics import counting

MANTISSA_BITS: Final = 10
_CHUNK: Final = 1 << 15  # elements; a chunk's temporaries stay in the cache beside what the model computes there
_SHIFT: Final = 23 - MANTISSA_BITS
_PAGE: Final = 1 << MANTISSA_BITS  # bins of one power of two
_SIGN: Final = 1 << 18  # the first bin of negative values
_LOOKED: Final = 16  # powers of two looked through at once
_MAX: Final = np.finfo(np.float32).max
_NEXT: Final = np.uint32(1)
_FEW: Final = 1 << 12  # values that are sorted rather than tabled

Keys = npt.NDArray[np.uint32]
"""Upper 19 bits of float32 values."""


class _Scratch(threading.local):
    """Each thread's temporaries; new ones for every call would cost a page fault every 1,024 elements."""

    def __init__(self) -> None:
        self.keys = np.empty(_CHUNK, np.uint32)


_SCRATCH: Final = _Scratch()


def _lazy_table() -> npt.NDArray[np.int32]:
    """A zero for each bin there is, 2 MiB, in small pages of memory that the system provides when they are touched."""
    size = 2 * _SIGN * np.dtype(np.int32).itemsize
    # Private pages: shared ones, the default, cost three times as much when they are first touched.
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, size, **private)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages does not know the advice
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return np.frombuffer(memory, np.int32)


@dataclass(frozen=True)
class Bins:
    """The occupied bins of a histogram, in ascending order of value.

    Attributes:
        lo, hi: float64 edges (n,); the bin of exact zeros has lo = hi = 0.
        count: int64 counts (n,); float64 where they are weights (:meth:`weighted`).
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

    def weighted(self, below: float) -> Bins:
        """The bins with counts below 0 multiplied by ``below``: float64 weights of squared errors."""
        if below == 1:
            return self
        weights: Any = np.where(self.hi <= 0, self.count * below, self.count)
        return Bins(self.lo, self.hi, weights)

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
        split = int(np.searchsorted(self.hi, 0, side="right"))
        if split and self.lo[split - 1] == 0:
            sums[0, split - 1] = 0
        np.multiply(sums[0], self.center, out=sums[1])
        np.multiply(self.center, self.center, out=sums[2])
        sums[2] += np.square(self.hi - self.lo) / 12
        sums[2] *= sums[0]
        prefix = np.zeros((3, self.count.size + 1))
        np.cumsum(sums[:, split:], axis=1, out=prefix[:, split + 1 :])
        np.cumsum(-sums[:, :split][:, ::-1], axis=1, out=prefix[:, :split][:, ::-1])
        return prefix

    @cached_property
    def inside(self) -> FloatArray:
        """How :attr:`prefix` goes on inside of each bin, float64 (5, n + 1): rows d, x0, c0, c1, c2.

        The sums of 1, v and v² over the non-zero values v between 0 and x, which lies in bin i or in the gap before it,
        are c0 + d·y, c1 + d·y²/2 and c2 + d·y³/3 with y = max(x, x0). Column n is for what lies beyond the last bin.
        """
        terms = np.zeros((5, self.count.size + 1))
        density, start = terms[:2, :-1]
        width = self.hi - self.lo
        np.divide(self.count, width, out=density, where=width > 0)
        start[:] = self.lo
        power = density.copy()
        for i in range(3):
            power *= start
            terms[2 + i] = self.prefix[i]
            terms[2 + i, :-1] -= power / (i + 1)
        return terms

    def mean(self, values: FloatArray) -> float:
        """Mean of ``values`` (one a bin) weighted by the counts; 0 for an empty histogram."""
        return (
            float((values * self.count).sum() / self.total) if self.total else 0.0
        )  # no BLAS: one result on any threads


class Histogram:
    """Counts by (sign, exponent, ten mantissa bits), kept for the bins that hold any."""

    def __init__(self) -> None:
        self._keys: Keys = np.empty(0, np.uint32)  # of the occupied bins, ascending
        self._counts: IntArray = np.empty(0, np.int64)
        self._zeros = 0
        self._few: list[Keys] = []  # of values that are too few for a table
        self._table: npt.NDArray[np.int32] | None = None  # a counter for every bin there is, while values come
        self._tabled = 0  # values in the table
        self._top = 0  # greatest exponent among them

    @property
    def zeros(self) -> int:
        """Number of exact zeros (and of magnitudes below 1.2e-41)."""
        self._settle()
        return self._zeros

    @property
    def total(self) -> int:
        """Number of values."""
        return self._zeros + int(self._counts.sum()) + self._tabled + sum(keys.size for keys in self._few)

    def __getstate__(self) -> dict[str, object]:
        """Settled: the table takes several times the room."""
        self._settle()
        return self.__dict__

    def add(self, values: npt.NDArray[np.float32], least: float, greatest: float) -> None:
        """Count finite ``values`` (flat, contiguous), the extremes of which are ``least`` and ``greatest``."""
        bits = values.view(np.uint32)
        if self._table is None and sum(keys.size for keys in self._few) + bits.size <= _FEW:
            self._few.append(np.right_shift(bits, _SHIFT, dtype=np.uint32))
            return
        if self._tabled + bits.size > counting.MOST:
            self._settle()
        if self._table is None:
            self._table = _lazy_table()
        self._top = max(self._top, int(np.float32(max(-least, greatest)).view(np.uint32)) >> 23)
        self._tabled += bits.size
        scratch = _SCRATCH.keys
        for start in range(0, bits.size, _CHUNK):
            chunk = bits[start : start + _CHUNK]
            keys = np.right_shift(chunk, _SHIFT, out=scratch[: chunk.size])
            counting.count(self._table, keys.view(np.int32))

    def _settle(self) -> None:
        """Take together what was counted, and let the table go."""
        if self._few:
            few, self._few = np.concatenate(self._few), []
            self._add(*np.unique(few, return_counts=True))
        if self._table is not None:
            table, total, self._table, self._tabled = self._table, self._tabled, None, 0
            self._add(*_occupied(table, total, self._top))

    def _add(self, keys: Keys, counts: IntArray) -> None:
        """Add the counts of bins."""
        zero = (keys & (_SIGN - 1)) == 0
        if zero.any():
            self._zeros += int(counts[zero].sum())
            keys, counts = keys[~zero], counts[~zero]
        if self._keys.size or (keys[1:] <= keys[:-1]).any():
            keys, counts = _summed(np.concatenate([self._keys, keys]), np.concatenate([self._counts, counts]))
        self._keys, self._counts = keys, counts

    def arrays(self) -> tuple[Keys, IntArray]:
        """Occupied bins as the upper 19 bits of their float32 values, uint32 (n,), and their counts, int64 (n,)."""
        self._settle()
        return self._keys, self._counts

    @classmethod
    def from_arrays(cls, zeros: int, keys: Keys, counts: IntArray) -> Histogram:
        """The histogram that :meth:`arrays` told, with its number of zeros; ValueError where a key is no bin."""
        if keys.shape != counts.shape or (keys >= 2 * _SIGN).any() or (counts < 0).any() or zeros < 0:
            raise ValueError("bins and counts do not fit together")
        made = cls()
        made._zeros = zeros
        made._add(keys, counts)
        return made

    def mapped(self, function: Callable[[npt.NDArray[np.float32]], npt.NDArray[np.float32]]) -> Histogram:
        """The histogram with each bin's counts moved to the bin that ``function`` moves its edge next to 0 to."""
        keys, counts = self.arrays()
        moved = np.right_shift(function((keys << _SHIFT).view(np.float32)).view(np.uint32), _SHIFT, dtype=np.uint32)
        return Histogram.from_arrays(self.zeros, moved, counts)

    @classmethod
    def of_table(cls, table: IntArray) -> Histogram:
        """The histogram of counts by the upper 19 bits of float32 values, int64 (2^19,); NaN and Inf are left out."""
        keys = np.flatnonzero(table)
        keys = keys[(keys & (_SIGN - 1)) < 0x7F800000 >> _SHIFT]
        return cls.from_arrays(0, keys.astype(np.uint32), table[keys])

    def __or__(self, other: Histogram) -> Histogram:
        merged = Histogram()
        merged._zeros = self.zeros + other.zeros
        for keys, counts in (self.arrays(), other.arrays()):
            merged._add(keys, counts)
        return merged

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Histogram):
            return NotImplemented
        (keys, counts), (other_keys, other_counts) = self.arrays(), other.arrays()
        same = np.array_equal(keys, other_keys) and np.array_equal(counts, other_counts)
        return same and self.zeros == other.zeros

    __hash__ = None  # type: ignore[assignment]  # a counter that changes is no key

    def bins(self) -> Bins:
        """The occupied bins in ascending order."""
        keys, counts = self.arrays()
        split = int(np.searchsorted(keys, _SIGN))
        above, below = keys[:split], keys[split:][::-1] & np.uint32(_SIGN - 1)
        zero = [self.zeros] if self.zeros else []
        return Bins(
            np.concatenate([-_value_of(below + _NEXT), np.zeros(len(zero)), _value_of(above)]),
            np.concatenate([-_value_of(below), np.zeros(len(zero)), _value_of(above + _NEXT)]),
            np.concatenate([counts[split:][::-1], np.array(zero, np.int64), counts[:split]]),
        )


def _occupied(table: npt.NDArray[np.int32], total: int, top: int) -> tuple[Keys, IntArray]:
    """Bins and counts of a table that holds ``total`` values with exponents up to ``top``, ascending."""
    zeros = (0, _SIGN)
    found = [[(np.array([zero], np.uint32), table[zero : zero + 1])] for zero in zeros]
    left = total - sum(int(table[zero]) for zero in zeros)
    for end in range(top + 1, 0, -_LOOKED):  # downwards, and no further than there are counts
        if not left:
            break
        for parts, zero in zip(found, zeros, strict=True):
            start = zero + max(max(end - _LOOKED, 0) * _PAGE, 1)
            some = table[start : zero + end * _PAGE]
            used = np.flatnonzero(some != 0)
            parts.insert(1, (used.astype(np.uint32) + np.uint32(start), some[used]))
            left -= int(parts[1][1].sum(dtype=np.int64))
    keys, counts = zip(*found[0], *found[1], strict=True)
    return np.concatenate(keys), np.concatenate(counts).astype(np.int64)


def _summed(keys: Keys, counts: IntArray) -> tuple[Keys, IntArray]:
    """Each bin once, ascending, with the sum of its counts."""
    found, places = np.unique(keys, return_inverse=True)
    sums = np.zeros(found.size, np.int64)
    np.add.at(sums, places, counts)
    return found, sums


def _value_of(keys: Keys) -> FloatArray:
    """Lower edges of magnitude bins, float64; the bin after the greatest float32 ends there."""
    return np.minimum((keys << _SHIFT).view(np.float32), _MAX).astype(np.float64)

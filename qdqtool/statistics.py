"""Mergeable statistics of tensors: histogram, extremes and a record of every sample.

Values are counted in bins keyed by the float32's own sign, exponent and first ten mantissa bits, so that bins do not
depend on what was seen first: two histograms merge by adding integer counts, bit for bit the same in any order, batch
size or partition. A bin is at most 0.1 % of its value wide. Moments are read off the histogram (their error, under
0.05 % of a value and of either sign, averages out), which keeps them as exactly mergeable as the counts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qdqtool.errors import StatisticsError
from qdqtool.spec import FloatArray, IntArray

MANTISSA_BITS: Final = 10
_SHIFT: Final = 23 - MANTISSA_BITS
_PAGE: Final = 1 << MANTISSA_BITS  # bins of one power of two
_LEAST: Final = np.array(1 << _SHIFT, np.uint32).view(np.float32)[()]  # least magnitude with a bin of its own
_WINDOW: Final = 10  # pages counted at once, so that the table stays in the cache; the few smaller values come after
_FEW: Final = 1 << 14  # values that are sorted rather than tabled
_CHUNK: Final = 1 << 15  # elements; a chunk's temporaries stay in the second-level cache

RECORD: Final = np.dtype([("sample", "S16"), ("position", np.int64), ("lo", np.float32), ("hi", np.float32)])
"""One sample's content hash, its position in the data, and its least and greatest finite value."""


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


class TensorStatistics:
    """What was seen of one tensor; ``observe`` adds to it, ``|`` merges two exactly."""

    def __init__(self) -> None:
        self.histogram = Histogram()
        self.nan = 0
        self.inf = 0
        self.first_non_finite: tuple[int, bytes] | None = (
            None  # position and hash of the earliest sample with NaN or Inf
        )
        self._records: list[npt.NDArray[Any]] = []

    def observe(self, values: npt.NDArray[Any], samples: Sequence[tuple[bytes, int]]) -> None:
        """Add a batch.

        Args:
            values: float array, sample after sample in memory order; its size is a multiple of their number.
            samples: content hash and position of each sample.
        """
        rows = len(samples)
        if values.size == 0:
            return
        with np.errstate(over="ignore"):  # a float64 beyond float32 becomes Inf and is counted as such
            flat = np.ascontiguousarray(values, np.float32).reshape(rows, -1)
        lo, hi = flat.min(axis=1), flat.max(axis=1)
        if not (np.isfinite(lo).all() and np.isfinite(hi).all()):
            flat, lo, hi = self._without_non_finite(flat, samples)
        record = np.empty(rows, RECORD)
        record["sample"], record["position"] = [s for s, _ in samples], [p for _, p in samples]
        record["lo"], record["hi"] = lo + np.float32(0), hi + np.float32(0)  # -0.0 becomes 0.0
        self._records.append(record)
        seen = ~np.isnan(lo)
        if seen.any():
            least, greatest = float(lo[seen].min()), float(hi[seen].max())
            self.histogram.add(flat.reshape(-1), max(-least, greatest), least < 0)
            self.__dict__.pop("bins", None)

    def _without_non_finite(
        self, flat: npt.NDArray[np.float32], samples: Sequence[tuple[bytes, int]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Count and take out NaN and Inf; returns the finite values (flat) and each row's extremes (NaN where none)."""
        finite = np.isfinite(flat)
        self.nan += int(np.isnan(flat).sum())
        self.inf += int(np.isinf(flat).sum())
        for row in np.flatnonzero(~finite.all(axis=1)):
            found = (samples[int(row)][1], samples[int(row)][0])
            self.first_non_finite = min(self.first_non_finite or found, found)
        none = ~finite.any(axis=1)
        lo = np.where(none, np.nan, np.where(finite, flat, np.inf).min(axis=1)).astype(np.float32)
        hi = np.where(none, np.nan, np.where(finite, flat, -np.inf).max(axis=1)).astype(np.float32)
        return flat[finite], lo, hi

    @property
    def records(self) -> npt.NDArray[Any]:
        """One :data:`RECORD` a sample, in the order observed (merged: in the order merged)."""
        if len(self._records) > 1:
            self._records = [np.concatenate(self._records)]
        return self._records[0] if self._records else np.empty(0, RECORD)

    @cached_property
    def bins(self) -> Bins:
        """Occupied bins, ascending, the outermost ones cut at the exact extremes."""
        bins = self.histogram.bins()
        if bins.total:
            bins.lo[0] = min(
                max(bins.lo[0], self.lo), bins.hi[0]
            )  # least subnormals are counted as zeros: keep lo <= hi
            bins.hi[-1] = max(min(bins.hi[-1], self.hi), bins.lo[-1])
        return bins

    @property
    def count(self) -> int:
        """Number of finite values seen."""
        return self.bins.total

    @property
    def lo(self) -> float:
        """Least finite value seen, exact; 0 where none was."""
        return self._extreme("lo", np.fmin)

    @property
    def hi(self) -> float:
        """Greatest finite value seen, exact; 0 where none was."""
        return self._extreme("hi", np.fmax)

    def _extreme(self, name: str, reduce: np.ufunc) -> float:
        values = self.records[name]
        found = float(reduce.reduce(values)) if values.size else 0.0
        return 0.0 if np.isnan(found) else found

    def __or__(self, other: TensorStatistics) -> TensorStatistics:
        merged = TensorStatistics()
        merged.histogram = self.histogram | other.histogram
        merged.nan, merged.inf = self.nan + other.nan, self.inf + other.inf
        found = [f for f in (self.first_non_finite, other.first_non_finite) if f is not None]
        merged.first_non_finite = min(found, default=None)
        merged._records = [*self._records, *other._records]
        return merged

    def __eq__(self, other: object) -> bool:
        """Same content; the order in which samples came does not count."""
        if not isinstance(other, TensorStatistics):
            return NotImplemented
        same = (self.nan, self.inf, self.histogram) == (other.nan, other.inf, other.histogram)
        mine, theirs = (s.records[np.argsort(s.records["sample"], kind="stable")] for s in (self, other))
        return same and all(mine[name].tobytes() == theirs[name].tobytes() for name in ("sample", "lo", "hi"))

    __hash__ = None  # type: ignore[assignment]  # a counter that changes is no key


@dataclass(frozen=True)
class Statistics:
    """Statistics of every observed tensor, by name, and how many samples they come from."""

    tensors: Mapping[str, TensorStatistics] = field(default_factory=dict)
    samples: int = 0

    def __getitem__(self, tensor: str) -> TensorStatistics:
        try:
            return self.tensors[tensor]
        except KeyError:
            raise StatisticsError(
                f"tensor {tensor!r} was not observed; observe the prepared model again with this tensor in the plan"
            ) from None

    def __or__(self, other: Statistics) -> Statistics:
        names = dict.fromkeys([*self.tensors, *other.tensors])
        empty = TensorStatistics()
        merged = {n: self.tensors.get(n, empty) | other.tensors.get(n, empty) for n in names}
        return Statistics(merged, self.samples + other.samples)

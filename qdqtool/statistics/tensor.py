"""Mergeable statistics of tensors: histogram, extremes and a record of every sample.

Values are counted in bins keyed by the float32's own sign, exponent and first ten mantissa bits, so that bins do not
depend on what was seen first: two histograms merge by adding integer counts, bit for bit the same in any order, batch
size or partition. A bin is at most 0.1 % of its value wide. Moments are read off the histogram (their error, under
0.05 % of a value and of either sign, averages out), which keeps them as exactly mergeable as the counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qdqtool.errors import StatisticsError
from qdqtool.spec import Range
from qdqtool.statistics.channel_statistics import ChannelStatistics
from qdqtool.statistics.histogram import Bins, Histogram

RECORD: Final = np.dtype([("sample", "S16"), ("position", np.int64), ("lo", np.float32), ("hi", np.float32)])
"""One sample's content hash, its position in the data, and its least and greatest finite value."""


_BLOCK: Final = 1 << 18  # elements
_FRESH: Final = 32  # batches
_NOTHING: Final = np.array([np.nan], np.float32)
_ZERO: Final = np.float32(0)


def _as_float32(values: npt.NDArray[Any]) -> npt.NDArray[np.float32]:
    if values.dtype == np.float32:
        return np.ascontiguousarray(values)
    with np.errstate(over="ignore"):  # a float64 beyond float32 becomes Inf and is counted as such
        return np.ascontiguousarray(values, np.float32)


class TensorStatistics:
    """What was seen of one tensor; ``observe`` adds to it, ``|`` merges two exactly.

    Args:
        axis: collect statistics of each channel along this axis too.
    """

    def __init__(self, axis: int | None = None) -> None:
        self.channels = None if axis is None else ChannelStatistics(axis)
        self.histogram = Histogram()
        self.nan = 0
        self.inf = 0
        self.first_non_finite: tuple[int, bytes] | None = (
            None  # position and hash of the earliest sample with NaN or Inf
        )
        self.chosen: dict[Any, Range] = {}  # by calibrator and spec, see calibrator_api.choose
        self._records = [np.empty(0, RECORD)]  # one array by position, and more behind it while values come
        self._fresh: list[tuple[Sequence[tuple[bytes, int]], Any, Any]] = []  # what is in no array yet

    @classmethod
    def of(
        cls,
        histogram: Histogram,
        records: npt.NDArray[Any],
        *,
        nan: int = 0,
        inf: int = 0,
        first_non_finite: tuple[int, bytes] | None = None,
        channels: ChannelStatistics | None = None,
    ) -> TensorStatistics:
        """Statistics put together from their parts; ``records`` of :data:`RECORD`."""
        made = cls()
        made.histogram, made.channels = histogram, channels
        made.nan, made.inf, made.first_non_finite = nan, inf, first_non_finite
        made._records = [records[np.argsort(records["position"], kind="stable")]]
        return made

    def observe(self, values: npt.NDArray[Any], samples: Sequence[tuple[bytes, int]]) -> None:
        """Add a batch.

        Args:
            values: float array, sample after sample in memory order; its size is a multiple of their number.
            samples: content hash and position of each sample.
        """
        rows = len(samples)
        flat = _as_float32(values).reshape(rows, values.size // rows)
        if flat.size <= _BLOCK:
            lo, hi = self._count(flat, samples)
        else:
            lo, hi = self._count_blocks(flat, samples)
        if self.channels is not None:
            self.channels.observe(values, rows)
        self._fresh.append((samples, lo, hi))
        if len(self._fresh) == _FRESH:
            self._pack()
        self.__dict__.pop("bins", None)
        self.chosen.clear()

    def _count_blocks(
        self, flat: npt.NDArray[np.float32], samples: Sequence[tuple[bytes, int]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """As :meth:`_count`, in blocks that stay in the cache while extremes and counts are taken."""
        rows, size = flat.shape
        many = max(1, _BLOCK // size)
        ends: list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]] = []
        for start in range(0, rows, many):
            part = slice(start, start + many)
            pieces = [self._count(flat[part, i : i + _BLOCK], samples[part]) for i in range(0, size, _BLOCK)]
            lo, hi = (list(end) for end in zip(*pieces, strict=True))
            ends.append((np.fmin.reduce(lo), np.fmax.reduce(hi)))
        lo, hi = (list(end) for end in zip(*ends, strict=True))
        return np.concatenate(lo), np.concatenate(hi)

    def _count(
        self, flat: npt.NDArray[np.float32], samples: Sequence[tuple[bytes, int]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Add the values of some samples to the histogram; returns each sample's extremes, NaN where it has none."""
        if flat.size == 0:
            return _NOTHING.repeat(len(flat)), _NOTHING.repeat(len(flat))
        lo, hi = np.minimum.reduce(flat, axis=1), np.maximum.reduce(flat, axis=1)
        least, greatest = float(np.minimum.reduce(lo)), float(np.maximum.reduce(hi))
        if not (math.isfinite(least) and math.isfinite(greatest)):
            flat, lo, hi = self._without_non_finite(flat, samples)
            if flat.size == 0:
                return lo, hi
            least, greatest = float(flat.min()), float(flat.max())
        self.histogram.add(flat.reshape(-1), least, greatest)
        return lo + _ZERO, hi + _ZERO  # -0.0 becomes 0.0

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
        """One :data:`RECORD` a sample, by position in the data; lo and hi are NaN where it had no finite value."""
        self._pack()
        if len(self._records) > 1:
            joined = np.concatenate(self._records)
            self._records = [joined[np.argsort(joined["position"], kind="stable")]]
        return self._records[0]

    def _pack(self) -> None:
        """Make an array of what came last: many small ones take ten times the room."""
        if self._fresh:
            fresh = np.empty(sum(len(samples) for samples, _, _ in self._fresh), RECORD)
            fresh["sample"] = [sample for samples, _, _ in self._fresh for sample, _ in samples]
            fresh["position"] = [position for samples, _, _ in self._fresh for _, position in samples]
            fresh["lo"] = np.concatenate([lo for _, lo, _ in self._fresh])
            fresh["hi"] = np.concatenate([hi for _, _, hi in self._fresh])
            self._records.append(fresh)
            self._fresh = []

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
        return self.histogram.total

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

    def shifted(self, by: int) -> TensorStatistics:
        """The same statistics of samples that lie ``by`` positions further on in the data."""
        records, first = self.records.copy(), self.first_non_finite
        records["position"] += by
        return TensorStatistics.of(
            self.histogram,
            records,
            nan=self.nan,
            inf=self.inf,
            first_non_finite=None if first is None else (first[0] + by, first[1]),
            channels=self.channels,
        )

    def __or__(self, other: TensorStatistics) -> TensorStatistics:
        found = [f for f in (self.first_non_finite, other.first_non_finite) if f is not None]
        return TensorStatistics.of(
            self.histogram | other.histogram,
            np.concatenate([self.records, other.records]),
            nan=self.nan + other.nan,
            inf=self.inf + other.inf,
            first_non_finite=min(found, default=None),
            channels=_both(self.channels, other.channels),
        )

    def __eq__(self, other: object) -> bool:
        """Same content; the order in which samples came does not count."""
        if not isinstance(other, TensorStatistics):
            return NotImplemented
        same = (self.nan, self.inf, self.histogram, self.channels) == (
            other.nan,
            other.inf,
            other.histogram,
            other.channels,
        )
        mine, theirs = (s.records[np.argsort(s.records["sample"], kind="stable")] for s in (self, other))
        return same and all(mine[name].tobytes() == theirs[name].tobytes() for name in ("sample", "lo", "hi"))

    __hash__ = None  # type: ignore[assignment]  # a counter that changes is no key


def _both(one: ChannelStatistics | None, other: ChannelStatistics | None) -> ChannelStatistics | None:
    return one | other if one is not None and other is not None else one if other is None else other


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

    @property
    def positions(self) -> frozenset[int]:
        """Positions in the data of the samples they come from."""
        return frozenset(p for stats in [*self.tensors.values()][:1] for p in stats.records["position"].tolist())

    def shifted(self, by: int) -> Statistics:
        """The same statistics of samples that lie ``by`` positions further on in the data."""
        return Statistics({name: stats.shifted(by) for name, stats in self.tensors.items()}, self.samples)

    def __or__(self, other: Statistics) -> Statistics:
        """Statistics of the samples of both."""
        tensors = dict(self.tensors)
        for name, stats in other.tensors.items():
            tensors[name] = tensors[name] | stats if name in tensors else stats
        return Statistics(tensors, self.samples + other.samples)

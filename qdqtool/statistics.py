"""Mergeable statistics of tensors: histogram, extremes and a record of every sample.

Values are counted in bins keyed by the float32's own sign, exponent and first ten mantissa bits, so that bins do not
depend on what was seen first: two histograms merge by adding integer counts, bit for bit the same in any order, batch
size or partition. A bin is at most 0.1 % of its value wide. Moments are read off the histogram (their error, under
0.05 % of a value and of either sign, averages out), which keeps them as exactly mergeable as the counts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qdqtool.errors import StatisticsError
from qdqtool.histogram import Bins, Histogram

RECORD: Final = np.dtype([("sample", "S16"), ("position", np.int64), ("lo", np.float32), ("hi", np.float32)])
"""One sample's content hash, its position in the data, and its least and greatest finite value."""


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

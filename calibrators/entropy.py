"""The range whose quantized distribution loses the least information (KL divergence).

For a slice [a, b] of the histogram, cut into R bins a level: P is the slice with the clipped mass added to its edge
bins, Q the slice *without* it, merged into the spec's levels and spread back evenly over each level's occupied bins;
both are normalised, and a and b minimise

    KL(P‖Q) = Σ P log P - Σ P log Q.

With the clipped mass in Q the least slice would win with KL = 0. Every slice has the same number of bins: with bins of
one width a narrow slice has fewer of them, and the noise of their counts, about (bins - levels)/2N, would favour it.
Exact zeros are left out: they are kept without error, and a ReLU's would outweigh all else. Migacz: 8-bit inference
with TensorRT, 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qdqtool.calibrator_api import Stat
from qdqtool.spec import FloatArray, QuantSpec, Range
from qdqtool.statistics.distribution import Side, is_zero, within
from qdqtool.statistics.histogram import Bins
from qdqtool.statistics.tensor import TensorStatistics

_UNIFORM = 4096  # bins of equal width that the log histogram is cut into, its mass spread in proportion
_SLICE = 512  # bins of a slice, about
_SHARES = np.geomspace(1, 0.125, 20)  # candidates for an end, the widest first, as shares of the table's
_ZOOMS = 12
_TINY = float(np.finfo(np.float64).tiny)


@dataclass(frozen=True)
class Entropy:
    """Minimises the KL divergence between the tensor's distribution and its quantized form.

    One-sided and symmetric ranges search one threshold; others both ends, the farther one first. Formats of more than
    256 levels keep the whole range: their steps are finer than the bins. An outlier beside which all other values share
    a bin or two is kept as well: what they lose is not seen.
    """

    name: ClassVar[str] = "entropy"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES, Stat.HISTOGRAM})

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the range of least divergence, the wider one among equals."""
        side = Side.of(stats, spec)
        levels = (spec.steps + 1) // 2 if side is Side.MAGNITUDE else spec.steps + 1
        if is_zero(stats) or 2 * levels > _SLICE:
            return within(stats, stats.lo, stats.hi)
        counts = _Counts(stats.bins)
        if counts.total == 0:  # subnormals share the bin of zeros: there is nothing to tell apart
            return within(stats, stats.lo, stats.hi)
        if side is Side.BOTH:
            return within(stats, *_search(counts, stats.lo, stats.hi, levels))
        _, threshold = _search(counts, 0.0, max(-stats.lo, stats.hi), levels)
        return within(stats, *side.ends(threshold))


class _Counts:
    """How many values other than exact zeros lie under any point; those of a bin are spread evenly over it."""

    def __init__(self, bins: Bins) -> None:
        seen = np.cumsum(np.where((bins.lo == 0) & (bins.hi == 0), 0, bins.count), dtype=np.float64)
        self.total = float(seen[-1])
        self._edges = np.stack([bins.lo, bins.hi], axis=1).ravel()
        self._seen = np.concatenate([[0.0], np.repeat(seen, 2)[:-1]])

    def under(self, x: FloatArray) -> FloatArray:
        """Their number under each x."""
        number: FloatArray = np.interp(x, self._edges, self._seen)
        return number


def _search(counts: _Counts, lo: float, hi: float, levels: int) -> tuple[float, float]:
    """Ends of the slice of least divergence; of magnitudes where ``lo`` is 0.

    Where the narrowest candidate wins, the histogram is cut at twice that end and searched again in finer bins.
    """
    for _ in range(_ZOOMS):
        shares = _sweeps(_Table(counts, lo, hi), levels)
        least = shares == _SHARES[-1]
        if not least.any():
            break
        lo, hi = np.where(least, 2 * shares, 1.0) * (lo, hi)
        shares = np.where(least, 0.5, shares)
    return lo * shares[0], hi * shares[1]


class _Table:
    """How many values lie under each edge of equal bins over [lo, hi], and under any point by interpolation.

    Attributes:
        under: float64 (_UNIFORM + 1,); the first counts what lies below ``lo``.
        total: number of values, exact zeros left out.
    """

    def __init__(self, counts: _Counts, lo: float, hi: float) -> None:
        self.lo, self.hi, self.total = lo, hi, counts.total
        edges = np.linspace(lo, hi, _UNIFORM + 1)
        self.under = counts.under(edges)
        if lo == 0:  # magnitudes
            self.under -= counts.under(-edges)

    def at(self, x: FloatArray) -> FloatArray:
        """Number of values under x."""
        position = (x - self.lo) * (_UNIFORM / (self.hi - self.lo))
        index = np.clip(position.astype(np.intp), 0, _UNIFORM - 1)
        low = self.under[index]
        position -= index
        position *= self.under[index + 1] - low
        position += low
        return position


def _sweeps(table: _Table, levels: int) -> FloatArray:
    """Shares of both ends with the least divergence: one end after the other, the farther one first and again.

    The widest candidate wins among those within the noise of the least divergence. Stops at the narrowest: the table
    is too coarse for it.
    """
    shares = np.ones(2)
    order = [1] if table.lo == 0 else [0, 1, 0] if -table.lo > table.hi else [1, 0, 1]
    for end in order:
        candidates = np.tile(shares, (_SHARES.size, 1))
        candidates[:, end] = _SHARES
        divergence, noise = _divergence(table, candidates[:, 0] * table.lo, candidates[:, 1] * table.hi, levels)
        least = int(np.argmin(divergence))
        shares = candidates[np.argmax(divergence <= divergence[least] + noise[least])]
        if shares[end] == _SHARES[-1]:
            break
    return shares


def _divergence(table: _Table, lo: FloatArray, hi: FloatArray, levels: int) -> tuple[FloatArray, FloatArray]:
    """N·KL(P‖Q) of every slice [lo, hi] and the standard deviation that counts lend it; float64 (m,).

    A slice that holds less than half of the values is out: one that holds next to none would be perfect.
    """
    each = min(_SLICE // levels, 8)
    under = table.at(lo[:, None] + (hi - lo)[:, None] * np.linspace(0, 1, levels * each + 1))
    mass = np.maximum(under[:, 1:] - under[:, :-1], 0)
    level, occupied = np.zeros((2, lo.size, levels))
    for part in range(each):  # a sum over an axis so short would be slow
        level += mass[:, part::each]
        occupied += mass[:, part::each] > 0
    kept = np.maximum(level.sum(axis=1), 1)
    log_q = _log(level / (np.maximum(occupied, 1) * kept[:, None]))
    divergence = (mass * _log(mass / table.total)).sum(axis=1) - (level * log_q).sum(axis=1)
    beyond = np.maximum([under[:, 0], table.total - under[:, -1]], 0)
    for end, clipped in zip((0, -1), beyond, strict=True):
        inside = mass[:, end]
        whole = inside + clipped
        divergence += whole * _log(whole / table.total) - inside * _log(inside / table.total)
        divergence -= clipped * np.where(inside > 0, log_q[:, end], -np.log(kept))  # smoothed: one value if empty
    freedom = np.maximum(occupied - 1, 0).sum(axis=1)
    return np.where(kept < table.total / 2, np.inf, divergence), np.sqrt((freedom + 1) / 2)


def _log(x: FloatArray) -> FloatArray:
    """Logarithm, and some finite number for 0: every use multiplies it by 0 there."""
    return np.log(np.maximum(x, _TINY))

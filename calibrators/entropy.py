"""The threshold whose quantized distribution loses the least information (KL divergence).

For a slice [a, b] of the histogram, cut into R bins a level: P is the slice with the clipped mass added to its edge bins, Q the
slice *without* it, merged into the spec's levels and spread back evenly over each level's occupied bins; both are normalised, and

    KL(P‖Q) = Σ P log P - Σ P log Q,   minimal over a and b.

With the clipped mass in Q the least slice would win with KL = 0. Every slice has the same number of bins: with bins of one width
a narrow slice has fewer of them, and the noise of their counts, about (bins - levels)/2N, would favour it. Exact zeros are
left out: they are kept without error, and a ReLU's would outweigh all else. Migacz: 8-bit inference with TensorRT, 2017.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qdqtool.calibrator_api import Stat
from qdqtool.distribution import Side, is_zero, partial_counts, within
from qdqtool.spec import FloatArray, QuantSpec, Range
from qdqtool.statistics import Bins, TensorStatistics

_UNIFORM = 4096  # bins of equal width that the log histogram is cut into, mass spread in proportion
_SLICE = 512  # bins of a slice
_SHARES = np.linspace(1, 0.125, 29)  # candidates for an end, as shares of the histogram's
_ZOOMS = 12


@dataclass(frozen=True)
class Entropy:
    """Minimises the KL divergence between the tensor's distribution and its quantized form.

    One-sided and symmetric ranges search one threshold; others both ends, the farther one first. Formats of more than 256 levels
    keep the whole range: their steps are finer than the bins.
    """

    name: ClassVar[str] = "entropy"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES, Stat.HISTOGRAM})

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the range of least divergence; the wider one on a tie."""
        side = Side.of(stats, spec)
        levels = (spec.steps + 1) // 2 if side is Side.MAGNITUDE else spec.steps + 1
        if is_zero(stats) or 2 * levels > _SLICE:
            return within(stats, stats.lo, stats.hi)
        if side is Side.BOTH:
            return within(stats, *_search(stats.bins, stats.lo, stats.hi, levels))
        _, threshold = _search(stats.bins, 0.0, max(-stats.lo, stats.hi), levels)
        return within(stats, *side.ends(threshold))


def _search(bins: Bins, lo: float, hi: float, levels: int) -> tuple[float, float]:
    """Ends of the slice of least divergence; magnitudes where ``lo`` is 0.

    Where the least candidate wins, the histogram is cut at twice that value and searched again in finer bins.
    """
    for _ in range(_ZOOMS):
        shares = _sweeps(_Table(bins, lo, hi), levels)
        if (shares > _SHARES[-1]).all():
            break
        least = shares == _SHARES[-1]
        lo, hi = np.where(least, 2 * shares, 1.0) * (lo, hi)
        shares = np.where(least, 0.5, np.minimum(shares, 1.0))
    return lo * shares[0], hi * shares[1]


class _Table:
    """How many values lie under each edge of equal bins over [lo, hi], and under any point by interpolation.

    Attributes:
        under: float64 (_UNIFORM + 1,); the first counts what lies below ``lo``.
        total: number of values, exact zeros left out.
    """

    def __init__(self, bins: Bins, lo: float, hi: float) -> None:
        self.lo, self.hi = lo, hi
        self.total = float(bins.prefix[0, -1] - bins.prefix[0, 0])
        edges = np.linspace(lo, hi, _UNIFORM + 1)
        if lo == 0:  # magnitudes
            self.under = partial_counts(bins, edges) - partial_counts(bins, -edges)
        else:
            self.under = partial_counts(bins, edges) - bins.prefix[0, 0]

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

    Stops at the least candidate: the table is too coarse for it.
    """
    shares = np.ones(2)
    order = [1] if table.lo == 0 else [0, 1, 0] if -table.lo > table.hi else [1, 0, 1]
    for end in order:
        candidates = np.tile(shares, (_SHARES.size, 1))
        candidates[:, end] = _SHARES
        divergence = _divergence(table, candidates[:, 0] * table.lo, candidates[:, 1] * table.hi, levels)
        shares = candidates[np.argmin(divergence)]
        if shares[end] == _SHARES[-1]:
            break
    return shares


def _divergence(table: _Table, lo: FloatArray, hi: FloatArray, levels: int) -> FloatArray:
    """KL(P‖Q) of every slice [lo, hi], float64 (m,)."""
    each = _SLICE // levels
    grid = np.linspace(0, 1, levels * each + 1)
    under = table.at(lo[:, None] + (hi - lo)[:, None] * grid)
    mass = np.maximum(np.diff(under, axis=1), 0)
    kept = np.maximum(mass.sum(axis=1), np.finfo(np.float64).tiny)
    grouped = mass.reshape(lo.size, levels, each)
    occupied = np.maximum((grouped > 0).sum(axis=2), 1)
    level = grouped.sum(axis=2)
    spread = level / (occupied * kept[:, None])  # Q of each occupied bin
    cross = (level * _log(spread)).sum(axis=1)
    own = (mass * _log(mass / table.total)).sum(axis=1)
    beyond = np.maximum([under[:, 0], table.total - under[:, -1]], 0)
    for bin_mass, q, clipped in zip((mass[:, 0], mass[:, -1]), (spread[:, 0], spread[:, -1]), beyond, strict=True):
        whole = bin_mass + clipped
        own += whole * _log(whole / table.total) - bin_mass * _log(bin_mass / table.total)
        cross += clipped * _log(
            np.where(bin_mass > 0, q, 1 / kept)
        )  # smoothed as if one value lay in an empty edge bin
    divergence: FloatArray = (own - cross) / table.total
    return divergence


def _log(x: FloatArray) -> FloatArray:
    return np.log(np.where(x > 0, x, 1.0))

"""Histograms of observed tensors for people: few bars of equal width, and the range that every calibrator chooses."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from qdqtool import registry
from qdqtool.arithmetic.affine import expected_error
from qdqtool.calibrator_api import Calibrator, choose
from qdqtool.errors import QdqError
from qdqtool.passes_api import State
from qdqtool.planning.plan import Key, Plan, params_of
from qdqtool.spec import PER_TENSOR, FloatArray, QuantSpec, Range
from qdqtool.statistics.histogram import Bins
from qdqtool.statistics.tensor import TensorStatistics

BARS: Final = 200
_ALL_BARS: Final = 80_000
"""Bars of all tensors together; where there are many tensors each has fewer."""
_LEAST_BARS: Final = 40
MOST: Final = 500
"""Tensors with a histogram; of more, those in which quantizing is expected to make the most noise."""


@dataclass(frozen=True)
class Candidate:
    """The range that a calibrator chooses for a tensor, and the SQNR in dB expected of it on the observed values."""

    calibrator: str
    lo: float
    hi: float
    sqnr_db: float


@dataclass(frozen=True)
class TensorHistogram:
    """What was seen of a tensor.

    Attributes:
        tensor: its name.
        lo, hi: least and greatest value seen: the ends of the first and the last bar.
        counts: values in each bar, all of one width.
        chosen: the range that the model uses, and who chose it.
        candidates: the ranges of all calibrators; those that cannot judge the tensor are left out.
    """

    tensor: str
    lo: float
    hi: float
    counts: tuple[float, ...]
    chosen: Candidate
    candidates: tuple[Candidate, ...]


def histograms(state: State) -> tuple[TensorHistogram, ...]:
    """Those of all tensors that got a range from statistics, in the order of the plan."""
    if state.plan is None or state.statistics is None or state.params is None:
        return ()
    stats = state.statistics.tensors
    keys = {name: key for name, key in _ranged(state.plan).items() if name in stats and stats[name].bins.total}
    chosen = {name: _chosen(state, key, stats[name]) for name, key in keys.items()}
    if len(chosen) > MOST:
        worst = sorted(chosen, key=lambda name: chosen[name].sqnr_db)[:MOST]
        chosen = {name: chosen[name] for name in chosen.keys() & set(worst)}
    bars = max(_LEAST_BARS, min(BARS, _ALL_BARS // max(len(chosen), 1)))
    calibrators: list[Calibrator] = [made() for made in registry.catalogue("calibrators").values()]
    specs = dict(state.plan.specs())
    return tuple(
        _histogram(
            name,
            stats[name],
            replace(specs[key], granularity=PER_TENSOR),
            chosen[name],
            calibrators=calibrators,
            bars=bars,
        )
        for name, key in keys.items()
        if name in chosen
    )


def _ranged(plan: Plan) -> dict[str, Key]:
    """Observed tensor -> the first key that has a range of it."""
    found: dict[str, Key] = {}
    for key, _ in plan.specs():
        if key not in plan.constants:
            found.setdefault(plan.tensors[key], key)
    return found


def _chosen(state: State, key: Key, stats: TensorStatistics) -> Candidate:
    assert state.params is not None
    params = params_of(state.params[key])
    spec = replace(params.spec, granularity=PER_TENSOR)
    return _candidate(params.method, params.range, stats, spec)


def _candidate(name: str, found: Range, stats: TensorStatistics, spec: QuantSpec) -> Candidate:
    lo, hi = float(found.lo.min()), float(found.hi.max())
    noise = float(expected_error(stats.bins, lo, hi, spec)[0])
    power = float(stats.bins.mean(np.square(stats.bins.center)))
    ratio = math.inf if not noise else power / noise
    return Candidate(name, lo, hi, 10 * math.log10(ratio) if ratio > 0 else -math.inf)


def _histogram(
    name: str,
    stats: TensorStatistics,
    spec: QuantSpec,
    chosen: Candidate,
    *,
    calibrators: Iterable[Calibrator],
    bars: int,
) -> TensorHistogram:
    candidates = []
    for calibrator in calibrators:
        try:
            found = choose(calibrator, stats, spec)
        except QdqError:  # it wants statistics that were not collected
            continue
        candidates.append(_candidate(calibrator.name, found, stats, spec))
    counts = binned(stats.bins, stats.lo, stats.hi, bars)
    return TensorHistogram(name, stats.lo, stats.hi, tuple(counts.tolist()), chosen, tuple(candidates))


def binned(bins: Bins, lo: float, hi: float, bars: int) -> FloatArray:
    """Counts in bars of equal width from ``lo`` to ``hi``, float64 (bars,), whose sum is that of the bins.

    Values are spread evenly over their bin, which is never rounded to one bar; exact zeros lie in the bar that 0 is in.
    """
    if not hi > lo:
        return np.array([float(bins.total)])
    edges = np.linspace(lo, hi, bars + 1)
    wide = bins.hi > bins.lo
    ends = np.concatenate([bins.lo[wide][:1], bins.hi[wide]]) if wide.any() else np.array([lo])
    counts = _spread(bins, wide, edges) if ends.size > 1 else np.zeros(bars)
    points = np.clip(np.searchsorted(edges, bins.lo[~wide], side="right") - 1, 0, bars - 1)
    np.add.at(counts, points, bins.count[~wide].astype(np.float64))
    return counts


def _spread(bins: Bins, wide: np.ndarray[tuple[int], np.dtype[np.bool_]], edges: FloatArray) -> FloatArray:
    """Counts of bins that have a width, by the cumulative distribution at each edge."""
    lo, hi, count = bins.lo[wide], bins.hi[wide], bins.count[wide].astype(np.float64)
    before = np.concatenate([[0.0], np.cumsum(count)])
    index = np.clip(np.searchsorted(lo, edges, side="right") - 1, 0, lo.size - 1)
    inside = np.clip((edges - lo[index]) / (hi[index] - lo[index]), 0.0, 1.0)
    below = before[index] + inside * count[index]
    below[0], below[-1] = 0.0, before[-1]
    found: FloatArray = np.diff(below)
    return found

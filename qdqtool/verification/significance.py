"""Whether a difference between two models on the same samples is more than chance."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_RESAMPLED: Final = 4000
_PERCENT: Final = 95.0


@dataclass(frozen=True)
class Difference:
    """A mean difference of paired scores, second minus first.

    Attributes:
        value: the difference.
        lo, hi: its 95 % interval, by resampling the samples.
        p: how often chance alone makes so large a difference: McNemar's exact test where a sample's score has two
            values (right or wrong), else the paired t-test; None where a score is one number over all samples.
    """

    value: float
    lo: float
    hi: float
    p: float | None

    @property
    def significant(self) -> bool:
        """Whether chance alone is unlikely, at 5 %: by p, or without one where the interval leaves out 0."""
        return self.lo > 0 or self.hi < 0 if self.p is None else self.p < 0.05


def paired(first: npt.NDArray[Any], second: npt.NDArray[Any], seed: int = 0) -> Difference:
    """Compare two models by their scores of each sample, (samples,) each.

    McNemar: Note on the sampling error of the difference between correlated proportions or percentages, 1947; Efron:
    Bootstrap methods: another look at the jackknife, 1979.
    """
    differences = second.astype(np.float64) - first.astype(np.float64)
    if not differences.any():
        return Difference(0.0, 0.0, 0.0, 1.0)
    values, counts = np.unique(differences, return_counts=True)
    rng = np.random.default_rng(seed)
    drawn = rng.multinomial(differences.size, counts / differences.size, _RESAMPLED) @ values / differences.size
    outside = (100 - _PERCENT) / 2
    lo, hi = np.percentile(drawn, [outside, 100 - outside])
    return Difference(float(differences.mean()), float(lo), float(hi), _chance(first, second, differences))


def resampled(
    score: Callable[[npt.NDArray[np.intp]], tuple[float, float]], samples: int, draws: int, seed: int = 0
) -> Difference | None:
    """Compare two models by scores that are one number each over all samples, such as an area under a curve.

    The interval is the percentile bootstrap's: samples are drawn with replacement, the same for both models, and the
    metric is computed anew (Efron, as above). None where fewer than half of the draws give a finite difference.

    Args:
        score: indices of samples, int (samples,) -> the score of either model on these.
        samples: how many there are.
        draws: how often to draw.
        seed: of the drawing.
    """
    rng = np.random.default_rng(seed)
    first, second = score(np.arange(samples))
    drawn = np.array([score(rng.integers(0, samples, samples)) for _ in range(draws)], np.float64).reshape(-1, 2)
    differences = drawn[:, 1] - drawn[:, 0]
    differences = differences[np.isfinite(differences)]
    if not differences.size or differences.size < draws / 2:
        return None
    outside = (100 - _PERCENT) / 2
    lo, hi = np.percentile(differences, [outside, 100 - outside])
    return Difference(second - first, float(lo), float(hi), None)


def _chance(first: npt.NDArray[Any], second: npt.NDArray[Any], differences: npt.NDArray[np.float64]) -> float:
    from scipy import stats  # takes a third of a second

    if np.unique(np.concatenate([first, second])).size <= 2:
        better, worse = int((differences > 0).sum()), int((differences < 0).sum())
        return float(stats.binomtest(better, better + worse).pvalue)
    if differences.size < 2 or np.ptp(differences) == 0:
        return 0.0 if differences.size > 1 else 1.0
    return float(stats.ttest_1samp(differences, 0.0).pvalue)

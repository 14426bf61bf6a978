"""Differences of paired scores: their intervals, and how likely they are by chance."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from qdqtool.verification.significance import paired, resampled


def hits(rng: np.random.Generator, both: int, first: int, second: int, none: int) -> tuple[np.ndarray, np.ndarray]:
    rows = [(100.0, 100.0)] * both + [(100.0, 0.0)] * first + [(0.0, 100.0)] * second + [(0.0, 0.0)] * none
    shuffled = np.array(rows)[rng.permutation(len(rows))]
    return shuffled[:, 0], shuffled[:, 1]


@pytest.mark.parametrize(("first", "second", "p"), [(5, 5, 1.0), (9, 1, 0.021484375), (30, 8, None)])
def test_right_or_wrong_is_mcnemar(first: int, second: int, p: float | None) -> None:
    found = paired(*hits(np.random.default_rng(0), 200, first, second, 50))
    assert found.value == pytest.approx(100 * (second - first) / (250 + first + second))
    assert found.p == pytest.approx(p if p is not None else stats.binomtest(second, first + second).pvalue)
    assert found.p is not None
    assert found.significant == (found.p < 0.05)
    assert found.lo <= found.value <= found.hi


def test_equal_scores_differ_in_nothing() -> None:
    found = paired(np.array([1.0, 2.0, 3.0]), np.array([1.0, 2.0, 3.0]))
    assert (found.value, found.lo, found.hi, found.p) == (0.0, 0.0, 0.0, 1.0)


def test_graded_scores_are_a_paired_t_test() -> None:
    rng = np.random.default_rng(1)
    first = rng.normal(30, 5, 200)
    second = first - rng.normal(0.5, 1, 200)
    found = paired(first, second)
    assert found.p == pytest.approx(stats.ttest_rel(second, first).pvalue)
    low, high = stats.t.interval(0.95, 199, found.value, stats.sem(second - first))
    assert (found.lo, found.hi) == pytest.approx((low, high), abs=0.03)


def test_the_interval_covers_the_truth() -> None:
    covered = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        found = paired(first := rng.normal(0, 1, 100), first + rng.normal(0.2, 1, 100), seed)
        covered += int(found.lo <= 0.2 <= found.hi)
    assert covered >= 87  # of 95 expected; fewer come once in a thousand


def test_one_sample_tells_nothing() -> None:
    assert paired(np.array([1.0]), np.array([2.5])).p == 1.0


# Metrics that are one number


def _spread(values: np.ndarray) -> float:
    return float(np.ptp(values))


def test_a_metric_of_one_number_gets_an_interval_by_drawing_samples() -> None:
    rng = np.random.default_rng(1)
    first = rng.standard_normal(400)
    second = first + 0.5 + 0.1 * rng.standard_normal(400)
    found = resampled(lambda i: (float(np.median(first[i])), float(np.median(second[i]))), 400, 200)
    assert found is not None
    assert found.p is None
    assert found.lo < 0.5 < found.hi
    assert found.value == pytest.approx(np.median(second) - np.median(first))
    assert found.significant
    assert 0 < found.hi - found.lo < 0.3


def test_equal_models_differ_by_nothing() -> None:
    values = np.random.default_rng(2).standard_normal(50)
    found = resampled(lambda i: (_spread(values[i]), _spread(values[i])), 50, 20)
    assert found is not None
    assert (found.value, found.lo, found.hi, found.significant) == (0.0, 0.0, 0.0, False)


def test_a_metric_that_fails_on_most_draws_has_no_interval() -> None:
    assert resampled(lambda i: (np.nan, 1.0), 10, 20) is None

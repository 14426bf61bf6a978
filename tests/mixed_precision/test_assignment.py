"""The integer program finds what trying everything finds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qdqtool.mixed_precision.assignment import least
from qdqtool.spec import FloatArray

BITS = np.array([2.0, 4.0, 8.0, 32.0])


def total(values: FloatArray, columns: tuple[int, ...]) -> float:
    return float(sum(values[row, column] for row, column in enumerate(columns)))


def brute_force(objective: FloatArray, cost: FloatArray, limit: float) -> float | None:
    choices = itertools.product(range(objective.shape[1]), repeat=len(objective))
    return min((total(objective, c) for c in choices if total(cost, c) <= limit), default=None)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), layers=st.integers(1, 5), mean=st.floats(1.5, 12.0))
def test_equals_brute_force(seed: int, layers: int, mean: float) -> None:
    rng = np.random.default_rng(seed)
    cost = rng.integers(1, 3000, (layers, 1)) * BITS
    noise = 10 ** -(rng.uniform(0, 3, (layers, 1)) + np.array([0.0, 1.2, 3.6, 8.0]))
    limit = float(cost[:, 0].sum() * mean / 2)
    best, found = brute_force(noise, cost, limit), least(noise, cost, limit)
    assert (found is None) == (best is None)
    if found is not None:
        columns = tuple(int(column) for column in found)
        assert total(cost, columns) <= limit * (1 + 1e-9)
        assert total(noise, columns) == pytest.approx(best, rel=1e-9)


def test_the_whole_budget_may_be_used() -> None:
    cost = np.array([[2.0, 4.0], [2.0, 4.0]])
    noise = np.array([[1.0, 0.1], [1.0, 0.2]])
    found = least(noise, cost, 6.0)
    assert found is not None
    assert found.tolist() == [1, 0]


def test_a_width_of_infinite_noise_is_never_chosen() -> None:
    found = least(np.array([[np.inf, 5.0]]), np.array([[1.0, 2.0]]), 2.0)
    assert found is not None
    assert found.tolist() == [1]
    assert least(np.array([[np.inf, 5.0]]), np.array([[1.0, 2.0]]), 1.0) is None

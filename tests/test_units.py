"""Numbers with their units."""

from __future__ import annotations

import math

import pytest

from qdqtool.units import count, db, duration, listed, percent, size


def test_decibels() -> None:
    assert [db(v) for v in (36.44, -2.0, math.inf, -math.inf)] == ["36.4 dB", "-2.0 dB", "equal", "-inf dB"]


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (278917, "279 kB"), (4_450_000, "4.5 MB"), (3 * 10**15, "3000 TB")],
)
def test_sizes(number: int, text: str) -> None:
    assert size(number) == text


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0001, "<1 ms"), (0.0994, "99 ms"), (0.2, "0.20 s"), (9.99, "9.99 s"), (42.3, "42 s"), (150.0, "2.5 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


def test_counts_and_lists() -> None:
    assert [count(1, "sample"), count(0, "sample"), count(2, "entry")] == ["1 sample", "0 samples", "2 entries"]
    assert listed(["a", "b"]) == "a, b"
    assert listed(["a", "b", "c", "d", "e"]) == "a, b, c and 2 more"
    assert percent(99.798) == "99.8 %"

"""What a user may ask a search for."""

from __future__ import annotations

import pytest

from qdqtool.errors import RecipeError
from qdqtool.mixed_precision.goals import Budget, Loss, goal, seconds


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("bits=4", Budget("bits", 4.0)),
        ("bits=3.5", Budget("bits", 3.5)),
        ("size=0.3", Budget("size", 0.3, share=True)),
        ("size=120kB", Budget("size", 120e3)),
        ("size = 1.5 MB", Budget("size", 1.5e6)),
        ("latency=0.8", Budget("latency", 0.8, share=True)),
    ],
)
def test_budgets(text: str, budget: Budget) -> None:
    assert Budget.of(text) == budget


@pytest.mark.parametrize("text", ["bit=4", "bits", "bits=0", "bits=-1", "bits=4kB", "size=1.2.3", "size=3xB", "4"])
def test_other_budgets_are_refused_with_examples(text: str) -> None:
    with pytest.raises(RecipeError, match="size=120kB"):
        Budget.of(text)


def test_a_budget_or_a_loss_but_not_both() -> None:
    assert goal("bits=4", None, None, None) == Budget("bits", 4.0)
    assert goal(None, 0.5, 20.0, "top1") == Loss(20.0, 0.5)
    for budget, drop in ((None, None), ("bits=4", 0.5)):
        with pytest.raises(RecipeError, match="either a budget"):
            goal(budget, drop, None, "top1")


def test_a_loss_of_a_metric_needs_one() -> None:
    with pytest.raises(RecipeError, match="name one"):
        goal(None, 0.5, None, None)
    with pytest.raises(RecipeError, match="at least 0"):
        goal(None, -0.5, None, "top1")


@pytest.mark.parametrize(("text", "number"), [("90", 90), ("90s", 90), ("10m", 600), ("1.5h", 5400)])
def test_durations(text: str, number: float) -> None:
    assert seconds(text) == number


@pytest.mark.parametrize("text", ["", "m", "-3s", "0", "10 minutes"])
def test_other_durations_are_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="10m"):
        seconds(text)

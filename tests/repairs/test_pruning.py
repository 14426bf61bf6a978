"""A step's change can be put on another recipe, and is only what the step changed."""

from __future__ import annotations

from typing import Any

import pytest

from qdqtool.recipe import Recipe
from qdqtool.repairs.pruning import Change
from qdqtool.repairs.values import Step

STEP = Step("c", "Conv", "bits", "", 0.0, 0.0, 0.0, 0, 0)
Fields = dict[str, Any]


@pytest.mark.parametrize(
    ("before", "after", "other", "expected"),
    [
        ({}, {"equalization": True}, {"seed": 1}, {"equalization": True, "seed": 1}),
        ({"bias_correction": False}, {}, {"bias_correction": False, "seed": 1}, {"seed": 1}),
        (
            {"nodes_to_exclude": ["a"]},
            {"nodes_to_exclude": ["a", "b"]},
            {"nodes_to_exclude": ["c"]},
            {"nodes_to_exclude": ["c", "b"]},
        ),
        (
            {"tensors": {"x": {"range": [0, 1]}, "y": {"dtype": "int16"}}},
            {"tensors": {"y": {"dtype": "int16"}, "z": {"dtype": "uint16"}}},
            {"tensors": {"x": {"range": [0, 1]}, "w": {"dtype": "uint16"}}},
            {"tensors": {"z": {"dtype": "uint16"}, "w": {"dtype": "uint16"}}},
        ),
        ({"seed": 1}, {"seed": 1}, {"seed": 2}, {"seed": 2}),
    ],
)
def test_a_change_on_another_recipe(before: Fields, after: Fields, other: Fields, expected: Fields) -> None:
    change = Change(STEP, Recipe.of(before), Recipe.of(after))
    assert change.on(Recipe.of(other)).values() == Recipe.of(expected).values()
    assert change.on(Recipe.of(before)).values() == Recipe.of(after).values()

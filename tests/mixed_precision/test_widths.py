"""Widths of layers, and the recipe that an assignment is."""

from __future__ import annotations

import tomllib

import numpy as np
import pytest

from qdqtool.errors import RecipeError
from qdqtool.mixed_precision.widths import WIDTHS, recipe_of, to_toml, widths
from qdqtool.recipe import Recipe
from tests import builders

BASE = Recipe.of({"target": "cpu", "calibrator": "minmax"})
MODEL = builders.conv_chain(4)


def test_widths_ascend_whatever_order_they_were_named_in() -> None:
    assert [width.name for width in widths(["float", "8", "2"], wide=True)] == ["2", "8", "float"]


@pytest.mark.parametrize(("names", "message"), [(["7"], "not 7"), ([], "not none"), (["16"], "leave 16 out")])
def test_unknown_widths_are_refused(names: list[str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        widths(names, wide=False)


def test_the_recipe_of_an_assignment_has_a_line_a_layer_and_reads_back() -> None:
    recipe = recipe_of(BASE, {"a/conv.1": "4", "b": "8", "c[0]": "float", "d": "16"})
    text = to_toml(recipe, ["what it came to"])
    assert text.startswith("# what it came to\n")
    assert '"a/conv\\\\.1" = { precision = "w4a8" }\n' in text
    assert recipe.nodes_to_exclude == (r"c\[0\]",)
    assert "b" not in recipe.nodes
    assert Recipe.of(tomllib.loads(text)) == recipe


def test_what_the_base_says_of_other_nodes_stays() -> None:
    base = Recipe.of({"target": "cpu", "nodes": {"other": {"dtype": "uint16"}}, "nodes_to_exclude": ["head"]})
    recipe = recipe_of(base, {"c0": "4", "c1": "float"})
    assert [*recipe.nodes] == ["c0", "other"]
    assert recipe.nodes_to_exclude == ("head", "c1")


@pytest.mark.parametrize("storage", ["packed", "int8"])
def test_weights_have_so_many_bits_in_the_quantized_model(storage: str) -> None:
    for name in ("2", "3", "4", "5", "6"):
        recipe = recipe_of(BASE, {f"c{i}": name for i in range(4)})
        result = builders.quantized(MODEL, **{**recipe.values(), "storage": storage})
        codes = [value for value in builders.constants(result.model).values() if value.ndim == 4]
        limit = 2 ** (int(name) - 1)
        assert codes
        for value in codes:
            assert limit / 2 <= np.abs(value.astype(np.int64)).max() <= limit
        stored = WIDTHS[name].stored_bits(recipe.storage if storage == "packed" else "int8")
        assert {value.dtype.name for value in codes} == {"int4" if stored == 4 else "int8"}


def test_more_bits_are_nearer() -> None:
    fed = builders.feeds(MODEL)
    found = []
    for name in ("2", "3", "4", "5", "6", "8"):
        recipe = recipe_of(BASE, {f"c{i}": name for i in range(4)})
        found.append(builders.quality(MODEL, builders.quantized(MODEL, fed, **recipe.values()).model, fed)["r3"])
    assert np.all(np.diff(found) > 0.3)


def test_16_bits_are_nearer_than_8() -> None:
    fed = builders.feeds(MODEL)
    last = {"c3": "float"}  # else its output has 8 bits
    want, found = builders.run(MODEL, fed)["r3"], {}
    for name in ("8", "16"):
        recipe = recipe_of(BASE, {**{f"c{i}": name for i in range(3)}, **last})
        result = builders.quantized(MODEL, fed, **recipe.values())
        found[name] = builders.sqnr(want, builders.run(result.model, fed, optimize=False)["r3"])
    assert found["16"] > found["8"] + 5

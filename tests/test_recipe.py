"""A recipe has three spellings, files, keywords and command-line options, and refuses what it does not know."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from qdqtool.cli.options import make_recipe as from_options
from qdqtool.errors import RecipeError
from qdqtool.pipeline import make_recipe
from qdqtool.recipe import Recipe, match_names
from qdqtool.spec import FORMATS

FIELDS: dict[str, Any] = {
    "target": "cpu",
    "calibrator": {"name": "percentile", "percentile": 99.9},
    "per_channel": False,
    "nodes_to_exclude": ["head/.*", "stem"],
    "tensors": {"logits": {"dtype": "int16", "range": [-1.0, 2.5]}},
    "nodes": {"block1/.*": {"symmetric": True}},
    "samples": 20,
    "min_sqnr": 30.0,
    "images": {"resize": 40, "crop": [32, 24], "mean": [0.4, 0.5, 0.6]},
}
TOML = """
target = "cpu"
per_channel = false
nodes_to_exclude = ["head/.*", "stem"]
samples = 20
min_sqnr = 30.0
[calibrator]
name = "percentile"
percentile = 99.9
[tensors.logits]
dtype = "int16"
range = [-1.0, 2.5]
[nodes."block1/.*"]
symmetric = true
[images]
resize = 40
crop = [32, 24]
mean = [0.4, 0.5, 0.6]
"""


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("suffix", "text"),
    [
        (".toml", TOML),
        (".json", json.dumps(FIELDS)),
        (".yaml", yaml.safe_dump(FIELDS)),
        (".yml", yaml.safe_dump(FIELDS)),
    ],
)
def test_every_file_format_gives_the_recipe_of_the_keywords(tmp_path: Path, suffix: str, text: str) -> None:
    path = write(tmp_path / f"recipe{suffix}", text)
    assert Recipe.of(Recipe.read(path)) == Recipe.of(FIELDS)
    assert from_options(str(path), {}) == Recipe.of(FIELDS)


def test_three_spellings_of_one_recipe() -> None:
    given: dict[str, Any] = {
        "target": "cpu",
        "calibrator": "percentile",
        "settings": (("percentile", 99.9),),
        "per_channel": False,
        "nodes_to_exclude": ("head/.*", "stem"),
        "tensors": (("logits", {"dtype": "int16", "range": [-1.0, 2.5]}),),
        "nodes": (("block1/.*", {"symmetric": True}),),
        "samples": 20,
        "min_sqnr": 30.0,
        "images": (("resize", 40), ("crop", [32, 24]), ("mean", [0.4, 0.5, 0.6])),
    }
    keywords = make_recipe(None, FIELDS)
    assert from_options(None, given) == keywords == make_recipe({"target": "tensorrt", **FIELDS}, {"target": "cpu"})
    assert make_recipe(keywords, {"samples": 5}) == Recipe.of({**FIELDS, "samples": 5})


def test_toml_and_json_are_read_back_as_they_were() -> None:
    recipe = Recipe.of(FIELDS)
    assert Recipe.of(tomllib.loads(recipe.to_toml())) == recipe
    assert Recipe.of(json.loads(recipe.to_json())) == recipe
    assert Recipe.of(yaml.safe_load(yaml.safe_dump(recipe.values()))) == recipe


def test_what_describes_every_file_is_always_written() -> None:
    written = tomllib.loads(Recipe().to_toml())
    assert written == {"target": "cuda", "precision": "w8a8", "calibrator": {"name": "mse"}}
    assert json.loads(Recipe().to_json()) == written
    assert Recipe().values() == {}


def test_the_order_of_overrides_is_kept_because_the_first_one_counts() -> None:
    nodes = {"z.*": {"symmetric": True}, "a.*": {"symmetric": False}, "m.*": {"dtype": "int16"}}
    recipe = Recipe.of({"nodes": nodes})
    assert list(Recipe.of(json.loads(recipe.to_json())).nodes) == list(nodes)
    assert list(Recipe.of(tomllib.loads(recipe.to_toml())).nodes) == list(nodes)


numbers = st.floats(allow_nan=False, allow_infinity=False, width=32)
names = st.text(st.characters(codec="utf-8", exclude_categories=["Cc"]), min_size=1, max_size=8)
overrides = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from([name for name in FORMATS if name != "int32"]),
        "symmetric": st.booleans(),
        "granularity": st.sampled_from(["per_tensor", "per_channel"]),
        "range": st.tuples(numbers, numbers).filter(lambda ends: ends[0] < ends[1]).map(list),
    },
)


@settings(deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {},
        optional={
            "target": st.sampled_from(["cpu", "cuda", "tensorrt"]),
            "calibrator": st.one_of(names, st.fixed_dictionaries({"name": names, "constant": numbers})),
            "samples": st.integers(1, 10**6),
            "seed": st.integers(0, 2**31),
            "min_sqnr": numbers,
            "tensors": st.dictionaries(names, overrides, max_size=3),
            "op_types_to_quantize": st.lists(names, max_size=3),
            "bias_correction": st.booleans(),
            "equalization": st.one_of(st.none(), st.booleans()),
            "smoothing": st.sampled_from(["off", "free", "inputs", "all"]),
            "external_data": st.one_of(st.none(), st.booleans()),
        },
    )
)
def test_any_recipe_survives_toml_and_json(fields: dict[str, Any]) -> None:
    recipe = Recipe.of(fields)
    assert Recipe.of(tomllib.loads(recipe.to_toml())) == recipe
    assert Recipe.of(json.loads(recipe.to_json())) == recipe


def test_a_calibrator_by_name_and_one_name_for_a_list() -> None:
    recipe = Recipe.of({"calibrator": "minmax", "nodes_to_exclude": "head"})
    assert recipe.calibrator.name == "minmax"
    assert recipe.calibrator.options == {}
    assert recipe.nodes_to_exclude == ("head",)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"calibrater": "mse"}, r"unknown recipe field 'calibrater'\. Did you mean 'calibrator'\? Known: target"),
        ({"tensors": {"x": {"dtyp": "int8"}}}, r"field 'tensors\.x\.dtyp'\. Did you mean 'dtype'\? Known: dtype"),
        ({"images": {"resise": 3}}, r"field 'images\.resise'\. Did you mean 'resize'\?"),
        ({"precision": "w8a9"}, r"'precision': Input should be 'w8a8', .* \(given: 'w8a9'\)"),
        ({"samples": 0}, r"'samples': .*greater than or equal to 1 \(given: 0\)"),
        ({"samples": "many"}, r"'samples': .*valid integer \(given: 'many'\)"),
        ({"samples": 1.0}, r"'samples': .*valid integer"),
        ({"per_channel": 1}, r"'per_channel': .*valid boolean \(given: 1\)"),
        ({"min_sqnr": float("nan")}, r"'min_sqnr': .*finite"),
        ({"tensors": {"x": {"dtype": "int9"}}}, r"unknown number format 'int9'; known: int8.*Did you mean 'int"),
        ({"tensors": {"x": {"dtype": "int32"}}}, r"unknown number format 'int32'; known: int8"),
        ({"tensors": {"x": {"range": [1.0, 1.0]}}}, r"the range must ascend, not \[1.0, 1.0\]"),
        ({"tensors": {"x": {"range": [1.0]}}}, r"'tensors.x.range.1': Field required"),
        ({"nodes_to_exclude": ["a("]}, r"'a\(' is no regular expression: .*unterminated"),
        ({"calibrator": 3}, r"'calibrator': .*\(given: 3\)"),
        ({"calibrator": {"percentile": 99.0}}, r"'calibrator.name': Field required"),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.of(fields)


def test_all_that_is_wrong_is_said_at_once() -> None:
    with pytest.raises(RecipeError, match=r"'targett'.*; .*'sampels'"):
        Recipe.of({"targett": "cpu", "sampels": 3})


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValueError, match="frozen"):
        Recipe().target = "cpu"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("r.toml", "target = ", "is no valid TOML"),
        ("r.json", "{", "is no valid JSON"),
        ("r.yaml", "a: [", "is no valid YAML"),
        ("r.toml", "[target", "is no valid TOML"),
        ("r.json", "[1]", "must be a table of fields, not list"),
        ("r.yaml", "", "must be a table of fields, not NoneType"),
        ("r.txt", "x", "name the file .toml, .yaml, .yml or .json"),
    ],
)
def test_files_that_hold_no_recipe(tmp_path: Path, name: str, text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        Recipe.read(write(tmp_path / name, text))
    assert name in str(caught.value)


def test_a_missing_or_binary_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"no\.toml cannot be read"):
        Recipe.read(tmp_path / "no.toml")
    (tmp_path / "r.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match=r"r\.toml cannot be read"):
        Recipe.read(tmp_path / "r.toml")


def test_patterns_match_whole_names() -> None:
    known = ["layer1/conv", "layer1/relu", "layer10/conv"]
    assert match_names(["layer1/.*"], known, "nodes") == {"layer1/conv", "layer1/relu"}
    assert match_names([], known, "nodes") == set()
    with pytest.raises(RecipeError, match=r"nodes_to_exclude 'layer1' matches no name\."):
        match_names(["layer1"], known, "nodes_to_exclude")
    with pytest.raises(RecipeError, match=r"Did you mean 'layer1/conv'\?"):
        match_names(["layer1/conf"], known, "nodes_to_exclude")

"""Values as users type them, and how options and a recipe file become one recipe."""

from __future__ import annotations

import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from qdqtool.cli.main import main
from qdqtool.cli.options import Assignment, NamedOverride, make_recipe, parse_value
from qdqtool.errors import RecipeError
from qdqtool.recipe import Recipe


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("99.99", 99.99),
        ("8", 8),
        ("true", True),
        ("int16", "int16"),
        ('"8"', "8"),
        ("[-1, 1.5]", [-1, 1.5]),
        ("1979-05-27", "1979-05-27"),
        ("1\nother = 2", "1\nother = 2"),
        ("", ""),
    ],
)
def test_values_are_toml_scalars_or_text(text: str, value: object) -> None:
    parsed = parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)


def test_an_assignment_splits_at_the_first_equals_sign() -> None:
    assert Assignment().convert("name = a=b", None, None) == ("name", "a=b")
    with pytest.raises(click.BadParameter, match="FIELD=VALUE"):
        Assignment().convert("=3", None, None)


def test_an_override_splits_at_the_last_colon_and_outside_of_brackets() -> None:
    found = NamedOverride("REGEX").convert("(?:a|b):0:dtype=int16,range=[-1,1],symmetric=true", None, None)
    assert found == ("(?:a|b):0", {"dtype": "int16", "range": [-1, 1], "symmetric": True})
    with pytest.raises(click.BadParameter, match="NAME:FIELD=VALUE"):
        NamedOverride("NAME").convert("dtype=int16", None, None)


def test_every_field_of_the_recipe_has_an_option() -> None:
    options = {parameter.name for parameter in main.commands["quantize"].params}
    assert set(Recipe.model_fields) <= options


def test_defaults_in_the_help_are_the_recipe_s() -> None:
    text = " ".join(CliRunner().invoke(main, ["quantize", "--help"]).stdout.split())
    shown = {
        "target": Recipe().target,
        "precision": Recipe().precision,
        "calibrator": Recipe().calibrator.name,
        "weight-calibrator": Recipe().weight_calibrator,
        "seed": str(Recipe().seed),
        "bias-correction": "on" if Recipe().bias_correction else "off",
        "smoothing": Recipe().smoothing,
    }
    for option, default in shown.items():
        found = re.search(rf"--{option} .*?\[default: (.*?)\]", text)
        assert found is not None
        assert found[1] == default


class TestMakeRecipe:
    @pytest.fixture
    def file(self, tmp_path: Path) -> str:
        path = tmp_path / "recipe.toml"
        path.write_text(
            'target = "tensorrt"\ncalibrator = {name = "percentile", percentile = 99.5}\n'
            'nodes = {"a.*" = {symmetric = true}}\ntensors = {x = {dtype = "int8", symmetric = true}}\n'
            "images = {resize = 256, crop = 224}\n"
        )
        return str(path)

    def test_only_what_is_given_is_set(self) -> None:
        recipe = make_recipe(None, {"target": None, "settings": (), "nodes_to_exclude": (), "seed": 0})
        assert recipe == Recipe()
        assert recipe.model_fields_set == {"seed"}

    def test_the_file_alone(self, file: str) -> None:
        recipe = make_recipe(file, {})
        assert (recipe.target, recipe.calibrator.options) == ("tensorrt", {"percentile": 99.5})

    def test_settings_go_to_the_file_s_calibrator(self, file: str) -> None:
        assert make_recipe(file, {"settings": (("percentile", 99),)}).calibrator.options == {"percentile": 99}
        same = make_recipe(file, {"calibrator": "percentile"})
        assert same.calibrator.options == {"percentile": 99.5}

    def test_another_calibrator_drops_the_file_s_options(self, file: str) -> None:
        recipe = make_recipe(file, {"calibrator": "minmax"})
        assert (recipe.calibrator.name, recipe.calibrator.options) == ("minmax", {})

    def test_settings_alone_go_to_the_default_calibrator(self) -> None:
        recipe = make_recipe(None, {"settings": (("step", 1),)})
        assert recipe.calibrator.name == Recipe().calibrator.name
        assert recipe.calibrator.options == {"step": 1}

    def test_overrides_merge_field_by_field_with_the_command_line_first(self, file: str) -> None:
        given = {
            "nodes": (("b", {"dtype": "int8"}), ("b", {"symmetric": False})),
            "tensors": (("x", {"dtype": "int16"}),),
        }
        recipe = make_recipe(file, given)
        assert list(recipe.nodes) == ["b", "a.*"]
        assert (recipe.nodes["b"].dtype, recipe.nodes["b"].symmetric) == ("int8", False)
        assert (recipe.tensors["x"].dtype, recipe.tensors["x"].symmetric) == ("int16", True)

    def test_images_merge_too(self, file: str) -> None:
        images = make_recipe(file, {"images": (("crop", 192), ("mean", [0.5, 0.5, 0.5]))}).images
        assert images is not None
        assert (images.resize, images.crop, images.mean) == (256, 192, (0.5, 0.5, 0.5))

    def test_operators_split_at_commas(self) -> None:
        assert make_recipe(None, {"op_types_to_quantize": ("Conv, Gemm", "Add")}).op_types_to_quantize == (
            "Conv",
            "Gemm",
            "Add",
        )

    def test_a_mistake_in_the_file_names_the_file(self, tmp_path: Path) -> None:
        path = tmp_path / "recipe.yaml"
        path.write_text("images: 3\n")
        with pytest.raises(RecipeError, match=r"recipe\.yaml: recipe field 'images'"):
            make_recipe(str(path), {"images": (("crop", 3),)})

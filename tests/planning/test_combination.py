"""Fields of a recipe that do not go together are refused with a reason, and those that do are not."""

from __future__ import annotations

from typing import Any

import pytest

from qdqtool.errors import RecipeError
from qdqtool.recipe import Recipe


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"block_size": 32}, "block_size goes with the precisions w8a16, w4a16 and w2a16, not with w8a8"),
        ({"weight_symmetric": True}, "weight_symmetric goes with the precisions w8a16, w4a16 and w2a16, not with w8a8"),
        ({"float16": True}, "float16 goes with the precisions w8a16, w4a16 and w2a16, not with w8a8"),
        ({"keep_io_types": False}, "keep_io_types = false is about models in float16; give precision fp16, or float16"),
        ({"precision": "w4a16", "keep_io_types": False}, "keep_io_types = false is about models in float16"),
        ({"precision": "w4a16", "calibrator": "minmax"}, "calibrator has no use with precision w4a16: no range"),
        ({"precision": "w8a16", "reduce_range": True}, "reduce_range has no use with precision w8a16: no 8-bit sums"),
        (
            {"precision": "w2a16", "per_channel": False},
            "per_channel has no use with precision w2a16: weights get a sca",
        ),
        ({"precision": "fp16", "float16": True}, "precision fp16 stores nothing in integers: float16 has no use there"),
        ({"precision": "fp16", "block_size": 32}, "precision fp16 stores nothing in integers: block_size has no use"),
        (
            {"precision": "fp16", "tensors": {"x": {"symmetric": True}}},
            "stores nothing in integers: tensors has no use",
        ),
        ({"precision": "fp16", "calibrator": "minmax"}, "precision fp16 stores nothing in integers: calibrator has no"),
        ({"precision": "w4a16", "block_size": 8}, "block_size must be a power of two from 16 to 256, not 8"),
        ({"precision": "w4a16", "block_size": 48}, "block_size must be a power of two from 16 to 256, not 48"),
        ({"precision": "w4a16", "block_size": 512}, "block_size must be a power of two from 16 to 256, not 512"),
        ({"precision": "w2a16", "block_size": 16}, "block_size 16 has no kernel for 2 bits; give one of 32, 64, 128"),
        (
            {"precision": "w8a16", "block_size": 32},
            "block_size: 8-bit weights have one scale for each channel on targe",
        ),
        (
            {"precision": "w2a16", "target": "tensorrt"},
            "target tensorrt has no 2-bit weights; give one of w8a16, w4a16",
        ),
        (
            {"precision": "w4a16", "target": "tensorrt", "weight_symmetric": False},
            "target tensorrt takes no zero points of weights: leave them symmetric",
        ),
        (
            {"precision": "w4a16", "target": "tensorrt", "nodes": {"a": {"symmetric": False}}},
            "target tensorrt takes no zero points of weights: leave them symmetric",
        ),
        (
            {"precision": "w4a16", "target": "tensorrt", "nodes": {"a": {"dtype": "uint4"}}},
            "override of 'a': target tensorrt takes signed codes of weights alone",
        ),
        (
            {"precision": "w4a16", "target": "tensorrt", "nodes": {"a": {"dtype": "int2"}}},
            "override of 'a': target tensorrt has no weights of 2 bits",
        ),
        (
            {"precision": "w4a16", "tensors": {"x": {"dtype": "int16"}}},
            "override of 'x': weights alone are stored in 2, 4 or 8 bits, not as int16",
        ),
    ],
)
def test_what_does_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.of(fields)


@pytest.mark.parametrize(
    ("fields", "opset", "weight", "half", "data"),
    [
        ({}, 13, "int8", False, True),
        ({"precision": "w8a16"}, 19, "int8", False, False),
        ({"precision": "w8a16", "target": "cpu"}, 21, "int8", False, False),
        ({"precision": "w8a16", "target": "cpu", "block_size": 64}, 21, "int8", False, False),
        ({"precision": "w4a16", "float16": True, "keep_io_types": False}, 21, "int4", True, False),
        ({"precision": "w4a16", "weight_symmetric": False}, 21, "uint4", False, False),
        ({"precision": "w2a16", "block_size": 128}, 25, "uint2", False, False),
        ({"precision": "w2a16", "weight_symmetric": True}, 25, "int2", False, False),
        ({"precision": "w8a16", "nodes": {"a": {"dtype": "int4"}}}, 21, "int8", False, False),
        ({"precision": "w4a16", "samples": 3, "bias_correction": False}, 21, "int4", False, False),
        ({"precision": "fp16", "keep_io_types": False, "nodes_to_exclude": ["a"]}, 13, "int8", True, False),
    ],
)
def test_what_does(fields: dict[str, Any], opset: int, weight: str, half: bool, data: bool) -> None:
    recipe = Recipe.of(fields)
    found = (recipe.min_opset, recipe.weight_format.name, recipe.to_float16, recipe.needs_data)
    assert found == (opset, weight, half, data)
    assert Recipe.of(recipe.values()) == recipe


def test_all_fields_are_judged_after_the_command_line_overrode_the_file() -> None:
    with pytest.raises(RecipeError, match="calibrator has no use with precision w4a16"):
        Recipe.of({**Recipe.of({"calibrator": "minmax"}).values(), "precision": "w4a16"})

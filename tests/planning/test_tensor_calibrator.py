"""A calibrator of its own for one tensor."""

from __future__ import annotations

from typing import Any

import pytest

from qdqtool.errors import RecipeError
from tests.builders import conv_chain, quantized

MODEL = conv_chain(2)


def methods(**recipe: Any) -> dict[str, str]:
    found = quantized(MODEL, calibrator="minmax", **recipe).report.tensors
    return {one.tensor: one.method for one in found if one.kind == "activation"}


def test_one_tensor_has_its_own_calibrator() -> None:
    assert methods(tensors={"r0": {"calibrator": "mse"}}) == {"x": "minmax", "r0": "mse", "r1": "minmax"}
    table = {"name": "percentile", "percentile": 90.0}
    assert methods(tensors={"r0": {"calibrator": table}})["r0"] == "percentile"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tensors": {"r0": {"calibrator": "msee"}}}, "unknown calibrator 'msee'.*Did you mean 'mse'"),
        ({"tensors": {"w0": {"calibrator": "mse"}}}, "'w0': calibrator has no effect"),
        ({"tensors": {"r0": {"calibrator": "mse", "range": [0, 1]}}}, "leave one of them out"),
        ({"nodes": {"c0": {"calibrator": "mse"}}}, "a calibrator is of a tensor"),
        ({"precision": "w8a16", "tensors": {"r0": {"calibrator": "mse"}}}, "no range of an activation is chosen"),
    ],
)
def test_a_calibrator_that_would_choose_nothing_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quantized(MODEL, **fields)

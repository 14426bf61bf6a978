"""Arrays of types that numpy has not go into the runtime and come out again."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import pytest

from qdqtool import foreign, runtime
from qdqtool.errors import ModelError
from tests.builders import parse

TYPES = [
    ("bfloat16", ml_dtypes.bfloat16),
    ("float8e4m3fn", ml_dtypes.float8_e4m3fn),
    ("float8e5m2", ml_dtypes.float8_e5m2),
]


@pytest.mark.parametrize(("name", "dtype"), TYPES)
@pytest.mark.parametrize("shape", [(3, 2), (0, 2), ()])
def test_values_come_out_as_they_went_in(name: str, dtype: Any, shape: tuple[int, ...]) -> None:
    size = f"[{', '.join('NM'[: len(shape)])}]" if shape else ""
    proto = parse(
        "y = Identity(x) w = Identity(v)", f"{name}{size} x, float[2] v", f"{name}{size} y, float[2] w", {}, opset=19
    )
    active = runtime.session(proto)
    assert foreign.is_needed(active)
    x, v = np.asarray(np.random.default_rng(0).normal(size=shape)).astype(dtype), np.array([1, 2], np.float32)
    y, w = runtime.run(active, None, {"x": x, "v": v})
    assert y.dtype == dtype
    assert y.shape == shape
    assert y.tobytes() == x.tobytes()
    np.testing.assert_array_equal(w, v)
    (only,) = runtime.run(active, ["w"], {"x": x, "v": v})
    np.testing.assert_array_equal(only, v)


def test_types_of_numpy_go_the_usual_way() -> None:
    active = runtime.session(parse("y = Identity(x)", "float16[N] x", "float16[N] y", {}))
    assert not foreign.is_needed(active)
    assert not foreign.is_foreign(np.dtype(np.float16))


def test_the_runtimes_complaint_is_kept() -> None:
    active = runtime.session(parse("y = Identity(x)", "bfloat16[2] x", "bfloat16[2] y", {}))
    with pytest.raises(ModelError, match=r"cannot run the model on inputs x bfloat16\[3\]"):
        runtime.run(active, None, {"x": np.zeros(3, ml_dtypes.bfloat16)})


def test_only_tensors_of_numbers_are_compared() -> None:
    body = "y = Identity(x) t = Identity(s) q = SequenceConstruct(x)"
    proto = parse(body, "float[2] x, string[1] s", "float[2] y, string[1] t, seq(float[2]) q", {})
    active = runtime.session(proto)
    assert runtime.comparable(active) == ["y"]
    assert runtime.run(active, [], {"x": np.zeros(2, np.float32), "s": np.array(["a"])}) == []

"""Which weights alone are stored in integers, in which form, and why others are not."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

from qdqtool import pipeline
from qdqtool.errors import RecipeError
from qdqtool.passes_api import State
from qdqtool.planning.plan import Plan
from qdqtool.spec import QuantSpec
from tests.builders import conv, conv_values, normal, parse

TOKENS = ("float[N, T, 64] x", "float[N, T, 64] y")
VALUES = conv_values(1) | {
    "w": normal(64, 64),
    "v": normal(64, 64, seed=1),
    "odd": normal(64, 50),
    "deep": normal(2, 64, 64),
    "half": normal(64, 64).astype(np.float16),
    "double": normal(64, 64).astype(np.float64),
    "empty": np.zeros((64, 0), np.float32),
    "table": normal(1000, 64),
    "wide": normal(64, 1000),
    "small": normal(100, 64),
    "cube": normal(40, 4, 128),
    "scale": np.array(0.1, np.float32),
    "codes": np.ones((64,), np.int8),
    "c": normal(40, 64, 3, 3),
    "first": normal(40, 8, 3, 3),
    "up": normal(64, 40, 3, 3),
    "gates": normal(1, 64, 16),
    "again": normal(1, 64, 16, seed=1),
}


def planned(body: str, x: str = TOKENS[0], y: str = TOKENS[1], **fields: Any) -> State:
    used = {name: value for name, value in VALUES.items() if re.search(rf"[( ]{name}[,)]", body)}
    fields = {"target": "cpu", "precision": "w4a16", **fields}
    state, _ = pipeline.dry_run(parse(body, x, y, used, opset=17), **fields)
    return state


def plan(state: State) -> Plan:
    assert state.plan is not None
    return state.plan


def specs(state: State) -> dict[str, str]:
    """Key -> format, symmetry and granularity, in words."""
    return {str(key).removeprefix("::"): str(entry) for key, entry in plan(state).entries.items()}


def skips(state: State) -> dict[str, str]:
    return {skip.node: skip.reason for skip in state.skipped}


PRODUCT = "[m] y = MatMul(x, w)"


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({}, "int4 symmetric per_block(axis 0, block 32)"),
        ({"block_size": 128}, "int4 symmetric per_block(axis 0, block 128)"),
        ({"weight_symmetric": False}, "uint4 asymmetric per_block(axis 0, block 32)"),
        ({"precision": "w8a16"}, "int8 symmetric per_block(axis 0, block 32)"),
        ({"precision": "w8a16", "weight_symmetric": False}, "uint8 asymmetric per_block(axis 0, block 32)"),
        ({"precision": "w2a16"}, "uint2 asymmetric per_block(axis 0, block 32)"),
        ({"precision": "w2a16", "weight_symmetric": True}, "int2 symmetric per_block(axis 0, block 32)"),
        ({"target": "cuda"}, "int4 symmetric per_block(axis 0, block 32)"),
        ({"target": "cuda", "precision": "w8a16"}, "int8 symmetric per_channel(axis 1)"),
        ({"target": "tensorrt", "precision": "w8a16"}, "int8 symmetric per_channel(axis 1)"),
        ({"nodes": {"m": {"dtype": "int8"}}}, "int8 symmetric per_block(axis 0, block 32)"),
        ({"nodes": {"m": {"dtype": "uint4"}}}, "uint4 asymmetric per_block(axis 0, block 32)"),
        ({"nodes": {"m": {"dtype": "uint4", "symmetric": True}}}, "uint4 symmetric per_block(axis 0, block 32)"),
        ({"tensors": {"w": {"granularity": "per_channel"}}}, "int4 symmetric per_channel(axis 1)"),
        ({"tensors": {"w": {"granularity": "per_tensor"}}}, "int4 symmetric per_tensor"),
        (
            {"tensors": {"w": {"dtype": "int8"}}, "nodes": {"m": {"dtype": "uint4"}}},
            "int8 symmetric per_block(axis 0, block 32)",
        ),
        (
            {"target": "cuda", "precision": "w8a16", "nodes": {"m": {"dtype": "int4"}}},
            "int4 symmetric per_block(axis 0, block 32)",
        ),
    ],
)
def test_formats_and_blocks(fields: dict[str, Any], wanted: str) -> None:
    state = planned(PRODUCT, **fields)
    assert specs(state) == {"m::1": wanted}
    assert plan(state).kernels == {"m": "MatMul"}
    assert plan(state).weight_only == {"m"}
    assert plan(state).constants == set(plan(state).entries)


def test_a_range_of_the_user_is_that_of_the_weight() -> None:
    (entry,) = plan(planned(PRODUCT, tensors={"w": {"range": [-0.5, 0.5]}})).entries.values()
    assert isinstance(entry, QuantSpec)
    assert entry.fixed == (-0.5, 0.5)


@pytest.mark.parametrize(
    ("body", "x", "y", "reason"),
    [
        ("[n] y = MatMul(x, z)", f"{TOKENS[0]}, float[64, 64] z", TOKENS[1], "it has no constant weight"),
        ("[n] y = MatMul(w, x)", "float[64, 3] x", "float[64, 3] y", "its constant stands on the left"),
        ("[n] y = MatMul(x, deep)", "float[2, T, 64] x", "float[2, T, 64] y", "its weight has rank 3: only a matrix"),
        ("[n] y = MatMul(x, double)", "double[N, 64] x", "double[N, 64] y", "its weight 'double' is no float32"),
        ("[n] y = MatMul(x, empty)", TOKENS[0], "float[N, T, 0] y", "its weight 'empty' is no float32 or float16, or"),
        (
            "[d] f = DequantizeLinear(q, scale) [n] y = MatMul(f, w)",
            "int8[N, 64] q",
            "float[N, 64] y",
            "its input is quantized already",
        ),
        ("[n] y = Gemm <transA = 1> (x, w)", "float[64, N] x", "float[N, 64] y", "its form keeps the runtime from"),
        ("[n] y = Gather(small, i)", "int64[N] i", "float[N, 64] y", "its table has only 6400 elements"),
        ("[n] y = Gather <axis = 1> (wide, i)", "int64[N] i", "float[64, N] y", "it does not take rows of a table"),
        ("[n] y = Gather(x, i)", "float[9, 9] x, int64[N] i", "float[N, 9] y", "it reads no constant table"),
        (
            "[n] e = Gather(table, i) [a] y = Add(e, table)",
            "int64[1000] i",
            "float[1000, 64] y",
            "its table is read as floats elsewhere too",
        ),
        (conv("n", "x"), "float[N, 8, 9, 9] x", "float[N, 8, 9, 9] n", "Conv has no kernel for weights in integers, t"),
        (
            "[n] y, h, k = LSTM <hidden_size = 16> (x, gates, again)",
            "float[T, N, 16] x",
            "float[T, 1, N, 16] y",
            "LSTM has no kernel for weights in integers",
        ),
    ],
)
def test_reasons(body: str, x: str, y: str, reason: str) -> None:
    state = planned(body, x, y)
    assert skips(state)["n"].startswith(reason)
    assert "n" not in {getattr(key, "node", "") for key in plan(state).entries}


def test_half_weights_are_weights() -> None:
    assert specs(planned("[m] y = MatMul(x, half)", "float16[N, 64] x", "float16[N, 64] y")) == {
        "m::1": "int4 symmetric per_block(axis 0, block 32)"
    }


@pytest.mark.parametrize("precision", ["w8a16", "w4a16", "w2a16"])
def test_tables_are_stored_row_by_row_in_8_bits(precision: str) -> None:
    x, y = "int64[N] i", "float[N, 64] y"
    state = planned("[n] y = Gather(table, i)", x, y, precision=precision)
    assert specs(state) == {"n::0": "int8 symmetric per_channel(axis 0)"}
    assert plan(state).kernels == {}
    cube = planned("[n] y = Gather <axis = -3> (cube, i)", x, "float[N, 4, 128] y", precision=precision)
    assert specs(cube) == {"n::0": "int8 symmetric per_channel(axis 0)"}
    with pytest.raises(RecipeError, match="tensors override 'table': a table that Gather reads is stored as int8 al"):
        planned("[n] y = Gather(table, i)", x, y, precision=precision, tensors={"table": {"dtype": "uint4"}})


def test_tensorrt_keeps_tables_in_float() -> None:
    found = planned("[n] y = Gather(table, i)", "int64[N] i", "float[N, 64] y", target="tensorrt")
    assert skips(found) == {"n": "target tensorrt has no Gather of integers"}


@pytest.mark.parametrize(
    ("weight", "precision", "wanted"),
    [
        ("c", "w8a16", "int8 symmetric per_block(axis 1, block 32)"),
        ("c", "w4a16", "int4 symmetric per_block(axis 1, block 32)"),
        ("first", "w4a16", "int4 symmetric per_channel(axis 0)"),
    ],
)
def test_convolutions_are_stored_in_integers_where_they_are_named(weight: str, precision: str, wanted: str) -> None:
    inputs = VALUES[weight].shape[1]
    body, x = f"[n] y = Conv(x, {weight})", f"float[N, {inputs}, 9, 9] x"
    state = planned(body, x, "float[N, 40, 7, 7] y", precision=precision, op_types_to_quantize=["Conv"])
    assert specs(state) == {"n::1": wanted}
    assert plan(state).kernels == {}
    up = "[n] y = ConvTranspose(x, up)"
    ops = ["ConvTranspose"]
    state = planned(up, "float[N, 64, 9, 9] x", "float[N, 40, 11, 11] y", op_types_to_quantize=ops)
    assert specs(state) == {"n::1": "int4 symmetric per_channel(axis 1)"}


def test_two_bits_need_outputs_by_four() -> None:
    state = planned("[m] y = MatMul(x, odd)", y="float[N, T, 50] y", precision="w2a16")
    assert specs(state) == {"m::1": "uint4 asymmetric per_block(axis 0, block 32)"}
    (note,) = state.notes
    assert note.startswith("the weight of 'm' is stored in 4 bits: the runtime computes 2-bit products wrongly")
    assert specs(planned(PRODUCT, precision="w2a16")) == {"m::1": "uint2 asymmetric per_block(axis 0, block 32)"}


@pytest.mark.parametrize(
    ("readers", "precision", "fits"), [(6, "w4a16", True), (7, "w4a16", False), (4, "w8a16", False)]
)
def test_a_weight_that_many_share(readers: int, precision: str, fits: bool) -> None:
    steps = [f"[m{i}] t{i + 1} = MatMul(t{i}, w)" for i in range(readers)]
    state = planned(" ".join(steps), "float[N, T, 64] t0", f"float[N, T, 64] t{readers}", precision=precision)
    assert len(plan(state).entries) == (readers if fits else 0)
    if not fits:
        assert skips(state)["m0"] == f"{readers} nodes read its weight 'w', and a copy in integers for each is larger"


def test_what_the_user_leaves_out() -> None:
    body = "[a] t = MatMul(x, w) [b] y = MatMul(t, v)"
    assert specs(planned(body, nodes_to_exclude=["a"])).keys() == {"b::1"}
    assert specs(planned(body, nodes_to_quantize=["a"])).keys() == {"a::1"}
    assert skips(planned(body, nodes_to_exclude=["a"])) == {"a": "excluded by name (a)"}
    assert not specs(planned(body, op_types_to_quantize=["Gather"]))
    with pytest.raises(RecipeError, match="nodes_to_exclude 'c' matches no name"):
        planned(body, nodes_to_exclude=["c"])
    with pytest.raises(RecipeError, match=r"tensors override 'ww' matches no tensor\. Did you mean 'w'"):
        planned(body, tensors={"ww": {"dtype": "int8"}})


def test_a_transposed_weight_answers_to_its_name() -> None:
    body = "[g] y = Gemm <transB = 1> (x, w)"
    flat = ("float[N, 64] x", "float[N, 64] y")
    assert specs(planned(body, *flat, tensors={"w": {"dtype": "int8"}})) == {
        "g::1": "int8 symmetric per_block(axis 0, block 32)"
    }

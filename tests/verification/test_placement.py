"""Every planned kernel is found again in the graph that the runtime makes, or the reason is said why it is none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import qdqtool
from qdqtool.pipeline import Result
from qdqtool.planning.plan import Plan
from qdqtool.planning.target import target
from qdqtool.verification import placement
from qdqtool.verification.placement import Placement
from qdqtool.verification.unfused import UNKNOWN
from tests.builders import Array, conv, conv_values, normal, parse, quantized, weight

IMAGE = "float[N, 8, 8, 8]"
VALUES: dict[str, Array] = conv_values(3) | {
    "head": weight(10, 8),
    "head_bias": normal(10),
    "m": weight(16, 16),
    "m_bias": normal(16),
    "half": np.array([256]),
    "start": np.array([0]),
    "end": np.array([512]),
    "one": np.array([1]),
    "flat": np.array([0, -1]),
}
CHAIN = f"{conv('a', 'x')} [r] r = Relu(a) {conv('y', 'r', 1)}"
HEAD = f"""{conv("a", "x")} [r] r = Relu(a) [p] p = GlobalAveragePool(r) [f] f = Flatten(p)
    [fc] y = Gemm <transB = 1> (f, head, head_bias)"""
RESIDUAL = f"{CHAIN.replace('y', 'b')} [s] s = Add(r, b) [y] y = Relu(s)"
TOKENS = "[q] q = MatMul(x, m) [k] k = MatMul(x, m) [t] t = Transpose <perm = [0, 2, 1]> (k) [s] y = MatMul(q, t)"
LAYER = "[w] w = MatMul(x, m) [bias] y = Add(w, m_bias)"
SLICES = f"""{conv("a", "x")} [flat] l = Reshape(a, flat) [first] f = Slice(l, start, half, one)
    [second] g = Slice(l, half, end, one) [k] y = Concat <axis = 1> (g, f)"""
LAYOUT = f"{conv('a', 'x')} [t] y = Transpose <perm = [0, 2, 3, 1]> (a)"
LOOKALIKES = f"{conv('a', 'x')} [a_token_2] r = Relu(a) [c] c = Softmax(r) [a_token_3] y = Add(c, r)"


def result(body: str, x: str = IMAGE, y: str = IMAGE, **fields: Any) -> Result:
    used = {name: value for name, value in VALUES.items() if f"{name})" in body or f"{name}," in body}
    return quantized(parse(body, f"{x} x", f"{y} y", used), bias_correction=False, **fields)


def found(body: str, x: str = IMAGE, y: str = IMAGE, **fields: Any) -> Placement:
    seen = result(body, x, y, **fields).report.placement
    assert seen is not None
    return seen


@pytest.mark.parametrize(
    ("body", "x", "y", "kernels"),
    [
        pytest.param(CHAIN, IMAGE, IMAGE, "a QLinearConv, y QLinearConv", id="the layout changed names"),
        pytest.param(RESIDUAL, IMAGE, IMAGE, "a QLinearConv, b QLinearConv, s QLinearAdd", id="residual"),
        pytest.param(
            HEAD,
            IMAGE,
            "float[N, 10]",
            "a QLinearConv, p QLinearGlobalAveragePool, f Flatten, fc QGemm",
            id="what moves codes keeps its operator",
        ),
        pytest.param(
            TOKENS,
            "float[N, 4, 16]",
            "float[N, 4, 4]",
            "q QLinearMatMul, k QLinearMatMul, t Transpose, s MatMulIntegerToFloat",
            id="float out",
        ),
        pytest.param(LAYER, "float[1, 4, 16]", "float[1, 4, 16]", "w QGemm", id="MatMul and Add became one"),
        pytest.param(
            SLICES,
            IMAGE,
            "float[N, 512]",
            "a QLinearConv, flat Reshape, first Split, second Split, k QLinearConcat",
            id="two nodes became one",
        ),
        pytest.param(
            LOOKALIKES,
            IMAGE,
            IMAGE,
            "a QLinearConv, c QLinearSoftmax, a_token_3 QLinearAdd",
            id="names that look rewritten",
        ),
    ],
)
def test_planned_kernels_are_found(body: str, x: str, y: str, kernels: str) -> None:
    seen = found(body, x, y)
    assert ", ".join(f"{node} {op}" for node, op in seen.kernels.items()) == kernels
    assert not seen.floats
    assert not seen.gone
    assert seen.planned == len(seen.kernels)


def test_a_transpose_that_the_layout_took_in_is_gone() -> None:
    seen = found(LAYOUT, y="float[N, 8, 8, 8]")
    assert dict(seen.kernels) == {"a": "QLinearConv"}
    assert seen.gone == ("t",)
    assert seen.planned == 2


def test_conversions_say_what_they_stand_between() -> None:
    assert found(HEAD, y="float[N, 10]").conversions == {"x_QuantizeLinear": "the model takes in 'x' in float"}
    chain = found(f"{conv('a', 'x')} [t] t = Tanh(a) {conv('y', 't', 1)}")
    assert chain.conversions == {
        "x_QuantizeLinear": "the model takes in 'x' in float",
        "a_DequantizeLinear": "Tanh 't' takes in float",
        "t_QuantizeLinear": "Tanh 't' puts out float",
        "y_DequantizeLinear": "the model gives out 'y' in float",
    }
    bias = found(LAYER, "float[N, 4, 16]", "float[N, 4, 16]").conversions
    assert bias["m_bias_DequantizeLinear"] == "Add 'bias' takes in a constant in float"


def test_a_user_s_choice_that_costs_a_kernel_is_told() -> None:
    seen = found(CHAIN, tensors={"x": {"dtype": "uint16"}})
    assert dict(seen.kernels) == {"y": "QLinearConv"}
    assert dict(seen.floats) == {"a": "its input 'x' has uint16 codes; integer kernels take 8 bits"}
    signed = {"dtype": "int8", "symmetric": True}
    seen = found(CHAIN, tensors={"x": signed, "r": signed})
    assert dict(seen.kernels) == {"y": "QLinearConv"}
    assert dict(seen.floats) == {"a": "Relu 'r' behind it stays, because codes of 'r' go beyond its limits"}
    seen = found(CHAIN, tensors={"y": {"dtype": "int16"}})
    assert dict(seen.floats) == {"y": "its output 'y_float' has int16 codes; integer kernels put out 8 bits"}


# Graphs written with Q/DQ where no kernel fits

U8 = "[xq] xq = QuantizeLinear(x, s, z) [xd] xd = DequantizeLinear(xq, s, z)"
W8 = "[wd] wd = DequantizeLinear <axis = 0> (wq, ws, wz)"
OUT = "[yq] yq = QuantizeLinear(c, s, z) [yd] y = DequantizeLinear(yq, s, z)"
CODES: dict[str, Array] = {
    "s": np.array(0.1, np.float32),
    "s2": np.array(0.2, np.float32),
    "z": np.array(128, np.uint8),
    "zi": np.array(0, np.int8),
    "wq": np.ones((8, 8, 1, 1), np.int8),
    "ws": np.full(8, 0.1, np.float32),
    "wz": np.zeros(8, np.int8),
    "b": np.ones(8, np.float32),
    "b4": np.ones((1, 8, 1, 1), np.float32),
    "b8": np.ones(8, np.int8),
    "double": np.array([1, 1, 2, 2], np.float32),
    "g": np.ones((8, 8), np.int8),
    "gain": np.ones(8, np.float32),
    "zero": np.array(0, np.float32),
    "lots": np.array(99, np.float32),
}


def place(body: str, kernels: Mapping[str, str], shape: str = "float[1, 8, 4, 4]", y: str = "") -> Placement:
    words = body.replace("(", " ").replace(")", " ").replace(",", " ").split()
    used = {name: value for name, value in CODES.items() if name in words}
    proto = parse(body, f"{shape} x", f"{y or shape} y", used)
    optimized, _ = placement.load(proto)
    return placement.place(proto, optimized, Plan(kernels=kernels), target("cpu"))


@pytest.mark.parametrize(
    ("body", "op", "reason"),
    [
        (
            f"{U8} {W8} [n] y = Conv(xd, wd)",
            "Conv",
            "its output 'y' is not quantized, and its integer kernel puts out integers alone",
        ),
        (
            f"{U8} {W8} [n] c = Conv(xd, wd) [neg] m = Neg(c) {OUT.replace('y = ', 'yy = ')} y = Add(m, yy)",
            "Conv",
            "its output 'c' is read in float too, by Neg 'neg'",
        ),
        (
            f"{U8} {W8} [n] c = Conv(xd, wd) [clip] k = Clip(c, zero, lots) {OUT.replace('(c,', '(k,')}",
            "Conv",
            "Clip 'clip' behind it stays, because codes of 'k' go beyond its limits",
        ),
        (f"{U8} [n] c = Add(xd, b4) {OUT}", "Add", "its input 'b4' is not quantized"),
        (
            f"{U8} [n] c = MaxPool <kernel_shape = [1, 1]> (xd) {OUT.replace(', s,', ', s2,')}",
            "MaxPool",
            "its output has another scale than its input",
        ),
        (
            f"{U8} {W8} bd = DequantizeLinear(b8, s, zi) [n] c = Conv(xd, wd, bd) {OUT}",
            "Conv",
            "its bias 'b8' has int8 codes; integer kernels take int32",
        ),
    ],
)
def test_why_a_node_runs_in_float(body: str, op: str, reason: str) -> None:
    seen = place(body, {"n": op})
    assert dict(seen.floats) == {"n": reason}
    assert not seen.kernels


def test_a_float_bias_where_the_product_puts_out_float() -> None:
    body = f"{U8} gd = DequantizeLinear(g, s, zi) [n] y = Gemm(xd, gd, b)"
    seen = place(body, {"n": "Gemm"}, "float[2, 8]")
    assert dict(seen.floats) == {"n": "its bias 'b' is float"}


def test_what_the_graph_does_not_explain_is_not_explained() -> None:
    """No rule here knows that the runtime has no integer form of a Resize that computes new values."""
    body = f'{U8} [n] c = Resize <mode = "linear"> (xd, , double) {OUT}'
    seen = place(body, {"n": "Resize"}, y="float[1, 8, 8, 8]")
    assert dict(seen.floats) == {"n": UNKNOWN}


def test_what_became_part_of_a_float_operator() -> None:
    body = f"{U8} o = Neg(x) [n] t = Add(xd, o) [norm] y = LayerNormalization <axis = -1> (t, gain, b)"
    seen = place(body, {"n": "Add"}, "float[1, 4, 8]")
    assert dict(seen.floats) == {"n": "the runtime made it part of another operator, which runs in float"}


def test_a_node_that_nothing_reads_is_gone() -> None:
    seen = place(f"{U8} {W8} c = Conv(xd, wd) {OUT}", {"dead": "Conv"})
    assert seen.gone == ("dead",)


def test_a_weight_alone_that_no_kernel_takes() -> None:
    proto = parse(
        "[d] wd = DequantizeLinear(g, s, zi) [n] y = MatMul(x, wd) z = Neg(wd)",
        "float[2, 8] x",
        "float[2, 8] y, float[8, 8] z",
        {name: CODES[name] for name in ("g", "s", "zi")},
    )
    plan = Plan(kernels={"n": "MatMul"}, weight_only=frozenset({"n"}))
    seen = placement.place(proto, placement.load(proto)[0], plan, target("cpu"))
    assert dict(seen.floats) == {"n": "its weight is dequantized at every run: no kernel takes it in integers"}


def test_control_flow_bodies_count_as_operators() -> None:
    inner = "then_branch = t () => (float[2] p) { p = Neg(x) }, else_branch = e () => (float[2] q) { q = Abs(x) }"
    proto = parse(f"y = If (f) <{inner}>", "float[2] x, bool f", "float[2] y", {})
    assert placement.load_and_count(proto)[0] == {"If": 1, "Neg": 1, "Abs": 1}


# In the report


def test_the_report_has_the_placement() -> None:
    report = result(CHAIN, tensors={"x": {"dtype": "uint16"}}).report
    shown = report.to_dict()["placement"]
    assert shown["provider"] == "cpu"
    assert shown["kernels"] == {"y": "QLinearConv"}
    assert set(shown["floats"]) == {"a"}
    assert report.to_dict()["partition"] is None


@pytest.mark.parametrize("name", ["cuda", "tensorrt"])
def test_nothing_is_claimed_of_a_runtime_that_is_not_here(name: str) -> None:
    report = result(CHAIN, target=name).report
    assert report.placement is None
    assert report.kernels["Conv"] + report.kernels["FusedConv"] == 2


@pytest.mark.zoo
@pytest.mark.slow
def test_every_planned_kernel_of_real_models_is_there(real_model: Path, any_data: Callable[[Path], Any]) -> None:
    done = qdqtool.quantize(
        real_model, any_data(real_model), target="cpu", provider="cpu", bias_correction=False, calibrator="minmax"
    )
    seen = done.report.placement
    assert seen is not None
    assert not seen.floats
    assert {*seen.kernels, *seen.gone} == set(done.plan.kernels)

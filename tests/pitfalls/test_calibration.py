"""Calibration data that break other quantizers: odd shapes, odd values, odd places."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import onnx
import pytest

from qdqtool.pipeline import Result, quantize
from tests.builders import (
    TARGETS,
    Array,
    constants,
    conv,
    conv_chain,
    conv_values,
    feeds,
    normal,
    parse,
    quality,
    quantized,
    run,
    single,
    sqnr,
    weight,
)

TWO = conv_chain(2)
ALL = ["minmax", "percentile", "entropy", "mse", "aciq", "moving_average", "auto"]


def worst(proto: onnx.ModelProto, result: Result, x: Array) -> float:
    return min(quality(proto, result.model, {"x": x}).values())


def scales(result: Result) -> list[Array]:
    return [a for name, a in constants(result.model).items() if name.endswith("_scale")]


@pytest.mark.parametrize("calibrator", ALL)
def test_mostly_zero_tensors_keep_a_range(calibrator: str) -> None:
    x = np.where(np.random.default_rng(0).random((32, 8, 8, 8)) < 0.99, np.float32(0), normal(32, 8, 8, 8))
    result = quantized(TWO, x, calibrator=calibrator)
    (found,) = (t for t in result.report.tensors if t.tensor == "x")
    assert found.hi - found.lo > 0.5
    if calibrator in ("minmax", "mse", "auto"):  # the others clip by definition
        assert worst(TWO, result, x) >= 35


@pytest.mark.parametrize("target", TARGETS)
def test_a_tensor_that_is_always_zero_gets_a_scale(target: str) -> None:
    x = np.zeros((8, 8, 8, 8), np.float32)
    result = quantized(TWO, x, target=target)
    assert all(np.isfinite(s).all() and (s > 0).all() for s in scales(result))
    assert worst(TWO, result, x) >= 35


@pytest.mark.parametrize(
    ("calibrator", "bad", "target"),
    [
        *((name, np.inf, "cpu") for name in ALL),
        *(("mse", bad, target) for bad in (-np.inf, np.nan) for target in TARGETS),
    ],
)
def test_a_value_that_is_not_finite_is_reported_with_its_sample(calibrator: str, bad: float, target: str) -> None:
    x = feeds(TWO)["x"]
    x[7, 0, 0, 0] = bad
    result = quantized(TWO, x, target=target, calibrator=calibrator)
    assert result.report.calibration is not None
    told = result.report.calibration.tensors["x"]
    assert (told.nan, told.inf) == ((1, 0) if np.isnan(bad) else (0, 1))
    assert told.first_non_finite is not None
    assert told.first_non_finite.position == 7
    assert all(np.isfinite(a).all() for a in constants(result.model).values() if a.dtype == np.float32)
    clean = worst(TWO, quantized(TWO, feeds(TWO)["x"], target=target, calibrator=calibrator), feeds(TWO)["x"])
    assert worst(TWO, result, feeds(TWO)["x"]) >= clean - 1


def test_a_value_that_overflows_inside_the_model_spoils_no_bias() -> None:
    body = f"{conv('c', 'x')} e = Exp(c) {conv('y', 'e', 1)}"
    proto = parse(body, "float[N, 8, 8, 8] x", "float[N, 8, 8, 8] y", conv_values(2))
    x = feeds(proto)["x"]
    x[3] *= 1000
    result = quantized(proto, x)
    assert result.report.calibration is not None
    told = result.report.calibration.tensors["e"]
    assert told.inf > 0
    assert told.first_non_finite is not None
    assert told.first_non_finite.position == 3
    assert all(np.isfinite(a).all() for a in constants(result.model).values() if a.dtype == np.float32)


def sentences() -> onnx.ModelProto:
    body = """m = MatMul(x, w) a = Add(m, b) r = Relu(a) q = MatMul(r, v) k = MatMul(r, u)
        t = Transpose <perm = [0, 2, 1]> (k) s = MatMul(q, t) p = Softmax <axis = -1> (s) y = MatMul(p, r)"""
    values = {"w": weight(32, 32), "b": normal(32, scale=0.1), "v": weight(32, 32, seed=1), "u": weight(32, 32, seed=2)}
    values |= {name: values[name] / np.float32(2) for name in ("u", "v")}
    return parse(body, "float[N, T, 32] x", "float[N, T, 32] y", values)


@pytest.mark.parametrize("target", TARGETS)
def test_sentences_of_different_length(target: str) -> None:
    proto = sentences()
    lengths = [1, 3, 7, 7, 12, 7, 3, 25, 1, 7, 12, 3]
    data = [{"x": normal(1, n, 32, seed=i)} for i, n in enumerate(lengths)]
    result = quantized(proto, data, target=target)
    assert result.report.samples == len(lengths)
    wanted, got = (
        np.concatenate([run(model, feed)["y"].reshape(-1) for feed in data]) for model in (proto, result.model)
    )
    assert sqnr(wanted, got) >= 32


@pytest.mark.parametrize("target", TARGETS)
def test_tensors_of_no_elements(target: str) -> None:
    proto = sentences()
    data = [{"x": normal(1, n, 32, seed=i)} for i, n in enumerate([0, 4, 0, 6])]
    result = quantized(proto, data, target=target)
    assert all(np.isfinite(s).all() for s in scales(result))
    assert worst(proto, result, data[1]["x"]) >= 30


@pytest.mark.parametrize("rows", [1, 5, 7, 32])
def test_the_last_short_batch_counts_and_batches_change_nothing(rows: int) -> None:
    data = feeds(TWO)
    whole, cut = quantized(TWO, data), quantized(TWO, list(single(data, rows)))
    assert cut.report.samples == 32
    assert cut.model == whole.model


def test_a_fixed_batch_takes_a_last_short_batch() -> None:
    fixed = parse(f"{conv('c', 'x')} y = Relu(c)", "float[4, 8, 8, 8] x", "float[4, 8, 8, 8] y", conv_values(1))
    data = feeds(TWO, 6)
    result = quantized(fixed, data["x"])
    assert result.report.samples == 6
    assert worst(fixed, result, data["x"][:4]) >= 35


def test_nothing_is_written_beside_the_model(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    onnx.save_model(
        conv_chain(2, 16), folder / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0
    )
    before = sorted(os.listdir(folder))
    folder.chmod(0o555)
    try:
        result = quantize(folder / "m.onnx", feeds(conv_chain(2, 16)), target="cpu", provider="cpu")
    finally:
        folder.chmod(0o755)
    assert sorted(os.listdir(folder)) == before == ["m.data", "m.onnx"]
    assert result.report.sizes.quantized_bytes < 0.5 * result.report.sizes.float_bytes
    assert worst(conv_chain(2, 16), result, feeds(conv_chain(2, 16), 8, seed=7)["x"]) >= 35

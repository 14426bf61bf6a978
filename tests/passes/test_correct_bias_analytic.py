"""Bias correction from BatchNormalization: means are those of data that follow it, and no data are needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import qdqtool
from qdqtool import chains, pipeline
from qdqtool.graphs.channel_means import Moments, channel_means
from qdqtool.passes_api import PassManager
from qdqtool.recipe import Recipe
from tests.builders import Array, normal, parse, quantized, reasons, run

SAMPLES = 256


def net(body: str, y: str) -> onnx.ModelProto:
    """A Conv with BatchNormalization whose recorded mean and variance are those of its input, then ``body``."""
    rng = np.random.default_rng(0)
    values: dict[str, Array] = {
        "w": normal(16, 3, 1, 1),
        "gamma": rng.uniform(0.5, 1.5, 16).astype(np.float32),
        "beta": rng.uniform(-1, 1, 16).astype(np.float32),
        "mean": np.zeros(16, np.float32),
        "v": normal(8, 16, 3, 3, seed=1),
        "depthwise": normal(16, 1, 3, 3, seed=2),
        "up": normal(16, 8, 2, 2, seed=3),
        "head": normal(16, 10, seed=4),
        "six": np.array(6, np.float32),
        "zero": np.array(0, np.float32),
        "d": np.zeros(8, np.float32),
        "e": np.zeros(16, np.float32),
        "f": np.zeros(10, np.float32),
    }
    values["variance"] = np.square(values["w"].reshape(16, 3)).sum(axis=1)
    start = "c = Conv(x, w) n = BatchNormalization(c, gamma, beta, mean, variance)"
    used = {name: value for name, value in values.items() if name in f"{start} {body}".replace("(", " ").replace(
        ",", " ").replace(")", " ").split()}  # fmt: skip
    return parse(f"{start} {body}", "float[N, 3, 8, 8] x", f"float{y} y", used)


X = np.random.default_rng(1).standard_normal((SAMPLES, 3, 8, 8)).astype(np.float32)
NETS = {
    "Conv": ("r = Relu(n) y = Conv(r, v, d)", "[N, 8, 6, 6]"),
    "behind a Clip": ("r = Clip(n, zero, six) y = Conv(r, v, d)", "[N, 8, 6, 6]"),
    "behind a LeakyRelu": ("r = LeakyRelu <alpha = 0.2> (n) y = Conv(r, v, d)", "[N, 8, 6, 6]"),
    "behind a HardSwish": ("r = HardSwish(n) y = Conv(r, v, d)", "[N, 8, 6, 6]"),
    "depthwise": ("r = Relu(n) y = Conv <group = 16> (r, depthwise, e)", "[N, 16, 6, 6]"),
    "ConvTranspose": ("r = Relu(n) y = ConvTranspose <strides = [2, 2]> (r, up, d)", "[N, 8, 16, 16]"),
    "Gemm": (
        "r = Relu(n) p = GlobalAveragePool(r) q = Flatten(p) y = Gemm(q, head, f)",
        "[N, 10]",
    ),
}


def mean_error(proto: onnx.ModelProto, fields: dict[str, Any]) -> float:
    """Root mean square over channels of how far the quantized model's mean output is off, weights in 4 bits."""
    statistics = qdqtool.calibrate(
        proto, {"x": X}, targets=["cpu"], precision="w4a8", first_last_8bit=False, cache=False
    )
    model = quantized(
        proto, statistics=statistics, precision="w4a8", first_last_8bit=False, weight_rounding="nearest", **fields
    ).model
    want, got = (run(one, {"x": X}, optimize=False)["y"] for one in (proto, model))
    axes = (0,) if want.ndim == 2 else (0, 2, 3)
    return float(np.sqrt(np.square((got - want).mean(axis=axes)).mean()))


@pytest.mark.parametrize("case", NETS)
def test_layers_keep_their_mean_without_data(case: str) -> None:
    proto = net(*NETS[case])
    plain, corrected = (mean_error(proto, {"bias_correction": on}) for on in (False, True))
    assert corrected < 0.6 * plain  # what is left comes from the first layer, whose input is not known


def test_the_method_may_be_asked_for_beside_data() -> None:
    proto = net(*NETS["Conv"])
    empirical, analytic = (
        quantized(proto, {"x": X[:16]}, precision="w4a8", bias_correction_method=method)
        for method in ("empirical", "analytic")
    )
    names = [{timing.pass_name for timing in one.report.timings} for one in (empirical, analytic)]
    assert "correct-bias" in names[0] - names[1]
    assert "correct-bias-analytic" in names[1] - names[0]
    assert "the mean of its input is not known" in reasons(analytic).values()  # the first layer reads the model's input


def test_moments_are_those_of_values_drawn() -> None:
    body = "r = Relu(n) s = Sigmoid(n) a = Add(r, s) k = Concat <axis = 1> (r, s) p = Add(r, n) y = Conv(r, v, d)"
    state, facts = pipeline.load(net(body, "[N, 8, 6, 6]"), Recipe(target="cpu"), "cpu")
    PassManager(chains.preparation()).run(state, facts)
    found = channel_means(state.graph, {"n": (np.array([0.3, -1.0]), np.array([2.0, 0.5]))})
    drawn = np.array([[0.3], [-1.0]]) + np.array([[2.0], [0.5]]) * np.random.default_rng(0).standard_normal(
        (2, 1_000_000)
    )
    relu = np.maximum(drawn, 0)
    np.testing.assert_allclose(found["r"].mean, relu.mean(axis=1), rtol=0.01, atol=1e-3)
    assert found["r"].variance is not None
    np.testing.assert_allclose(found["r"].variance, relu.var(axis=1), rtol=0.03, atol=1e-3)


def test_what_is_not_known_stays_unknown() -> None:
    assert Moments(np.zeros(3)).through(np.tanh) is None
    proto = parse("y = Relu(x)", "float[N, 3] x", "float[N, 3] y", {})
    state, _ = pipeline.load(proto, Recipe(target="cpu"), "cpu")
    assert channel_means(state.graph, {}) == {}

"""Columns of a layer's input times its weight are the layer's output, and second moments tell the error of rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool.arithmetic import gptq
from qdqtool.arithmetic.second_moments import SecondMoments, columns, gram, obstacle
from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.linear import LinearLayer
from qdqtool.spec import FORMATS, QuantSpec
from tests.builders import normal, parse, run

INT4 = QuantSpec(FORMATS["int4"], symmetric=True, narrow=True)


def layer_of(proto: onnx.ModelProto) -> LinearLayer:
    graph, _ = models.to_graph(proto)
    layer = LinearLayer.of(next(graphs.all_nodes(graph)))
    assert layer is not None
    return layer


CONVOLUTIONS: dict[str, tuple[str, tuple[int, ...], tuple[int, ...]]] = {
    "plain": ("", (8, 4, 3, 3), (2, 4, 9, 7)),
    "pads, all different": ("pads = [1, 2, 0, 3]", (8, 4, 3, 3), (2, 4, 9, 7)),
    "strides": ("pads = [1, 1, 1, 1], strides = [2, 3]", (8, 4, 3, 3), (2, 4, 9, 7)),
    "dilations": ("pads = [2, 2, 2, 2], dilations = [2, 1]", (8, 4, 3, 3), (2, 4, 9, 7)),
    "strides and dilations": ("strides = [2, 2], dilations = [2, 2]", (8, 4, 3, 2), (2, 4, 12, 9)),
    "grouped": ("group = 2, pads = [1, 1, 1, 1]", (8, 2, 3, 3), (2, 4, 6, 6)),
    "depthwise": ("group = 4, strides = [2, 2], pads = [1, 1, 1, 1]", (4, 1, 3, 3), (2, 4, 7, 7)),
    "depthwise with a multiplier": ("group = 4", (8, 1, 3, 3), (2, 4, 7, 7)),
    "one dimension": ("strides = [2], pads = [1, 2]", (6, 4, 5), (3, 4, 20)),
    "three dimensions": ("strides = [2, 1, 1]", (6, 2, 2, 3, 2), (2, 2, 5, 6, 4)),
    "SAME_UPPER": ('auto_pad = "SAME_UPPER", strides = [2, 2]', (8, 4, 3, 3), (2, 4, 8, 7)),
    "SAME_LOWER": ('auto_pad = "SAME_LOWER", strides = [2, 2]', (8, 4, 4, 3), (2, 4, 8, 7)),
    "VALID": ('auto_pad = "VALID", strides = [2, 2]', (8, 4, 3, 3), (2, 4, 8, 7)),
}


@pytest.mark.parametrize("form", CONVOLUTIONS)
def test_columns_of_a_convolution(form: str) -> None:
    attributes, shape, given = CONVOLUTIONS[form]
    ranks = ["?"] * (len(given) - 2)
    body = f"y = Conv <{attributes}> (x, w)" if attributes else "y = Conv(x, w)"
    sizes = ", ".join(f"d{i}" for i in range(len(ranks)))
    proto = parse(body, f"float[N, {given[1]}, {sizes}] x", f"float[N, {shape[0]}, {sizes}] y", {"w": normal(*shape)})
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    x, layer = normal(*given, seed=2), layer_of(proto)
    wanted = run(proto, {"x": x})["y"]
    found = columns(layer, x)
    rows = normal(*shape).reshape(layer.groups, -1, found.shape[1])
    made = (rows @ found).reshape(shape[0], given[0], *wanted.shape[2:]).swapaxes(0, 1)
    np.testing.assert_allclose(made, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("body", "x", "shape", "given"),
    [
        ("y = MatMul(x, w)", "float[N, 8] x", (8, 5), (6, 8)),
        ("y = MatMul(x, w)", "float[N, 3, 8] x", (8, 5), (6, 3, 8)),
        ("y = Gemm(x, w)", "float[N, 8] x", (8, 5), (6, 8)),
        ("y = Gemm <transB = 1> (x, w)", "float[N, 8] x", (5, 8), (6, 8)),
        ("y = Gemm <transA = 1> (x, w)", "float[8, N] x", (8, 5), (8, 6)),
    ],
)
def test_columns_of_a_product(body: str, x: str, shape: tuple[int, ...], given: tuple[int, ...]) -> None:
    proto = parse(body, x, "float[N, 5] y" if len(given) == 2 else "float[N, 3, 5] y", {"w": normal(*shape)})
    values = normal(*given, seed=2)
    rows = normal(*shape) if "transB" in body else normal(*shape).T
    made = (rows @ columns(layer_of(proto), values)[0]).T
    np.testing.assert_allclose(made, run(proto, {"x": values})["y"].reshape(-1, 5), atol=1e-4)


def test_moments_are_means_over_samples_of_means_over_positions() -> None:
    rng, found = np.random.default_rng(0), SecondMoments(gram())
    samples = [rng.standard_normal((2, 6, positions)).astype(np.float32) for positions in (5, 40, 17)]
    for sample in samples:
        found.add(sample)
    found.add(np.full((2, 6, 3), np.inf, np.float32))
    wanted = np.mean([s @ s.swapaxes(1, 2) / s.shape[2] for s in samples], axis=0)
    assert found.samples == 3
    assert found.total is not None
    np.testing.assert_allclose(found.total / 3, wanted, rtol=1e-5, atol=1e-6)


def test_shrinking_ends_where_samples_are_many() -> None:
    """With few samples H comes nearer to the truth, with many it is H."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((20, 20)) / 5 + np.eye(20)
    truth, errors = mixing @ mixing.T, {}
    for count in (10, 2000):
        found = SecondMoments(gram())
        for _ in range(count):
            found.add((mixing @ rng.standard_normal((20, 1)))[None].astype(np.float32))
        assert found.total is not None
        errors[count] = [float(((h - truth) ** 2).sum()) for h in (found.total[0] / count, found.shrunk()[0])]
    assert errors[10][1] < 0.7 * errors[10][0]
    assert errors[2000][1] < 1.05 * errors[2000][0]


def test_one_sample_tells_nothing_of_correlations() -> None:
    found = SecondMoments(gram())
    found.add(normal(1, 4, 9))
    assert np.count_nonzero(found.shrunk()) == 4


def test_without_correlations_gptq_is_nearest() -> None:
    weights, scale = normal(3, 8, 40).astype(np.float64), np.full((3, 8, 1), 0.3)
    moments = np.broadcast_to(np.diag(np.linspace(0, 2, 40)), (3, 40, 40))
    found = gptq.rounded(weights, moments, scale, np.zeros_like(scale), INT4)
    np.testing.assert_array_equal(found, np.clip(np.rint(weights / scale), -7, 7))


@pytest.mark.parametrize("inputs", [3, 127, 128, 129, 300])
def test_gptq_lowers_the_error_that_the_moments_tell(inputs: int) -> None:
    """In one block and over several, with an input that is always 0."""
    rng = np.random.default_rng(inputs)
    weights = rng.standard_normal((1, 10, inputs))
    x = rng.standard_normal((inputs, 3)) @ rng.standard_normal((3, 500)) + 0.3 * rng.standard_normal((inputs, 500))
    x[0] = 0
    moments, scale = (x @ x.T / 500)[None], np.abs(weights).max(axis=2, keepdims=True) / 7
    nearest = np.rint(weights / scale)
    found = gptq.rounded(weights, moments, scale, np.zeros_like(scale), INT4)
    near, best = (float(((((weights - q * scale)[0]) @ x) ** 2).mean()) for q in (nearest, found))
    assert best < (1.0 if inputs == 3 else 0.5) * near + 1e-12
    assert np.abs(found).max() <= 7


def test_gptq_is_the_rule_written_out() -> None:
    """Against optimal brain surgeon step by step: w -= e H⁻¹_i / H⁻¹_ii, then input i leaves H."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((6, 50))
    weights, scale = rng.standard_normal((1, 4, 6)), np.full((1, 4, 1), 0.4)
    h = x @ x.T / 50
    found = gptq.rounded(weights, h[None], scale, np.zeros_like(scale), INT4)[0]
    damped, w, wanted = h + 0.01 * np.diag(h).mean() * np.eye(6), weights[0].copy(), np.zeros((4, 6))
    left = list(np.argsort(-np.diag(h), kind="stable"))
    while left:
        inverse, i = np.linalg.inv(damped[np.ix_(left, left)]), left[0]
        wanted[:, i] = np.clip(np.rint(w[:, i] / 0.4), -7, 7)
        w[:, left] -= np.outer(w[:, i] - 0.4 * wanted[:, i], inverse[0] / inverse[0, 0])
        left = left[1:]
    np.testing.assert_array_equal(found, wanted)


def test_a_weight_that_is_no_matrix_has_no_columns() -> None:
    values: dict[str, Any] = {"w": normal(2, 8, 5)}
    proto = parse("y = MatMul(x, w)", "float[N, 2, 3, 8] x", "float[N, 2, 3, 5] y", values)
    assert obstacle(layer_of(proto)) == "its weight is not of rank 2"

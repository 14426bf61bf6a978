"""Columns of a layer's input times its weight are the layer's output, and second moments tell the error of rounding."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool.arithmetic.second_moments import SecondMoments, columns, from_rows, obstacle, product, rows, size
from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.linear import LinearLayer
from tests.builders import Array, normal, parse, run


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


def samples(count: int, positions: int = 30, inputs: int = 6) -> list[tuple[Array, Array]]:
    """Columns of the float model and of another, whose inputs are smaller and noisier."""
    rng, found = np.random.default_rng(0), []
    for _ in range(count):
        exact = 1 + rng.standard_normal((2, inputs, positions))
        seen = 0.8 * exact + 0.1 * rng.standard_normal(exact.shape)
        found.append((exact.astype(np.float32), seen.astype(np.float32)))
    return found


def counted(given: list[tuple[Array, Array]]) -> SecondMoments:
    found = SecondMoments(product(), count_exact=True)
    for exact, seen in given:
        found.add(exact, seen)
    return found


def test_moments_are_means_over_samples_of_means_over_positions() -> None:
    given = [pair for n in (5, 40, 17) for pair in samples(1, n)]
    spoilt = np.full((2, 6, 3), np.inf, np.float32)
    found = counted([*given, (spoilt, spoilt)])
    known = found.mean(centred=False)
    assert found.samples == 3
    for got, pairs in (
        (known.h, [(y, y) for _, y in given]),
        (known.drift, [(x - y, y) for x, y in given]),
        (known.exact, [(x, x) for x, _ in given]),
    ):
        assert got is not None
        wanted = np.mean([one @ other.swapaxes(1, 2) / one.shape[2] for one, other in pairs], axis=0)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-5)


def test_errors_are_those_of_the_outputs() -> None:
    """With the inputs of either model, about the mean and about 0; the quantized model's but for a constant."""
    given, rng = samples(20), np.random.default_rng(1)
    weights, tries = rng.standard_normal((2, 3, 6)), rng.standard_normal((2, 2, 3, 6))
    exact, seen = (np.concatenate(parts, axis=2).astype(np.float64) for parts in zip(*given, strict=True))
    for centred in (False, True):
        known = counted(given).mean(centred=centred)
        x, y = (part - part.mean(axis=2, keepdims=True) if centred else part for part in (exact, seen))
        wanted = [float(((weights @ x - v @ y) ** 2).mean(axis=2).sum()) for v in tries]
        got = [known.error(weights, v) for v in tries]
        assert got[0] - got[1] == pytest.approx(wanted[0] - wanted[1], rel=1e-4)
        own = float((((weights - tries[0]) @ x) ** 2).mean(axis=2).sum())
        assert known.exact_error(weights, tries[0]) == pytest.approx(own, rel=1e-4)


def test_sums_of_parts_are_those_of_all() -> None:
    given = samples(6)
    whole, parts = counted(given), counted(given[:2]) | counted(given[2:])
    assert parts.samples == whole.samples
    for centred in (False, True):
        one, other = (found.shrunk(centred=centred) for found in (whole, parts))
        np.testing.assert_allclose(one.h, other.h, rtol=1e-9)
        np.testing.assert_allclose(one.drift, other.drift, rtol=1e-9)


def test_shrinking_ends_where_samples_are_many() -> None:
    """With few samples H comes nearer to the truth, with many it is H."""
    rng = np.random.default_rng(0)
    mixing = rng.standard_normal((20, 20)) / 5 + np.eye(20)
    truth, errors = mixing @ mixing.T, {}
    for count in (10, 2000):
        columns_of_one = [(mixing @ rng.standard_normal((20, 1)))[None].astype(np.float32) for _ in range(count)]
        found = counted([(one, one) for one in columns_of_one])
        both = found.mean(centred=False), found.shrunk(centred=False)
        errors[count] = [float(((known.h[0] - truth) ** 2).sum()) for known in both]
    assert errors[10][1] < 0.7 * errors[10][0]
    assert errors[2000][1] < 1.05 * errors[2000][0]


def test_one_sample_tells_nothing_of_correlations() -> None:
    known = counted(samples(1)).shrunk(centred=False)
    assert np.count_nonzero(known.h) == 2 * 6
    assert not known.drift.any()


def test_a_weight_as_rows_and_back() -> None:
    for body, shape in (
        ("y = Conv <group = 2> (x, w)", (8, 2, 3, 3)),
        ("y = MatMul(x, w)", (8, 5)),
        ("y = Gemm <transB = 1> (x, w)", (5, 8)),
    ):
        given = "float[N, 4, 9, 9] x" if len(shape) == 4 else "float[N, 8] x"
        result = "float[N, 8, 7, 7] y" if len(shape) == 4 else "float[N, 5] y"
        layer, values = layer_of(parse(body, given, result, {"w": normal(*shape)})), normal(*shape)
        matrix = rows(layer, values)
        np.testing.assert_array_equal(from_rows(layer, matrix, shape).astype(np.float32), values)
        assert size(layer) == 8 * matrix.shape[0] * matrix.shape[2] ** 2


def test_a_weight_that_is_no_matrix_has_no_columns() -> None:
    values: dict[str, Any] = {"w": normal(2, 8, 5)}
    proto = parse("y = MatMul(x, w)", "float[N, 2, 3, 8] x", "float[N, 2, 3, 5] y", values)
    assert obstacle(layer_of(proto)) == "its weight is not of rank 2"

"""A linear layer's channels, weight and bias, whatever operator it is."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from qdqtool.graphs.channels import ChannelMap, channel_vector
from qdqtool.graphs.linear import LinearLayer


def layer(
    op: str, weight: tuple[int, ...], x: list[int | str] | None = None, bias: Any = None, **attrs: Any
) -> LinearLayer:
    inputs = [gs.Variable("x", np.float32, x), gs.Constant("w", np.ones(weight, np.float32))]
    if bias is not None:
        inputs.append(gs.Constant("b", np.asarray(bias, np.float32)))
    found = LinearLayer.of(gs.Node(op, "layer", attrs, inputs, [gs.Variable("y")]))
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("made", "channels", "axes", "bias_input", "rank"),
    [
        (layer("Conv", (8, 4, 3, 3)), 8, (0, 1), 2, 4),
        (layer("Conv", (8, 1, 3), group=4), 8, (0, 1), 2, 3),
        (layer("ConvTranspose", (4, 8, 3, 3)), 8, (1, 1), 2, 4),
        (layer("ConvTranspose", (4, 8, 3, 3), group=2), 16, (None, 1), 2, 4),
        (layer("Gemm", (4, 5)), 5, (1, -1), 2, 2),
        (layer("Gemm", (5, 4), transB=1), 5, (0, -1), 2, 2),
        (layer("MatMul", (4, 5), ["N", 7, 4]), 5, (1, -1), None, 3),
        (layer("MatMul", (4, 5)), 5, (1, -1), None, None),
        (layer("MatMul", (2, 4, 5), [2, 7, 4]), None, (None, -1), None, None),
    ],
)
def test_channels_axes_of_weight_and_result_and_bias(
    made: LinearLayer, channels: int | None, axes: tuple[int | None, int], bias_input: int | None, rank: int | None
) -> None:
    assert made.weight_input == 1
    assert (made.channels, (made.weight_axis, made.output_axis)) == (channels, axes)
    assert (made.bias_input, made.output_rank) == (bias_input, rank)


@pytest.mark.parametrize(
    ("bias", "beta", "expected"),
    [
        (None, 1.0, [0, 0]),
        ([1, 2], 1.0, [1, 2]),
        ([[1, 2]], 2.0, [2, 4]),
        (3, 1.0, [3, 3]),
        ([[1], [2], [3]], 1.0, None),
        ([[1], [2], [3]], 0.0, [0, 0]),
    ],
)
def test_bias_of_a_gemm(bias: Any, beta: float, expected: list[float] | None) -> None:
    values = layer("Gemm", (4, 2), bias=bias, beta=beta).bias_values()
    assert (None if values is None else values.tolist()) == expected


def test_a_computed_bias_has_no_values() -> None:
    made = layer("Conv", (8, 4, 3, 3))
    made.node.inputs.append(gs.Variable("b"))
    assert made.bias_values() is None
    assert made.obstacle(shift=False) == "the bias of 'layer' is computed at run time or differs inside a channel"


def test_other_operators_are_no_linear_layers() -> None:
    assert LinearLayer.of(None) is None
    assert LinearLayer.of(gs.Node("Relu", inputs=[gs.Variable("x")])) is None
    assert LinearLayer.of(gs.Node("Conv", inputs=[gs.Variable("x"), gs.Variable("w")], domain="my.domain")) is None


def test_integer_weights_are_an_obstacle() -> None:
    made = layer("MatMul", (4, 5))
    made.node.inputs[1] = gs.Constant("w", np.ones((4, 5), np.int8))
    assert made.obstacle(shift=False) == "the weight of 'layer' is of type int8, not a float"


@pytest.mark.parametrize(
    ("shape", "axis", "rank", "understood"),
    [
        ((), 1, 4, True),
        ((3, 1, 1), 1, 4, True),
        ((1, 3, 1, 1), 1, 4, True),
        ((1, 1, 3, 1, 1), 1, 4, False),
        ((3,), 1, 4, False),
        ((2, 3, 1, 1), 1, 4, False),
        ((3,), -1, None, True),
        ((1, 3), -1, None, False),
        ((1, 3), -1, 2, True),
        ((3, 1), -1, 2, False),
        ((1,), 1, None, True),
        ((2,), 1, None, False),
        ((2,), -1, 2, False),
    ],
)
def test_a_constant_as_one_value_per_channel(
    shape: tuple[int, ...], axis: int, rank: int | None, understood: bool
) -> None:
    vector = channel_vector(np.arange(np.prod(shape), dtype=np.float32).reshape(shape) + 1, 3, axis, rank)
    assert (vector is not None) == understood
    if vector is not None:
        assert vector.shape == (3,)
        assert vector.dtype == np.float64


def test_maps_compose_from_left_to_right() -> None:
    first, second = ChannelMap(np.array([2.0]), np.array([1.0])), ChannelMap(np.array([3.0]), np.array([5.0]))
    both = ChannelMap.identity(1).then(first).then(second)
    assert (both.scale[0], both.shift[0]) == (6.0, 8.0)
    assert not ChannelMap(np.array([np.inf]), np.zeros(1)).finite


def test_the_old_values_are_never_written_to() -> None:
    made = layer("Conv", (2, 1, 1, 1), bias=[1, 2])
    weight, bias = made.weight.values, made.bias.values  # type: ignore[union-attr]  # gs tensors are untyped
    assert made.scale_shift(np.array([2.0, 3.0]), np.array([1.0, 1.0]), set()) is None
    assert weight.tolist() == [[[[1]]], [[[1]]]]
    assert bias.tolist() == [1, 2]
    assert made.weight.values.reshape(-1).tolist() == [2, 3]
    assert made.node.inputs[2].values.tolist() == [3, 7]

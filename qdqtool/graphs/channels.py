"""Arithmetic on the channels of a tensor: y = scale_c x + shift_c, and the nodes that do it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.graph import Array
from qdqtool.spec import FloatArray


@dataclass(frozen=True)
class ChannelMap:
    """y = scale * x + shift for each channel: float64 arrays (channels,)."""

    scale: FloatArray
    shift: FloatArray

    @staticmethod
    def identity(channels: int) -> ChannelMap:
        """The map that changes nothing."""
        return ChannelMap(np.ones(channels), np.zeros(channels))

    def then(self, other: ChannelMap) -> ChannelMap:
        """This one first, ``other`` after it."""
        return ChannelMap(self.scale * other.scale, self.shift * other.scale + other.shift)

    @property
    def finite(self) -> bool:
        """Whether every value is finite."""
        return bool(np.isfinite(self.scale).all() and np.isfinite(self.shift).all())


_ARITHMETIC: Final[dict[str, Callable[[FloatArray, bool], ChannelMap | None]]] = {
    "Add": lambda c, last: ChannelMap(np.ones_like(c), c),
    "Sub": lambda c, last: ChannelMap(np.ones_like(c), -c) if last else ChannelMap(-np.ones_like(c), c),
    "Mul": lambda c, last: ChannelMap(c, np.zeros_like(c)),
    "Div": lambda c, last: ChannelMap(1.0 / c, np.zeros_like(c)) if last else None,
}


_KEEP_LAYOUT: Final = frozenset(
    {"Add", "Cast", "Clip", "Div", "Dropout", "Elu", "Erf", "Gelu", "HardSigmoid", "HardSwish", "Identity", "LeakyRelu",
     "Mul", "PRelu", "Relu", "Sigmoid", "Softmax", "Sub", "Tanh"}
)  # fmt: skip


def constant_operand(node: gs.Node) -> int | None:
    """Index of the one constant operand of an Add, Sub, Mul or Div; None for other nodes."""
    if node.op not in _ARITHMETIC or len(node.inputs) != 2 or node.domain not in (None, "", "ai.onnx"):
        return None
    found = [i for i, tensor in enumerate(node.inputs) if graphs.is_constant(tensor)]
    return found[0] if len(found) == 1 else None


def channel_axis(tensor: gs.Tensor) -> int:
    """Channel axis of an activation: the last behind MatMul and LayerNormalization, else 1.

    Operators that keep the layout are looked through, up to the layer that gives it its channels.
    """
    maker = graphs.producer(tensor)
    while maker is not None and maker.op in _KEEP_LAYOUT:
        maker = graphs.producer(next((t for t in maker.inputs if not graphs.is_constant(t)), tensor))
    return -1 if maker is not None and maker.op in ("MatMul", "LayerNormalization") else 1


def channel_map(node: gs.Node, channels: int, axis: int, rank: int | None) -> ChannelMap | str:
    """What an Add, Sub, Mul or Div by a constant does to each channel of its other operand, or why that is not known.

    ``channels``, ``axis`` and ``rank`` describe that operand as for :func:`channel_vector`.
    """
    index = constant_operand(node)
    if index is None:
        return "it has no constant operand"
    values = cast(Array, graphs.constant(node.inputs[index]))
    vector = channel_vector(values, channels, axis, rank)
    if vector is None:
        return f"its constant of shape {values.shape} is not one value for each of the {channels} channels"
    with np.errstate(divide="ignore"):
        change = _ARITHMETIC[node.op](vector, index == 1)
    if change is None:
        return "it divides a constant by the result"
    return change if change.finite else "its constant is zero or not finite"


def channel_vector(values: Array, channels: int, axis: int, rank: int | None) -> FloatArray | None:
    """A constant operand as one float64 value for each channel, shape (channels,).

    Args:
        values: the constant, broadcast against a tensor with ``channels`` along ``axis``.
        channels: number of channels.
        axis: channel axis of the tensor: 1 or -1.
        rank: rank of the tensor; None if not known, then only a constant of rank 0 or 1 is understood.

    Returns:
        None where the constant differs inside a channel, or would widen the tensor.
    """
    if values.ndim > (1 if rank is None else rank):
        return None
    if rank is None and axis != -1:
        return np.full(channels, float(values.reshape(-1)[0])) if values.size == 1 else None
    size = max(values.ndim, 1) if rank is None else rank
    shape = (1,) * (size - values.ndim) + values.shape
    place = axis % size
    if any(extent != 1 for i, extent in enumerate(shape) if i != place) or shape[place] not in (1, channels):
        return None
    return np.array(np.broadcast_to(values.reshape(-1).astype(np.float64), (channels,)))


def stored(values: FloatArray, dtype: np.dtype[Any]) -> Array | None:
    """Float64 values rounded to ``dtype``; None where one is not finite there."""
    with np.errstate(over="ignore"):
        rounded: Array = np.asarray(values, dtype=np.float64).astype(dtype)
    return rounded if np.isfinite(rounded).all() else None

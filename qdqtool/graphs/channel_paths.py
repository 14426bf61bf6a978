"""Where a factor on the channels of a tensor goes: forward, until linear layers take it up in their weights.

With a positive factor s_c for each channel, and f the operators on the way,

    f(s x) = s f(x),    so    W f(x) = (W / s) f(s x)

That holds for Relu, LeakyRelu and PRelu (Nagel et al., ICCV 2019, section 4.1), for pooling, for products with
something else, and for operators that move whole channels. It does not hold for Clip, whose bounds would differ from
channel to channel. There is a path where linear layers are at all of its ends.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.channels import ChannelMap
from qdqtool.graphs.graph import Array
from qdqtool.graphs.layer_input import LayerInput
from qdqtool.spec import FloatArray

_GIVEN_OUT: Final = "its result, or what is made of it, is a graph output"
_BOUNDED: Final = frozenset({"Clip", "HardSigmoid", "HardSwish"})


@dataclass(frozen=True)
class ChannelPath:
    """Everything from a tensor to the linear layers that read it, directly or through other operators.

    Attributes:
        channels: number of channels.
        axes: names of the tensors that the factor reaches, in the order found -> their channel axis (not negative).
        layers: the layers that read the last of them.
    """

    channels: int
    axes: Mapping[str, int]
    layers: tuple[LayerInput, ...]

    def divided(self, factors: FloatArray, outputs: set[int]) -> list[Array] | None:
        """New weights of the layers, for channels that come multiplied by ``factors``, float64 (channels,).

        ``outputs`` comes from :func:`qdqtool.graphs.graph.output_ids`. None where one would not be finite.
        """
        change = ChannelMap(1.0 / factors, np.zeros(self.channels))
        found = [layer.folded(change, outputs) for layer in self.layers]
        return None if any(each is None for each in found) else [each[0] for each in found if each is not None]

    def store(self, weights: Sequence[Array], outputs: set[int], taken: set[str]) -> None:
        """Give the layers the weights that :meth:`divided` made."""
        for layer, weight in zip(self.layers, weights, strict=True):
            layer.store(weight, None, outputs, taken)


def follow(start: gs.Tensor, axis: int, channels: int, here: Container[int], outputs: set[int]) -> ChannelPath | str:
    """The path that begins with a tensor, or why there is none.

    Args:
        start: the tensor whose channels are to be multiplied.
        axis: its channel axis, which may be negative.
        channels: number of its channels.
        here: identities of the nodes of its graph; a reader that is not among them is in a control-flow body.
        outputs: from :func:`qdqtool.graphs.graph.output_ids`.
    """
    if id(start) in outputs:
        return _GIVEN_OUT
    if start.shape is None or not -len(start.shape) <= axis < len(start.shape):
        return "the rank of its result is not known"
    axes, layers = {start.name: axis % len(start.shape)}, []
    pending, seen = [start], set[int]()
    while pending:
        tensor = pending.pop()
        if id(tensor) in outputs:
            return _GIVEN_OUT
        for node, index in graphs.uses(tensor):
            if id(node) in seen or id(node) not in here:
                return "a control-flow body reads it" if id(node) not in here else f"{node.op} reads it twice"
            seen.add(id(node))
            layer = LayerInput.of(node, index)
            found = _step(node, index, axes[tensor.name], channels) if layer is None else None
            if layer is not None:
                found = _refusal(layer, axes[tensor.name], channels)
                layers.append(layer)
            if isinstance(found, str):
                return found
            if found is not None:
                axes[node.outputs[0].name] = found
                pending.append(node.outputs[0])
    return ChannelPath(channels, axes, tuple(layers)) if layers else "no linear layer reads it"


def _refusal(layer: LayerInput, axis: int, channels: int) -> str | None:
    """Why a layer does not take up the factor; None where it does."""
    if layer.obstacle() is not None:
        return f"a {layer.layer.node.op} that reads it takes no factors: it is transposed, or its weight no matrix"
    rank = len(layer.layer.node.inputs[0].shape)
    if layer.axis % rank != axis or layer.channels != channels:
        return f"{layer.layer.node.op} reads it along another axis"
    if len(layer.layer.weight.outputs) > 1:
        return f"a {layer.layer.node.op} that reads it shares its weight with another node"
    return None


def _step(node: gs.Node, index: int, axis: int, channels: int) -> int | str:
    """Channel axis of a node's result, where a factor passes it; else the reason."""
    rule = _RULES.get(node.op) if node.domain in (None, "", "ai.onnx") else None
    if rule is None and node.op in _BOUNDED:
        return f"the bounds of {node.op} would differ from channel to channel"
    if rule is None:
        return f"{node.op} does not commute with a factor for each channel"
    if node.inputs[index].shape is None or node.outputs[0].shape is None:
        return "the rank of what is made of its result is not known"
    found = rule(node, index, axis)
    if found is None or node.outputs[0].shape[found] != channels:
        return f"{node.op} does not keep its channels apart, or together"
    return found


def _kept(node: gs.Node, index: int, axis: int) -> int | None:
    """Operators that keep the layout of input 0."""
    return axis if index == 0 and _ranks(node, index) else None


def _product(node: gs.Node, index: int, axis: int) -> int | None:
    """Mul of anything, and what Div divides."""
    return axis if _ranks(node, index) and (node.op == "Mul" or index == 0) else None


def _matmul(node: gs.Node, index: int, axis: int) -> int | None:
    """A product of two activations, apart from the axis that it sums over."""
    rank = len(node.inputs[index].shape)
    return axis if _ranks(node, index) and axis != rank - (1 if index == 0 else 2) else None


def _pooled(node: gs.Node, index: int, axis: int) -> int | None:
    return 1 if axis == 1 else None


def _transposed(node: gs.Node, index: int, axis: int) -> int | None:
    rank = len(node.inputs[0].shape)
    order = list(node.attrs.get("perm", range(rank)[::-1]))
    return order.index(axis)


def _reshaped(node: gs.Node, index: int, axis: int) -> int | None:
    """The axis of as many channels with as many values behind it, so that the rest lies before it."""
    before, after = node.inputs[0].shape, node.outputs[0].shape
    sizes = [before[axis:], *(after[i:] for i in range(len(after)))]
    if index != 0 or not all(isinstance(extent, int) for extent in sizes[0]):
        return None
    for place, size in enumerate(sizes[1:]):
        if all(isinstance(extent, int) for extent in size) and (size[0], math.prod(size)) == (
            before[axis],
            math.prod(sizes[0]),
        ):
            return place
    return None


def _reduced(node: gs.Node, index: int, axis: int) -> int | None:
    """A mean, sum or greatest value over other axes than the channels'."""
    rank = len(node.inputs[0].shape)
    given = graphs.constant(graphs.input_at(node, 1))
    axes = given.reshape(-1).tolist() if given is not None else node.attrs.get("axes")
    if index != 0 or not axes or axis in (gone := {int(each) % rank for each in axes}):
        return None
    return axis if node.attrs.get("keepdims", 1) else axis - sum(each < axis for each in gone)


def _ranks(node: gs.Node, index: int) -> bool:
    return len(node.inputs[index].shape) == len(node.outputs[0].shape)


_RULES: Final[Mapping[str, Callable[[gs.Node, int, int], int | None]]] = {
    **dict.fromkeys(("Abs", "Dropout", "Identity", "LeakyRelu", "Neg", "PRelu", "Relu"), _kept),
    **dict.fromkeys(("AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool"), _pooled),
    **dict.fromkeys(("Flatten", "Reshape", "Squeeze", "Unsqueeze"), _reshaped),
    **dict.fromkeys(("ReduceMax", "ReduceMean", "ReduceSum"), _reduced),
    **dict.fromkeys(("Div", "Mul"), _product),
    "MatMul": _matmul,
    "Transpose": _transposed,
}

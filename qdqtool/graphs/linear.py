"""Conv, ConvTranspose, Gemm and MatMul seen as one thing: a linear layer with a weight, a bias and output channels.

Whatever multiplies output channel c of such a layer by s_c and adds t_c belongs into its parameters:

    s_c (W_c x + b_c) + t_c = (s_c W_c) x + (s_c b_c + t_c)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, cast

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.channels import ChannelMap, channel_map, channel_vector, stored
from qdqtool.graphs.graph import Array
from qdqtool.spec import FloatArray

LINEAR_OPS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
RECURRENT_OPS: Final = frozenset({"GRU", "LSTM", "RNN"})
"""Their weights are inputs 1 and 2: [directions, gates * hidden, inputs] and [directions, gates * hidden, hidden]."""
_CONV_OPS: Final = frozenset({"Conv", "ConvTranspose"})


@dataclass(frozen=True)
class LinearLayer:
    """A view of one Conv, ConvTranspose, Gemm or MatMul node; it holds no values of its own."""

    node: gs.Node

    @staticmethod
    def of(node: gs.Node | None) -> LinearLayer | None:
        """The node as a linear layer; None for any other operator."""
        if node is None or node.op not in LINEAR_OPS or node.domain not in (None, "", "ai.onnx"):
            return None
        return LinearLayer(node) if len(node.inputs) >= 2 else None

    @property
    def weight_input(self) -> int:
        """Index of the input that holds the weight."""
        return 1

    @property
    def bias_input(self) -> int | None:
        """Index of the input that holds, or would hold, the bias; None for MatMul, which has none."""
        return None if self.node.op == "MatMul" else 2

    @property
    def weight(self) -> gs.Tensor:
        """The weight: constant or computed."""
        return self.node.inputs[self.weight_input]

    @property
    def bias(self) -> gs.Tensor | None:
        """The bias: constant or computed; None where there is none."""
        return None if self.bias_input is None else graphs.input_at(self.node, self.bias_input)

    @property
    def groups(self) -> int:
        """Number of groups of a convolution; 1 for Gemm and MatMul."""
        return int(self.node.attrs.get("group", 1)) if self.node.op in _CONV_OPS else 1

    @property
    def weight_axis(self) -> int | None:
        """Axis of the weight that runs over the output channels, for per-channel scales.

        None where no single axis does: a grouped ConvTranspose, or a MatMul whose weight is not of rank 2.
        """
        if self.node.op == "Conv":
            return 0
        if self.node.op == "ConvTranspose":
            return 1 if self.groups == 1 else None
        if self.node.op == "Gemm":
            return 0 if self.node.attrs.get("transB", 0) else 1
        shape = self.weight.shape
        return 1 if shape is not None and len(shape) == 2 else None

    @property
    def output_axis(self) -> int:
        """Axis of the result that runs over the output channels: 1 for convolutions, -1 for Gemm and MatMul."""
        return 1 if self.node.op in _CONV_OPS else -1

    @property
    def output_rank(self) -> int | None:
        """Rank of the result; None where it is not known."""
        shape = self.weight.shape
        if self.node.op in _CONV_OPS:
            return None if shape is None else len(shape)
        if self.node.op == "Gemm":
            return 2
        source = self.node.inputs[0].shape
        if source is None or shape is None or len(shape) != 2:
            return None
        return len(source)

    @property
    def channels(self) -> int | None:
        """Number of output channels; None where the weight does not tell."""
        shape = self.weight.shape
        if shape is None:
            return None
        if self.node.op == "ConvTranspose":
            size = shape[1] * self.groups if len(shape) > 1 and isinstance(shape[1], int) else None
        else:
            axis = self.weight_axis
            size = None if axis is None or axis >= len(shape) else shape[axis]
        return size if isinstance(size, int) and size > 0 else None

    def bias_values(self) -> FloatArray | None:
        """What is added to each output channel, float64 (channels,): zeros without a bias, Gemm's ``beta * C``.

        None where the bias is computed at run time or differs inside a channel.
        """
        channels = self.channels
        if channels is None:
            return None
        if self.bias is None or self._beta == 0.0:
            return np.zeros(channels)
        values = graphs.constant(self.bias)
        vector = None if values is None else channel_vector(values, channels, -1, None if self._is_conv else 2)
        return None if vector is None else vector * self._beta

    def obstacle(self, *, shift: bool) -> str | None:
        """Why parameters cannot scale (and, with ``shift``, shift) the output channels; None where they can."""
        if not graphs.is_constant(self.weight):
            return f"the weight of {self.node.name!r} is computed at run time"
        if not graphs.is_float(self.weight):
            return f"the weight of {self.node.name!r} is of type {self.weight.dtype}, not a float"
        if self.channels is None:
            return f"the weight of {self.node.name!r} has shape {tuple(self.weight.shape)}: no axis of output channels"
        if self.node.op == "MatMul" and shift and self.output_rank != 2:
            return f"{self.node.name!r} is a MatMul without a known rank-2 input, so it has no place for a bias"
        if self.bias_values() is None:
            return f"the bias of {self.node.name!r} is computed at run time or differs inside a channel"
        return None

    def scale_shift(self, scale: FloatArray, shift: FloatArray, taken: set[str]) -> str | None:
        """Multiply output channel c by ``scale[c]`` and add ``shift[c]``, in new weight and bias constants.

        Gemm's alpha and beta end up in the values; a MatMul of rank 2 that gets a bias becomes a Gemm. Computed in
        float64, stored in the weight's type. Tensors that other nodes read are copied under a new name.

        Args:
            scale: float64 (channels,).
            shift: float64 (channels,).
            taken: all tensor names of the model; the new ones join it.

        Returns:
            None, or the reason why the layer was left as it is.
        """
        reason = self.obstacle(shift=bool(shift.any()))
        if reason is not None:
            return reason
        values, factors = cast(Array, graphs.constant(self.weight)), scale * self._alpha
        bias = cast(FloatArray, self.bias_values()) * scale + shift
        new_weight = stored(values.astype(np.float64) * self._over_weight(factors), values.dtype)
        new_bias = stored(bias, values.dtype)
        if new_weight is None or new_bias is None:
            return f"the folded parameters of {self.node.name!r} would not be finite {values.dtype} values"
        if (factors != 1.0).any():
            self.set_weight(new_weight, taken)
        if self.bias is not None or bias.any():
            self.set_bias(new_bias, taken)
        if self.node.op == "Gemm":
            self.node.attrs.pop("alpha", None)
            self.node.attrs.pop("beta", None)
        return None

    def set_weight(self, values: Array, taken: set[str]) -> None:
        """Give the layer a weight of its own; its name stays where no other node reads it."""
        replace_constant(self.node, self.weight_input, values, f"{self.node.name}.weight", taken)

    def set_bias(self, values: Array, taken: set[str]) -> None:
        """Give the layer a bias of its own, shape (channels,); a MatMul becomes a Gemm."""
        if self.node.op == "MatMul":
            self.node.op = "Gemm"
        while len(self.node.inputs) < 3:
            self.node.inputs.append(gs.Variable.empty())
        replace_constant(self.node, 2, values, f"{self.node.name}.bias", taken)

    @property
    def _is_conv(self) -> bool:
        return self.node.op in _CONV_OPS

    @property
    def _alpha(self) -> float:
        return float(self.node.attrs.get("alpha", 1.0)) if self.node.op == "Gemm" else 1.0

    @property
    def _beta(self) -> float:
        return float(self.node.attrs.get("beta", 1.0)) if self.node.op == "Gemm" else 1.0

    def _over_weight(self, factors: FloatArray) -> FloatArray:
        """Per-channel factors in a shape that broadcasts over the weight."""
        shape = tuple(self.weight.shape)
        if self.node.op == "ConvTranspose":  # [Cin, Cout/g, ...]: the rows of a group make that group's output channels
            per_group = np.repeat(factors.reshape(self.groups, -1), shape[0] // self.groups, axis=0)
            return per_group.reshape(shape[0], shape[1], *(1,) * (len(shape) - 2))
        axis = cast(int, self.weight_axis)
        return factors.reshape([-1 if i == axis else 1 for i in range(len(shape))])


def weight_inputs(node: gs.Node) -> tuple[int, ...]:
    """Inputs that hold the weights of a linear or recurrent layer."""
    return (1, 2) if node.op in RECURRENT_OPS else (1,)


def channel_axis_of_weight(node: gs.Node) -> int | None:
    """Axis of a layer's weights that runs over what has a scale of its own: output channels, or gates.

    None where no single axis does.
    """
    if node.op in RECURRENT_OPS:
        return 1
    layer = LinearLayer.of(node)
    return None if layer is None else layer.weight_axis


def replace_constant(node: gs.Node, index: int, values: Array, name: str, taken: set[str]) -> None:
    """Put a new constant at an input: under the old one's name where this node was its only reader, else ``name``."""
    old = node.inputs[index]
    alone = isinstance(old, gs.Constant) and len(old.outputs) == 1
    name = old.name if alone else graphs.fresh_name(name, taken)
    graphs.set_input(node, index, gs.Constant(name, values))


def arithmetic(node: gs.Node, layer: LinearLayer) -> ChannelMap | str:
    """What an Add, Sub, Mul or Div by a constant does to each channel of the layer's result, or why that is unknown."""
    if layer.channels is None:
        return f"the number of output channels of {layer.node.name!r} is not known"
    return channel_map(node, layer.channels, layer.output_axis, layer.output_rank)


@dataclass(frozen=True)
class BiasPlace:
    """Where a layer's bias stands, and the tensor it is part of.

    Attributes:
        node: name of the node that adds the bias, the layer or the Add behind a MatMul; its output is the result.
        index: input of that node that holds the bias, a constant (channels,).
        axis: channel axis of the result: 1 or -1.
        rank: rank of the result; None where it is not known (then ``axis`` is -1).
        channels: number of output channels.
    """

    node: str
    index: int
    axis: int
    rank: int | None
    channels: int


def bias_place(node: gs.Node, outputs: set[int]) -> BiasPlace | None:
    """Where the bias of a linear layer stands; None where it has none that is a constant vector.

    ``outputs`` comes from :func:`qdqtool.graphs.graph.output_ids`.
    """
    layer = LinearLayer.of(node)
    if layer is None or layer.channels is None:
        return None
    shape = (layer.channels,)
    if layer.bias is not None:
        fits = graphs.is_constant(layer.bias) and tuple(layer.bias.shape) == shape
        return BiasPlace(node.name, 2, layer.output_axis, layer.output_rank, layer.channels) if fits else None
    reader = graphs.single_use(node.outputs[0], outputs)
    if node.op != "MatMul" or reader is None or reader.op != "Add":
        return None
    index = 1 if reader.inputs[0] is node.outputs[0] else 0
    bias = reader.inputs[index]
    fits = graphs.is_constant(bias) and tuple(bias.shape) == shape and graphs.is_constant(layer.weight)
    return BiasPlace(reader.name, index, -1, layer.output_rank, layer.channels) if fits else None

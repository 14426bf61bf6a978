"""What makes a tensor and can make its channels multiplied by factors, at no cost: by its own constants."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, cast

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.channels import stored
from qdqtool.graphs.graph import Array
from qdqtool.graphs.linear import LinearLayer, bias_place, replace_constant
from qdqtool.passes_api import State
from qdqtool.spec import FloatArray

_NOT_FINITE = "its parameters would not be finite"
_SHARED = "it shares its weight or bias with another node"


class Source(Protocol):
    """A node whose constants can multiply the channels of a tensor."""

    @property
    def name(self) -> str:
        """The node or model input that is named where something is said about it."""
        ...

    @property
    def tensor(self) -> gs.Tensor:
        """The tensor whose channels are multiplied."""
        ...

    @property
    def axis(self) -> int:
        """Its channel axis, which may be negative."""
        ...

    @property
    def channels(self) -> int:
        """Number of its channels."""
        ...

    def multiply(self, factors: FloatArray, state: State, taken: set[str]) -> str | None:
        """Multiply the channels by positive ``factors``, float64 (channels,), in new constants.

        Computed in float64, rounded once. Returns None, or the reason why all is left as it was. ``taken`` holds the
        names of all tensors; new ones join it.
        """
        ...


@dataclass(frozen=True)
class LayerSource:
    """A linear layer by its weight and bias; of a MatMul the bias is what an Add behind it adds."""

    layer: LinearLayer
    add: gs.Node | None = None
    operand: int = 0

    @staticmethod
    def of(node: gs.Node, outputs: set[int]) -> LayerSource | str | None:
        """The node as a source, None where it is no layer with a constant weight; a reason where it cannot be one.

        ``outputs`` comes from :func:`qdqtool.graphs.graph.output_ids`.
        """
        layer = LinearLayer.of(node)
        if layer is None or not graphs.is_constant(layer.weight):
            return None
        if any(len(each.outputs) > 1 for each in (layer.weight, layer.bias) if each is not None):
            return _SHARED
        reason = layer.obstacle(shift=False)
        if reason is not None:
            return reason
        place = bias_place(node, outputs)
        if place is None or place.node == node.name:
            return LayerSource(layer)
        add = graphs.single_use(node.outputs[0], outputs)
        return (
            _SHARED if add is None or len(add.inputs[place.index].outputs) > 1 else LayerSource(layer, add, place.index)
        )

    @property
    def name(self) -> str:
        """The layer's own node."""
        return str(self.layer.node.name)

    @property
    def tensor(self) -> gs.Tensor:
        """The result with the bias."""
        return (self.add or self.layer.node).outputs[0]

    @property
    def axis(self) -> int:
        """1 for convolutions, else -1."""
        return self.layer.output_axis

    @property
    def channels(self) -> int:
        """Number of output channels."""
        return cast(int, self.layer.channels)

    def multiply(self, factors: FloatArray, state: State, taken: set[str]) -> str | None:
        """Multiply weight and bias, and what is recorded of a BatchNormalization folded into them."""
        bias = None
        if self.add is not None:
            old = cast(Array, graphs.constant(self.add.inputs[self.operand]))
            bias = stored(old.astype(np.float64) * factors, old.dtype)
            if bias is None:
                return _NOT_FINITE
        if self.layer.scale_shift(factors, np.zeros(self.channels), taken) is not None:
            return _NOT_FINITE
        if self.add is not None and bias is not None:
            replace_constant(self.add, self.operand, bias, f"{self.add.name}.bias", taken)
        for name in {self.layer.node.outputs[0].name, self.tensor.name} & state.batchnorms.keys():
            beta, gamma = cast(tuple[FloatArray, FloatArray], state.batchnorms[name])
            state.batchnorms[name] = (beta * factors, gamma * factors)
        return None


@dataclass(frozen=True)
class NormalizationSource:
    """A LayerNormalization by its scale and bias."""

    node: gs.Node

    @staticmethod
    def of(node: gs.Node) -> NormalizationSource | str | None:
        """The node as a source, None where it is no LayerNormalization; a reason where it cannot be one."""
        if node.op != "LayerNormalization" or node.domain not in (None, "", "ai.onnx"):
            return None
        scale, bias = graphs.constant(node.inputs[1]), graphs.input_at(node, 2)
        if scale is None or scale.ndim != 1 or (bias is not None and not graphs.is_constant(bias)):
            return "its scale or bias is computed, or spans several axes"
        return NormalizationSource(node) if all(len(each.outputs) == 1 for each in node.inputs[1:3]) else _SHARED

    @property
    def name(self) -> str:
        """The node."""
        return str(self.node.name)

    @property
    def tensor(self) -> gs.Tensor:
        """The normalized tensor."""
        return self.node.outputs[0]

    @property
    def axis(self) -> int:
        """The last one."""
        return -1

    @property
    def channels(self) -> int:
        """Extent of the last axis."""
        return int(self.node.inputs[1].shape[0])

    def multiply(self, factors: FloatArray, state: State, taken: set[str]) -> str | None:
        """Multiply scale and bias."""
        values = {i: cast(Array, graphs.constant(graphs.input_at(self.node, i))) for i in (1, 2)}
        return _replace(self.node, {i: v for i, v in values.items() if v is not None}, factors, taken)


@dataclass(frozen=True)
class InputSource:
    """An input of the model, which only a Mul put behind it can multiply."""

    tensor: gs.Tensor
    graph: gs.Graph
    axis: int
    channels: int

    @property
    def name(self) -> str:
        """The input."""
        return str(self.tensor.name)

    def multiply(self, factors: FloatArray, state: State, taken: set[str]) -> str | None:
        """Put a Mul between the input and all its readers."""
        values = stored(factors, np.dtype(self.tensor.dtype))
        if values is None:
            return _NOT_FINITE
        behind = len(self.tensor.shape) - 1 - self.axis % len(self.tensor.shape)
        constant = gs.Constant(graphs.fresh_name(f"{self.name}.factors", taken), values.reshape(-1, *(1,) * behind))
        result = gs.Variable(graphs.fresh_name(f"{self.name}_smoothed", taken), self.tensor.dtype, self.tensor.shape)
        graphs.redirect(self.tensor, result)
        names = graphs.node_names(self.graph)
        node = gs.Node("Mul", graphs.fresh_name(f"{self.name}.smooth", names), {}, [self.tensor, constant], [result])
        self.graph.nodes.insert(0, node)
        return None


def _replace(node: gs.Node, values: dict[int, Array], factors: FloatArray, taken: set[str]) -> str | None:
    """Multiply vectors that a node reads."""
    new = {index: stored(old.astype(np.float64) * factors, old.dtype) for index, old in values.items()}
    if any(each is None for each in new.values()):
        return _NOT_FINITE
    for index, each in new.items():
        assert each is not None
        replace_constant(node, index, each, f"{node.name}.{'scale' if index == 1 else 'bias'}", taken)
    return None

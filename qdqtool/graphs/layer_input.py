"""A linear layer seen from its input: arithmetic on the channels it reads belongs into its weight and bias.

    W (s x + t) + b = (W s) x + (W t + b)

The shift t passes a convolution as a constant only where every output position sees all of the kernel, that is without
zero padding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.channels import ChannelMap, stored
from qdqtool.graphs.graph import Array
from qdqtool.graphs.linear import LinearLayer, bias_place, replace_constant
from qdqtool.spec import FloatArray


@dataclass(frozen=True)
class LayerInput:
    """The activation input of a layer whose weight is a constant; holds no values of its own."""

    layer: LinearLayer

    @staticmethod
    def of(node: gs.Node, index: int) -> LayerInput | None:
        """The layer that reads an activation at this input; None where it is no such layer."""
        layer = LinearLayer.of(node)
        if layer is None or index != 0 or not graphs.is_constant(layer.weight) or not graphs.is_float(layer.weight):
            return None
        return LayerInput(layer) if len(layer.weight.shape) >= 2 else None

    @property
    def axis(self) -> int:
        """Channel axis of the input: 1 for convolutions, -1 for Gemm and MatMul."""
        return self.layer.output_axis

    @property
    def rank(self) -> int | None:
        """Rank of the input; None where it is not known."""
        if self.layer.node.op != "MatMul":
            return self.layer.output_rank
        shape = self.layer.node.inputs[0].shape
        return None if shape is None else len(shape)

    @property
    def channels(self) -> int:
        """Number of channels that the weight expects."""
        shape, node = self.layer.weight.shape, self.layer.node
        if node.op == "Conv":
            return int(shape[1]) * self.layer.groups
        return int(shape[1] if node.op == "Gemm" and node.attrs.get("transB", 0) else shape[0])

    def obstacle(self) -> str | None:
        """Why a scale of the input's channels cannot be folded; None where it can."""
        node = self.layer.node
        if node.op == "Gemm" and node.attrs.get("transA", 0):
            return f"{node.name!r} has transA = 1"
        if node.op == "MatMul" and len(self.layer.weight.shape) != 2:
            return f"the weight of {node.name!r} is not of rank 2"
        return None

    def shift_obstacle(self, outputs: set[int]) -> str | None:
        """Why a shift of the input's channels cannot be folded; None where it can.

        ``outputs`` comes from :func:`qdqtool.graphs.graph.output_ids`.
        """
        node = self.layer.node
        if _sees_border(self.layer):
            return f"{node.name!r} pads with 0, which the shift would move"
        if node.op == "MatMul" and self.layer.output_rank != 2:
            found = bias_place(node, outputs)
            return None if found is not None else f"{node.name!r} has no bias that could take up the shift"
        if self.layer.channels is None or self.layer.bias_values() is None:
            return f"the bias of {node.name!r} is computed at run time or differs inside a channel"
        return None

    def folded(self, change: ChannelMap, outputs: set[int]) -> tuple[Array, Array | None] | None:
        """Weight and bias of the layer after ``change`` of its input; None where they would not be finite.

        The bias is None where it stays as it is. Computed in float64, rounded once to the weight's type.
        """
        values = cast(Array, graphs.constant(self.layer.weight))
        exact = values.astype(np.float64)
        weight = stored(exact * self._over_weight(change.scale), values.dtype)
        if weight is None or not change.shift.any():
            return None if weight is None else (weight, None)
        bias = stored(self._bias(outputs) + self._sums(exact, change.shift), values.dtype)
        return None if bias is None else (weight, bias)

    def store(self, weight: Array, bias: Array | None, outputs: set[int], taken: set[str]) -> None:
        """Give the layer new parameters; names as in :meth:`LinearLayer.scale_shift`."""
        node = self.layer.node
        place = self._add_behind(outputs)
        self.layer.set_weight(weight, taken)
        if bias is None:
            return
        if place is not None:
            replace_constant(place[0], place[1], bias, f"{place[0].name}.bias", taken)
        else:
            self.layer.set_bias(bias, taken)
            node.attrs.pop("beta", None)

    def _add_behind(self, outputs: set[int]) -> tuple[gs.Node, int] | None:
        """The Add of a MatMul's bias and the input where it reads that bias."""
        place = bias_place(self.layer.node, outputs) if self.layer.node.op == "MatMul" else None
        reader = graphs.single_use(self.layer.node.outputs[0], outputs)
        return None if place is None or reader is None else (reader, place.index)

    def _bias(self, outputs: set[int]) -> FloatArray:
        place = self._add_behind(outputs)
        if place is None:
            return cast(FloatArray, self.layer.bias_values())
        return cast(Array, graphs.constant(place[0].inputs[place[1]])).astype(np.float64)

    def _over_weight(self, factors: FloatArray) -> FloatArray:
        """Factors of the input's channels in a shape that broadcasts over the weight."""
        shape, node = tuple(self.layer.weight.shape), self.layer.node
        if node.op == "Conv":  # [M, C/g, ...]: the rows of a group read that group's channels
            rows = np.repeat(factors.reshape(self.layer.groups, -1), shape[0] // self.layer.groups, axis=0)
            return rows.reshape(shape[0], shape[1], *(1,) * (len(shape) - 2))
        axis = 1 if node.op == "Gemm" and node.attrs.get("transB", 0) else 0
        return factors.reshape([-1 if i == axis else 1 for i in range(len(shape))])

    def _sums(self, weight: FloatArray, shift: FloatArray) -> FloatArray:
        """What a constant input ``shift`` gives in each output channel."""
        products: FloatArray = weight * self._over_weight(shift)
        node = self.layer.node
        if node.op == "Conv":
            return cast(FloatArray, products.reshape(len(weight), -1).sum(axis=1))
        if node.op == "ConvTranspose":  # of a single position: [C, M/g, 1, ...]
            groups = self.layer.groups
            return cast(FloatArray, products.reshape(groups, -1, weight.shape[1]).sum(axis=1).reshape(-1))
        total: FloatArray = products.sum(axis=1 if node.op == "Gemm" and node.attrs.get("transB", 0) else 0)
        return total * float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else total


def _sees_border(layer: LinearLayer) -> bool:
    """Whether some output of a convolution is computed from fewer inputs than others."""
    node = layer.node
    if node.op not in ("Conv", "ConvTranspose"):
        return False
    point = all(extent == 1 for extent in layer.weight.shape[2:])
    padded = any(node.attrs.get("pads", ())) or (node.attrs.get("auto_pad", "NOTSET").startswith("SAME") and not point)
    if node.op == "Conv" or padded:
        return padded
    given = any(node.attrs.get("output_padding", ())) or bool(node.attrs.get("output_shape"))
    return not point or given or any(stride != 1 for stride in node.attrs.get("strides", ()))

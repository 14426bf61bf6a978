"""A linear layer's weight as a matrix of outputs and inputs, over which scales of channels are weighed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.graph import Array
from qdqtool.graphs.linear import LinearLayer
from qdqtool.spec import FloatArray


@dataclass(frozen=True)
class WeightMatrix:
    """Largest magnitude and sum of squares of what connects an input channel with an output channel.

    Attributes:
        peak: max |w| over the positions of the kernel, float64 (groups, outputs of a group, inputs of a group).
        power: sum of w² over these positions, alike.
    """

    peak: FloatArray
    power: FloatArray

    @staticmethod
    def of(layer: LinearLayer) -> WeightMatrix:
        """The matrix of a layer whose weight is constant and, but for a convolution, of rank 2."""
        values = np.abs(cast(Array, graphs.constant(layer.weight)).astype(np.float64))
        flat = values.reshape(*values.shape[:2], -1)
        return WeightMatrix(_arranged(layer, flat.max(axis=2)), _arranged(layer, (flat**2).sum(axis=2)))

    def inputs(self) -> FloatArray:
        """Largest magnitude of each input channel, float64 (inputs,)."""
        return cast(FloatArray, self.peak.max(axis=1).reshape(-1))

    def scaled(self, factors: FloatArray) -> WeightMatrix:
        """The matrix with its input channels multiplied by positive factors, float64 (inputs,)."""
        groups, _, columns = self.peak.shape
        right = factors.reshape(groups, 1, columns)
        return WeightMatrix(self.peak * right, self.power * right**2)


def _arranged(layer: LinearLayer, values: FloatArray) -> FloatArray:
    """[M, C/g], [C, M/g], [N, K] or [K, N], as the operator has them, as (groups, outputs, inputs)."""
    node, groups = layer.node, layer.groups
    rows_first = node.op == "Conv" or (node.op == "Gemm" and node.attrs.get("transB", 0))
    split = values.reshape(groups, -1, values.shape[1])
    return split if rows_first else split.swapaxes(1, 2)

"""Nodes that bias correction puts behind a layer: the mean of its output for each sample, and the shrunk shift."""

from __future__ import annotations

from typing import Any, Final

import numpy as np
import onnx

from qdqtool.graphs import model as models
from qdqtool.graphs.linear import BiasPlace

PREFIX: Final = "qdqtool.bias_correction."
ROWS: Final = f"{PREFIX}rows"
"""Input: number of samples, int64 (1,)."""
DEGREES: Final = f"{PREFIX}degrees"
"""Input: degrees of freedom of a mean, float32 (1,)."""
_TINY: Final = 1e-30


class BiasNodes:
    """Nodes that compute small float tensors beside a layer, appended to a model behind the layer's own node."""

    def __init__(self, proto: onnx.ModelProto, layer: str) -> None:
        """``proto`` gets the constants, ``nodes`` the nodes; ``layer`` names them."""
        self.graph, self.opset, self.stem = proto.graph, models.opset(proto), f"{PREFIX}{layer}"
        self.nodes: list[onnx.NodeProto] = []

    def op(self, op: str, *inputs: str, name: str | None = None, **attrs: Any) -> str:
        """Add a node; returns the name of its output, which is ``name`` if that is given."""
        name = name or f"{self.stem}.{len(self.nodes)}"
        self.nodes.append(onnx.helper.make_node(op, inputs, [name], f"{self.stem}.{len(self.nodes)}", **attrs))
        return name

    def constant(self, values: object, dtype: type) -> str:
        """Add a constant; returns its name."""
        name = f"{self.stem}.constant{len(self.graph.initializer)}"
        self.graph.initializer.append(onnx.numpy_helper.from_array(np.array(values, dtype), name))
        return name

    def mean(self, tensor: str, axis: int) -> str:
        """Mean along an axis, which is then gone."""
        if self.opset >= 18:
            return self.op("ReduceMean", tensor, self.constant([axis], np.int64), keepdims=0)
        return self.op("ReduceMean", tensor, axes=[axis], keepdims=0)

    def sample_means(self, tensor: str, place: BiasPlace) -> str:
        """Mean over all but samples and channels, shape (samples, channels)."""
        channels, rest = self.constant([place.channels], np.int64), self.constant([-1], np.int64)
        order = [ROWS, rest, channels] if place.axis == -1 else [ROWS, channels, rest]
        shape = self.op("Concat", *order, axis=0)
        floats = self.op("Cast", tensor, to=onnx.TensorProto.FLOAT)
        return self.mean(self.op("Reshape", floats, shape), 1 if place.axis == -1 else 2)

    def shrunk(self, differences: str) -> str:
        """The shift of every channel, shrunk by its standard error, out of differences (samples, channels)."""
        mean = self.mean(differences, 0)
        centred = self.op("Sub", differences, mean)
        error = self.op("Div", self.mean(self.op("Mul", centred, centred), 0), DEGREES)
        squares = self.mean(self.op("Mul", mean, mean), 0)
        between = self.op("Relu", self.op("Sub", squares, self.mean(error, 0)))
        whole = self.op("Max", self.op("Add", between, error), self.constant(_TINY, np.float32))
        return self.op("Mul", mean, self.op("Div", between, whole))

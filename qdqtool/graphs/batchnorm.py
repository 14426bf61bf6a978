"""BatchNormalization at inference, seen as arithmetic on channels.

y = gamma (x - mean) / sqrt(var + epsilon) + beta = s x + t
s = gamma / sqrt(var + epsilon),  t = beta - mean s
"""

from __future__ import annotations

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.channels import ChannelMap
from qdqtool.spec import FloatArray


def normalization(node: gs.Node, outputs: set[int]) -> ChannelMap | str:
    """What a BatchNormalization does to each channel, or why that is not known.

    ``outputs`` comes from :func:`qdqtool.graphs.graph.output_ids`.
    """
    if node.attrs.get("training_mode", 0) or any(t.outputs or id(t) in outputs for t in node.outputs[1:]):
        return "it is in training mode"
    if not node.attrs.get("spatial", 1):
        return "it normalizes each position by itself (spatial = 0)"
    values = parameters(node)
    if values is None:
        return "its scale, bias, mean or variance is computed at run time"
    gamma, beta, mean, variance = values
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / np.sqrt(variance + float(node.attrs.get("epsilon", 1e-5)))
        change = ChannelMap(scale, beta - mean * scale)
    return change if change.finite else "its parameters give a factor that is not finite"


def parameters(node: gs.Node) -> tuple[FloatArray, FloatArray, FloatArray, FloatArray] | None:
    """Values of gamma, beta, mean and variance, float64 (channels,); None where one is computed at run time."""
    values = [graphs.constant(tensor) for tensor in node.inputs[1:5]]
    found = [array.astype(np.float64).reshape(-1) for array in values if array is not None]
    return (found[0], found[1], found[2], found[3]) if len(found) == 4 else None

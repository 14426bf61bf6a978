"""What a folded BatchNormalization tells of a model's activations without any data: mean and variance of each channel.

What a BatchNormalization puts out has mean beta and standard deviation |gamma| in every channel. Taken as normal, its
moments behind an elementwise function follow by quadrature (Nagel et al., Data-Free Quantization Through Weight
Equalization and Bias Correction, ICCV 2019, section 4.2.1, has the closed form for Relu and Clip); sums of such
tensors are taken as independent.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, cast

import numpy as np
import onnx_graphsurgeon as gs
from scipy.special import expit, ndtri

from qdqtool.graphs import graph as graphs
from qdqtool.spec import FloatArray

_POINTS: Final = 1000
_NORMAL: Final[FloatArray] = ndtri((np.arange(_POINTS) + 0.5) / _POINTS)
"""Values of equal probability under a standard normal distribution."""


@dataclass(frozen=True)
class Moments:
    """Mean and variance of each channel, float64 (channels,); the variance is None where it is not known."""

    mean: FloatArray
    variance: FloatArray | None = None

    def through(self, function: Callable[[FloatArray], FloatArray]) -> Moments | None:
        """Moments of ``function`` of normal values with these moments; None without a variance."""
        if self.variance is None:
            return None
        values = function(self.mean[:, None] + np.sqrt(self.variance)[:, None] * _NORMAL)
        return Moments(values.mean(axis=1), values.var(axis=1))


def channel_means(graph: gs.Graph, batchnorms: Mapping[str, tuple[Any, Any]]) -> dict[str, Moments]:
    """Moments of every tensor of the top graph of which they are known, by name; one pass over the nodes.

    Args:
        graph: prepared float graph, nodes in order.
        batchnorms: tensor -> beta and |gamma| of the BatchNormalization folded into its producer, float64 (channels,).
    """
    known: dict[str, Moments] = {}
    for node in graph.nodes:
        for tensor in node.outputs:
            if tensor.name in batchnorms:
                beta, gamma = batchnorms[tensor.name]
                known[tensor.name] = Moments(np.asarray(beta, np.float64), np.asarray(gamma, np.float64) ** 2)
        if len(node.outputs) == 1 and node.outputs[0].name not in known and not node.domain:
            found = _behind(node, known)
            if found is not None:
                known[node.outputs[0].name] = found
    return known


def _behind(node: gs.Node, known: Mapping[str, Moments]) -> Moments | None:
    inputs = [known.get(tensor.name) for tensor in node.inputs]
    first = inputs[0] if inputs else None
    if node.op == "Add" and all(inputs):
        return _sum([moments for moments in inputs if moments is not None])
    if node.op == "Concat" and node.attrs.get("axis") == 1 and all(inputs):
        return _joined([moments for moments in inputs if moments is not None])
    if first is None:
        return None
    if node.op in ("GlobalAveragePool", "AveragePool"):
        return Moments(first.mean)
    if node.op in ("Flatten", "Reshape", "Squeeze", "Identity", "Dropout"):
        return _reshaped(first, node.outputs[0].shape)
    function = _function(node)
    return None if function is None else first.through(function)


def _sum(parts: list[Moments]) -> Moments | None:
    if len({part.mean.shape for part in parts}) > 1:
        return None
    variances = [part.variance for part in parts if part.variance is not None]
    whole = sum(variances) if len(variances) == len(parts) else None
    return Moments(np.sum([part.mean for part in parts], axis=0), cast(FloatArray | None, whole))


def _joined(parts: list[Moments]) -> Moments:
    variances = [part.variance for part in parts if part.variance is not None]
    whole = np.concatenate(variances) if len(variances) == len(parts) else None
    return Moments(np.concatenate([part.mean for part in parts]), whole)


def _reshaped(moments: Moments, shape: Any) -> Moments | None:
    """Moments along axis 1 of a result that has all positions of a channel one behind the other."""
    channels = shape[1] if shape is not None and len(shape) > 1 else None
    if not isinstance(channels, int) or channels % moments.mean.size:
        return None
    each = channels // moments.mean.size
    variance = None if moments.variance is None else np.repeat(moments.variance, each)
    return Moments(np.repeat(moments.mean, each), variance)


def _function(node: gs.Node) -> Callable[[FloatArray], FloatArray] | None:
    """The elementwise function that a node computes of its input 0; None where it is none of those known."""
    alpha = float(node.attrs.get("alpha", {"HardSigmoid": 0.2}.get(node.op, 0.01)))
    beta = float(node.attrs.get("beta", 0.5))
    functions: dict[str, Callable[[FloatArray], FloatArray]] = {
        "Relu": lambda x: np.maximum(x, 0),
        "LeakyRelu": lambda x: np.where(x < 0, alpha * x, x),
        "HardSigmoid": lambda x: np.clip(alpha * x + beta, 0, 1),
        "HardSwish": lambda x: x * np.clip(x / 6 + 0.5, 0, 1),
        "Sigmoid": expit,
        "Tanh": np.tanh,
    }
    return _clip(node) if node.op == "Clip" else functions.get(node.op)


def _clip(node: gs.Node) -> Callable[[FloatArray], FloatArray] | None:
    ends = [graphs.input_at(node, index) for index in (1, 2)]
    limits = [graphs.constant(end) for end in ends]
    if any(end is not None and limit is None for end, limit in zip(ends, limits, strict=True)):
        return None
    lo, hi = (float(limit.item()) if limit is not None else None for limit in limits)
    return lambda x: np.clip(x, lo, hi)

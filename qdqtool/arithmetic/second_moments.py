"""Second moments of what a linear layer multiplies its weight with: H = E[x xᵀ], x a column of the unrolled input.

For Conv, x holds the inputs that one output position sees (im2col), for each group on its own; for Gemm and MatMul it
is a row of the input. A squared error of an output channel is then a quadratic form of the error of its weights:

    E[(w x - v x)²] = (w - v) H (w - v)ᵀ

From few samples H is uncertain, and so are above all its small eigenvalues. It is shrunk towards its diagonal D by what
the spread between samples says about it (Ledoit and Wolf, A well-conditioned estimator for large-dimensional covariance
matrices, 2004; the diagonal as target: Schäfer and Strimmer, 2005), samples counted and not positions, as positions of
one sample are alike:

    (1 - a) H + a D,    a = Σ_s ||H_s - H||² / (S (S - 1)) / ||H - D||²
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final, cast

import numpy as np
import onnx

from qdqtool import runtime
from qdqtool.graphs.graph import Array
from qdqtool.graphs.linear import LinearLayer
from qdqtool.spec import FloatArray

_OPSET: Final = 13


def obstacle(layer: LinearLayer) -> str | None:
    """Why the columns of a layer's input are not known here; None where they are."""
    node = layer.node
    if node.op == "ConvTranspose":
        return "a ConvTranspose scatters its input, which has no columns to take moments of"
    if node.op != "Conv":
        return None if len(layer.weight.shape) == 2 else "its weight is not of rank 2"
    return None


def columns(layer: LinearLayer, values: Array) -> Array:
    """What the rows of the layer's weight are multiplied with: (groups, inputs of a group, positions).

    Args:
        layer: a Conv, Gemm or MatMul without :func:`obstacle`.
        values: its input, as the model computes it.
    """
    node = layer.node
    if node.op != "Conv":
        rows = values.T if node.attrs.get("transA", 0) and node.op == "Gemm" else values
        return rows.reshape(1, -1, rows.shape[-1]).swapaxes(1, 2)
    kernel = tuple(layer.weight.shape[2:])
    strides, dilations = (node.attrs.get(name, [1] * len(kernel)) for name in ("strides", "dilations"))
    pads = _pads(layer, values.shape[2:], kernel, strides, dilations)
    padded = np.pad(values, [(0, 0), (0, 0), *pads])
    spans = tuple((k - 1) * d + 1 for k, d in zip(kernel, dilations, strict=True))
    axes = tuple(range(2, 2 + len(kernel)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axes)
    steps = (*(slice(None, None, s) for s in strides), *(slice(None, None, d) for d in dilations))
    windows = windows[:, :, *steps]  # (N, C, positions..., kernel...)
    count, channels = values.shape[:2]
    split = windows.reshape(count, layer.groups, channels // layer.groups, *windows.shape[2:])
    places = tuple(range(3, 3 + len(kernel)))
    order = (1, 2, *(p + len(kernel) for p in places), 0, *places)  # neighbours in memory stay neighbours
    return split.transpose(order).reshape(layer.groups, channels // layer.groups * math.prod(kernel), -1)


def _pads(
    layer: LinearLayer, sizes: tuple[int, ...], kernel: tuple[int, ...], strides: list[int], dilations: list[int]
) -> list[tuple[int, int]]:
    """Zeros before and behind every spatial axis, ``auto_pad`` worked out."""
    attrs, rank = layer.node.attrs, len(kernel)
    mode = attrs.get("auto_pad", "NOTSET")
    if mode == "VALID":
        return [(0, 0)] * rank
    if mode in ("SAME_UPPER", "SAME_LOWER"):
        found = []
        for size, k, s, d in zip(sizes, kernel, strides, dilations, strict=True):
            total = max((-(-size // s) - 1) * s + (k - 1) * d + 1 - size, 0)
            small, large = total // 2, total - total // 2
            found.append((small, large) if mode == "SAME_UPPER" else (large, small))
        return found
    pads = attrs.get("pads", [0] * 2 * rank)
    return list(zip(pads[:rank], pads[rank:], strict=True))


def gram() -> Callable[[Array], Array]:
    """C -> C Cᵀ for float32 arrays (groups, inputs, positions), on one thread of the runtime.

    numpy's threads wait for each other so busily that beside other work such small products take fifty times as long.
    """
    head = f'<ir_version: 8, opset_import: ["": {_OPSET}]> g (float[g, k, p] c) => (float[g, k, k] y)'
    proto = onnx.parser.parse_model(f"{head} {{ t = Transpose <perm = [0, 2, 1]> (c) y = MatMul(c, t) }}")
    session = runtime.session(proto, threads=1)
    return lambda columns: runtime.run(session, None, {"c": np.ascontiguousarray(columns)})[0]


@dataclass
class SecondMoments:
    """Sums over samples, from which H and its uncertainty follow; ``gram`` as :func:`gram` gives it."""

    gram: Callable[[Array], Array]
    total: FloatArray | None = None
    squares: FloatArray = field(default_factory=lambda: np.zeros(()))
    samples: int = 0

    def add(self, columns: Array) -> None:
        """Count one sample's columns (groups, inputs, positions); one with NaN or infinite values is left out."""
        positions = columns.shape[2]
        if positions == 0 or not np.isfinite(columns).all():
            return
        own = self.gram(columns)
        own /= positions
        if self.total is None:
            self.total = np.zeros(own.shape)
        self.total += own
        self.squares = self.squares + np.einsum("gij,gij->g", own, own)
        self.samples += 1

    def shrunk(self) -> FloatArray:
        """H shrunk towards its diagonal, float64 (groups, inputs, inputs); at least one sample must have been added."""
        mean = cast(FloatArray, self.total) / self.samples
        inputs = np.arange(mean.shape[1])
        diagonal = np.zeros_like(mean)
        diagonal[:, inputs, inputs] = mean[:, inputs, inputs]
        if self.samples == 1:
            return diagonal
        spread = self.squares - self.samples * (mean**2).sum(axis=(1, 2))
        noise = np.maximum(spread, 0) / (self.samples * (self.samples - 1))
        signal = ((mean - diagonal) ** 2).sum(axis=(1, 2))
        share = np.clip(np.divide(noise, signal, out=np.ones_like(noise), where=signal > 0), 0, 1)[:, None, None]
        found: FloatArray = (1 - share) * mean + share * diagonal
        return found

"""Second moments of what a linear layer multiplies its weight with, in the float and in the quantized model.

For Conv, x holds the inputs that one output position sees (im2col), for each group on its own; for Gemm and MatMul it
is a row of the input. With y what the same layer reads in the quantized model, and d = x - y, the squared error of an
output channel is a quadratic form of the error of its weights, e = w - v, and a constant:

    E[(w x - v y)²] = e H eᵀ + 2 e Dᵀ wᵀ + const,    H = E[y yᵀ],  D = E[d yᵀ]

Where a bias makes up for the mean of the error, all moments are those about the mean.

From few samples H is uncertain, and so are above all its small eigenvalues. It is shrunk towards its diagonal, and D
towards 0, by what the spread between samples says about H (Ledoit and Wolf, A well-conditioned estimator for
large-dimensional covariance matrices, 2004; the diagonal as target: Schäfer and Strimmer, 2005), samples counted and
not positions, as positions of one sample are alike:

    (1 - a) H + a diag H,    a = Σ_s ||H_s - H||² / (S (S - 1)) / ||H - diag H||²
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


def size(layer: LinearLayer) -> int:
    """Bytes of one matrix of second moments of all groups."""
    outputs, *others = layer.weight.shape if _outputs_first(layer) else layer.weight.shape[::-1]
    return 8 * layer.groups * math.prod(others) ** 2 if outputs else 0


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


def rows(layer: LinearLayer, values: Array) -> FloatArray:
    """A weight as float64 (groups, outputs of a group, inputs of a group), inputs as in :func:`columns`."""
    matrix = values.reshape(values.shape[0], -1) if _outputs_first(layer) else values.T
    found: FloatArray = matrix.reshape(layer.groups, -1, matrix.shape[1]).astype(np.float64)
    return found


def from_rows(layer: LinearLayer, matrix: Array, shape: tuple[int, ...]) -> Array:
    """What :func:`rows` made of a weight, in the weight's shape again."""
    flat = matrix.reshape(-1, matrix.shape[2])
    return np.ascontiguousarray(flat if _outputs_first(layer) else flat.T).reshape(shape)


def _outputs_first(layer: LinearLayer) -> bool:
    return layer.node.op == "Conv" or bool(layer.node.op == "Gemm" and layer.node.attrs.get("transB", 0))


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


Product = Callable[[Array, Array], Array]


def product() -> Product:
    """A, B -> A Bᵀ for float32 arrays (groups, inputs, positions), on one thread of the runtime.

    numpy's threads wait for each other so busily that beside other work such small products take fifty times as long.
    """
    head = f'<ir_version: 8, opset_import: ["": {_OPSET}]> g (float[g, k, p] a, float[g, k, p] b) => (float[g, k, k] y)'
    proto = onnx.parser.parse_model(f"{head} {{ t = Transpose <perm = [0, 2, 1]> (b) y = MatMul(a, t) }}")
    session = runtime.session(proto, threads=1)
    return lambda a, b: runtime.run(session, None, {"a": np.ascontiguousarray(a), "b": np.ascontiguousarray(b)})[0]


@dataclass(frozen=True)
class Moments:
    """What is known of a layer's inputs, float64; ``h``, ``drift`` and ``exact`` are (groups, inputs, inputs).

    Attributes:
        h: H of the inputs in the quantized model.
        drift: D, how they depart from those of the float model.
        exact: second moments of the float model's inputs; None: not counted.
    """

    h: FloatArray
    drift: FloatArray
    exact: FloatArray | None

    def error(self, weights: FloatArray, values: FloatArray) -> float:
        """Squared error of all outputs in the quantized model, but for a constant that is the same for all values.

        Args:
            weights: the float weight, float64 (groups, outputs of a group, inputs of a group).
            values: what it becomes, alike.
        """
        e = weights - values
        return float((e * (e @ self.h + 2 * weights @ self.drift)).sum())

    def exact_error(self, weights: FloatArray, values: FloatArray) -> float:
        """Squared error of all outputs where the inputs are those of the float model."""
        e = weights - values
        return float((e * (e @ cast(FloatArray, self.exact))).sum())


@dataclass
class SecondMoments:
    """Sums over samples, from which moments and their uncertainty follow.

    Attributes:
        product: as :func:`product` gives it.
        count_exact: the float model's moments are wanted too.
        h, drift, exact: float64 (groups, inputs, inputs), summed.
        means: of the inputs in the quantized and in the float model, float64 (2, groups, inputs), summed.
        squares: of all elements of each sample's H, summed, float64 (groups,).
        samples: their number.
    """

    product: Product
    count_exact: bool = False
    h: FloatArray = field(default_factory=lambda: np.zeros(()))
    drift: FloatArray = field(default_factory=lambda: np.zeros(()))
    exact: FloatArray = field(default_factory=lambda: np.zeros(()))
    means: FloatArray = field(default_factory=lambda: np.zeros(()))
    squares: FloatArray = field(default_factory=lambda: np.zeros(()))
    samples: int = 0

    def add(self, exact: Array, seen: Array) -> None:
        """Count one sample's columns (groups, inputs, positions), of the float and of the quantized model.

        One with NaN or infinite values is left out.
        """
        positions = seen.shape[2]
        means = np.stack([part.mean(axis=2, dtype=np.float64) for part in (seen, exact)]) if positions else None
        if means is None or not np.isfinite(means).all():
            return
        own = self.product(seen, seen) / np.float32(positions)
        self.h = self.h + own
        self.drift = self.drift + self.product(exact - seen, seen) / np.float32(positions)
        if self.count_exact:
            self.exact = self.exact + self.product(exact, exact) / np.float32(positions)
        self.means = self.means + means
        self.squares = self.squares + np.einsum("gij,gij->g", own, own, dtype=np.float64)
        self.samples += 1

    def __or__(self, other: SecondMoments) -> SecondMoments:
        """The sums over the samples of both, without those of the float model."""
        sums = {
            name: getattr(self, name) + getattr(other, name) for name in ("h", "drift", "means", "squares", "samples")
        }
        return SecondMoments(self.product, **sums)

    @property
    def average(self) -> FloatArray:
        """Mean inputs of the quantized and of the float model, float64 (2, groups, inputs)."""
        found: FloatArray = self.means / self.samples
        return found

    def mean(self, *, centred: bool) -> Moments:
        """The moments as they were seen, about the mean or about 0; at least one sample must have been added."""
        h, drift = self.h / self.samples, self.drift / self.samples
        exact = self.exact / self.samples if self.count_exact else None
        if centred:
            seen, wanted = self.average
            h -= _outer(seen, seen)
            drift -= _outer(wanted - seen, seen)
            exact = None if exact is None else exact - _outer(wanted, wanted)
        return Moments(h, drift, exact)

    def shrunk(self, *, centred: bool) -> Moments:
        """The moments with H shrunk towards its diagonal and D towards 0, both by the same share."""
        found = self.mean(centred=centred)
        inputs = np.arange(found.h.shape[1])
        diagonal = np.zeros_like(found.h)
        diagonal[:, inputs, inputs] = found.h[:, inputs, inputs]
        if self.samples == 1:
            return Moments(diagonal, np.zeros_like(found.drift), found.exact)
        spread = self.squares - (self.h**2).sum(axis=(1, 2)) / self.samples
        noise = np.maximum(spread, 0) / (self.samples * (self.samples - 1))
        signal = ((found.h - diagonal) ** 2).sum(axis=(1, 2))
        share = np.clip(np.divide(noise, signal, out=np.ones_like(noise), where=signal > 0), 0, 1)[:, None, None]
        return Moments((1 - share) * found.h + share * diagonal, (1 - share) * found.drift, found.exact)


def _outer(one: FloatArray, other: FloatArray) -> FloatArray:
    found: FloatArray = one[:, :, None] * other[:, None, :]
    return found

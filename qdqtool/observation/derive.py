"""Statistics that follow from those of another tensor, so that no value is counted twice.

Some operators hand on every value as it is (Reshape, Transpose) or scaled by a constant of magnitude at most 1 for each
sign (LeakyRelu, Neg, Mul by a scalar). Extremes follow exactly, by the float32 operation that the runtime does. Where
the runtime fuses a LeakyRelu into the Conv before it, what it puts out is observed, so that the fusion is kept, and the
Conv's own output follows by the inverse, extremes to the last bit of the float32. A bin
of the source follows to the bin in which its edge next to 0 comes to lie: a scaled value is counted in its own bin or
the one before, 0.1 % off at most. Each bin follows by itself, so derived statistics merge as exactly as observed ones.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from qdqtool.graphs import model as models
from qdqtool.graphs.scopes import read_by
from qdqtool.statistics.channel_statistics import ChannelStatistics
from qdqtool.statistics.tensor import Statistics, TensorStatistics

Floats = npt.NDArray[np.float32]

_MOVES: Final = frozenset(
    {"DepthToSpace", "Flatten", "Identity", "Reshape", "SpaceToDepth", "Squeeze", "Transpose", "Unsqueeze"}
)


@dataclass(frozen=True)
class Derivation:
    """``tensor`` is ``source`` times a factor: one for negative values, one for the others.

    Attributes:
        tensor: name of the tensor that follows.
        source: name of the one it follows from.
        negative, positive: the factors, of one sign and magnitude at most 1.
        inverse: values are divided by the factors instead.
    """

    tensor: str
    source: str
    negative: float = 1.0
    positive: float = 1.0
    inverse: bool = False

    def __call__(self, values: Floats) -> Floats:
        """What becomes of values."""
        factors = np.array([self.positive, self.negative], np.float32)[(values < 0).astype(np.intp)]
        result: Floats = values / factors if self.inverse else values * factors
        return result

    def statistics(self, source: TensorStatistics, channels: ChannelStatistics | None = None) -> TensorStatistics:
        """Statistics of the tensor, given those of its source; those of its channels do not follow."""
        histogram, records = source.histogram, source.records
        if not self.negative == self.positive == 1:
            histogram, records = histogram.mapped(self), records.copy()
            ends = ("lo", "hi") if self.positive > 0 else ("hi", "lo")
            for name, end in zip(("lo", "hi"), ends, strict=True):
                records[name] = self(source.records[end]) + np.float32(0)  # -0.0 becomes 0.0
        return TensorStatistics.of(
            histogram,
            records,
            nan=source.nan,
            inf=source.inf,
            first_non_finite=source.first_non_finite,
            channels=channels,
        )


def derivations(proto: onnx.ModelProto, tensors: Sequence[str], apart: Container[str] = ()) -> dict[str, Derivation]:
    """Those of ``tensors`` that follow from another of them, by name, each behind the one it follows from.

    Args:
        proto: the model; only its top graph is looked at.
        tensors: names of float tensors whose statistics are wanted.
        apart: those that must be observed themselves.
    """
    constants = {t.name: t for t in proto.graph.initializer if int(np.prod(t.dims)) == 1}
    wanted = set(tensors)
    fused = _fused(proto)
    found: dict[str, Derivation] = {}
    for node in proto.graph.node:
        for step in _of(node, constants):
            if step.source in wanted and step.tensor in wanted:
                back = replace(step, tensor=step.source, source=step.tensor, inverse=True)
                turned = node.op_type == "LeakyRelu" and step.source in fused and step.source not in apart
                chosen = back if turned else step
                if chosen.tensor not in apart:
                    found[chosen.tensor] = chosen
    return found


def all_derivations(proto: onnx.ModelProto) -> dict[str, Derivation]:
    """Every tensor of the model that follows from another one; see :func:`derivations`."""
    computed = [name for node in proto.graph.node for name in node.output]
    return derivations(proto, [*(info.name for info in models.inputs(proto)), *computed])


def _fused(proto: onnx.ModelProto) -> set[str]:
    """Outputs of Convs that nothing but one node reads, so that the runtime can fuse an activation function."""
    readers = Counter(name for node in proto.graph.node for name in read_by(node))
    readers.update(output.name for output in proto.graph.output)
    return {node.output[0] for node in proto.graph.node if node.op_type == "Conv" and readers[node.output[0]] == 1}


def derived(known: Statistics, steps: Mapping[str, Derivation]) -> Statistics:
    """Statistics with those that follow from them; what was observed of a tensor's channels is kept."""
    tensors = dict(known.tensors)
    for name, step in steps.items():
        channels = tensors[name].channels if name in tensors else None
        tensors[name] = step.statistics(tensors[step.source], channels)
    return Statistics(tensors, known.samples)


def _of(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> list[Derivation]:
    """How a node's output follows from its input; [] where it does not."""
    make = _RULES.get(node.op_type) if node.domain in ("", "ai.onnx") else None
    if make is None or len(node.output) != 1:
        return []
    scalars = [_scalar(constants.get(name)) for name in node.input]
    return [
        step
        for step in make(node, scalars)
        if 0 < abs(step.negative) <= 1 and 0 < abs(step.positive) <= 1 and step.negative * step.positive > 0
    ]


def _scalar(tensor: onnx.TensorProto | None) -> float | None:
    if tensor is None or tensor.data_type != onnx.TensorProto.FLOAT:
        return None
    return float(numpy_helper.to_array(tensor).ravel()[0])


def _moved(node: onnx.NodeProto, _: Sequence[float | None]) -> list[Derivation]:
    return [Derivation(node.output[0], node.input[0])]


def _negated(node: onnx.NodeProto, _: Sequence[float | None]) -> list[Derivation]:
    return [Derivation(node.output[0], node.input[0], -1.0, -1.0)]


def _leaky(node: onnx.NodeProto, _: Sequence[float | None]) -> list[Derivation]:
    alpha = next((helper.get_attribute_value(a) for a in node.attribute if a.name == "alpha"), 0.01)
    return [Derivation(node.output[0], node.input[0], float(np.float32(alpha)))]


def _sloped(node: onnx.NodeProto, scalars: Sequence[float | None]) -> list[Derivation]:
    return [] if scalars[1] is None else [Derivation(node.output[0], node.input[0], scalars[1])]


def _multiplied(node: onnx.NodeProto, scalars: Sequence[float | None]) -> list[Derivation]:
    return [
        Derivation(node.output[0], node.input[1 - i], factor, factor)
        for i, factor in enumerate(scalars)
        if factor is not None
    ]


_RULES: Final[Mapping[str, Callable[[onnx.NodeProto, Sequence[float | None]], list[Derivation]]]] = {
    **dict.fromkeys(_MOVES, _moved),
    "LeakyRelu": _leaky,
    "Mul": _multiplied,
    "Neg": _negated,
    "PRelu": _sloped,
}

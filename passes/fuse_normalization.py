"""Puts layer and root-mean-square normalization together from their parts.

    LayerNormalization   y = (x - E x) / sqrt(E (x - E x)^2 + epsilon) gamma + beta
    RMSNormalization     y = x / sqrt(E x^2 + epsilon) gamma

with means over the last axes (Ba, Kiros and Hinton, "Layer Normalization", 2016; Zhang and Sennrich, "Root Mean Square
Layer Normalization", 2019). The match starts at the mean of squares and follows it: the root may be Sqrt or Pow, its
inverse a Div, a Reciprocal or part of Pow, and gamma may meet it before x does, as in y = x r + (beta - E x r), r the
inverse root times gamma.

From opset 17 (23 for RMS) on the parts become the operator. An older model keeps its opset: its parts are brought into
the order that the runtime fuses, with Pow and Div, gamma and beta, of 1 and 0 where there are none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.graph import Array
from qdqtool.graphs.pattern import Rewriter, affine, is_op, rank, read_outside, scalar
from qdqtool.passes_api import GRAPH_FACTS, Fact, State

_LAYER: Final = "LayerNormalization"
_ROOT_MEAN_SQUARE: Final = "RMSNormalization"
_OPSETS: Final = {_LAYER: 17, _ROOT_MEAN_SQUARE: 23}
_AXES_ARE_AN_INPUT: Final = 18
_FUSED_ORDER: Final = {
    _LAYER: ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"],
    _ROOT_MEAN_SQUARE: ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"],
}
_READERS: Final = 4  # looked at for the next node


@dataclass
class _Match:
    """Normalization of ``x`` over its last ``axes`` axes; the last of ``nodes`` puts it out."""

    x: gs.Tensor
    mean: gs.Node | None
    axes: int
    nodes: list[gs.Node]
    epsilon: float = 0.0
    gamma: gs.Constant | None = None
    beta: gs.Constant | None = None
    deviations: set[int] = field(default_factory=set)

    @property
    def op(self) -> str:
        return _ROOT_MEAN_SQUARE if self.mean is None else _LAYER

    @property
    def size(self) -> list[Any]:
        return list(self.x.shape[-self.axes :])

    def parameter(self, tensor: gs.Constant | None, default: float) -> Array:
        """Values of gamma or beta in the shape of the normalized axes."""
        if tensor is None:
            return np.full(self.size, default)
        values: Array = tensor.values
        return np.array(np.broadcast_to(values.reshape(values.shape[-self.axes :]), self.size))


@dataclass(frozen=True)
class FuseNormalization:
    """Make one LayerNormalization or RMSNormalization of its parts, or bring them into the order the runtime fuses."""

    name: ClassVar[str] = "fuse-normalization"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES}

    def run(self, state: State) -> int:
        """Rewrite every normalization; returns how many."""
        outputs, rewriter, opset = graphs.output_ids(state.graph), Rewriter(state), state.graph.opset

        def rewrite(node: gs.Node, graph: gs.Graph) -> str | bool:
            found = _match(node, outputs) if is_op(node, "ReduceMean") else None
            if not isinstance(found, _Match):
                return found or False
            reason = _obstacle(found, opset, outputs)
            if reason is None:
                _rewrite(found, opset, rewriter)
            return reason or True

        return rewriter.each(self.name, rewrite)


def _match(mean: gs.Node, outputs: set[int]) -> _Match | str | None:
    """The normalization that a mean of squares belongs to; a reason, or None where it is no candidate."""
    deviation = _squared(graphs.producer(mean.inputs[0]))
    if deviation is None:
        return None
    variance = mean.outputs[0]
    shift = _reader(variance, lambda node: is_op(node, "Add") and (affine(node, variance) or (0, 0))[1] > 0)
    root = None if shift is None else _reader(shift.outputs[0], lambda node: _exponent(node) is not None)
    if shift is None or root is None:
        return None
    axes = _last_axes(mean, deviation)
    if axes is None:
        return "its mean is not known to be over the last axes"
    centre = _centre(deviation, axes)
    x = deviation if centre is None else centre[0]
    before = [] if centre is None else [*centre[1]]
    found = _Match(
        x, before[0] if before else None, axes, [*before, graphs.producer(mean.inputs[0]), mean, shift, root]
    )
    found.epsilon = (affine(shift, variance) or (0.0, 0.0))[1]
    found.deviations.add(id(deviation))
    return found if _divide(found, root, outputs) else "its root does not divide what was squared"


def _squared(node: gs.Node | None) -> gs.Tensor | None:
    """What a node squares; None where it does not."""
    if node is None:
        return None
    square = is_op(node, "Pow") and scalar(node.inputs[1], node.inputs[0]) == 2
    return node.inputs[0] if square or (is_op(node, "Mul") and node.inputs[0] is node.inputs[1]) else None


def _exponent(node: gs.Node) -> float | None:
    """1/2 or -1/2 where the node takes that power of its input; None for any other node."""
    if is_op(node, "Sqrt"):
        return 0.5
    value = scalar(node.inputs[1], node.inputs[0]) if is_op(node, "Pow") else None
    return value if value in (0.5, -0.5) else None


def _reader(tensor: gs.Tensor, wanted: Callable[[gs.Node], bool]) -> gs.Node | None:
    return next((node for node in islice(tensor.outputs, _READERS) if wanted(node)), None)


def _last_axes(mean: gs.Node, source: gs.Tensor) -> int | None:
    """Over how many axes, the last ones, a ReduceMean goes; None where it is others, or not known."""
    axes = mean.attrs.get("axes")
    given = graphs.input_at(mean, 1)
    if given is not None:
        values = graphs.constant(given)
        axes = None if values is None else values.tolist()
    dims = rank(source)
    if not axes or mean.attrs.get("keepdims", 1) != 1 or (dims is None and min(axes) >= 0):
        return None
    behind = sorted(axis - (dims or 0) if axis >= 0 else axis for axis in axes)
    return len(axes) if behind == list(range(-len(axes), 0)) else None


def _centre(tensor: gs.Tensor, axes: int) -> tuple[gs.Tensor, list[gs.Node]] | None:
    """(x, nodes) where the tensor is x - E x; None where it is not."""
    subtract = graphs.producer(tensor)
    if subtract is None or not is_op(subtract, "Sub"):
        return None
    x, subtrahend = subtract.inputs
    mean = graphs.producer(subtrahend)
    if mean is None or not is_op(mean, "ReduceMean") or mean.inputs[0] is not x:
        return None
    return (x, [mean, subtract]) if _last_axes(mean, x) == axes else None


def _divide(found: _Match, root: gs.Node, outputs: set[int]) -> bool:
    """Follow the root until it has divided the deviation, and what comes behind; whether that is so."""
    tensor, inverse = root.outputs[0], _exponent(root) == -0.5
    if not inverse:
        node = _reader(
            tensor, lambda node: is_op(node, "Reciprocal") or (is_op(node, "Div") and node.inputs[1] is tensor)
        )
        if node is None:
            return False
        found.nodes.append(node)
        if node.op == "Div" and scalar(node.inputs[0], tensor) != 1:
            return _is_deviation(found, node.inputs[0]) and _behind(found, node.outputs[0], outputs)
        tensor = node.outputs[0]
    node = _reader(tensor, lambda node: is_op(node, "Mul"))
    if node is None:
        return False
    found.nodes.append(node)
    other = node.inputs[1] if node.inputs[0] is tensor else node.inputs[0]
    if isinstance(other, gs.Constant) and _fits(found, other):
        found.gamma = other
        return _scaled(found, node.outputs[0], outputs)
    return _is_deviation(found, other) and _behind(found, node.outputs[0], outputs)


def _is_deviation(found: _Match, tensor: gs.Tensor) -> bool:
    """Whether the tensor is what was squared, or the same computed a second time."""
    if id(tensor) in found.deviations:
        return True
    again = None if found.mean is None else _centre(tensor, found.axes)
    if again is None or again[0] is not found.x:
        return False
    found.nodes[:0] = [node for node in again[1] if all(node is not known for known in found.nodes)]
    return True


def _fits(found: _Match, tensor: gs.Tensor) -> bool:
    """Whether a constant is gamma or beta: it varies along the normalized axes alone, whose sizes are known."""
    dims, shape = rank(found.x), tuple(tensor.shape) if graphs.is_constant(tensor) else None
    if shape is None or dims is None or len(shape) > dims or not all(isinstance(size, int) for size in found.size):
        return False
    pairs = zip(shape[::-1], found.x.shape[::-1], strict=False)
    return all(extent == 1 or (i < found.axes and extent == size) for i, (extent, size) in enumerate(pairs))


def _behind(found: _Match, tensor: gs.Tensor, outputs: set[int]) -> bool:
    """Take in gamma and beta that follow; always possible."""
    for op in ("Mul", "Add"):
        node = graphs.single_use(tensor, outputs)
        other = next((t for t in node.inputs if t is not tensor), None) if is_op(node, op) and node else None
        if node is None or other is None or not _fits(found, other):
            continue
        if op == "Mul":
            found.gamma = other
        elif found.mean is not None:
            found.beta = other
        else:
            continue
        found.nodes.append(node)
        tensor = node.outputs[0]
    return True


def _scaled(found: _Match, factor: gs.Tensor, outputs: set[int]) -> bool:
    """Follow x r, and with a mean x r + (beta - E x r), for ``factor`` r; whether it is that."""
    x = found.x
    product = _reader(factor, lambda node: is_op(node, "Mul") and any(read is x for read in node.inputs))
    if product is None:
        return False
    found.nodes.append(product)
    if found.mean is None:
        return True
    mean = found.mean.outputs[0]
    shift = _reader(factor, lambda node: is_op(node, "Mul") and any(read is mean for read in node.inputs))
    rest = None if shift is None else graphs.single_use(shift.outputs[0], outputs)
    total = graphs.single_use(product.outputs[0], outputs)
    if not (is_op(rest, "Sub") and is_op(total, "Add")) or rest is None or total is None or shift is None:
        return False
    if rest.inputs[1] is not shift.outputs[0] or not _fits(found, rest.inputs[0]):
        return False
    if all(read is not rest.outputs[0] for read in total.inputs):
        return False
    found.beta = rest.inputs[0]
    found.nodes += [shift, rest, total]
    return True


def _obstacle(found: _Match, opset: int, outputs: set[int]) -> str | None:
    if found.x.dtype not in (np.float32, np.float16):
        kind = "of unknown type" if found.x.dtype is None else np.dtype(found.x.dtype).name
        return f"{found.x.name!r} is {kind}; {found.op} computes in float32"
    if rank(found.x) is None or not all(isinstance(size, int) and size > 0 for size in found.size):
        return f"the sizes of the normalized axes of {found.x.name!r} are not known"
    if found.axes > 1 and found.gamma is None:
        return f"without gamma it would need a constant as large as its last {found.axes} axes"
    outside = read_outside(found.nodes, outputs)
    if outside is not None:
        return f"{outside!r} inside it is read elsewhere too, or is a graph output"
    if opset >= _OPSETS[found.op]:
        return None
    if [node.op for node in found.nodes] == _FUSED_ORDER[found.op]:
        return f"opset {opset} has no {found.op}, and the runtime fuses these parts itself"
    return None if found.axes == 1 else f"opset {opset} has no {found.op}, and the runtime fuses one axis alone"


def _rewrite(found: _Match, opset: int, rewriter: Rewriter) -> None:
    last, x = found.nodes[-1], found.x
    scale = rewriter.constant(f"{last.name}.gamma", found.parameter(found.gamma, 1.0), x)
    shift = rewriter.constant(f"{last.name}.beta", found.parameter(found.beta, 0.0), x)
    if opset >= _OPSETS[found.op]:
        inputs = [x, scale] if found.beta is None else [x, scale, shift]
        rewriter.replace(last, found.op, inputs, found.nodes, axis=-found.axes, epsilon=found.epsilon)
        return

    def part(op: str, *inputs: gs.Tensor, like: gs.Tensor = x, **attrs: Any) -> gs.Tensor:
        return rewriter.node(op, f"{last.name}.{op.lower()}", inputs, like, **attrs)

    def mean(tensor: gs.Tensor) -> gs.Tensor:
        one = gs.Variable("", x.dtype, [*x.shape[:-1], 1])
        if opset < _AXES_ARE_AN_INPUT:
            return part("ReduceMean", tensor, like=one, axes=[-1], keepdims=1)
        axes = rewriter.constant(f"{last.name}.axes", np.array([-1], np.int64))
        return part("ReduceMean", tensor, axes, like=one, keepdims=1)

    deviation = x if found.mean is None else part("Sub", x, mean(x))
    variance = mean(part("Pow", deviation, rewriter.constant(f"{last.name}.two", 2.0, x)))
    shifted = part("Add", variance, rewriter.constant(f"{last.name}.epsilon", found.epsilon, x), like=variance)
    normal = part("Div", deviation, part("Sqrt", shifted, like=variance))
    if found.mean is None:
        rewriter.replace(last, "Mul", [normal, scale], found.nodes)
    else:
        rewriter.replace(last, "Add", [part("Mul", normal, scale), shift], found.nodes)

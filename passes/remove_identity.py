"""Takes out nodes that hand their input on unchanged.

Identity, Dropout at inference, Cast to the same type, Cast there and back without loss; Reshape, Flatten, Transpose,
Expand, Tile, Slice and Pad that leave everything in place; Concat, Sum, Max, Min and Mean of one tensor; x * 1, x / 1,
x + 0, x - 0 and x^1.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.pattern import is_op
from qdqtool.passes_api import GRAPH_FACTS, Fact, State

_MANTISSA: Final = {2: 11, 4: 24, 8: 53}
"""Bits of a float's mantissa, by its size in bytes."""
_ENDLESS: Final = 2**31 - 1
"""From here on a Slice's end means the end of the axis: exporters write INT_MAX of 32 or 64 bits."""
_NEUTRAL: Final = {"Add": 0, "Sub": 0, "Mul": 1, "Div": 1, "Pow": 1}


@dataclass(frozen=True)
class RemoveIdentity:
    """Take out Identity, Dropout, Cast, Reshape, Slice, Mul and others where they change nothing."""

    name: ClassVar[str] = "remove-identity"
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES}

    def run(self, state: State) -> int:
        """Bypass every node that changes nothing; returns how many."""
        outputs = graphs.output_ids(state.graph)
        changes = 0
        for _, graph in graphs.all_graphs(state.graph):
            for node in graph.nodes:
                if node.op not in _WORKS or not is_op(node, node.op) or not node.inputs:
                    continue
                reason = _WORKS[node.op](node, outputs)
                if reason is None:
                    if _take_out(node, graph, outputs):
                        changes += 1
                        continue
                    reason = "it gives a graph output its name, and its input is known under another name outside"
                if reason:
                    state.skip(self.name, node.name, reason)
        graphs.sweep(state.graph)
        return changes


def _take_out(node: gs.Node, graph: gs.Graph, outputs: set[int]) -> bool:
    if node.op == "Cast" and not _same_type(node):  # back to what the Cast before it read
        graphs.set_input(node, 0, node.inputs[0].inputs[0].inputs[0])
    if node.op in ("Add", "Mul") and graphs.is_constant(node.inputs[0]):
        first, second = node.inputs
        list.__setitem__(node.inputs, slice(None), [second, first])
    source, result = node.inputs[0], node.outputs[0]
    for known, other in ((source, result), (result, source)):
        if isinstance(other, gs.Variable):
            other.dtype = other.dtype if other.dtype is not None else known.dtype
            other.shape = other.shape if other.shape is not None else known.shape
    return graphs.bypass(node, graph, outputs)


# Each of these says why the node is needed; None where it is not, "" where it was never a candidate.


def _dropout(node: gs.Node, outputs: set[int]) -> str | None:
    mask = node.outputs[1] if len(node.outputs) > 1 else None
    if mask is not None and (mask.outputs or id(mask) in outputs):
        return "its mask is read"
    training = graphs.input_at(node, 2)
    if training is None:
        return None
    values = graphs.constant(training)
    if values is None:
        return "whether it is in training mode is decided at run time"
    return "it is in training mode" if values.any() else None


def _cast(node: gs.Node, _: set[int]) -> str | None:
    before = graphs.producer(node.inputs[0])
    if _same_type(node):
        return None
    if before is None or not is_op(before, "Cast") or _code(before.inputs[0]) != node.attrs["to"]:
        return ""
    wide, narrow = (tensor.dtype for tensor in (before.inputs[0], node.inputs[0]))
    return None if _lossless(wide, narrow) else "the type in between is narrower" if _alike(wide, narrow) else ""


def _code(tensor: gs.Tensor) -> int | None:
    """ONNX's number of the tensor's type."""
    source = tensor.dtype
    if source is None:
        return None
    return source if isinstance(source, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(source)))


def _same_type(node: gs.Node) -> bool:
    return _code(node.inputs[0]) == int(node.attrs["to"])


def _alike(one: Any, other: Any) -> bool:
    """Whether both are floats, or both integers, so that a Cast does not mean to round."""
    return all(kind is not None and not isinstance(kind, int) for kind in (one, other)) and (
        np.dtype(one).kind == np.dtype(other).kind
    )


def _lossless(narrow: Any, wide: Any) -> bool:
    """Whether every value of one type has its like in the other."""
    if narrow is None or wide is None or isinstance(narrow, int) or isinstance(wide, int):
        return False
    one, other = np.dtype(narrow), np.dtype(wide)
    if one.kind == "b":
        return other.kind in "iuf"
    if one.kind in "iu" and other.kind == "f":
        return bool(one.itemsize * 8 <= _MANTISSA[other.itemsize])
    return one.kind in "iuf" and other.kind in "iuf" and np.can_cast(one, other, "safe")


def _reshape(node: gs.Node, _: set[int]) -> str | None:
    target, shape = _values(node, 1), node.inputs[0].shape
    if target is None or shape is None or len(target) != len(shape):
        return ""
    copies = not node.attrs.get("allowzero", 0)
    moved = [size for size, old in zip(target, shape, strict=True) if size != old and not (size == 0 and copies)]
    # One axis may be what remains: that is all of it where the others keep theirs.
    return None if moved in ([], [-1]) else ""


def _transpose(node: gs.Node, _: set[int]) -> str | None:
    perm = node.attrs.get("perm")
    return None if perm is not None and list(perm) == list(range(len(perm))) else ""


def _flatten(node: gs.Node, _: set[int]) -> str | None:
    shape = node.inputs[0].shape
    return None if shape is not None and len(shape) == 2 and node.attrs.get("axis", 1) in (1, -1) else ""


def _expand(node: gs.Node, _: set[int]) -> str | None:
    target = _values(node, 1)
    return None if target is not None and _fits(target, node.inputs[0]) else ""


def _tile(node: gs.Node, _: set[int]) -> str | None:
    repeats = _values(node, 1)
    return None if repeats is not None and all(count == 1 for count in repeats) else ""


def _pad(node: gs.Node, _: set[int]) -> str | None:
    pads = node.attrs.get("pads", _values(node, 1))
    return None if pads is not None and not any(pads) else ""


def _slice(node: gs.Node, _: set[int]) -> str | None:
    given = [node.attrs.get(name, _values(node, i)) for i, name in enumerate(("starts", "ends", "axes", "steps"), 1)]
    starts, ends, axes, steps = given
    if (
        starts is None
        or ends is None
        or any(graphs.input_at(node, i) is not None and given[i - 1] is None for i in (3, 4))
    ):
        return ""
    shape = node.inputs[0].shape
    for index, (start, end) in enumerate(zip(starts, ends, strict=True)):
        axis = index if axes is None else axes[index]
        size = shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None
        whole = end >= _ENDLESS or (isinstance(size, int) and end >= size)
        if start != 0 or not whole or (steps is not None and steps[index] != 1):
            return ""
    return None


def _variadic(node: gs.Node, _: set[int]) -> str | None:
    return None if len(node.inputs) == 1 else ""


def _arithmetic(node: gs.Node, _: set[int]) -> str | None:
    # x + 0 is exact: -0.0 alone turns into 0.0, its equal.
    for index in (1, 0) if node.op in ("Add", "Mul") else (1,):
        operand, other = node.inputs[index], node.inputs[1 - index]
        if not graphs.is_constant(operand) or graphs.is_constant(other) or isinstance(operand.dtype, int):
            continue  # a type without values in numpy has a number
        if _fits(list(operand.shape), other):
            return None if (operand.values == _NEUTRAL[node.op]).all() else ""
    return ""


def _values(node: gs.Node, index: int) -> list[int] | None:
    """A constant vector of integers at an input; None where there is none."""
    values = graphs.constant(graphs.input_at(node, index))
    return None if values is None else [int(value) for value in values.reshape(-1)]


def _fits(sizes: list[int], tensor: gs.Tensor) -> bool:
    """Whether what has these sizes broadcasts against the tensor and leaves its shape."""
    if not sizes:
        return True
    shape = tensor.shape
    if shape is None or len(sizes) > len(shape):
        return False
    return all(size in (1, old) for size, old in zip(sizes[::-1], shape[::-1], strict=False))


_WORKS: Final[dict[str, Callable[[gs.Node, set[int]], str | None]]] = {
    "Identity": lambda *_: None,
    "Dropout": _dropout,
    "Cast": _cast,
    "Reshape": _reshape,
    "Transpose": _transpose,
    "Flatten": _flatten,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "Slice": _slice,
    **dict.fromkeys(("Concat", "Sum", "Max", "Min", "Mean"), _variadic),
    **dict.fromkeys(_NEUTRAL, _arithmetic),
}

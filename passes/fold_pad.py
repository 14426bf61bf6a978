"""Folds Pad into the convolution or pooling that reads it.

A convolution and an average that counts padding (count_include_pad) both pad with 0, so that

    Conv(Pad(x, p, 0), pads = q) = Conv(x, pads = p + q)
    AveragePool(Pad(x, p, 0), pads = q) = AveragePool(x, pads = p + q, count_include_pad = 1)

the latter where q is 0 or was counted. A MaxPool ignores its padding, as if it held -inf. So a Pad in front of it folds
where it pads with -inf, or with a value that no element of x is below, as 0 behind a Relu: every window holds an
element of x, because no pad is as wide as the kernel.

Between Q and DQ a Pad is a float operator of its own. (ONNX Runtime folds a Pad of 0 into every MaxPool of a float
graph, also where x has negative values and the result is wrong.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.pattern import is_op, rank, scalar
from qdqtool.passes_api import GRAPH_FACTS, Fact, State

_READERS: Final = ("Conv", "AveragePool", "MaxPool")
_PATH: Final = 8  # nodes looked at for the least value of a tensor
_LEAST: Final = {
    **dict.fromkeys(("Relu", "Abs", "Sigmoid", "HardSigmoid", "Softmax", "Sqrt", "Exp", "Softplus"), 0.0),
    "Tanh": -1.0,
}
_SELECT: Final = frozenset(
    {"AveragePool", "DepthToSpace", "Dropout", "Flatten", "Gather", "GlobalAveragePool", "GlobalMaxPool", "Identity",
     "MaxPool", "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)  # fmt: skip
"""Operators whose results are no less than the least element of their first input."""


@dataclass(frozen=True)
class FoldPad:
    """Fold Pad into the Conv, AveragePool or MaxPool behind it."""

    name: ClassVar[str] = "fold-pad"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES}

    def run(self, state: State) -> int:
        """Fold every Pad that all its readers can take; returns how many."""
        outputs = graphs.output_ids(state.graph)
        changes = 0
        for _, graph in graphs.all_graphs(state.graph):
            for node in reversed(graph.nodes):  # of two in a row the one next to its reader comes first
                readers = [reader for reader, _ in graphs.uses(node.outputs[0])] if is_op(node, "Pad") else []
                if not any(is_op(reader, *_READERS) for reader in readers):
                    continue
                pads = _spatial_pads(node)
                reason = pads if isinstance(pads, str) else _obstacle(node, readers, pads, outputs)
                if isinstance(pads, str) or reason is not None:
                    state.skip(self.name, node.name, reason or "")
                else:
                    _fold(node, readers, pads, state)
                    changes += 1
        graphs.sweep(state.graph)
        return changes


def _spatial_pads(pad: gs.Node) -> list[int] | str:
    """Pads before and after every spatial axis, as convolutions write them, or why there are none."""
    mode = pad.attrs.get("mode", "constant")
    if mode != "constant":
        return f"it pads in mode {mode!r}"
    given: Any = pad.attrs.get("pads")
    if given is None:
        values = graphs.constant(graphs.input_at(pad, 1))
        given = None if values is None else values.reshape(-1).tolist()
    if given is None:
        return "its pads are computed at run time"
    axes_input = graphs.input_at(pad, 3)
    axes = None if axes_input is None else graphs.constant(axes_input)
    dims = rank(pad.inputs[0]) if axes_input is not None else len(given) // 2
    if dims is None or (axes_input is not None and axes is None):
        return "its axes are computed at run time, or the rank of its input is not known"
    pads = np.zeros((2, dims), np.int64)
    pads[:, list(range(dims)) if axes is None else axes.reshape(-1).tolist()] = np.reshape(given, (2, -1))
    if (pads < 0).any():
        return "it crops: a pad is negative"
    return "it pads other axes than the spatial ones" if pads[:, :2].any() else [int(p) for p in pads[:, 2:].ravel()]


def _value(pad: gs.Node) -> float | None:
    """What it pads with; None where that is computed at run time."""
    given = graphs.input_at(pad, 2)
    if given is None:
        return float(pad.attrs.get("value", 0.0))
    values = graphs.constant(given)
    return None if values is None else float(values.reshape(-1)[0])


def _obstacle(pad: gs.Node, readers: list[gs.Node], pads: list[int], outputs: set[int]) -> str | None:
    value = _value(pad)
    if value is None:
        return "what it pads with is computed at run time"
    if id(pad.outputs[0]) in outputs:
        return "its result is a graph output"
    for reader in readers:
        if not is_op(reader, *_READERS) or sum(read is pad.outputs[0] for read in reader.inputs) != 1:
            return f"{reader.op} {reader.name!r} reads it too"
        if reader.inputs[0] is not pad.outputs[0]:
            return f"{reader.name!r} reads it as its weight"
        if reader.attrs.get("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
            return f"{reader.name!r} pads by its output's size (auto_pad)"
        reason = None if reader.op == "Conv" else _pool_obstacle(reader, pads)
        if reason is None:
            reason = _value_obstacle(reader, value, pad.inputs[0])
        if reason is not None:
            return reason
    return None


def _pool_obstacle(pool: gs.Node, pads: list[int]) -> str | None:
    """Why a pooling cannot pad by so much itself."""
    if pool.attrs.get("ceil_mode", 0):
        return f"{pool.name!r} rounds its output size up, and its last window may leave the padded input"
    if len(pool.outputs) > 1 and not pool.outputs[1].is_empty():
        return f"{pool.name!r} puts out indices, which count the padding"
    if any(extent != 1 for extent in pool.attrs.get("dilations", ())):
        return f"{pool.name!r} is dilated, and a window may see nothing but padding"
    kernel = list(pool.attrs["kernel_shape"])
    own = list(pool.attrs.get("pads", ())) or [0] * len(pads)
    if any(total >= extent for total, extent in zip(np.add(pads, own), kernel * 2, strict=True)):
        return f"it pads as much as the kernel of {pool.name!r} covers"
    if pool.op == "AveragePool":
        if any(own) and not pool.attrs.get("count_include_pad", 0):
            return f"{pool.name!r} does not count the padding of its own"
        if pads[: len(kernel)] != pads[len(kernel) :]:
            return "averages over asymmetric pads are wrong in older versions of the runtime, on CPU and CUDA"
    return None


def _value_obstacle(reader: gs.Node, value: float, source: gs.Tensor) -> str | None:
    """Why a reader's own padding is not the same as padding with ``value``."""
    if reader.op != "MaxPool":
        return None if value == 0 else f"it pads with {value:g}, {reader.name!r} with 0"
    if source.dtype is not None and graphs.is_float(source) and value <= np.finfo(source.dtype).min:
        return None
    if value <= _least(source):
        return None
    return f"it pads with {value:g}, and {source.name!r} may be less, which {reader.name!r} would then put out"


def _least(tensor: gs.Tensor) -> float:
    """A value that no element is below; -inf where none is known."""
    for _ in range(_PATH):
        node = graphs.producer(tensor)
        if is_op(node, *_LEAST):
            assert node is not None
            return _LEAST[node.op]
        if node is not None and is_op(node, "Clip"):
            given = graphs.input_at(node, 1)
            lower = node.attrs.get("min") if given is None else scalar(given, tensor)
            return -math.inf if lower is None else float(lower)
        if node is None or not is_op(node, *_SELECT) or (node.op == "AveragePool" and any(node.attrs.get("pads", ()))):
            return -math.inf
        tensor = node.inputs[0]
    return -math.inf


def _fold(pad: gs.Node, readers: list[gs.Node], pads: list[int], state: State) -> None:
    parts = state.origins.pop(pad.name, (pad.name,))
    for reader in readers:
        own = list(reader.attrs.get("pads", ())) or [0] * len(pads)
        reader.attrs.pop("auto_pad", None)
        reader.attrs["pads"] = [int(total) for total in np.add(pads, own)]
        if reader.op == "AveragePool":
            reader.attrs["count_include_pad"] = 1
        graphs.set_input(reader, 0, pad.inputs[0])
        state.merged(reader.name, *parts)
    graphs.unlink(pad)

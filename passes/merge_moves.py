"""Makes one node of consecutive Transposes, and one of consecutive Reshape, Flatten, Squeeze and Unsqueeze.

    Transpose(Transpose(x, p), q) = Transpose(x, p[q])

A Reshape keeps the elements in their order, whatever the shape before; so of a chain only the last shape counts. It is
written with the sizes that are known, and -1 where one is not; where more are not known, an axis that keeps its place
and size is written as 0. What ends where it began disappears.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.pattern import Rewriter, is_op, rank
from qdqtool.passes_api import GRAPH_FACTS, Fact, State

_SHAPING: Final = ("Reshape", "Flatten", "Squeeze", "Unsqueeze")


@dataclass(frozen=True)
class MergeMoves:
    """Merge consecutive Transposes, and consecutive Reshape, Flatten, Squeeze and Unsqueeze, into one or none."""

    name: ClassVar[str] = "merge-moves"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES}

    def run(self, state: State) -> int:
        """Merge every node with the one before it where both move values alike; returns how many were."""
        outputs, rewriter = graphs.output_ids(state.graph), Rewriter(state)

        def rewrite(node: gs.Node, graph: gs.Graph) -> str | bool:
            before = graphs.producer(node.inputs[0]) if is_op(node, "Transpose", *_SHAPING) else None
            if before is None or not is_op(before, *(("Transpose",) if node.op == "Transpose" else _SHAPING)):
                return False
            return _merge(node, before, graph, outputs, rewriter) or True

        return rewriter.each(self.name, rewrite)


def _merge(node: gs.Node, before: gs.Node, graph: gs.Graph, outputs: set[int], rewriter: Rewriter) -> str | None:
    """Let ``node`` do the work of both, or take it out; returns the reason where neither is possible."""
    source, between, result = before.inputs[0], node.inputs[0], node.outputs[0]
    perm = _permutation(before, node) if node.op == "Transpose" else None
    if perm == list(range(len(perm))) if perm is not None else _returns(before, node):
        graphs.set_input(node, 0, source)
        if not graphs.bypass(node, graph, outputs):  # both ends are known outside
            rewriter.replace(node, "Identity", [source], [node])
        if not between.outputs and id(between) not in outputs:
            graphs.unlink(before)
        return None
    if graphs.single_use(between, outputs) is None:
        return f"{between.name!r} is read elsewhere too, or is a graph output"
    if node.op == "Transpose":
        if perm is None:
            return f"the rank of {between.name!r} is not known"
        rewriter.replace(node, "Transpose", [source], [before, node], perm=perm)
        return None
    target = _target(source, result)
    if target is None:
        return f"more than one size of {result.name!r} is not known"
    shape = rewriter.constant(f"{node.name}.shape", np.array(target, np.int64))
    rewriter.replace(node, "Reshape", [source, shape], [before, node])
    return None


def _permutation(first: gs.Node, second: gs.Node) -> list[int] | None:
    """What two Transposes do together; None where the rank is not known and none of them says."""
    given = [node.attrs.get("perm") for node in (first, second)]
    size = next((len(perm) for perm in given if perm is not None), rank(first.inputs[0]))
    if size is None:
        return None
    one, two = (list(range(size))[::-1] if perm is None else list(perm) for perm in given)
    return [one[axis] for axis in two]


def _returns(first: gs.Node, second: gs.Node) -> bool:
    """Whether the result has the shape that the source had: that is known of all axes but one, which is the rest."""
    old, new = first.inputs[0].shape, second.outputs[0].shape
    if old is not None and new is not None and len(old) == len(new):
        pairs = [(a, b) for a, b in zip(old, new, strict=True) if not (isinstance(a, int) and a == b and a > 0)]
        if not pairs or (len(pairs) == 1 and not all(isinstance(size, int) for size in pairs[0])):
            return True
    if {first.op, second.op} != {"Squeeze", "Unsqueeze"}:
        return False
    axes = [_axes(node) for node in (first, second)]
    return axes[0] is not None and axes[0] == axes[1]


def _axes(node: gs.Node) -> list[int] | None:
    """Axes of a Squeeze or Unsqueeze, counted in the tensor that has them."""
    given = node.attrs.get("axes")
    values = graphs.constant(graphs.input_at(node, 1)) if given is None else given
    if values is None:
        return None
    size = rank(node.inputs[0] if node.op == "Squeeze" else node.outputs[0])
    axes = [int(axis) for axis in values]
    return sorted(axis + (size or 0) if axis < 0 else axis for axis in axes) if size or min(axes) >= 0 else None


def _target(source: gs.Tensor, result: gs.Tensor) -> list[int] | None:
    """What a Reshape must be told; None where too little is known, or an axis has no elements."""
    if result.shape is None or 0 in result.shape:
        return None
    target = [size if isinstance(size, int) else -1 for size in result.shape]
    if target.count(-1) > 1 and source.shape is not None:
        for axis, (old, new) in enumerate(zip(source.shape, result.shape, strict=False)):
            if isinstance(new, str) and old == new:
                target[axis] = 0
    return target if target.count(-1) <= 1 else None

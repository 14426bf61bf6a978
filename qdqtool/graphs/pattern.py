"""Read what a group of nodes computes, as a formula of one tensor, and put other nodes in its place.

Exporters write one formula in many orders. Comparing formulas instead of node orders needs only two readings: the
polynomial of a tensor x that other tensors are, and the affine map with scalars that one node is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx_graphsurgeon as gs
from numpy.polynomial import Polynomial

from qdqtool.graphs import graph as graphs

if TYPE_CHECKING:
    from qdqtool.passes_api import State

_DEPTH: Final = 8  # nodes between a formula's end and its variable
_DEGREE: Final = 3
_ROUNDED: Final = 1e-5
"""How far, relative, a constant of a formula may be off: what the runtime's own fusions allow."""
_ROUNDED_TO_HALF: Final = 1e-3
"""The same for float16."""


def is_op(node: gs.Node | None, *ops: str) -> bool:
    """Whether the node is one of these operators of the default domain."""
    return node is not None and node.op in ops and node.domain in (None, "", "ai.onnx")


def rank(tensor: gs.Tensor) -> int | None:
    """Rank of a tensor; None where it is not known."""
    return None if tensor.shape is None else len(tensor.shape)


def scalar(tensor: gs.Tensor | None, beside: gs.Tensor) -> float | None:
    """The single value of a constant that broadcasts against ``beside`` and leaves its shape; None for any other."""
    if not isinstance(tensor, gs.Constant) or math.prod(tensor.shape) != 1:
        return None
    if len(tensor.shape) > (rank(beside) or 0):
        return None
    return float(tensor.values.reshape(()))


def affine(node: gs.Node, tensor: gs.Tensor) -> tuple[float, float] | None:
    """(a, b) where the node puts out a * ``tensor`` + b with scalars a and b; None for any other node."""
    if not is_op(node, "Add", "Sub", "Mul", "Div", "Neg"):
        return None
    index = next((i for i, read in enumerate(node.inputs) if read is tensor), None)
    if index is None or node.op == "Neg":
        return None if index is None else (-1.0, 0.0)
    value = scalar(node.inputs[1 - index], tensor)
    if value is None:
        return None
    if node.op == "Div":
        return (1.0 / value, 0.0) if index == 0 and value != 0 else None
    if node.op == "Mul":
        return value, 0.0
    if node.op == "Add":
        return 1.0, value
    return (1.0, -value) if index == 0 else (-1.0, value)


class Formula:
    """The polynomial of ``variable`` that a tensor is, and the nodes that compute it.

    Attributes:
        polynomial: with its coefficients; None where the tensor is no polynomial of the variable, of degree 3 at most.
        nodes: in the order of computation.
    """

    def __init__(self, tensor: gs.Tensor, variable: gs.Tensor) -> None:
        """Read the formula; looks at a bounded number of nodes."""
        self.nodes: list[gs.Node] = []
        self._variable = variable
        self._known: dict[int, Polynomial | None] = {id(variable): Polynomial([0.0, 1.0])}
        self.polynomial = self._read(tensor, _DEPTH)

    def is_near(self, coefficients: Sequence[float]) -> bool:
        """Whether the coefficients, constant first, are these up to the rounding of the tensor's type."""
        if self.polynomial is None:
            return False
        found = np.zeros(max(len(self.polynomial.coef), len(coefficients)))
        found[: len(self.polynomial.coef)] = self.polynomial.coef
        wanted = np.zeros_like(found)
        wanted[: len(coefficients)] = coefficients
        return bool(np.allclose(found, wanted, rtol=tolerance(self._variable), atol=1e-8))

    def _read(self, tensor: gs.Tensor, depth: int) -> Polynomial | None:
        if id(tensor) not in self._known:
            value = scalar(tensor, self._variable)
            self._known[id(tensor)] = self._computed(tensor, depth) if value is None else Polynomial([value])
        return self._known[id(tensor)]

    def _computed(self, tensor: gs.Tensor, depth: int) -> Polynomial | None:
        node = graphs.producer(tensor)
        if node is None or depth == 0 or not is_op(node, "Add", "Sub", "Mul", "Div", "Pow", "Neg"):
            return None
        parts = []
        for read in node.inputs:
            part = self._read(read, depth - 1)
            if part is None:
                return None
            parts.append(part)
        result = _combine(node.op, parts)
        if result is not None and result.degree() <= _DEGREE:
            self.nodes.append(node)
            return result
        return None


def _combine(op: str, parts: Sequence[Polynomial]) -> Polynomial | None:
    if op == "Neg":
        return -parts[0]
    left, right = parts
    if op in ("Add", "Sub"):
        return left + right if op == "Add" else left - right
    if op == "Mul":
        return left * right
    if right.degree() > 0:
        return None
    value = float(right.coef[0])
    if op == "Div":
        return left / value if value != 0 else None
    return left ** int(value) if value in (1.0, 2.0, 3.0) else None


def tolerance(tensor: gs.Tensor) -> float:
    """How far a constant of a formula of the tensor may be off, relative."""
    return _ROUNDED_TO_HALF if tensor.dtype == np.float16 else _ROUNDED


def near(value: float, wanted: float, tensor: gs.Tensor) -> bool:
    """Whether a scalar beside ``tensor`` is ``wanted`` up to the rounding of the tensor's type."""
    return math.isclose(value, wanted, rel_tol=tolerance(tensor), abs_tol=1e-8)


def read_outside(nodes: Sequence[gs.Node], outputs: set[int]) -> str | None:
    """Name of a tensor inside the group, whose last node puts out its result, that others read; None if there is none.

    ``outputs`` comes from :func:`qdqtool.graphs.graph.output_ids`.
    """
    inside = {id(node) for node in nodes}
    for node in nodes[:-1]:
        for tensor in node.outputs:
            if id(tensor) in outputs or any(id(reader) not in inside for reader in tensor.outputs):
                return str(tensor.name)
    return None


class Rewriter:
    """Adds nodes and constants under names that the model does not use yet, and records where nodes come from."""

    def __init__(self, state: State) -> None:
        """Collect the names of the model."""
        self._state = state
        self._tensors, self._nodes = graphs.tensor_names(state.graph), graphs.node_names(state.graph)
        self._added: list[gs.Node] = []
        self._before: dict[int, list[gs.Node]] = {}

    def each(self, pass_name: str, rewrite: Callable[[gs.Node, gs.Graph], str | bool]) -> int:
        """Call ``rewrite`` with every node and its graph; returns how many nodes it has rewritten.

        It returns True where it has, a reason where a candidate stays, which is recorded for the pass, else False.
        """
        changes = 0
        for _, graph in graphs.all_graphs(self._state.graph):
            for node in graph.nodes:
                result = rewrite(node, graph)
                changes += result is True
                if isinstance(result, str):
                    self._state.skip(pass_name, node.name, result)
            self._place(graph)
        graphs.sweep(self._state.graph)
        return changes

    def constant(self, name: str, values: Any, like: gs.Tensor | None = None) -> gs.Constant:
        """A new constant, of the type of ``like`` where that is given."""
        dtype = None if like is None else like.dtype
        return gs.Constant(graphs.fresh_name(name, self._tensors), np.asarray(values, dtype=dtype))

    def node(self, op: str, name: str, inputs: Sequence[gs.Tensor], like: gs.Tensor, **attrs: Any) -> gs.Tensor:
        """Add a node; returns its result, of type and shape as ``like``."""
        title = graphs.fresh_name(name, self._nodes)
        shape = None if like.shape is None else list(like.shape)
        result = gs.Variable(graphs.fresh_name(f"{title}.out", self._tensors), dtype=like.dtype, shape=shape)
        self._added.append(gs.Node(op, title, attrs, list(inputs), [result]))
        return result

    def replace(
        self, last: gs.Node, op: str, inputs: Sequence[gs.Tensor], parts: Iterable[gs.Node], **attrs: Any
    ) -> None:
        """Let the node ``last`` compute its result in another way; the nodes ``parts`` disappear.

        The nodes added since this was called before are there for ``last``, and come right before it. All answer to the
        names of the user's nodes in ``parts``.
        """
        result = last.outputs[0]
        gone = [part for part in parts if part is not last]
        for node in (*gone, last):
            graphs.unlink(node)
        last.op, last.attrs, last.inputs, last.outputs = op, attrs, list(inputs), [result]
        self._state.merged(last.name, *(node.name for node in gone))
        for node in self._added:
            self._state.origins[node.name] = self._state.origins[last.name]
        self._before[id(last)] = self._before.get(id(last), []) + self._added
        self._added = []

    def _place(self, graph: gs.Graph) -> None:
        """Put the nodes that were added for nodes of this graph where they belong."""
        if any(id(node) in self._before for node in graph.nodes):
            graph.nodes = [one for node in graph.nodes for one in (*self._before.pop(id(node), ()), node)]

"""Which nodes compute in float16: all whose operator takes it, but those that would lose what float32 holds.

A node stays in float32 where a weight or an activation of it does not fit, where the target has no kernel, and where it
does arithmetic on positions, sizes and masks: those are exact integers, of which float16 knows 2048. A constant too
large for float16 is a mask as a rule, so what it may end up in stays float32 as well, up to the Softmax that ends it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.float16 import (
    ANY_TYPE,
    BOUNDS,
    EXACT,
    HANDS_ON,
    MOVES,
    Misfit,
    Slots,
    has_float32,
    is_float32,
    misfit,
    observed_misfit,
    slots,
)
from qdqtool.graphs.lazy import peek
from qdqtool.passes_api import State
from qdqtool.planning.selection import Selection


@dataclass
class Choice:
    """The nodes that compute in float16, by identity, and why others do not, by name."""

    converted: dict[int, Slots] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)


def choose(state: State) -> Choice:
    """Decide for every node of the graph and of its control-flow bodies."""
    return _Chooser(state).run()


class _Chooser:
    def __init__(self, state: State) -> None:
        self.state, self.choice = state, Choice()
        self.selection = Selection(state) if state.recipe.precision == "fp16" else None
        self.seen = {} if state.statistics is None else state.statistics.tensors
        self.misfits: dict[int, Misfit | None] = {}
        self.exact: set[int] = set()  # tensors that come from integers
        self.extreme: set[int] = set()  # tensors that may hold a constant beyond float16

    def run(self) -> Choice:
        for _, graph in graphs.all_graphs(self.state.graph):
            for node in graph.nodes:
                if has_float32(node):
                    self._decide(node)
            self._stay_between(graph)
        return self.choice

    def _decide(self, node: gs.Node) -> None:
        found = slots(node, self.state.graph.opset)
        self._spread_extremes(node)
        if self._is_exact(node):
            self.exact.update(id(tensor) for tensor in node.outputs)
            return
        if node.op in ANY_TYPE and not any(is_float32(tensor) for tensor in node.outputs):
            return
        if isinstance(found, str):
            if not any(isinstance(value, gs.Graph) for value in node.attrs.values()):  # what counts is in the bodies
                self.choice.reasons[node.name] = found
            return
        reason = self._reason(node, found)
        if reason is None:
            self.choice.converted[id(node)] = found
        else:
            self.choice.reasons[node.name] = reason

    def _reason(self, node: gs.Node, found: Slots) -> str | None:
        """Why a node that could compute in float16 does not."""
        left_out = None if self.selection is None else self.selection.left_out(node)
        if left_out is not None:
            return left_out
        if node.op in self.state.target.float32_ops:
            return f"{node.op} has no float16 kernel on target {self.state.target.name}"
        for index in sorted(found.inputs):
            tensor = node.inputs[index]
            if graphs.is_constant(tensor) and not _limits(node, index):
                unfit = self._constant(tensor)
                if unfit is not None:
                    return f"its constant {tensor.name!r} {unfit.reason}"
        read = [node.inputs[i] for i in sorted(found.inputs)]
        for tensor in (*read, *(node.outputs[i] for i in sorted(found.outputs))):
            seen = self._observed(tensor)
            if seen is not None:
                return f"{tensor.name!r} {seen.reason}"
            if id(tensor) in self.extreme:
                return f"{tensor.name!r} may hold a constant beyond float16, as masks do"
        return None

    def _constant(self, tensor: gs.Constant) -> Misfit | None:
        if id(tensor) not in self.misfits:
            self.misfits[id(tensor)] = misfit(peek(tensor))
        return self.misfits[id(tensor)]

    def _observed(self, tensor: gs.Tensor) -> Misfit | None:
        stats = self.seen.get(tensor.name)
        return None if stats is None or stats.count == 0 else observed_misfit(stats.lo, stats.hi)

    def _spread_extremes(self, node: gs.Node) -> None:
        """Mark what may hold a huge constant that a node reads, unless its values were observed."""
        if node.op not in HANDS_ON:
            return
        for index, tensor in enumerate(node.inputs):
            huge = id(tensor) in self.extreme
            if is_float32(tensor) and graphs.is_constant(tensor) and not _limits(node, index):
                unfit = self._constant(tensor)
                huge = unfit is not None and unfit.overflow
            if huge:
                self.extreme.update(id(t) for t in node.outputs if t.name not in self.seen)

    def _is_exact(self, node: gs.Node) -> bool:
        """Whether a node turns integers into floats, or does arithmetic on such floats and constants alone."""
        if node.op == "Cast":
            source = node.inputs[0].dtype
            if isinstance(source, np.dtype | type) and np.dtype(source).kind in "iub":
                return is_float32(node.outputs[0])
        floats = [t for t in node.inputs if is_float32(t) and not graphs.is_constant(t)]
        if not floats or any(id(tensor) not in self.exact for tensor in floats):
            return False
        return node.op in EXACT or _is_outer_product(node)

    def _stay_between(self, graph: gs.Graph) -> None:
        """Let what only moves values stay float32 where it stands between nodes that do."""
        converted, outputs = self.choice.converted, {id(tensor) for tensor in graph.outputs}
        movers = [node for node in graph.nodes if id(node) in converted and node.op in MOVES]
        inside = {id(node) for node in graph.nodes}
        wanted: set[int] = set()  # movers whose results nobody reads in float16
        for node in reversed(movers):
            readers = [reader for tensor in node.outputs for reader in tensor.outputs]
            given = any(id(tensor) in outputs for tensor in node.outputs)
            if (readers or given) and all(
                id(r) in inside and (id(r) in wanted or id(r) not in converted) for r in readers
            ):
                wanted.add(id(node))
        for node in movers:
            makers = [graphs.producer(node.inputs[i]) for i in converted[id(node)].inputs]
            if id(node) in wanted and makers and all(m is not None and id(m) not in converted for m in makers):
                del converted[id(node)]


def _limits(node: gs.Node, index: int) -> bool:
    """Whether an input only limits others."""
    return node.op in BOUNDS and (BOUNDS[node.op] is None or index in (BOUNDS[node.op] or ()))


def _is_outer_product(node: gs.Node) -> bool:
    """Whether a node multiplies each position with each of some constant frequencies, as rotary embeddings do."""
    constants = [tuple(t.shape) for t in node.inputs if graphs.is_constant(t)]
    if node.op == "MatMul":
        return any(len(shape) >= 2 and 1 in shape[-2:] for shape in constants)
    return node.op == "Einsum" and bool(constants) and all(len(shape) <= 1 for shape in constants)

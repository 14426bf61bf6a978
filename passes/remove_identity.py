"""Takes out nodes that hand their input on unchanged: Identity, Dropout at inference, Cast to the same type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qdqtool import graph as graphs
from qdqtool.passes_api import GRAPH_FACTS, Fact, State

_CANDIDATES: Final = frozenset({"Identity", "Dropout", "Cast"})


@dataclass(frozen=True)
class RemoveIdentity:
    """Take out Identity, Dropout in its inference form, and Cast to the same type."""

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
                if node.op not in _CANDIDATES or node.domain or not node.inputs:
                    continue
                reason = _works(node, outputs)
                if reason is None:
                    _keep_type(node)
                    if graphs.bypass(node, graph, outputs):
                        changes += 1
                        continue
                    reason = "it gives a graph output its name, and its input is known under another name outside"
                if reason:
                    state.skip(self.name, node.name, reason)
        graphs.sweep(state.graph)
        return changes


def _works(node: gs.Node, outputs: set[int]) -> str | None:
    """Why the node is needed; None where it is not, "" where it was never a candidate."""
    if node.op == "Identity":
        return None
    if node.op == "Cast":
        return None if _same_type(node) else ""
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


def _same_type(node: gs.Node) -> bool:
    source = node.inputs[0].dtype
    if source is None:
        return False
    code = source if isinstance(source, int) else onnx.helper.np_dtype_to_tensor_dtype(np.dtype(source))
    return bool(code == node.attrs["to"])


def _keep_type(node: gs.Node) -> None:
    """Tell the tensor that stays what is known of the other."""
    source, result = node.inputs[0], node.outputs[0]
    for known, other in ((source, result), (result, source)):
        if isinstance(other, gs.Variable):
            other.dtype = other.dtype if other.dtype is not None else known.dtype
            other.shape = other.shape if other.shape is not None else known.shape

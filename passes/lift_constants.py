"""Turns Constant nodes into initializers, so that weights held in Constant nodes are seen as weights.

An initializer that is a graph output too gets an Identity in between: passes may then replace it as any other.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.graph import Array
from qdqtool.passes_api import Fact, State

_DTYPES: Final = {
    "value_float": np.float32,
    "value_floats": np.float32,
    "value_int": np.int64,
    "value_ints": np.int64,
}


@dataclass(frozen=True)
class LiftConstants:
    """Turn Constant nodes, those in control-flow bodies included, into initializers."""

    name: ClassVar[str] = "lift-constants"
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset()

    def run(self, state: State) -> int:
        """Lift every Constant node with a dense numeric value; returns how many."""
        outputs, taken = graphs.output_ids(state.graph), graphs.tensor_names(state.graph)
        changes = 0
        for _, graph in graphs.all_graphs(state.graph):
            kept = []
            for node in graph.nodes:
                reason = self._lift(node, outputs) if node.op == "Constant" and not node.domain else "no Constant"
                if reason is None:
                    changes += 1
                    continue
                kept.append(node)
                if reason != "no Constant":
                    state.skip(self.name, node.name, reason)
            graph.nodes = kept
            changes += _detach_outputs(graph, taken)
        return changes

    def _lift(self, node: gs.Node, outputs: set[int]) -> str | None:
        """Make the node's output a constant; returns the reason where that cannot be."""
        tensor = node.outputs[0]
        if id(tensor) in outputs:
            return "it is a graph output itself"
        value = _value(node)
        if value is None:
            return f"its value ({', '.join(node.attrs) or 'none'}) is no dense numeric tensor"
        node.outputs.clear()
        tensor.to_constant(value)
        return None


def _value(node: gs.Node) -> Array | gs.LazyValues | None:
    for name, value in node.attrs.items():
        if name in _DTYPES:
            return np.array(value, dtype=_DTYPES[name])
        if name == "value" and isinstance(value, gs.Constant) and value.dtype != np.object_:
            return value._values  # read only when needed: 4-bit and bfloat16 values must not be touched
    return None


def _detach_outputs(graph: gs.Graph, taken: set[str]) -> int:
    """Let an Identity give out what was an initializer; returns of how many."""
    changes = 0
    for index, given in enumerate(graph.outputs):
        if isinstance(given, gs.Constant):
            value = gs.Constant(graphs.fresh_name(f"{given.name}.value", taken), given._values)
            graphs.redirect(given, value)
            result = gs.Variable(given.name, given.dtype, tuple(given.shape))
            graph.nodes.append(gs.Node("Identity", f"{given.name}.identity", inputs=[value], outputs=[result]))
            graph.outputs[index] = result
            changes += 1
    return changes

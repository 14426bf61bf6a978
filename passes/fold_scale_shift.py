"""Folds Mul, Div, Add and Sub by constants behind a linear layer into its weight and bias.

A chain of them is one map y = s x + t per channel, composed in float64: (s, t) then (s', t') is (s s', t s' + t'). The
layer's weight becomes s_c W_c and its bias s_c b_c + t_c. A MatMul that is not known to be of rank 2 has no bias: its
chain becomes the scaled weight and one Add of t.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.absorb import absorb
from qdqtool.graphs.channels import ChannelMap, constant_operand, stored
from qdqtool.graphs.linear import LinearLayer, arithmetic, replace_constant
from qdqtool.passes_api import GRAPH_FACTS, Fact, State


@dataclass(frozen=True)
class FoldScaleShift:
    """Fold Mul, Div, Add and Sub by per-channel constants into the linear layer before them."""

    name: ClassVar[str] = "fold-scale-shift"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES}

    def run(self, state: State) -> int:
        """Fold the chain behind every linear layer; returns how many nodes were folded."""
        outputs, taken = graphs.output_ids(state.graph), graphs.tensor_names(state.graph)
        changes = 0
        for _, graph in graphs.all_graphs(state.graph):
            here = {id(node) for node in graph.nodes}
            for node in graph.nodes:
                layer = LinearLayer.of(node)
                if layer is not None and graphs.is_constant(layer.weight):
                    chain, total = self._chain(layer, state, here, outputs)
                    changes += self._fold(layer, chain, total, state, taken)
        graphs.sweep(state.graph)
        return changes

    def _chain(
        self, layer: LinearLayer, state: State, here: set[int], outputs: set[int]
    ) -> tuple[list[gs.Node], ChannelMap]:
        """The arithmetic behind the layer that is per channel, and what it does altogether."""
        total = ChannelMap.identity(layer.channels or 1)
        chain: list[gs.Node] = []
        tensor = layer.node.outputs[0]
        while True:
            candidate = next((node for node in tensor.outputs if constant_operand(node) is not None), None)
            if candidate is None:
                return chain, total
            if graphs.single_use(tensor, outputs) is None:
                step: ChannelMap | str = f"{tensor.name!r} is read elsewhere too, or is a graph output"
            elif id(candidate) not in here:
                step = f"it is in a control-flow body, {layer.node.name!r} outside"
            else:
                step = arithmetic(candidate, layer)
            if isinstance(step, str):
                state.skip(self.name, candidate.name, step)
                return chain, total
            chain.append(candidate)
            total = total.then(step)
            tensor = candidate.outputs[0]

    def _fold(self, layer: LinearLayer, chain: list[gs.Node], total: ChannelMap, state: State, taken: set[str]) -> int:
        """Fold one chain; returns how many of its nodes changed."""
        biasless = layer.node.op == "MatMul" and layer.output_rank != 2
        if not chain or (biasless and len(chain) == 1 and chain[0].op == "Add"):  # MatMul and Add is the form to keep
            return 0
        fold = _leave_add if biasless and total.shift.any() else _absorb_all
        reason = fold(layer, chain, total, state, taken)
        if reason is not None:
            for node in chain:
                state.skip(self.name, node.name, reason)
            return 0
        return len(chain)


def _absorb_all(
    layer: LinearLayer, chain: list[gs.Node], total: ChannelMap, state: State, taken: set[str]
) -> str | None:
    reason = layer.scale_shift(total.scale, total.shift, taken)
    if reason is None:
        absorb(layer, chain, total, state)
    return reason


def _leave_add(
    layer: LinearLayer, chain: list[gs.Node], total: ChannelMap, state: State, taken: set[str]
) -> str | None:
    """Scale the weight and keep one node, an Add of the shift."""
    bias = stored(total.shift, np.dtype(layer.weight.dtype))
    if bias is None:
        return f"the shift behind {layer.node.name!r} would not be finite"
    reason = layer.scale_shift(total.scale, np.zeros_like(total.shift), taken)
    if reason is not None:
        return reason
    kept = next(node for node in reversed(chain) if node.op in ("Add", "Sub"))
    result, product = chain[-1].outputs[0], layer.node.outputs[0]
    kept.outputs.clear()
    for node in chain:
        if node is not kept:
            graphs.unlink(node)
    kept.op, kept.outputs = "Add", [result]
    operand = constant_operand(kept) or 0
    replace_constant(kept, operand, bias, f"{kept.name}.bias", taken)
    kept.inputs = [product, kept.inputs[operand]]
    merged = [node.name for node in chain if node is not kept]
    if merged:
        state.merged(layer.node.name, *merged)
    return None

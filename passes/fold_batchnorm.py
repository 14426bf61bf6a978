"""Folds BatchNormalization at inference into the linear layer that feeds it.

    y = gamma (x - mean) / sqrt(var + epsilon) + beta = s x + t
    s = gamma / sqrt(var + epsilon),  t = beta - mean s

so that, for x = W_c z + b_c, the layer gets the weight s_c W_c and the bias s_c b_c + t_c (Jacob et al., "Quantization
and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference", CVPR 2018, section 3.2). An Add or Mul
by a constant between the two, as frameworks with a separate bias export it, folds along.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.absorb import absorb
from qdqtool.graphs.batchnorm import normalization, parameters
from qdqtool.graphs.channels import ChannelMap, constant_operand
from qdqtool.graphs.linear import LinearLayer, arithmetic
from qdqtool.passes_api import GRAPH_FACTS, Fact, State


@dataclass(frozen=True)
class FoldBatchnorm:
    """Fold BatchNormalization into the Conv, ConvTranspose, Gemm or MatMul before it."""

    name: ClassVar[str] = "fold-batchnorm"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES}

    def run(self, state: State) -> int:
        """Fold every BatchNormalization that can be; returns how many."""
        outputs, taken = graphs.output_ids(state.graph), graphs.tensor_names(state.graph)
        changes = 0
        for _, graph in graphs.all_graphs(state.graph):
            here = {id(node) for node in graph.nodes}
            for node in graph.nodes:
                if node.op == "BatchNormalization" and not node.domain:
                    reason = _fold(node, state, here, outputs, taken)
                    changes += reason is None
                    if reason is not None:
                        state.skip(self.name, node.name, reason)
        graphs.sweep(state.graph)
        return changes


def _fold(node: gs.Node, state: State, here: set[int], outputs: set[int], taken: set[str]) -> str | None:
    """Fold one BatchNormalization; returns the reason where it stays."""
    normalize = normalization(node, outputs)
    if isinstance(normalize, str):
        return normalize
    found = _layer_before(node, here, outputs)
    if isinstance(found, str):
        return found
    layer, between = found
    if layer.channels != normalize.scale.size:
        return f"it has {normalize.scale.size} channels, {layer.node.name!r} has {layer.channels}"
    if layer.output_axis == -1 and layer.output_rank != 2:
        return f"its channels are axis 1, those of {layer.node.name!r} the last of a result not known to be of rank 2"
    total = ChannelMap.identity(normalize.scale.size)
    for step in between:
        change = arithmetic(step, layer)
        if isinstance(change, str):
            return f"{step.name!r} lies between it and {layer.node.name!r}: {change}"
        total = total.then(change)
    total = total.then(normalize)
    reason = layer.scale_shift(total.scale, total.shift, taken)
    if reason is None:
        values = parameters(node)
        assert values is not None
        absorb(layer, [*between, node], total, state)
        state.batchnorms[layer.node.outputs[0].name] = (values[1], np.abs(values[0]))
    return reason


def _layer_before(node: gs.Node, here: set[int], outputs: set[int]) -> tuple[LinearLayer, list[gs.Node]] | str:
    """The linear layer that feeds the node and the constant arithmetic between, in order; or why there is none."""
    between: list[gs.Node] = []
    tensor = node.inputs[0]
    while True:
        maker = graphs.producer(tensor)
        if maker is None or id(maker) not in here:
            return "its input is a graph input or comes from outside the control-flow body"
        layer, operand = LinearLayer.of(maker), constant_operand(maker)
        if layer is None and operand is None:
            return f"its input comes from {maker.op} {maker.name!r}, not from a linear layer"
        if graphs.single_use(tensor, outputs) is None:
            return f"the result of {maker.name!r} is read elsewhere too, or is a graph output"
        if layer is not None:
            return layer, between[::-1]
        between.append(maker)
        tensor = maker.inputs[1 - (operand or 0)]

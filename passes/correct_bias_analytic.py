"""Analytic bias correction: what rounding its weight takes from a layer's mean output, told without any data.

    b <- b + (W - W_q) E[x]

where E[x], the mean of each input channel, follows from the BatchNormalization folded into the layers before (Nagel et
al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.2.1; see
:mod:`qdqtool.graphs.channel_means`). Zero padding is not reckoned with, nor is what the rounding of activations does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np

from qdqtool.arithmetic import affine
from qdqtool.graphs import graph as graphs
from qdqtool.graphs.channel_means import channel_means
from qdqtool.graphs.graph import Array
from qdqtool.graphs.linear import LinearLayer, bias_place, replace_constant
from qdqtool.passes_api import Fact, State
from qdqtool.planning.plan import Use
from qdqtool.spec import FloatArray, QuantizedWeight


@dataclass(frozen=True)
class CorrectBiasAnalytic:
    """Shift biases by what rounded weights make of their inputs' mean, known from BatchNormalization."""

    name: ClassVar[str] = "correct-bias-analytic"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAN, Fact.PARAMS})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})

    def run(self, state: State) -> int:
        """Change the float biases in ``state.graph``; returns the number of layers corrected."""
        assert state.plan is not None
        assert state.params is not None
        means, outputs = channel_means(state.graph, state.batchnorms), graphs.leaving_ids(state.graph)
        taken, nodes = graphs.tensor_names(state.graph), {node.name: node for node in state.graph.nodes}
        corrected = 0
        for node in state.graph.nodes:
            layer, weight = LinearLayer.of(node), state.params.get(Use(node.name, 1))
            if layer is None or not isinstance(weight, QuantizedWeight):
                continue
            place, known = bias_place(node, outputs), means.get(node.inputs[0].name)
            shift = None if known is None else _shift(layer, weight, known.mean)
            if place is None or shift is None or shift.size != place.channels:
                missing = (
                    "it has no constant bias to correct" if place is None else "the mean of its input is not known"
                )
                state.skip(self.name, node.name, missing)
                continue
            reader = nodes[place.node]
            bias = reader.inputs[place.index]
            new = (bias.values.astype(np.float64) + shift).astype(bias.dtype)
            replace_constant(reader, place.index, new, f"{node.name}.bias", taken)
            corrected += 1
        return corrected


def _shift(layer: LinearLayer, weight: QuantizedWeight, mean: FloatArray) -> FloatArray | None:
    """(W - W_q) E[x] of each output channel, float64 (channels,); None where the weight does not fit the mean."""
    node, values = layer.node, cast(Array, graphs.constant(layer.weight)).astype(np.float64)
    error = values - affine.dequantize(weight.codes, weight.params)
    if node.op in ("Conv", "ConvTranspose"):
        error = error.sum(axis=tuple(range(2, error.ndim)))
    elif node.op == "MatMul" or not node.attrs.get("transB", 0):
        error = error.T
    groups = layer.groups
    if node.op == "ConvTranspose":  # [Cin, Cout/g]; an output position sees one of so many taps
        error = error.reshape(groups, -1, error.shape[1]).swapaxes(1, 2) / np.prod(node.attrs.get("strides", [1]))
    else:
        error = error.reshape(groups, -1, error.shape[1])
    if groups * error.shape[2] != mean.size:
        return None
    shift = np.einsum("goi,gi->go", error, mean.reshape(groups, -1)).reshape(-1)
    return cast(FloatArray, shift * (float(node.attrs.get("alpha", 1.0)) if node.op == "Gemm" else 1.0))

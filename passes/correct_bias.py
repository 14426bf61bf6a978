"""Empirical bias correction: shift every layer's bias so that its mean output per channel is that of the float model.

    b_c <- b_c + E[y_float,c] - E[y_quantized,c]

layer after layer with quantized inputs (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019,
section 4.2; Banner et al., NeurIPS 2019, for the weights' part). The quantized graph computes its own correction: behind each layer, nodes
take the mean of its output over the batch, subtract it from the float mean, and add the difference before the next layer reads. So the whole
sequence of corrections costs one inference of the float and one of the quantized model on the held samples.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool import graph as graphs
from qdqtool import model as models
from qdqtool import runtime
from qdqtool.insert import insert
from qdqtool.linear import BiasPlace, bias_place, replace_constant
from qdqtool.passes_api import Fact, State
from qdqtool.spec import FloatArray

_PREFIX = "qdqtool.bias_correction."


@dataclass(frozen=True)
class CorrectBias:
    """Shift biases so that every layer keeps its mean output on calibration samples."""

    name: ClassVar[str] = "correct-bias"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.DATA, Fact.PLAN, Fact.PARAMS})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})

    def run(self, state: State) -> int:
        """Change the float biases in ``state.graph``; returns the number of layers corrected."""
        assert state.plan is not None
        assert state.params is not None
        layers = self._layers(state)
        if not layers or not state.held:
            return 0
        plain = graphs.copy(state.graph)
        means = _run(state, _measuring(plain, layers))
        quantized = insert(state.graph, state.plan, state.params)
        shifts = _run(state, _correcting(quantized, layers, means))
        taken = graphs.tensor_names(state.graph)
        nodes = {node.name: node for node in state.graph.nodes}
        for name, place in layers.items():
            reader = nodes[place.node]
            bias = reader.inputs[place.index]
            corrected = bias.values.astype(np.float64) + shifts[name]
            replace_constant(reader, place.index, corrected.astype(bias.dtype), f"{name}.bias", taken)
        return len(layers)

    def _layers(self, state: State) -> dict[str, BiasPlace]:
        """Layers whose weight is quantized and whose bias is a constant vector, by node name in graph order."""
        assert state.plan is not None
        outputs = graphs.output_ids(state.graph)
        quantized = {key.node for key in state.plan.constants if hasattr(key, "node")}
        found = {}
        for node in state.graph.nodes:
            if node.name in quantized:
                place = bias_place(node, outputs)
                if place is not None:
                    found[node.name] = place
                elif node.name in state.plan.kernels:
                    state.skip(self.name, node.name, "it has no constant bias to correct")
        return found


def _mean(graph: gs.Graph, name: str, tensor: gs.Tensor, place: BiasPlace) -> gs.Variable:
    """Append nodes that give the mean over all but the channel axis, shape (channels,)."""
    flat = tensor
    if place.rank is None or place.rank != 2:
        shape = [-1, place.channels] if place.axis == -1 else [0, place.channels, -1]
        flat = gs.Variable(f"{_PREFIX}{name}.flat")
        target = gs.Constant(f"{_PREFIX}{name}.shape", np.array(shape, np.int64))
        graph.nodes.append(gs.Node("Reshape", f"{_PREFIX}{name}.reshape", {}, [tensor, target], [flat]))
    axes = [0] if place.axis == -1 or place.rank == 2 else [0, 2]
    mean = gs.Variable(f"{_PREFIX}{name}.mean", dtype=np.float32)
    node = gs.Node("ReduceMean", f"{_PREFIX}{name}.reduce", {"keepdims": 0}, [flat], [mean])
    if graph.opset >= 18:
        node.inputs.append(gs.Constant(f"{_PREFIX}{name}.axes", np.array(axes, np.int64)))
    else:
        node.attrs["axes"] = axes
    graph.nodes.append(node)
    return mean


def _measuring(graph: gs.Graph, layers: Mapping[str, BiasPlace]) -> gs.Graph:
    """The graph with the means of all layers as its only outputs."""
    nodes = {node.name: node for node in graph.nodes}
    graph.outputs = [_mean(graph, name, nodes[place.node].outputs[0], place) for name, place in layers.items()]
    graphs.sweep(graph)
    return graph


def _correcting(graph: gs.Graph, layers: Mapping[str, BiasPlace], means: Mapping[str, FloatArray]) -> gs.Graph:
    """The quantized graph that corrects every layer as it runs, with the corrections as its only outputs."""
    nodes = {node.name: node for node in graph.nodes}
    shifts = []
    for name, place in layers.items():
        output = nodes[place.node].outputs[0]
        readers = graphs.uses(output)
        mean = _mean(graph, name, output, place)
        wanted = gs.Constant(f"{_PREFIX}{name}.wanted", means[name].astype(np.float32))
        shift = gs.Variable(f"{_PREFIX}{name}.shift", dtype=np.float32)
        graph.nodes.append(gs.Node("Sub", f"{_PREFIX}{name}.sub", {}, [wanted, mean], [shift]))
        broadcast: gs.Tensor = shift
        if place.axis == 1 and place.rank is not None and place.rank > 2:
            broadcast = gs.Variable(f"{_PREFIX}{name}.broadcast")
            shape = gs.Constant(f"{_PREFIX}{name}.channels", np.array([place.channels] + [1] * (place.rank - 2), np.int64))
            graph.nodes.append(gs.Node("Reshape", f"{_PREFIX}{name}.expand", {}, [shift, shape], [broadcast]))
        corrected = gs.Variable(f"{_PREFIX}{name}.corrected", dtype=np.float32)
        graph.nodes.append(gs.Node("Add", f"{_PREFIX}{name}.add", {}, [output, broadcast], [corrected]))
        for node, index in readers:
            node.inputs[index] = corrected
        shifts.append(shift)
    graph.outputs = shifts
    graphs.sweep(graph)
    return graph


def _run(state: State, graph: gs.Graph) -> dict[str, FloatArray]:
    """Outputs of an instrumented graph averaged over the held samples, by layer."""
    proto = models.to_proto(graph, state.header)
    active = runtime.session(proto, provider=state.provider, config={"session.disable_quant_qdq": "1"})
    totals: list[FloatArray] = []
    count = 0
    assert state.batching is not None
    for batch in state.batching.together(len(state.held)).batches(state.held):
        outputs = runtime.run(active, None, batch.feeds)
        weight = len(batch.samples)
        values = [output.astype(np.float64) * weight for output in outputs]
        totals = values if not totals else [a + b for a, b in zip(totals, values, strict=True)]
        count += weight
    names = [output.name.removeprefix(_PREFIX).rpartition(".")[0] for output in active.get_outputs()]
    return {name: total / count for name, total in zip(names, totals, strict=True)}

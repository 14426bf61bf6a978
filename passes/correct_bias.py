"""Empirical bias correction: shift every layer's bias so that its mean output per channel is that of the float model.

    b_c <- b_c + k_c d_c,    d_c = E[y_float,c - y_quantized,c]

layer after layer with quantized inputs (Nagel et al., Data-Free Quantization Through Weight Equalization and Bias
Correction, ICCV 2019, section 4.2; Banner et al., NeurIPS 2019, for the weights' part). The quantized graph computes
its own correction: behind each layer, nodes take the mean of its output over the batch, subtract it from the float
mean, and add the difference before the next layer reads. So the whole sequence of corrections costs one inference of
the float and one of the quantized model on the held samples.

A few samples tell d_c only up to a standard error s_c, and a shift that is noise does harm: it is the same at every
position, so nothing averages it out. Each d_c is therefore shrunk by what the spread between samples says about it
(empirical Bayes, the variance t² of the true shifts pooled over the layer's channels; Efron and Morris, JASA 1973):

    k_c = t² / (t² + s_c²),    t² = max(0, mean_c d_c² - mean_c s_c²)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool import graph as graphs
from qdqtool import model as models
from qdqtool import runtime
from qdqtool.batching import Batch, Batching, Sample
from qdqtool.fit import Feeds
from qdqtool.insert import insert
from qdqtool.linear import BiasPlace, bias_place, replace_constant
from qdqtool.passes_api import Fact, State
from qdqtool.plan import Use
from qdqtool.spec import FloatArray

_PREFIX: Final = "qdqtool.bias_correction."
_TINY: Final = 1e-30


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
        quantized = _correcting(insert(state.graph, state.plan, state.params), layers)
        differences = _run(state, _measuring(graphs.copy(state.graph), layers), quantized, list(layers))
        if not differences:
            state.notes.append("biases were not corrected: every sample held NaN or infinite values")
            return 0
        taken = graphs.tensor_names(state.graph)
        nodes = {node.name: node for node in state.graph.nodes}
        corrected = 0
        for name, place in layers.items():
            reader = nodes[place.node]
            bias = reader.inputs[place.index]
            shift = shrunk(differences[name])
            corrected += bool(shift.any())
            new = (bias.values.astype(np.float64) + shift).astype(bias.dtype)
            replace_constant(reader, place.index, new, f"{name}.bias", taken)
        return corrected

    def _layers(self, state: State) -> dict[str, BiasPlace]:
        """Layers whose weight is quantized and whose bias is a constant vector, by node name in graph order."""
        assert state.plan is not None
        outputs = graphs.output_ids(state.graph)
        weights = {key.node for key in state.plan.constants if isinstance(key, Use) and key.index == 1}
        found = {}
        for node in state.graph.nodes:
            if node.name in weights and node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
                place = bias_place(node, outputs)
                if place is not None:
                    found[node.name] = place
                else:
                    state.skip(self.name, node.name, "it has no constant bias to correct")
        return found


def shrunk(differences: FloatArray) -> FloatArray:
    """The shift of every channel, shrunk by its standard error.

    Args:
        differences: mean of float minus quantized output, float64 (samples, channels).

    Returns:
        float64 (channels,).
    """
    count = len(differences)
    mean = differences.mean(axis=0)
    error = ((differences - mean) ** 2).sum(axis=0) / (count * max(count - 1, 1))
    between = max(0.0, float((mean**2).mean() - error.mean()))
    shift: FloatArray = mean * between / (between + error + _TINY)
    return shift


class _Builder:
    """Appends nodes that compute small float tensors to a graph."""

    def __init__(self, graph: gs.Graph, layer: str) -> None:
        self.graph, self.stem, self.count = graph, f"{_PREFIX}{layer}", 0

    def op(self, op: str, *inputs: gs.Tensor, **attrs: object) -> gs.Variable:
        self.count += 1
        name = f"{self.stem}.{self.count}"
        result = gs.Variable(name)
        self.graph.nodes.append(gs.Node(op, name, attrs, list(inputs), [result]))
        return result

    def constant(self, values: object, dtype: type = np.float32) -> gs.Constant:
        self.count += 1
        return gs.Constant(f"{self.stem}.{self.count}", np.array(values, dtype))

    def mean(self, tensor: gs.Tensor, axis: int) -> gs.Variable:
        if self.graph.opset >= 18:
            return self.op("ReduceMean", tensor, self.constant([axis], np.int64), keepdims=0)
        return self.op("ReduceMean", tensor, axes=[axis], keepdims=0)

    def sample_means(self, tensor: gs.Tensor, place: BiasPlace, rows: gs.Tensor) -> gs.Variable:
        """Mean over all but samples and channels, shape (samples, channels); ``rows``: how many samples, int64 (1,)."""
        channels, rest = self.constant([place.channels], np.int64), self.constant([-1], np.int64)
        order = [rows, rest, channels] if place.axis == -1 else [rows, channels, rest]
        shape = self.op("Concat", *order, axis=0)
        return self.mean(self.op("Reshape", tensor, shape), 1 if place.axis == -1 else 2)


def _rows_input() -> gs.Variable:
    return gs.Variable(f"{_PREFIX}rows", dtype=np.int64, shape=[1])


def _measuring(graph: gs.Graph, layers: Mapping[str, BiasPlace]) -> gs.Graph:
    """The float graph with the mean of every layer's output, (samples, channels), as its only outputs."""
    nodes = {node.name: node for node in graph.nodes}
    rows = _rows_input()
    graph.inputs.append(rows)
    graph.outputs = [
        _Builder(graph, name).sample_means(nodes[place.node].outputs[0], place, rows) for name, place in layers.items()
    ]
    _as_float_outputs(graph)
    return graph


def _correcting(graph: gs.Graph, layers: Mapping[str, BiasPlace]) -> gs.Graph:
    """The quantized graph that corrects every layer as it runs.

    It takes the float means as inputs and gives, as its only outputs, the differences (samples, channels) that it
    found.
    """
    nodes = {node.name: node for node in graph.nodes}
    rows = _rows_input()
    graph.inputs.append(rows)
    found = []
    for name, place in layers.items():
        build, output = _Builder(graph, name), nodes[place.node].outputs[0]
        readers = graphs.uses(output)
        wanted = gs.Variable(f"{_PREFIX}{name}.wanted", dtype=np.float32, shape=[None, place.channels])
        graph.inputs.append(wanted)
        difference = build.op("Sub", wanted, build.sample_means(output, place, rows))
        shift = _shrinking(build, difference, rows)
        if place.axis == 1 and place.rank is not None and place.rank > 2:
            shape = build.constant([place.channels] + [1] * (place.rank - 2), np.int64)
            shift = build.op("Reshape", shift, shape)
        corrected = build.op("Add", output, shift)
        for node, index in readers:
            graphs.set_input(node, index, corrected)
        found.append(difference)
    graph.outputs = found
    _as_float_outputs(graph)
    return graph


def _as_float_outputs(graph: gs.Graph) -> None:
    for tensor in graph.outputs:
        tensor.dtype = np.dtype(np.float32)
    graphs.sweep(graph)


def _shrinking(build: _Builder, differences: gs.Variable, rows: gs.Variable) -> gs.Variable:
    """:func:`shrunk` as nodes."""
    mean = build.mean(differences, 0)
    centred = build.op("Sub", differences, mean)
    count = build.op("Cast", rows, to=1)
    degrees = build.op("Max", build.op("Sub", count, build.constant([1.0])), build.constant([1.0]))
    error = build.op("Div", build.mean(build.op("Mul", centred, centred), 0), degrees)
    squares = build.mean(build.op("Mul", mean, mean), 0)
    between = build.op("Relu", build.op("Sub", squares, build.mean(error, 0)))
    whole = build.op("Add", build.op("Add", between, error), build.constant(_TINY))
    return build.op("Mul", mean, build.op("Div", between, whole))


def _run(state: State, plain: gs.Graph, quantized: gs.Graph, layers: list[str]) -> dict[str, FloatArray]:
    """Float minus quantized means of the finite held samples by layer, float64 (samples, channels); {} without any."""
    assert state.batching is not None
    config = {"session.disable_quant_qdq": "1"}  # weights become floats at load, activations keep their Q/DQ
    measure = runtime.session(models.to_proto(plain, state.header), provider=state.provider)
    correct = runtime.session(models.to_proto(quantized, state.header), provider=state.provider, config=config)
    measured = _means(measure, state.batching, state.held)
    usable = [sample for batch, means in measured for sample in _finite(batch, means)]
    if len(usable) < len(state.held):  # NaN and Inf of one sample would spoil the shifts of all
        measured = _means(measure, state.batching, usable)
    parts: list[list[FloatArray]] = []
    for batch, means in measured:
        wanted = {f"{_PREFIX}{name}.wanted": mean for name, mean in zip(layers, means, strict=True)}
        outputs = runtime.run(correct, None, {**_fed(batch), **wanted})
        parts.append([batch.real(output).astype(np.float64) for output in outputs])
    return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(layers)} if parts else {}


def _fed(batch: Batch) -> Feeds:
    return {**batch.feeds, f"{_PREFIX}rows": np.array([batch.rows], np.int64)}


def _means(measure: Any, batching: Batching, samples: Sequence[Sample]) -> list[tuple[Batch, list[graphs.Array]]]:
    """The float model's means of every layer, (rows, channels) each, batch by batch."""
    batches = batching.together(len(samples)).batches(samples)
    return [(batch, runtime.run(measure, None, _fed(batch))) for batch in batches]


def _finite(batch: Batch, means: Sequence[graphs.Array]) -> Iterator[Sample]:
    """The samples of a batch for which every mean is finite."""
    fine = np.all([np.isfinite(batch.real(mean)).all(axis=1) for mean in means], axis=0)
    each = fine.reshape(len(batch.samples), -1).all(axis=1)  # a whole feed may have several rows
    return (sample for sample, good in zip(batch.samples, each, strict=True) if good)

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

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qdqtool import runtime
from qdqtool.data.batching import Batch, Batching, Sample
from qdqtool.data.fit import Feeds
from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.bias_nodes import DEGREES, PREFIX, ROWS, BiasNodes
from qdqtool.graphs.linear import BiasPlace, bias_place, replace_constant
from qdqtool.graphs.scopes import held
from qdqtool.observation.bodies import expose
from qdqtool.passes_api import Fact, State
from qdqtool.planning.insert import insert
from qdqtool.planning.plan import Use
from qdqtool.spec import FloatArray
from qdqtool.verification.fidelity import fidelity

_TINY: Final = 1e-30


@dataclass(frozen=True)
class CorrectBias:
    """Shift biases so that every layer keeps its mean output on calibration samples.

    Attributes:
        checked: take the shifts back where the outputs are nearer to the float model's without them.
    """

    checked: bool = False

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
        quantized = models.to_proto(insert(state.graph, state.plan, state.params), state.header)
        plain = models.to_proto(state.graph, state.header)
        differences = _run(state, _measuring(plain, layers), _correcting(quantized, layers), layers)
        if not differences:
            state.notes.append("biases were not corrected: every sample held NaN or infinite values")
            return 0
        taken = graphs.tensor_names(state.graph)
        nodes = {node.name: node for node in graphs.all_nodes(state.graph)}
        corrected, given = 0, []
        for name, place in layers.items():
            reader = nodes[place.node]
            bias = reader.inputs[place.index]
            given.append((reader, place.index, bias))
            shift = shrunk(differences[name]) if differences[name].size else np.zeros(place.channels)
            corrected += bool(shift.any())
            new = (bias.values.astype(np.float64) + shift).astype(bias.dtype)
            replace_constant(reader, place.index, new, f"{name}.bias", taken)
        if self.checked and corrected and not _helps(state, given):
            state.notes.append("biases were not corrected: on the calibration samples the outputs are nearer without")
            return 0
        return corrected

    def _layers(self, state: State) -> dict[str, BiasPlace]:
        """Layers whose weight is quantized and whose bias is a constant vector, by node name in graph order."""
        assert state.plan is not None
        outputs = graphs.leaving_ids(state.graph)
        weights = {key.node for key in state.plan.constants if isinstance(key, Use) and key.index == 1}
        found = {}
        for node in _run_once(state.graph):
            if node.name in weights and node.op in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
                place = bias_place(node, outputs)
                if place is not None:
                    found[node.name] = place
                else:
                    state.skip(self.name, node.name, "it has no constant bias to correct")
        return found


def _run_once(graph: gs.Graph) -> Iterator[gs.Node]:
    """Nodes of the graph and of branches in it: one in a loop has a mean for each iteration, and is left alone."""
    for node in graph.nodes:
        yield node
        if node.op == "If":
            for body in node.subgraphs():
                yield from _run_once(body)


def _helps(state: State, given: Sequence[tuple[gs.Node, int, gs.Tensor]]) -> bool:
    """Whether the outputs are nearer to the float model's with the biases as they are than with those ``given``.

    Leaves the better ones in the graph.
    """
    corrected = [(node, index, node.inputs[index]) for node, index, _ in given]
    with_shifts = fidelity(state)
    _put(given)
    if fidelity(state) > with_shifts:
        return False
    _put(corrected)
    return True


def _put(biases: Sequence[tuple[gs.Node, int, gs.Tensor]]) -> None:
    for node, index, bias in biases:
        graphs.set_input(node, index, bias)


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


def _measuring(proto: onnx.ModelProto, layers: Mapping[str, BiasPlace]) -> onnx.ModelProto:
    """The float model with the mean of every layer's output, (samples, channels), as its only outputs."""
    found: list[str] = []

    def measure(name: str, place: BiasPlace, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        build = BiasNodes(proto, name)
        found.append(build.sample_means(node.output[0], place))
        return build.nodes

    return _extended(proto, layers, measure, found)


def _correcting(proto: onnx.ModelProto, layers: Mapping[str, BiasPlace]) -> onnx.ModelProto:
    """The quantized model that corrects every layer as it runs.

    It takes the float means as inputs and gives, as its only outputs, the differences (samples, channels) it found.
    """
    found: list[str] = []

    def correct(name: str, place: BiasPlace, node: onnx.NodeProto) -> list[onnx.NodeProto]:
        build, result = BiasNodes(proto, name), node.output[0]
        node.output[0] = f"{build.stem}.raw"  # whoever read the layer's output now reads the corrected one
        wanted = f"{build.stem}.wanted"
        shape = [None, place.channels]
        proto.graph.input.append(onnx.helper.make_tensor_value_info(wanted, onnx.TensorProto.FLOAT, shape))
        found.append(build.op("Sub", wanted, build.sample_means(node.output[0], place)))
        shift = build.shrunk(found[-1])
        if place.axis == 1 and place.rank is not None and place.rank > 2:
            wide = build.constant([place.channels] + [1] * (place.rank - 2), np.int64)
            shift = build.op("Reshape", shift, wide)
        if build.opset >= 15:  # a layer may be in float16
            shift = build.op("CastLike", shift, node.output[0])
        build.op("Add", node.output[0], shift, name=result)
        return build.nodes

    return _extended(proto, layers, correct, found)


def _extended(
    proto: onnx.ModelProto,
    layers: Mapping[str, BiasPlace],
    extend: Callable[[str, BiasPlace, onnx.NodeProto], list[onnx.NodeProto]],
    outputs: list[str],
) -> onnx.ModelProto:
    """The model with more nodes behind every layer, and ``outputs``, which ``extend`` fills, as its only outputs."""
    graph = proto.graph
    graph.input.append(onnx.helper.make_tensor_value_info(ROWS, onnx.TensorProto.INT64, [1]))
    graph.input.append(onnx.helper.make_tensor_value_info(DEGREES, onnx.TensorProto.FLOAT, [1]))
    ends = {place.node: (name, place) for name, place in layers.items()}
    order: list[str] = []

    def visit(inner: onnx.GraphProto) -> None:
        nodes: list[onnx.NodeProto] = []
        for node in inner.node:
            for body in held(node):
                visit(body)
            nodes.append(node)
            if node.name in ends:
                order.append(ends[node.name][0])
                nodes += extend(*ends[node.name], node)
        copied = onnx.GraphProto(node=nodes)
        del inner.node[:]
        inner.node.extend(copied.node)

    visit(graph)
    by_layer = dict(zip(order, outputs, strict=True))
    expose(graph, dict.fromkeys(outputs, onnx.TensorProto.FLOAT))
    del graph.output[:]
    for name in layers:
        graph.output.append(onnx.helper.make_tensor_value_info(by_layer[name], onnx.TensorProto.FLOAT, None))
    return proto


def _run(
    state: State, plain: onnx.ModelProto, quantized: onnx.ModelProto, layers: Mapping[str, BiasPlace]
) -> dict[str, FloatArray]:
    """Float minus quantized means of the finite held samples by layer, float64 (samples, channels); {} without any.

    A layer in a branch has those of the samples for which the branch ran.
    """
    assert state.batching is not None
    config = {"session.disable_quant_qdq": "1"}  # weights become floats at load, activations keep their Q/DQ
    channels = [place.channels for place in layers.values()]
    with ThreadPoolExecutor(1) as pool:  # loading the one and running the other each leave a core idle
        loading = pool.submit(runtime.session, quantized, provider=state.provider, config=config)
        measure = runtime.session(plain, provider=state.provider)
        measured = _means(measure, state.batching, state.held, channels)
        correct = loading.result()
    usable = [sample for batch, means in measured for sample in _finite(batch, means)]
    if len(usable) < len(state.held):  # NaN and Inf of one sample would spoil the shifts of all
        measured = _means(measure, state.batching, usable, channels)
    parts: list[list[FloatArray]] = []
    for batch, means in measured:
        wanted = {f"{PREFIX}{name}.wanted": mean for name, mean in zip(layers, means, strict=True)}
        outputs = runtime.run(correct, None, {**_fed(batch), **wanted})
        real = [batch.real(output).astype(np.float64) for output in outputs]
        parts.append([found.reshape(-1, width) for found, width in zip(real, channels, strict=True)])
    return {name: np.concatenate([part[i] for part in parts]) for i, name in enumerate(layers)} if parts else {}


def _fed(batch: Batch) -> Feeds:
    degrees = np.array([max(batch.rows - 1, 1)], np.float32)
    return {**batch.feeds, ROWS: np.array([batch.rows], np.int64), DEGREES: degrees}


def _means(
    measure: Any, batching: Batching, samples: Sequence[Sample], channels: Sequence[int]
) -> list[tuple[Batch, list[graphs.Array]]]:
    """Float means of every layer batch by batch: (rows, channels) each, (0, channels) where it did not run."""
    found = []
    for batch in batching.together(len(samples)).batches(samples):
        outputs = runtime.run(measure, None, _fed(batch))
        found.append((batch, [mean.reshape(-1, width) for mean, width in zip(outputs, channels, strict=True)]))
    return found


def _finite(batch: Batch, means: Sequence[graphs.Array]) -> Iterator[Sample]:
    """The samples of a batch for which every mean is finite."""
    finite = [np.isfinite(batch.real(mean)).all(axis=1) for mean in means if mean.size]
    if not finite:
        return iter(batch.samples)
    # A whole feed may have several rows.
    each = np.all(finite, axis=0).reshape(len(batch.samples), -1).all(axis=1)
    return (sample for sample, good in zip(batch.samples, each, strict=True) if good)

"""What each layer reads in the float model and in the one that is quantized up to it, layer after layer."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Final, cast

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.arithmetic import affine
from qdqtool.data.batching import Sample
from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.graph import Array
from qdqtool.graphs.linear import LinearLayer
from qdqtool.observation.stepwise import Stepwise
from qdqtool.passes_api import State
from qdqtool.planning.insert import insert
from qdqtool.planning.plan import Key, Plan, Use
from qdqtool.spec import Format, QuantizedWeight, QuantParams, QuantSpec

_BYTES: Final = 2 << 30  # activations of both models that wait for a later layer
_LEAST: Final = 8  # samples that are run whatever they take


class Layerwise:
    """The float and the quantized model side by side, each run once over the held samples that memory has room for.

    Attributes:
        layers: in the order in which their inputs are to be taken.
    """

    def __init__(self, state: State, layers: Sequence[LinearLayer]) -> None:
        """Nothing has run yet; ``state`` has a plan, parameters, held samples and their batching.

        Args:
            state: the model; the quantized one starts with the parameters that are there now.
            layers: layers of the top graph, whose inputs will be taken once each.
        """
        assert state.plan is not None
        assert state.params is not None
        assert state.batching is not None
        plain = models.to_proto(state.graph, state.header)
        quantized = models.to_proto(
            insert(state.graph, _activations(state, models.opset(plain)), state.params), state.header
        )
        reads = {node.name: node.input[0] for node in quantized.graph.node if len(node.input)}
        order = {node.name: index for index, node in enumerate(quantized.graph.node)}
        self.layers = sorted(layers, key=lambda layer: order[layer.node.name])
        self._names = {layer.node.name: (layer.node.inputs[0].name, reads[layer.node.name]) for layer in layers}
        self._batches = list(state.batching.small().batches(_fitting(state)))
        feeds = [batch.feeds for batch in self._batches]
        exact, seen = ([names[i] for names in self._names.values()] for i in (0, 1))
        self._plain = Stepwise(plain, feeds, exact, provider=state.provider)
        self._quantized = Stepwise(quantized, feeds, seen, provider=state.provider)
        tensors = graphs.all_tensors(state.graph)
        for key in state.plan.constants:
            if isinstance(key, Use) and key in state.params:
                values = cast(Array, graphs.constant(tensors[state.plan.tensors[key]]))
                self.settle(key.node, key.index, _quantized(values, state.params[key]))

    def inputs(self, layer: LinearLayer) -> Iterator[tuple[Array, Array]]:
        """What a layer reads in the float and in the quantized model, sample by sample."""
        exact, seen = self._names[layer.node.name]
        taken = self._plain.take(exact), self._quantized.take(seen)
        for batch, *values in zip(self._batches, *taken, strict=True):
            yield from zip(*(_samples(one, len(batch.samples), batch.rows) for one in values), strict=True)

    def settle(self, node: str, index: int, values: Array) -> None:
        """Let a node of the quantized model that has not run yet read ``values`` as its input ``index``."""
        self._quantized.replace(node, index, values)


def _fitting(state: State) -> tuple[Sample, ...]:
    """The held samples, of large activations only as many as memory has room for."""
    count = max(_LEAST, _BYTES // max(2 * _waiting_bytes(state.graph), 1))
    if count < len(state.held):
        state.notes.append(f"weights were rounded by {count} of {len(state.held)} samples: activations are large")
    return state.held[:count]


def _waiting_bytes(graph: gs.Graph) -> int:
    """The most bytes of one sample's activations that wait for a later node at once; sizes not known count as 1."""
    last = {id(tensor): index for index, node in enumerate(graph.nodes) for tensor in graphs.reads(node)}
    waiting = most = 0
    ending: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        for tensor in node.outputs:
            if id(tensor) in last:
                sizes = [size for size in tensor.shape or () if isinstance(size, int)]
                size = math.prod(sizes) * np.dtype(tensor.dtype or np.float32).itemsize
                waiting += size
                ending[last[id(tensor)]] = ending.get(last[id(tensor)], 0) + size
        most = max(most, waiting)
        waiting -= ending.pop(index, 0)
    return most


def _activations(state: State, opset: int) -> Plan:
    """The plan without constants, and without what the model's opset has no type for: both stay float."""
    assert state.plan is not None
    kept = {
        key: entry
        for key, entry in state.plan.entries.items()
        if key not in state.plan.constants and _format(state.plan, key).min_opset <= opset
    }
    return replace(state.plan, entries=kept, constants=frozenset())


def _format(plan: Plan, key: Key) -> Format:
    entry = plan.entries[plan.resolve(key)]
    assert isinstance(entry, QuantSpec)
    return entry.format


def _quantized(values: Array, how: QuantParams | QuantizedWeight) -> Array:
    """A constant after its quantization, in its own type."""
    if isinstance(how, QuantizedWeight):
        return affine.dequantize(how.codes, how.params).astype(values.dtype)
    return affine.fake_quantize(values, how).astype(values.dtype)


def _samples(values: Array, samples: int, rows: int) -> Iterator[Array]:
    """What belongs to each sample of a batch; all of it where axis 0 is not the batch's."""
    if values.ndim == 0 or values.shape[0] % rows or rows == 1:
        yield values
        return
    each = values.shape[0] // rows
    for index in range(samples):
        yield values[index * each : (index + 1) * each]

"""Folds BatchNormalization and constant Mul, Div, Add and Sub in front of linear layers into them.

A chain of them is one map s x + t per channel, composed in float64, and

    W (s x + t) + b = (W s) x + (W t + b)

All readers of the chain must be layers that take it. Where one of them cannot take the shift (a convolution that pads
with zeros would shift those too), the scale alone is folded, and an Add of t / s stays:

    W (s x + t) + b = (W s) (x + t / s) + b

A layer's input has one quantization scale for all channels. With r_c the largest magnitude in channel c, a step is
proportional to max r, and the noise that reaches the layer's sums changes by the factor

    mean(s^2) max(r before)^2 / max(r after)^2

(before and after the chain). A BatchNormalization tells both ranges, three standard deviations around its means; else
channels are taken for equally wide after the chain, as they are where it was put there to make them so (SmoothQuant,
Xiao et al., ICML 2023). Where the factor is above 4, one bit, the chain stays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.batchnorm import normalization, parameters
from qdqtool.graphs.channels import ChannelMap, channel_map, constant_operand, stored
from qdqtool.graphs.graph import Array
from qdqtool.graphs.layer_input import LayerInput
from qdqtool.graphs.pattern import is_op
from qdqtool.passes_api import GRAPH_FACTS, Fact, State

_NOISE: Final = 4.0


@dataclass
class _Chain:
    """Nodes in order, what each does to a channel, and the tensor they do it to."""

    nodes: list[gs.Node]
    steps: list[ChannelMap]
    source: gs.Tensor
    channels: int

    @property
    def change(self) -> ChannelMap:
        """What they do altogether."""
        total = ChannelMap.identity(self.channels)
        for step in self.steps:
            total = total.then(step)
        return total


@dataclass
class _Run:
    """What one run of the pass reads and writes."""

    state: State
    outputs: set[int]
    taken: set[str]
    folded: set[str] = field(default_factory=set)
    reasons: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class FoldInputScale:
    """Fold BatchNormalization and per-channel Mul, Div, Add and Sub into the linear layers behind them."""

    name: ClassVar[str] = "fold-input-scale"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES}

    def run(self, state: State) -> int:
        """Fold the chain in front of every layer; returns how many nodes were folded."""
        run = _Run(state, graphs.output_ids(state.graph), graphs.tensor_names(state.graph))
        for _, graph in graphs.all_graphs(state.graph):
            for node in graph.nodes:
                layers = _layers_behind(node, run.outputs) if _is_affine(node) else []
                reason = layers if isinstance(layers, str) else _fold(node, layers, run) if layers else None
                if reason is not None:
                    run.reasons[node.name] = reason
        # What an earlier pass said about leaving them alone no longer holds.
        state.skipped[:] = [skip for skip in state.skipped if skip.node not in run.folded]
        for name, reason in run.reasons.items():
            state.skip(self.name, name, reason)
        graphs.sweep(state.graph)
        return len(run.folded)


def _is_affine(node: gs.Node) -> bool:
    return is_op(node, "BatchNormalization") or constant_operand(node) is not None


def _layers_behind(node: gs.Node, outputs: set[int]) -> list[LayerInput] | str:
    """The layers that read a node's result, [] where none does; a reason where something else does, too."""
    tensor = node.outputs[0]
    found, others = [], id(tensor) in outputs
    for reader, index in graphs.uses(tensor):
        layer = LayerInput.of(reader, index)
        if layer is None:
            others = True
        else:
            found.append(layer)
    return f"{tensor.name!r} is read elsewhere too, or is a graph output" if found and others else found


def _fold(tail: gs.Node, layers: list[LayerInput], run: _Run) -> str | None:
    """Fold the chain that ends with ``tail``, or its scale alone; returns the reason where it stays."""
    found = _chain(tail, layers, run.outputs)
    if isinstance(found, str):
        return found
    change, why = found.change, None
    if change.shift.any():
        why = next((w for w in (layer.shift_obstacle(run.outputs) for layer in layers) if w), None)
    if why is not None:
        if (change.scale == 1.0).all() or ((change.scale == 0) & (change.shift != 0)).any():
            return why
        change = ChannelMap(change.scale, np.zeros_like(change.shift))
    reason = _noise(found, whole=why is None)
    if reason is not None:
        return reason
    values = [layer.folded(change, run.outputs) for layer in layers]
    rest = None if why is None else _rest(found, layers[0])
    if any(pair is None for pair in values) or (why is not None and rest is None):
        return f"the folded parameters of {layers[0].layer.node.name!r} would not be finite"
    for layer, pair in zip(layers, values, strict=True):
        assert pair is not None
        layer.store(*pair, run.outputs, run.taken)
    run.folded |= {node.name for node in found.nodes}
    if rest is None:
        _take_out(found, layers, run)
    else:
        _leave_add(found, rest, run)
        run.reasons[tail.name] = f"its shift stays: {why}"
    return None


def _chain(tail: gs.Node, layers: list[LayerInput], outputs: set[int]) -> _Chain | str:
    """The longest chain that ends with ``tail`` and does something to each channel alone; a reason if there is none."""
    first = layers[0]
    reason = next((why for why in (layer.obstacle() for layer in layers) if why is not None), None)
    if reason is not None:
        return reason
    if any((layer.channels, layer.axis) != (first.channels, first.axis) for layer in layers):
        return f"{first.layer.node.name!r} and others read its result along other channels"
    found = _Chain([], [], tail.outputs[0], first.channels)
    node: gs.Node | None = tail
    while node is not None and _is_affine(node):
        step = _step(node, first, outputs)
        if isinstance(step, str):
            reason = step
            break
        found.nodes.insert(0, node)
        found.steps.insert(0, step)
        found.source = node.inputs[1 if constant_operand(node) == 0 else 0]
        node = graphs.producer(found.source) if graphs.single_use(found.source, outputs) is not None else None
    return (_widening(found, first) or _fusion(found) or found) if found.nodes else reason or ""


def _step(node: gs.Node, layer: LayerInput, outputs: set[int]) -> ChannelMap | str:
    if node.op != "BatchNormalization":
        return channel_map(node, layer.channels, layer.axis, layer.rank)
    if layer.axis == -1 and layer.rank != 2:
        return f"its channels are axis 1, those of {layer.layer.node.name!r} the last of an input not of rank 2"
    found = normalization(node, outputs)
    if isinstance(found, ChannelMap) and found.scale.size != layer.channels:
        return f"it has {found.scale.size} channels, {layer.layer.node.name!r} reads {layer.channels}"
    return found


def _widening(found: _Chain, layer: LayerInput) -> str | None:
    """Why the chain's result may have another shape than its source."""
    operands = [node.inputs[index] for node in found.nodes if (index := constant_operand(node)) is not None]
    shape = found.source.shape
    fits = shape is not None and (layer.rank is None or len(shape) == layer.rank)
    if all(len(operand.shape) == 0 for operand in operands) or (fits and shape[layer.axis] == layer.channels):
        return None
    return f"{found.source.name!r} is not known to have the {layer.channels} channels of the result"


def _fusion(found: _Chain) -> str | None:
    """Why the chain is the end of something that the runtime fuses: a normalization or a Gelu in parts."""
    maker = graphs.producer(found.source)
    if maker is None:
        return None
    before = [graphs.producer(read) for read in maker.inputs]
    root = is_op(maker, "Div") and is_op(before[1], "Sqrt")
    curve = is_op(maker, "Mul") and any(
        node is not None and is_op(node, "Add") and any(is_op(graphs.producer(t), "Erf", "Tanh") for t in node.inputs)
        for node in before
    )
    return "the runtime fuses it with the parts of a normalization or Gelu in front of it" if root or curve else None


def _noise(found: _Chain, *, whole: bool) -> str | None:
    """Why the source (with the shift left: source and shift) is nothing to quantize with one scale for all channels."""
    change, mean, deviation = found.change, np.zeros(found.channels), np.full(found.channels, 1 / 3)
    for node, step in zip(found.nodes, found.steps, strict=True):
        values = parameters(node) if node.op == "BatchNormalization" else None
        if values is None:
            mean, deviation = mean * step.scale + step.shift, deviation * np.abs(step.scale)
        else:
            mean, deviation = values[1], np.abs(values[0])
    used = change.scale != 0
    known = any(node.op == "BatchNormalization" for node in found.nodes)
    after = np.abs(mean) + 3 * deviation if known else np.ones(found.channels)
    if not used.any() or not after.any():
        return None
    scale, shift = change.scale[used], change.shift[used] if known and whole else 0.0
    before = (np.abs(mean[used] - shift) + 3 * deviation[used] if known else after[used]) / np.abs(scale)
    growth = float(np.mean(change.scale**2) * np.max(before) ** 2 / np.max(after) ** 2)
    if growth <= _NOISE:
        return None
    return (
        f"its channels are better balanced than its input's: folded, quantization noise would grow {growth:.3g} times"
    )


def _rest(found: _Chain, layer: LayerInput) -> Array | None:
    """The shift that stays, as operand of an Add in front of the layer."""
    scale, shift = found.change.scale, found.change.shift
    rest = np.divide(shift, scale, out=np.zeros_like(shift), where=scale != 0)
    shape = (-1,) if layer.axis == -1 else (-1, *(1,) * ((layer.rank or 2) - 2))
    rounded = stored(rest, np.dtype(layer.layer.weight.dtype))
    return None if rounded is None else rounded.reshape(shape)


def _take_out(found: _Chain, layers: list[LayerInput], run: _Run) -> None:
    parts = [name for node in found.nodes for name in run.state.origins.pop(node.name, (node.name,))]
    for layer in layers:
        graphs.set_input(layer.layer.node, 0, found.source)
        run.state.merged(layer.layer.node.name, *parts)
    for node in found.nodes:
        graphs.unlink(node)


def _leave_add(found: _Chain, values: Array, run: _Run) -> None:
    """Make one Add of the whole chain: its last node, which keeps its result."""
    last, result = found.nodes[-1], found.nodes[-1].outputs[0]
    for node in found.nodes:
        graphs.unlink(node)
    last.op, last.attrs = "Add", {}
    last.inputs = [found.source, gs.Constant(graphs.fresh_name(f"{last.name}.shift", run.taken), values)]
    last.outputs = [result]
    run.state.merged(last.name, *(node.name for node in found.nodes[:-1]))

"""Where activations can be smoothed: tensors that linear layers read in integers, and what makes them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.channel_paths import ChannelPath, follow
from qdqtool.graphs.channel_sources import InputSource, LayerSource, NormalizationSource, Source
from qdqtool.graphs.layer_input import LayerInput
from qdqtool.passes_api import State
from qdqtool.planning.plan import Output, Plan, Use
from qdqtool.planning.smoothing import specs
from qdqtool.spec import QuantSpec


@dataclass(frozen=True)
class Site:
    """A tensor with the layers that take its factors up.

    Attributes:
        source: what multiplies its channels.
        path: where the factors go.
        free: whether that takes no operator more.
    """

    source: Source
    path: ChannelPath
    free: bool

    @property
    def start(self) -> str:
        """The first tensor that the factors reach."""
        return str(self.source.tensor.name)


def sites(state: State) -> Iterator[Site | tuple[str, str]]:
    """Every tensor of the top graph that can be smoothed, or (node, reason) where one cannot.

    Inputs of the model are among them where the recipe has it so.
    """
    assert state.plan is not None
    outputs, here = graphs.output_ids(state.graph), {id(node) for node in state.graph.nodes}
    planned: dict[str, list[QuantSpec]] = {}
    for key, spec in state.plan.specs():
        planned.setdefault(state.plan.tensors[key], []).append(spec)
    for source in _sources(state, outputs):
        if isinstance(source, tuple):
            yield source
            continue
        path = follow(source.tensor, source.axis, source.channels, here, outputs)
        reason = path if isinstance(path, str) else _obstacle(source, path, state.plan, planned)
        if reason is not None:
            yield source.name, reason
        elif isinstance(path, ChannelPath):
            yield Site(source, path, not isinstance(source, InputSource))


def _sources(state: State, outputs: set[int]) -> Iterator[Source | tuple[str, str]]:
    wanted = state.recipe.smoothing
    if wanted in ("inputs", "all"):
        yield from (each for tensor in state.graph.inputs if (each := _input(tensor, state)) is not None)
    for node in state.graph.nodes if wanted in ("free", "all") else ():
        found = NormalizationSource.of(node) or LayerSource.of(node, outputs)
        if isinstance(found, str):
            yield node.name, found
        elif found is not None and found.axis == -1:
            yield found


def _input(tensor: gs.Tensor, state: State) -> InputSource | None:
    """A model input that a linear layer reads."""
    layers = [LayerInput.of(node, index) for node, index in graphs.uses(tensor)]
    layer = next((each for each in layers if each is not None), None)
    return None if layer is None else InputSource(tensor, state.graph, layer.axis, layer.channels)


def _obstacle(source: Source, path: ChannelPath, plan: Plan, planned: Mapping[str, Sequence[QuantSpec]]) -> str | None:
    """What in the plan speaks against factors on a path; None where nothing does."""
    found = [specs(layer, plan) for layer in path.layers]
    if not any(activation is not None and weight is not None for activation, weight in found):
        return "no layer reads it in integers"
    specs_there = [spec for name in path.axes for spec in planned.get(name, ())]
    if any(spec.fixed is not None or spec.granularity.axis is not None for spec in specs_there):
        return "a range is set for it, or it has one for each channel"
    if isinstance(source, InputSource) and Output(source.tensor.name) in plan.entries:
        return "the model's input is in integers for all its readers"
    weight = plan.entries.get(Use(source.name, 1)) if isinstance(source, LayerSource) else None
    if isinstance(weight, QuantSpec) and weight.granularity.axis is None:
        return "its weight has one scale for all channels, which factors would set apart"
    return None

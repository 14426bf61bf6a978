"""What every layer may become: its weight and inputs at each width, all from one preparation and one observation.

The model is prepared, planned and observed once. For each width the plan's specs of weights and inputs are exchanged,
and scales are chosen anew, which costs no run over the data but the one for rounding weights of few bits.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final, cast

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool import chains
from qdqtool.arithmetic import affine
from qdqtool.errors import ModelError
from qdqtool.graphs import graph as graphs
from qdqtool.graphs.graph import Array
from qdqtool.graphs.linear import LinearLayer, weight_inputs
from qdqtool.mixed_precision import rounding
from qdqtool.mixed_precision.widths import FLOAT, Width
from qdqtool.passes import ChooseRanges, InsertQdq
from qdqtool.passes_api import Fact, PassManager, State
from qdqtool.planning import low_bits
from qdqtool.planning.plan import Entry, Key, Output, Plan, SharedWith, Use, params_of
from qdqtool.planning.precision import Precision, weight_spec
from qdqtool.recipe import Recipe
from qdqtool.spec import QuantizedWeight, QuantParams, QuantSpec

PASS: Final = "search"
"""Under this name layers that cannot be searched are recorded."""


@dataclass(frozen=True)
class Layer:
    """A linear layer with a constant weight that the plan quantizes.

    Attributes:
        name: of its node in the prepared graph.
        op: its operator.
        elements: of its weight.
        scales: number of scales that the weight has.
        inputs: indices of the activations that it reads in integers.
    """

    name: str
    op: str
    elements: int
    scales: int
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Coded:
    """A layer at one width: its weight after rounding, float32, and how its inputs are rounded, by index."""

    weight: Array
    inputs: Mapping[int, QuantParams]


@dataclass(frozen=True)
class Candidates:
    """The prepared float graph and all that its layers may become.

    Attributes:
        state: with the prepared graph, its plan and its statistics.
        layers: in the graph's order.
        coded: (layer, width) -> what it becomes; float is absent.
    """

    state: State
    layers: tuple[Layer, ...]
    coded: Mapping[tuple[str, str], Coded]


def prepare(state: State, facts: frozenset[Fact], recipe: Recipe) -> tuple[Layer, ...]:
    """Prepare, plan and observe the model in ``state``; returns the layers that can be searched.

    Raises:
        ModelError: there is none.
    """
    steps = [*chains.preparation(recipe), *chains.quantization(recipe)]
    cut = next(index for index, step in enumerate(steps) if isinstance(step, ChooseRanges | InsertQdq))
    PassManager(steps[:cut]).run(state, facts | {Fact.DATA})
    layers = tuple(_layers(state))
    if not layers:
        raise ModelError("no linear layer of this model is quantized, so there is nothing to search: see --dry-run")
    return layers


def _layers(state: State) -> list[Layer]:
    assert state.plan is not None
    top, found = {id(node) for node in state.graph.nodes}, []
    for node in graphs.all_nodes(state.graph):
        layer = LinearLayer.of(node)
        if layer is None or Use(node.name, 1) not in state.plan.constants:
            continue
        if id(node) not in top:
            state.skip(PASS, node.name, "it is in a control-flow body, and keeps the recipe's own precision")
            continue
        spec = cast(QuantSpec, state.plan.entries[Use(node.name, 1)])
        values = cast(Array, graphs.constant(layer.weight))
        axis = spec.granularity.axis
        inputs = tuple(
            index
            for index, tensor in enumerate(node.inputs)
            if index not in weight_inputs(node)
            and (key := state.plan.activation_of(node.name, index, tensor.name)) is not None
            and key not in state.plan.constants
        )
        found.append(Layer(node.name, node.op, values.size, 1 if axis is None else values.shape[axis], inputs))
    return found


def code(state: State, layers: Sequence[Layer], widths: Sequence[Width]) -> Candidates:
    """Quantize every layer at every width; ``state`` keeps its plan."""
    assert state.plan is not None
    plan, coded = state.plan, {}
    nodes = {node.name: node for node in state.graph.nodes}
    params: dict[str, dict[str, QuantParams]] = {layer.name: {} for layer in layers}
    for width in widths:
        if width.name == FLOAT:
            continue
        entries, tensors = _entries(state, layers, width, nodes), _tensors(plan, layers, nodes)
        state.plan = replace(plan, entries={**plan.entries, **entries}, tensors={**tensors, **plan.tensors})
        ChooseRanges().run(state)
        for layer in layers:
            coded[layer.name, width.name] = _coded(state, nodes[layer.name], layer)
            assert state.params is not None
            params[layer.name][width.name] = params_of(state.params[Use(layer.name, 1)])
        state.plan = plan
    if state.recipe.weight_rounding in ("auto", "gptq", "adaround"):
        for name, chosen, weight in rounding.rounded(state, params):
            coded[name, chosen] = replace(coded[name, chosen], weight=weight)
    return Candidates(state, tuple(layers), coded)


def _entries(state: State, layers: Sequence[Layer], width: Width, nodes: Mapping[str, gs.Node]) -> dict[Key, Entry]:
    """Specs of weights and inputs at a width, by use."""
    assert state.plan is not None
    assert width.precision is not None
    recipe, precision = state.recipe, Precision.of(width.precision)
    found: dict[Key, Entry] = {}
    for layer in layers:
        weight = cast(QuantSpec, state.plan.entries[Use(layer.name, 1)])
        spec = weight_spec(recipe.weight_format, precision.weights, recipe.storage)
        # What was decided for 8 bits (7 bits without VNNI, a type by the user) holds for 8 bits.
        spec = low_bits.shared_out_weight(replace(spec, granularity=weight.granularity), recipe, precision.weights)
        found[Use(layer.name, 1)] = weight if width.bits == 8 else spec
        for index in layer.inputs:
            key = state.plan.activation_of(layer.name, index, nodes[layer.name].inputs[index].name)
            assert key is not None
            usual = state.plan.entries[state.plan.resolve(key)]
            assert isinstance(usual, QuantSpec)
            if precision.wide:
                wide = low_bits.activation_spec(state.target, precision.activations)
                found[Use(layer.name, index)] = replace(wide, granularity=usual.granularity, headroom=usual.headroom)
            elif isinstance(key, Output):
                found[Use(layer.name, index)] = SharedWith(key)
    return found


def _tensors(plan: Plan, layers: Sequence[Layer], nodes: Mapping[str, gs.Node]) -> dict[Key, str]:
    """The tensor that tells the range of every input: the one that it shares codes with was observed."""
    found: dict[Key, str] = {}
    for layer in layers:
        for index in layer.inputs:
            key = plan.activation_of(layer.name, index, nodes[layer.name].inputs[index].name)
            assert key is not None
            found[Use(layer.name, index)] = plan.tensors[plan.resolve(key)]
    return found


def _coded(state: State, node: gs.Node, layer: Layer) -> Coded:
    assert state.plan is not None
    assert state.params is not None
    value = state.params[Use(layer.name, 1)]
    values = cast(Array, graphs.constant(node.inputs[1]))
    if isinstance(value, QuantizedWeight):
        weight = affine.dequantize(value.codes, value.params)
    else:
        weight = affine.fake_quantize(values, value)
    inputs = {i: params_of(state.params[state.plan.resolve(Use(layer.name, i))]) for i in layer.inputs}
    return Coded(np.ascontiguousarray(weight, values.dtype), inputs)

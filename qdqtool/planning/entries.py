"""What a plan is made of while it is made: specs by target, recipe and the user's overrides."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TYPE_CHECKING

import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.channels import channel_axis
from qdqtool.graphs.linear import channel_axis_of_weight
from qdqtool.planning import low_bits
from qdqtool.planning.plan import Entry, Key, Output, Plan, SharedWith, Use
from qdqtool.planning.precision import FEW_BITS, Precision, weight_spec, width
from qdqtool.planning.selection import Selection
from qdqtool.planning.target import OpRule, Target
from qdqtool.spec import PER_TENSOR, QuantSpec, per_channel

if TYPE_CHECKING:
    from qdqtool.passes_api import State


class Entries:
    """Entries of a plan by key, each with the tensor that it is about.

    Attributes:
        of: key -> what happens there.
        tensors: key -> name of the tensor.
        constants: keys whose tensor is a constant.
    """

    def __init__(self, state: State, selection: Selection, target: Target) -> None:
        """Nothing yet; ``selection`` holds the recipe's overrides, ``target`` says how activations are quantized."""
        self._target, self._recipe, self._selection = target, state.recipe, selection
        self._ends = low_bits.ends(state.graph) if state.recipe.ends_in_8_bits else frozenset()
        self._paths = {node.name: path for path, inner in graphs.all_graphs(state.graph) for node in inner.nodes}
        self._fed = {id(tensor) for tensor in state.graph.inputs}
        self._leaving = graphs.leaving_ids(state.graph)
        self.of: dict[Key, Entry] = {}
        self.tensors: dict[Key, str] = {}
        self.constants: set[Key] = set()

    def add(self, key: Key, entry: Entry, tensor: gs.Tensor) -> None:
        """Put an entry about ``tensor`` at ``key``, which gets the path of its graph."""
        maker = key.node if isinstance(key, Use) else tensor.inputs[0].name
        key = replace(key, graph=self._paths[maker])
        self.of[key] = entry
        self.tensors[key] = tensor.name
        if graphs.is_constant(tensor):
            self.constants.add(key)

    def bits(self, node: gs.Node) -> Precision:
        """Bits of a node's weight and inputs: the user's for it, 8 at the ends where wanted, else the recipe's."""
        override = self._selection.node_override(node)
        if override is not None and override.override.precision is not None:
            return Precision.of(override.override.precision)
        return Precision() if node.name in self._ends else self._recipe.bits

    def activation(
        self, tensor: gs.Tensor, bound: tuple[float, float] | None, bits: int = Precision.activations
    ) -> QuantSpec:
        """The spec of an activation whose values an activation function keeps inside ``bound``."""
        weight = 1.0 if id(tensor) in self._leaving else negative_weight(tensor)
        spec = replace(low_bits.activation_spec(self._target, bits), bound=bound, negative_weight=weight)
        channels = self._recipe.activations_by_channel and not graphs.is_constant(tensor)
        if (channels or self._selection.per_channel(tensor)) and not self._in_body(tensor):
            spec = replace(spec, granularity=per_channel(channel_axis(tensor)))
            spec = low_bits.shared_out(spec, self._recipe)
        return self._selection.on_tensor(tensor, spec)

    def _in_body(self, tensor: gs.Tensor) -> bool:
        """Whether a control-flow body makes the tensor, or takes it in: its channels are not observed."""
        maker = graphs.producer(tensor)
        return bool(self._paths[maker.name]) if maker is not None else id(tensor) not in self._fed

    def weight(self, node: gs.Node, tensor: gs.Tensor) -> QuantSpec:
        """The spec of a weight of a linear or recurrent layer."""
        wanted = self._selection.granularity(node, tensor)
        per_tensor = wanted == "per_tensor" or (wanted is None and not self._recipe.per_channel)
        axis = None if per_tensor else channel_axis_of_weight(node)
        bits = self.bits(node).weights
        spec = weight_spec(self._recipe.weight_format, bits, self._recipe.storage)
        if self._recipe.reduce_range and width(spec) == spec.format.bits == 8:
            spec = replace(spec, bits=7)
        spec = replace(spec, granularity=PER_TENSOR if axis is None else per_channel(axis))
        spec = low_bits.shared_out_weight(spec, self._recipe, bits)
        return self._selection.on_tensor(tensor, spec)

    def without_kernel(self, node: gs.Node, rule: OpRule, activations: tuple[int, ...]) -> str | None:
        """What it is in a node's specs that keeps it from an integer kernel; None where nothing does."""
        if any(self.have_channel_scales(node, index) for index in activations):
            return "an input has a scale for each channel"
        if not rule.kernel:
            return f"activations of {self._recipe.precision} stand where they cost the least accuracy"
        weight = self.of.get(Use(node.name, 1)) if rule.weight else None
        if isinstance(weight, QuantSpec) and weight.format.bits <= FEW_BITS:
            return f"its weight is stored as {weight.format.name} (storage int8: the same codes in 8 bits)"
        if isinstance(weight, QuantSpec) and weight.split:
            return "its weight is put together of groups of channels at every run (storage int8: codes in 8 bits)"
        return None

    def have_channel_scales(self, node: gs.Node, index: int) -> bool:
        """Whether a node reads an activation that has a scale for each channel."""
        use = Use(node.name, index)
        key = use if use in self.of else Output(node.inputs[index].name)
        if key not in self.of:
            return False
        entry = self.of[Plan(self.of).resolve(key)]
        return isinstance(entry, QuantSpec) and key not in self.constants and entry.granularity.axis is not None

    def share(self, concat: gs.Node, outputs: set[int]) -> None:
        """Let a Concat's inputs that nothing else reads take over its range, unless activation functions forbid it.

        ``outputs`` comes from :func:`qdqtool.graphs.graph.leaving_ids`.
        """
        root = Output(concat.outputs[0].name)
        if root not in self.of:
            return
        keys = [Output(t.name) for t in concat.inputs]
        specs = [self.of.get(key) for key in keys]
        single = [graphs.single_use(t, outputs) is not None for t in concat.inputs]
        bounds = {spec.bound if isinstance(spec, QuantSpec) else None for spec in specs}
        if len(bounds) != 1 or not all(single) or not all(isinstance(spec, QuantSpec) for spec in specs):
            return
        if any(self._selection.overrides(t) for t in concat.inputs):
            return
        entry = self.of[root]
        if isinstance(entry, QuantSpec) and entry.bound is None:
            self.of[root] = replace(entry, bound=bounds.pop())
        for key in keys:
            self.of[key] = SharedWith(root)


def activation_bound(node: gs.Node) -> tuple[float, float] | None:
    """The interval into which a Relu or Clip maps; None where it is not known, or does not hold 0."""
    if node.op == "Relu":
        return (0.0, math.inf)
    limits = []
    for index, (name, default) in enumerate((("min", -math.inf), ("max", math.inf)), start=1):
        tensor = graphs.input_at(node, index)
        value = graphs.constant(tensor)
        if tensor is not None and (value is None or value.size != 1):
            return None
        limits.append(float(value.item()) if value is not None else float(node.attrs.get(name, default)))
    return (limits[0], limits[1]) if limits[0] <= 0 < limits[1] else None


def negative_weight(tensor: gs.Tensor) -> float:
    """What squared errors below 0 count for those who read the tensor, beside those above: alpha² of a LeakyRelu."""
    slopes = [float(node.attrs.get("alpha", 0.01)) if node.op == "LeakyRelu" else 1.0 for node in tensor.outputs]
    return max((slope**2 for slope in slopes), default=1.0)

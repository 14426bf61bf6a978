"""Decide which uses of which tensors are quantized on the target, without any number yet.

A walk forward over the graph gives every tensor a state: in integers (its producer's kernel puts them out), either (the
kernel can put out both), or float. A walk back finds which tensors that can be either are wanted in integers by a
reader. Both are linear in the nodes. Then each operator in integers gets its entries: its activations, unless their
producer gives them, its weight and bias, its output.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs import spectrum
from qdqtool.graphs.linear import LinearLayer, bias_place, weight_inputs
from qdqtool.observation import bodies
from qdqtool.passes_api import Fact, State
from qdqtool.planning import low_bits
from qdqtool.planning.entries import Entries, activation_bound
from qdqtool.planning.obstacles import is_dequantized, is_quantized_behind, obstacle
from qdqtool.planning.plan import DerivedFrom, Output, Plan, SharedWith, Use
from qdqtool.planning.selection import Selection
from qdqtool.planning.target import Emit, OpRule


@dataclass(frozen=True)
class PlanQuantization:
    """Decide which uses of which tensors are quantized on the target."""

    name: ClassVar[str] = "plan"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAN})
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS, Fact.PARAMS, Fact.QDQ})

    def run(self, state: State) -> int:
        """Set ``state.plan``; returns its number of entries."""
        state.plan = _Planner(state).plan()
        return len(state.plan.entries)


class _Kind(enum.Enum):
    INTEGER = "put out in integers"
    EITHER = "integers or float, as readers want"
    FLOAT = "float"


@dataclass
class _Unit:
    """A node to quantize with what fuses into it: the Add of its bias and an activation function."""

    node: gs.Node
    rule: OpRule
    outputs: list[gs.Tensor]
    bias: Use | None = None
    bound: tuple[float, float] | None = None
    activations: tuple[int, ...] = field(default=())


class _Planner:
    def __init__(self, state: State) -> None:
        self.state, self.recipe = state, state.recipe
        channels = self.recipe.activations_by_channel
        self.target = low_bits.placed(state.target, self.recipe.bits, channels=channels)
        self.graph = state.graph
        self.outputs = graphs.leaving_ids(state.graph)
        self.hidden = bodies.hidden(state.graph)
        self.selection = Selection(state)
        self.spectra = spectrum.layers(state.graph)
        self.kinds: dict[int, _Kind] = {}
        self.wanted: set[int] = set()
        self.fused: set[int] = set()
        self.entries = Entries(state, self.selection, self.target)
        self.kernels: dict[str, str] = {}
        self.weight_only: set[str] = set()

    def plan(self) -> Plan:
        units = [unit for node in graphs.all_nodes(self.graph) for unit in self._unit(node)]
        for unit in reversed(units):
            self._want(unit)
        for unit in units:
            self._emit(unit)
        if self.target.share_concat:
            for unit in units:
                if unit.node.op == "Concat":
                    self.entries.share(unit.node, self.outputs)
        if self.target.residual:
            for node in graphs.all_nodes(self.graph):
                self._residual(node)
        found = self.entries
        plan = Plan(found.of, found.tensors, frozenset(found.constants), self.kernels, frozenset(self.weight_only))
        self.selection.check_tensors(plan)
        return plan

    def _skip(self, node: gs.Node, reason: str) -> None:
        self.state.skip(PlanQuantization.name, node.name, reason)

    # Forward: which nodes, and what they put out.

    def _unit(self, node: gs.Node) -> Iterator[_Unit]:
        if id(node) in self.fused:
            return
        rule = self._rule(node)
        if rule is None:
            return
        unit = _Unit(node, rule, list(node.outputs))
        unit.activations = self._activations(node, rule)
        if rule.follows:
            kinds = {self._kind(node.inputs[i]) for i in unit.activations if not graphs.is_constant(node.inputs[i])}
            if _Kind.INTEGER not in kinds or _Kind.FLOAT in kinds:
                if rule.output is Emit.SAME and kinds == {_Kind.EITHER}:
                    self._set_kinds(unit, _Kind.EITHER)
                    yield unit
                elif graphs.is_float(node.outputs[0]):
                    self._skip(
                        node,
                        "its inputs are float here; converting them for this operator alone costs more than it gains",
                    )
                return
        if rule.output in (Emit.ALWAYS, Emit.WANTED):
            self._fuse(unit)
        emitted = {
            Emit.ALWAYS: _Kind.INTEGER,
            Emit.SAME: _Kind.INTEGER,
            Emit.WANTED: _Kind.EITHER,
            Emit.NEVER: _Kind.FLOAT,
        }
        self._set_kinds(unit, emitted[rule.output])
        yield unit

    def _rule(self, node: gs.Node) -> OpRule | None:
        """The target's rule for the node; None, with the reason recorded, where it stays float."""
        if not any(tensor.dtype is None or graphs.is_float(tensor) for tensor in node.outputs):
            return None  # shapes, indices and masks: nothing to quantize
        if node.op == "Add" and self.target.residual:
            return None  # _residual looks at it
        if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
            return None  # what is quantized are the nodes inside
        rule = self.target.by_op.get(node.op) if node.domain in (None, "", "ai.onnx") else None
        if rule is None:
            self._skip(node, f"{node.op} has no integer kernel on target {self.target.name}")
            return None
        reason = self.selection.left_out(node) or self.hidden.get(id(node)) or self._unnamed(node, rule)
        reason = reason or obstacle(node, rule, self.target, self.graph.opset)
        if reason is None and not self.selection.asked_for(node):
            reason = self.spectra.get(id(node))
        if reason is not None:
            self._skip(node, reason)
            return None
        return rule

    def _unnamed(self, node: gs.Node, rule: OpRule) -> str | None:
        if not rule.named or node.op in (self.recipe.op_types_to_quantize or ()):
            return None
        return (
            f"{node.op} has no integer kernel on target {self.target.name}, and its weights would be dequantized at "
            f"every run; name {node.op} in op_types_to_quantize to have the smaller file all the same"
        )

    def _activations(self, node: gs.Node, rule: OpRule) -> tuple[int, ...]:
        indices = range(len(node.inputs)) if rule.activations is None else rule.activations
        weight = 1 if rule.weight and graphs.is_constant(graphs.input_at(node, 1)) else None
        if rule.weight and weight is None and not rule.weight_only:
            indices = (0, 1)  # a computed weight is an activation
        return tuple(i for i in indices if i != weight and graphs.input_at(node, i) is not None)

    def _kind(self, tensor: gs.Tensor) -> _Kind:
        return self.kinds.get(id(tensor), _Kind.FLOAT)

    def _set_kinds(self, unit: _Unit, kind: _Kind) -> None:
        for tensor in unit.outputs:
            self.kinds[id(tensor)] = _Kind.FLOAT if is_quantized_behind(tensor) else kind

    def _fuse(self, unit: _Unit) -> None:
        """Take the Add of a MatMul's bias and one activation function into the unit."""
        unit.bound = unit.rule.bound
        reader = graphs.single_use(unit.outputs[0], self.outputs)
        if reader is not None and unit.node.op == "MatMul" and unit.rule.weight:
            place = bias_place(unit.node, self.outputs)
            if place is not None and self.selection.left_out(reader) is None:
                unit.bias = Use(place.node, place.index)
                reader = self._take(unit, reader)
        if reader is not None and reader.op in self.target.absorbed and reader.inputs[0] is unit.outputs[0]:
            bound = activation_bound(reader)
            if bound is not None and self.selection.left_out(reader) is None:
                unit.bound = bound
                self._take(unit, reader)

    def _take(self, unit: _Unit, reader: gs.Node) -> gs.Node | None:
        self.fused.add(id(reader))
        unit.outputs = list(reader.outputs)
        return graphs.single_use(unit.outputs[0], self.outputs)

    # Back: which tensors are wanted in integers.

    def _want(self, unit: _Unit) -> None:
        if unit.rule.output is Emit.SAME and not any(
            self._kind(t) is _Kind.INTEGER or id(t) in self.wanted for t in unit.outputs
        ):
            return
        self.wanted.update(id(unit.node.inputs[i]) for i in unit.activations)

    def _in_integers(self, tensor: gs.Tensor) -> bool:
        """Whether the tensor's producer puts out integers."""
        kind = self._kind(tensor)
        return kind is _Kind.INTEGER or (kind is _Kind.EITHER and id(tensor) in self.wanted)

    # Entries.

    def _emit(self, unit: _Unit) -> None:
        node, rule = unit.node, unit.rule
        if rule.output is Emit.SAME:
            if self._in_integers(node.inputs[0]):
                if rule.kernel:
                    self.kernels[node.name] = node.op
                for tensor in unit.outputs:
                    if graphs.is_float(tensor) and not is_quantized_behind(tensor):
                        self.entries.add(Output(tensor.name), SharedWith(Output(node.inputs[0].name)), tensor)
            return
        for index in unit.activations:
            self._emit_activation(node, index)
        if rule.weight and graphs.is_constant(graphs.input_at(node, 1)):
            self._emit_weight(unit)
        if rule.weight_only:
            self.weight_only.add(node.name)
            self._skip(
                node,
                f"{node.op} has no integer kernel on target {self.target.name}: its weight alone is stored in integers",
            )
            return
        reason = self.entries.without_kernel(node, rule, unit.activations)
        if reason is not None:
            self._skip(node, f"{reason}, which no integer kernel takes: it runs in float")
        else:
            self.kernels[node.name] = node.op
        if all(self._in_integers(t) for t in unit.outputs):
            for tensor in unit.outputs:
                self.entries.add(Output(tensor.name), self.entries.activation(tensor, unit.bound), tensor)

    def _emit_activation(self, node: gs.Node, index: int) -> None:
        tensor, key = node.inputs[index], Use(node.name, index)
        override = self.selection.node_override(node)
        if is_dequantized(tensor):
            return  # the model itself has it in integers
        bits = self.entries.bits(node).activations
        own = override is not None or bits != self.recipe.bits.activations
        if not graphs.is_constant(tensor) and not own and self._in_integers(tensor):
            return  # quantized where it is produced
        spec = self.entries.activation(tensor, None, bits)
        self.entries.add(key, spec if override is None else override.on(spec), tensor)

    def _emit_weight(self, unit: _Unit) -> None:
        node = unit.node
        layer = LinearLayer.of(node)
        for index in weight_inputs(node):
            weight = node.inputs[index]
            self.entries.add(Use(node.name, index), self.entries.weight(node, weight), weight)
        if unit.bias is None and layer is not None and layer.bias is not None and layer.bias_input is not None:
            unit.bias = Use(node.name, layer.bias_input)
        if unit.bias is not None and self.target.bias_int32 and not unit.rule.weight_only:
            self._emit_bias(unit, Use(node.name, 1))

    def _emit_bias(self, unit: _Unit, weight: Use) -> None:
        assert unit.bias is not None
        reader = unit.node if unit.bias.node == unit.node.name else unit.node.outputs[0].outputs[0]
        bias, source = reader.inputs[unit.bias.index], unit.node.inputs[0]
        use = Use(unit.node.name, 0)
        activation = use if use in self.entries.of else Output(source.name)
        if is_dequantized(source):
            return  # its scale is the model's own, and no parameter here: the runtime rounds the bias as it loads
        if self.entries.bits(unit.node).wide:
            return
        if self.entries.have_channel_scales(unit.node, 0):
            return  # its sums have no scale of their own: the bias stays float
        self.entries.add(unit.bias, DerivedFrom(activation, weight), bias)

    def _residual(self, node: gs.Node) -> None:
        """At an Add behind a convolution quantize the other branch only, so that Conv, Add and Relu fuse."""
        if node.op != "Add" or not graphs.is_float(node.outputs[0]):
            return
        reason = self.selection.left_out(node) or self.hidden.get(id(node))
        if node.inputs[0].dtype != np.float32 or any(graphs.is_constant(t) for t in node.inputs):
            reason = (
                f"this Add is no residual connection, and target {self.target.name} has no integer kernel for others"
            )
        if reason is not None:
            self._skip(node, reason)
            return
        makers = [graphs.producer(t) for t in node.inputs]
        convs = [
            i
            for i, m in enumerate(makers)
            if m is not None
            and m.op == "Conv"
            and m.name in self.kernels
            and graphs.single_use(node.inputs[i], self.outputs) is not None
        ]
        if not convs:
            self._skip(node, "no convolution feeds it, so there is nothing to fuse it with")
            return
        other = 1 - convs[0]
        if not is_dequantized(node.inputs[other]):
            self.entries.add(
                Use(node.name, other), self.entries.activation(node.inputs[other], None), node.inputs[other]
            )
        self.kernels[node.name] = node.op

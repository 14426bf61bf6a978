"""What a recipe says about nodes and tensors by name, resolved against one model; names without a match are errors."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from qdqtool.errors import RecipeError, nearest
from qdqtool.graphs import graph as graphs
from qdqtool.planning.plan import DerivedFrom, Plan, SharedWith
from qdqtool.recipe import Override, match_names
from qdqtool.spec import PER_TENSOR, QuantSpec, number_format

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

    from qdqtool.passes_api import State


@dataclass(frozen=True)
class SpecOverride:
    """A user's override as it applies to a spec."""

    override: Override

    @property
    def granularity(self) -> Literal["per_tensor", "per_channel"] | None:
        """The granularity asked for."""
        return self.override.granularity

    def on(self, spec: QuantSpec) -> QuantSpec:
        """The spec with what the override names changed."""
        wanted = self.override
        if wanted.dtype is not None:
            spec = replace(spec, format=number_format(wanted.dtype), bits=None, allocation=None, split=False)
        if wanted.symmetric is not None:
            spec = replace(spec, symmetric=wanted.symmetric, narrow=wanted.symmetric)
        if wanted.range is not None:
            spec = replace(spec, fixed=wanted.range, allocation=None, split=False)
        return spec


class Selection:
    """Which nodes a recipe leaves out and what it overrides; fused nodes answer to the names of all their parts."""

    def __init__(self, state: State) -> None:
        """Resolve the recipe's names; RecipeError names the nearest where one matches nothing."""
        recipe = state.recipe
        self._origins = state.origins
        self._user_tensors = state.user_tensors
        names = state.user_nodes | graphs.node_names(state.graph)
        self._excluded = match_names(recipe.nodes_to_exclude, names, "nodes_to_exclude")
        chosen = recipe.nodes_to_quantize
        self._chosen = None if chosen is None else match_names(chosen, names, "nodes_to_quantize")
        self._ops = None if recipe.op_types_to_quantize is None else set(recipe.op_types_to_quantize)
        self._nodes = {pattern: SpecOverride(override) for pattern, override in recipe.nodes.items()}
        self._tensors = {name: SpecOverride(override) for name, override in recipe.tensors.items()}
        match_names(self._nodes, names, "nodes override")
        self._check_operators(state)

    def _check_operators(self, state: State) -> None:
        known = set(state.target.by_op) | {node.op for node in graphs.all_nodes(state.graph)}
        for op in self._ops or ():
            if op not in known:
                raise RecipeError(
                    f"op_types_to_quantize {op!r} is no operator that target {state.target.name} or the model knows."
                    f"{nearest(op, known)}"
                )

    def check_tensors(self, plan: Plan) -> None:
        """Refuse overrides of tensors that have no spec of their own, with the reason."""
        known = {plan.tensors[key] for key, _ in plan.specs()}
        for name, override in self._tensors.items():
            if name not in known:
                raise RecipeError(f"tensors override {name!r}{self._no_effect(name, plan, known)}")
            specs = [spec for key, spec in plan.specs() if plan.tensors[key] == name]
            if override.granularity == "per_channel" and all(spec.granularity == PER_TENSOR for spec in specs):
                raise RecipeError(f"tensors override {name!r}: this tensor cannot have a scale for each channel")

    def _no_effect(self, name: str, plan: Plan, known: set[str]) -> str:
        for key, tensor in plan.tensors.items():
            entry = plan.entries[key]
            if tensor == name and isinstance(entry, SharedWith):
                return f": it has the same codes as {plan.tensors[plan.resolve(key)]!r}; override that tensor"
            if tensor == name and isinstance(entry, DerivedFrom):
                return ": this bias is int32, and its scale follows from the layer's input and weight"
        if name not in self._user_tensors:
            return f" matches no tensor.{nearest(name, known | self._user_tensors)}"
        return (
            f": the plan does not quantize this tensor (it stays float, or was fused away).{nearest(name, known)} "
            f"See the plan with --dry-run"
        )

    def overrides(self, tensor: gs.Tensor) -> bool:
        """Whether the user overrides the tensor by its name."""
        return tensor.name in self._tensors

    def asked_for(self, node: gs.Node) -> bool:
        """Whether the user names the node among those to quantize, or overrides it."""
        return self._chosen is not None or self.node_override(node) is not None

    def left_out(self, node: gs.Node) -> str | None:
        """Why the user leaves the node float; None where they do not."""
        parts = {node.name, *self._origins.get(node.name, ())}
        hit = parts & self._excluded
        if hit:
            return f"excluded by name ({min(hit)})"
        if self._chosen is not None and not parts & self._chosen:
            return "not among nodes_to_quantize"
        if self._ops is not None and node.op not in self._ops:
            return f"{node.op} is not among op_types_to_quantize"
        return None

    def node_override(self, node: gs.Node) -> SpecOverride | None:
        """The override whose pattern matches the node or one of its parts; the first in the recipe's order."""
        parts = {node.name, *self._origins.get(node.name, ())}
        for pattern, override in self._nodes.items():
            if any(re.fullmatch(pattern, part) for part in parts):
                return override
        return None

    def tensor_override(self, tensor: gs.Tensor) -> SpecOverride | None:
        """The override of the tensor by its name."""
        return self._tensors.get(tensor.name)

    def granularity(self, node: gs.Node, weight: gs.Tensor) -> str | None:
        """The granularity that the user wants for a node's weight, by the tensor's name or else the node's."""
        for override in (self._tensors.get(weight.name), self.node_override(node)):
            if override is not None and override.granularity is not None:
                return override.granularity
        return None

    def per_channel(self, tensor: gs.Tensor) -> bool:
        """Whether the user wants a scale for each channel of an activation."""
        override = self._tensors.get(tensor.name)
        return override is not None and override.granularity == "per_channel" and not graphs.is_constant(tensor)

    def on_tensor(self, tensor: gs.Tensor, spec: QuantSpec) -> QuantSpec:
        """The spec of a tensor after the user's override by its name."""
        override = self._tensors.get(tensor.name)
        return spec if override is None else override.on(spec)

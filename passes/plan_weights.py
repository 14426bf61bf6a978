"""Decide which weights are stored in integers while activations stay float.

Matrix products by a constant matrix are the operators that a runtime fuses with the DequantizeLinear of their weight:

    DequantizeLinear(codes [K, N], scales [K / block, N]) -> MatMul   =>   MatMulNBits

A table that Gather reads is stored as 8-bit codes with a scale for each row, whatever the weights have: Gather takes
no smaller type, and what it found is turned into floats behind it. Other weights are only dequantized, at every run, so
they are left alone unless the recipe names their operator.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Final, cast

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.errors import RecipeError
from qdqtool.graphs import graph as graphs
from qdqtool.graphs.linear import LinearLayer
from qdqtool.passes_api import Fact, State
from qdqtool.planning.plan import Entry, Key, Plan, Use
from qdqtool.planning.selection import Selection, SpecOverride
from qdqtool.spec import FORMATS, PER_TENSOR, Granularity, QuantSpec, Scheme, per_channel

_TABLE_BITS: Final = 8
_LEAST_TABLE: Final = 2**14
"""Elements from which a table is worth the three nodes that reading it in integers costs."""
_WIDTH_OF_2_BITS: Final = 4
"""The runtime unpacks 2-bit codes rightly only where the outputs are a multiple of this: four codes make a byte."""


@dataclass(frozen=True)
class PlanWeights:
    """Decide which weights alone are stored in integers, by what the target fuses."""

    name: ClassVar[str] = "plan-weights"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAN})
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.STATISTICS, Fact.PARAMS, Fact.QDQ})

    def run(self, state: State) -> int:
        """Set ``state.plan``; returns its number of entries.

        Raises:
            RecipeError: a name matches nothing, or an override does not fit the tensor.
        """
        state.plan = _Planner(state).plan()
        return len(state.plan.entries)


class _Planner:
    def __init__(self, state: State) -> None:
        self.state, self.recipe, self.target = state, state.recipe, state.target
        self.selection = Selection(state)
        self.paths = {node.name: path for path, inner in graphs.all_graphs(state.graph) for node in inner.nodes}
        self.entries: dict[Key, Entry] = {}
        self.tensors: dict[Key, str] = {}
        self.kernels: dict[str, str] = {}

    def plan(self) -> Plan:
        makers: Mapping[str, Callable[[gs.Node], QuantSpec | str]] = {
            "MatMul": self._product,
            "Gemm": lambda node: "its form keeps the runtime from fusing it; see what gemm-to-matmul says",
            "Gather": self._table,
            **dict.fromkeys(("Conv", "ConvTranspose"), self._convolution),
            **dict.fromkeys(("LSTM", "GRU", "RNN", "Einsum"), self._no_kernel),
        }
        for node in graphs.all_nodes(self.state.graph):
            if node.op not in makers or node.domain not in (None, "", "ai.onnx"):
                continue
            found = self.selection.left_out(node) or makers[node.op](node)
            if isinstance(found, str):
                self.state.skip(PlanWeights.name, node.name, found)
                continue
            index = 0 if node.op == "Gather" else 1
            key = Use(node.name, index, self.paths[node.name])
            self.entries[key], self.tensors[key] = found, node.inputs[index].name
            if node.op == "MatMul":
                self.kernels[node.name] = node.op
        self._drop_costly()
        weight_only = frozenset(key.node for key in self.entries if isinstance(key, Use))
        plan = Plan(self.entries, self.tensors, frozenset(self.entries), self.kernels, weight_only)
        self.selection.check_tensors(plan)
        return plan

    def _drop_costly(self) -> None:
        """Leave weights float that so many products share that a copy of the codes for each is larger than the floats.

        The runtime fuses codes and scales that one node alone reads.
        """
        tensors, bits = graphs.all_tensors(self.state.graph), defaultdict[str, float](float)
        products = [key for key in self.entries if isinstance(key, Use) and key.node in self.kernels]
        for key in products:
            spec = cast(QuantSpec, self.entries[key])
            group = spec.granularity.block_size or tensors[self.tensors[key]].shape[0]
            bits[self.tensors[key]] += spec.format.bits + 8 * tensors[self.tensors[key]].dtype.itemsize / group
        readers = Counter(self.tensors[key] for key in products)
        for key in products:
            name = self.tensors[key]
            if readers[name] > 1 and bits[name] > 8 * tensors[name].dtype.itemsize:
                del self.entries[key], self.tensors[key], self.kernels[key.node]
                reason = f"{readers[name]} nodes read its weight {name!r}, and a copy in integers for each is larger"
                self.state.skip(PlanWeights.name, key.node, reason)

    def _product(self, node: gs.Node) -> QuantSpec | str:
        left, right = node.inputs[0], node.inputs[1]
        if not graphs.is_constant(right):
            return "its constant stands on the left" if graphs.is_constant(left) else "it has no constant weight"
        if not _is_weight(right):
            return f"its weight {right.name!r} is no float32 or float16, or is empty"
        if len(right.shape) != 2:
            return f"its weight has rank {len(right.shape)}: only a matrix fuses"
        maker = graphs.producer(left)
        if maker is not None and maker.op == "DequantizeLinear":
            return "its input is quantized already"
        return self._spec(node, right, axis=0, channels=1)

    def _table(self, node: gs.Node) -> QuantSpec | str:
        table = node.inputs[0]
        if not graphs.is_constant(table):
            return "it reads no constant table"
        if not _is_weight(table):
            return f"its table {table.name!r} is no float32 or float16, or is empty"
        shape = table.shape
        if len(shape) < 2 or node.attrs.get("axis", 0) % len(shape):
            return "it does not take rows of a table"
        if math.prod(shape) < _LEAST_TABLE:
            return f"its table has only {math.prod(shape)} elements"
        if not self.target.weights.tables:
            return f"target {self.target.name} has no Gather of integers"
        if any(reader.op != "Gather" or index for reader, index in graphs.uses(table)):
            return "its table is read as floats elsewhere too"
        plain = QuantSpec(FORMATS[f"int{_TABLE_BITS}"], symmetric=True, granularity=per_channel(0))
        spec = self.selection.on_tensor(table, plain)
        if replace(spec, fixed=None, narrow=False) != plain:
            raise RecipeError(f"tensors override {table.name!r}: a table that Gather reads is stored as int8 alone")
        return spec

    def _convolution(self, node: gs.Node) -> QuantSpec | str:
        """Weights that are dequantized at every run: in integers only where the user wants the smaller file."""
        layer = LinearLayer(node)
        if node.op not in (self.recipe.op_types_to_quantize or ()):
            return (
                f"{node.op} has no kernel for weights in integers, they would be dequantized at every run; "
                f"name {node.op} in op_types_to_quantize to have the smaller file all the same"
            )
        if not graphs.is_constant(layer.weight) or not _is_weight(layer.weight):
            return "it has no constant weight"
        inputs = layer.weight.shape[1]
        axis = 1 if node.op == "Conv" and isinstance(inputs, int) else None
        return self._spec(node, layer.weight, axis=axis, channels=layer.weight_axis)

    def _no_kernel(self, node: gs.Node) -> str:
        return f"{node.op} has no kernel for weights in integers"

    def _spec(self, node: gs.Node, weight: gs.Tensor, *, axis: int | None, channels: int | None) -> QuantSpec:
        """Format and granularity of a weight: blocks along ``axis`` where they fill, else a scale for each channel."""
        spec = QuantSpec(self.recipe.weight_format, symmetric=self.recipe.weight_format.signed)
        override = self.selection.node_override(node)
        for given in (override, self.selection.tensor_override(weight)):
            spec = spec if given is None else _overridden(spec, given)
        if spec.format.bits == 2 and node.op == "MatMul" and weight.shape[1] % _WIDTH_OF_2_BITS:
            spec = replace(spec, format=FORMATS["int4" if spec.format.signed else "uint4"])
            self.state.notes.append(
                f"the weight of {node.name!r} is stored in 4 bits: the runtime computes 2-bit products wrongly where "
                f"the number of outputs ({weight.shape[1]}) is no multiple of {_WIDTH_OF_2_BITS}"
            )
        block = self.recipe.block_of(spec.format.bits)
        wanted = self.selection.granularity(node, weight)
        if wanted == "per_tensor":
            return replace(spec, granularity=PER_TENSOR)
        fills = node.op == "MatMul" or (axis is not None and block is not None and weight.shape[axis] >= block)
        if wanted is None and block is not None and axis is not None and fills:
            return replace(spec, granularity=Granularity(Scheme.PER_BLOCK, axis, block))
        return replace(spec, granularity=PER_TENSOR if channels is None else per_channel(channels))


def _overridden(spec: QuantSpec, given: SpecOverride) -> QuantSpec:
    """A spec with what the user says; codes of a type that the user names are symmetric where that is signed."""
    found = replace(given.on(spec), narrow=given.override.symmetric is True)
    if given.override.dtype is not None and given.override.symmetric is None:
        found = replace(found, symmetric=found.format.signed)
    return found


def _is_weight(tensor: gs.Tensor) -> bool:
    """Whether a constant holds float32 or float16 values, and any at all."""
    return tensor.dtype in (np.float32, np.float16) and math.prod(tensor.shape) > 0

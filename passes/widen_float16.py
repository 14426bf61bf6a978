"""Turns float16 and bfloat16 into float32, as integer kernels take and give it; ``float32(x)`` is exact for both.

Inputs and outputs of the model keep their types, with a Cast behind or before them. So does a node that cannot compute
in float32: one of another domain, one whose result has the type that an attribute names, and the model's own Q/DQ. A
scale that float16 rounds to 0 (below 6e-8) is no trouble any more.
"""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import SparseValues

from qdqtool import runtime
from qdqtool.errors import ModelError
from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.float16 import QUANTIZED, TYPED_BY_ATTRIBUTE, is_tensor
from qdqtool.graphs.graph import Array
from qdqtool.graphs.lazy import Derived, peek
from qdqtool.passes_api import GRAPH_FACTS, Fact, State

_FLOAT: Final = int(onnx.TensorProto.FLOAT)
_FLOAT16: Final = int(onnx.TensorProto.FLOAT16)
_BFLOAT16: Final = int(onnx.TensorProto.BFLOAT16)
_TYPES: Final[dict[int, tuple[str, Any]]] = {
    _FLOAT: ("float32", np.float32),
    _FLOAT16: ("float16", np.float16),
    _BFLOAT16: ("bfloat16", _BFLOAT16),
}
"""Name and, as the graph library spells it, the type of each number."""


@dataclass(frozen=True)
class WidenFloat16:
    """Turn float16 and bfloat16 into float32 in between the model's inputs and outputs."""

    name: ClassVar[str] = "widen-float16"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES}

    def run(self, state: State) -> int:
        """Rewrite the graph and its bodies; returns the number of nodes that now compute in float32."""
        for node in graphs.all_nodes(state.graph):
            _settle_types(node, state.graph.opset)
        given = {id(tensor) for tensor in (*state.graph.inputs, *state.graph.outputs)}
        nodes = [node for node in graphs.all_nodes(state.graph) if _computes_narrow(node, given)]
        mapped = [node.name for node in graphs.all_nodes(state.graph) if node.op == "SequenceMap"] if nodes else []
        if mapped:  # its body gets elements of a sequence, which keep their type
            state.skip(self.name, mapped[0], "nothing is widened in a model with a SequenceMap")
            return 0
        reasons = {id(node): reason for node in nodes if (reason := _obstacle(node, state.graph.opset)) is not None}
        for node in nodes:
            if id(node) in reasons:
                state.skip(self.name, node.name, f"it keeps its types: {reasons[id(node)]}")
        widened = len(nodes) - len(reasons)
        if widened:
            _Widening(state.graph, reasons.keys()).run()
            state.notes.append(f"{widened} nodes of the model in float16 or bfloat16 now compute in float32")
            _replace_reference(state)
        return widened


class _Widening:
    """Inside the graph every tensor becomes float32; whoever keeps its types stands between Casts."""

    def __init__(self, graph: gs.Graph, keeping: Set[int]) -> None:
        self.graph, self.keeping = graph, keeping
        self.taken = graphs.tensor_names(graph) | graphs.node_names(graph)
        self.graphs = [inner for _, inner in graphs.all_graphs(graph)]
        self.before: dict[int, int] = {}  # a float32 tensor that was narrower -> ONNX's number of the type it had
        self.constants: dict[int, tuple[gs.Constant, gs.Constant]] = {}  # a constant -> it, and its float32 form

    def run(self) -> None:
        """Rewrite everything."""
        start, end = self._interface()
        for inner in self.graphs:
            given = [] if inner is self.graph else inner.inputs
            for tensor in (*given, *(made for node in inner.nodes for made in node.outputs)):
                if _is_half(tensor):
                    self.before[id(tensor)] = _code(tensor)
                    tensor.dtype = np.float32
        for inner in self.graphs:
            inner.nodes = [each for node in inner.nodes for each in self._around(node)]
            if inner is not self.graph:
                for index, tensor in enumerate(inner.outputs):
                    if graphs.is_constant(tensor) and _is_half(tensor):
                        inner.outputs[index] = self._constant(tensor)
        self.graph.nodes = [*start, *self.graph.nodes, *end]
        for old, new in self.constants.values():
            if not old.outputs:
                new.name, old.name = old.name, new.name

    def _interface(self) -> tuple[list[gs.Node], list[gs.Node]]:
        """Casts behind the model's inputs and before its outputs; all others read and make the float32 forms."""
        start, end = [], []
        forms: dict[int, gs.Variable] = {}
        for tensor in self.graph.inputs:
            if _is_half(tensor):
                forms[id(tensor)] = wide = self._variable(tensor, _FLOAT)
                self.before[id(wide)] = _code(tensor)
                graphs.redirect(tensor, wide)
                start.append(self._cast(tensor, wide, _FLOAT))
        for tensor in self.graph.outputs:
            maker = graphs.producer(tensor)
            if _is_half(tensor) and maker is not None and id(tensor) not in forms:
                forms[id(tensor)] = wide = self._variable(tensor, _FLOAT)
                self.before[id(wide)] = _code(tensor)
                graphs.redirect(tensor, wide)
                maker.outputs[next(i for i, made in enumerate(maker.outputs) if made is tensor)] = wide
                end.append(self._cast(wide, tensor, _code(tensor)))
        for inner in self.graphs[1:]:
            inner.outputs = [forms.get(id(tensor), tensor) for tensor in inner.outputs]
        return start, end

    def _around(self, node: gs.Node) -> list[gs.Node]:
        """The node in float32; or as it is, with the Casts that it then needs."""
        start, end = [], []
        for index, tensor in enumerate(node.inputs):
            if id(node) not in self.keeping:
                if graphs.is_constant(tensor) and _is_half(tensor):
                    graphs.set_input(node, index, self._constant(tensor))
            elif id(tensor) in self.before:
                narrow = self._variable(tensor, self.before[id(tensor)])
                start.append(self._cast(tensor, narrow, self.before[id(tensor)]))
                graphs.set_input(node, index, narrow)
        for index, tensor in enumerate(node.outputs):
            if id(node) in self.keeping and id(tensor) in self.before:
                narrow = self._variable(tensor, self.before[id(tensor)])
                node.outputs[index] = narrow
                end.append(self._cast(narrow, tensor, _FLOAT))
        if id(node) not in self.keeping:
            _set_type(node)
        return [*start, node, *end]

    def _constant(self, tensor: gs.Constant) -> gs.Constant:
        if id(tensor) not in self.constants:
            values = Derived(tensor, tensor.shape, np.dtype(np.float32), _widened)
            new = gs.Constant(graphs.fresh_name(f"{tensor.name}_float32", self.taken), values)
            self.constants[id(tensor)] = tensor, new
        return self.constants[id(tensor)][1]

    def _variable(self, tensor: gs.Tensor, code: int) -> gs.Variable:
        """A tensor of the same shape in the type of that number."""
        suffix, dtype = _TYPES[code]
        return gs.Variable(graphs.fresh_name(f"{tensor.name}_{suffix}", self.taken), dtype, tensor.shape)

    def _cast(self, source: gs.Tensor, result: gs.Tensor, code: int) -> gs.Node:
        name = graphs.fresh_name(f"{result.name}_Cast", self.taken)
        return gs.Node("Cast", name, {"to": code}, [source], [result])


def _replace_reference(state: State) -> None:
    """Let the float32 form be what the result is compared with, where the runtime has no kernels for the model."""
    if state.original is None:
        return
    try:
        runtime.session(state.original, provider=state.provider)
    except ModelError:
        state.original = models.to_proto(state.graph, state.header)
        state.notes.append("ONNX Runtime does not load the model; the result is compared with its float32 form")


def _is_half(tensor: gs.Tensor) -> bool:
    """Whether a value is a dense tensor known to be float16 or bfloat16; one that is left out has no type."""
    if not is_tensor(tensor) or isinstance(getattr(tensor, "_values", None), SparseValues):
        return False
    dtype = tensor.dtype
    return dtype is not None and bool(dtype == _BFLOAT16 if isinstance(dtype, int) else dtype == np.float16)


def _code(tensor: gs.Tensor) -> int:
    return _BFLOAT16 if isinstance(tensor.dtype, int) else _FLOAT16


def _widened(values: Array) -> Array:
    return values.astype(np.float32)


def _computes_narrow(node: gs.Node, given: set[int]) -> bool:
    """Whether a node has to do with float16 otherwise than to convert what the model takes in or gives out."""
    narrow = [tensor for tensor in (*node.inputs, *node.outputs) if _is_half(tensor)]
    converts = node.op == "Cast" and len(narrow) == 1 and id(narrow[0]) in given
    return bool(narrow) and not converts


def _settle_types(node: gs.Node, opset: int) -> None:
    """Take over the type of a narrow tensor to those for which the operator prescribes the same one.

    Shape inference does not look back, so behind an operator of another domain it knows nothing.
    """
    tensors = [tensor for tensor in (*node.inputs, *node.outputs) if is_tensor(tensor)]
    if all(tensor.dtype is not None for tensor in tensors) or not any(map(_is_half, tensors)):
        return
    if node.domain not in (None, "", "ai.onnx") or not onnx.defs.has(node.op, opset):
        return
    schema = onnx.defs.get_schema(node.op, opset)
    pairs = [(t, schema.inputs[min(i, len(schema.inputs) - 1)].type_str) for i, t in enumerate(node.inputs)]
    pairs += [(t, schema.outputs[min(i, len(schema.outputs) - 1)].type_str) for i, t in enumerate(node.outputs)]
    known = {kind: tensor.dtype for tensor, kind in pairs if _is_half(tensor)}
    for tensor, kind in pairs:
        if not tensor.is_empty() and is_tensor(tensor) and tensor.dtype is None and kind in known:
            tensor.dtype = known[kind]


def _obstacle(node: gs.Node, opset: int) -> str | None:
    """Why a node cannot take and give float32 in place of a narrower type."""
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return None  # it hands on whatever its bodies make
    if node.domain not in (None, "", "ai.onnx"):
        return f"{node.op} of domain {node.domain!r} says nothing of float32"
    if node.op in QUANTIZED:
        return "it is part of the model's own quantization"
    if node.op == "Gather" and graphs.is_constant(node.inputs[0]) and len(node.inputs[0].shape) > 1:
        return "a table in float32 would be twice as large; what is found in it is widened"
    if node.op in TYPED_BY_ATTRIBUTE or "Sequence" in node.op or "Optional" in node.op:
        return f"an attribute, an operand or a sequence gives {node.op} its type"
    tensors = [tensor for tensor in (*node.inputs, *node.outputs) if not tensor.is_empty()]
    unknown = [tensor.name for tensor in tensors if tensor.dtype is None]
    if unknown:
        return f"the type of {unknown[0]!r} is not known"
    try:
        schema = onnx.defs.get_schema(node.op, opset)
    except onnx.defs.SchemaError:
        return f"{node.op} is no operator of opset {opset}"
    float32 = {c.type_param_str for c in schema.type_constraints if "tensor(float)" in c.allowed_type_strs}
    for own, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, tensor in enumerate(own):
            if _is_half(tensor) and formal[min(index, len(formal) - 1)].type_str not in float32:
                return f"{node.op} of opset {opset} takes no float32 there"
    return None


def _set_type(node: gs.Node) -> None:
    """Change the attribute that names the type of a result."""
    if node.op == "Cast" and node.attrs["to"] in (_FLOAT16, _BFLOAT16):
        node.attrs["to"] = _FLOAT
    elif node.op == "ConstantOfShape" and "value" in node.attrs and _is_half(node.attrs["value"]):
        node.attrs["value"] = gs.Constant("", _widened(peek(node.attrs["value"])))

"""Writes what ONNX shape inference finds out to the tensors of the graph and of its control-flow bodies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.importers.onnx_importer import get_onnx_tensor_dtype

from qdqtool.graphs.light import light_proto
from qdqtool.passes_api import Fact, State

_INVENTED = "unk__"  # ONNX names an unknown dimension so; another run may give another dimension the same name


@dataclass(frozen=True)
class InferShapes:
    """Infer type and shape of every tensor; a model that cannot be inferred goes on with what is known."""

    name: ClassVar[str] = "infer-shapes"
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    drops: ClassVar[frozenset[Fact]] = frozenset()

    def run(self, state: State) -> int:
        """Infer and write back; returns how many tensors are known better than before."""
        if state.shapes_current:
            return 0
        state.shapes_current = True
        light, _ = light_proto(state.graph, state.header)
        known = [*light.graph.value_info]
        del light.graph.value_info[:]  # what the model says may be wrong
        inferred = _infer(light, state)
        if inferred is None:
            return 0
        unseen = _known_before(known, inferred)
        if unseen:  # results of custom operators: only the model says what they are, and inference goes on behind them
            light.graph.value_info.extend(unseen)
            inferred = _infer(light, state) or inferred
        return _write_back(state.graph, inferred.graph)


def _infer(light: onnx.ModelProto, state: State) -> onnx.ModelProto | None:
    try:
        return onnx.shape_inference.infer_shapes(light, check_type=False, strict_mode=False, data_prop=True)
    except Exception as error:  # the C++ side raises several unrelated types
        state.notes.append(f"shape inference failed, shapes stay as the model gives them: {str(error).strip()}")
        return None


def _known_before(known: list[onnx.ValueInfoProto], inferred: onnx.ModelProto) -> list[onnx.ValueInfoProto]:
    """What the model says about tensors that inference could not reach."""
    found = {value.name for value in inferred.graph.value_info if value.type.HasField("tensor_type")}
    return [value for value in known if value.name not in found and value.type.tensor_type.elem_type]


def _write_back(graph: gs.Graph, proto: onnx.GraphProto) -> int:
    changes = 0
    values: dict[str, onnx.ValueInfoProto] = {}
    for value in (*proto.value_info, *proto.output):
        values.setdefault(value.name, value)
    given = {id(tensor) for tensor in graph.inputs}
    for tensor in _computed(graph):
        if tensor.name in values and id(tensor) not in given:
            changes += _learn(tensor, values[tensor.name])
    bodies = {(node.name, a.name): a.g for node in proto.node for a in node.attribute if a.HasField("g")}
    for node in graph.nodes:
        for name, body in node.attrs.items():
            if isinstance(body, gs.Graph) and (node.name, name) in bodies:
                changes += _write_back(body, bodies[node.name, name])
    return changes


def _computed(graph: gs.Graph) -> Iterable[gs.Variable]:
    return (
        tensor for node in graph.nodes for tensor in node.outputs if isinstance(tensor, gs.Variable) and tensor.name
    )


def _learn(tensor: gs.Variable, value: onnx.ValueInfoProto) -> int:
    """Take over a type and shape; known dimensions are never replaced by unknown ones."""
    if tensor.type not in (None, "tensor_type") or not value.type.HasField("tensor_type"):
        return 0
    before = tensor.dtype, tensor.shape
    if value.type.tensor_type.elem_type:
        tensor.dtype = get_onnx_tensor_dtype(value)
    if value.type.tensor_type.HasField("shape"):
        tensor.shape = _merged(tensor.shape, [_dim(d) for d in value.type.tensor_type.shape.dim])
    return int(before != (tensor.dtype, tensor.shape))


def _dim(dim: onnx.TensorShapeProto.Dimension) -> int | str | None:
    if dim.HasField("dim_value"):
        return int(dim.dim_value)
    return dim.dim_param if dim.dim_param and not dim.dim_param.startswith(_INVENTED) else None


def _merged(old: list[int | str | None] | None, new: list[int | str | None]) -> list[int | str | None]:
    if old is None or len(old) != len(new):
        return new
    return [
        after if isinstance(after, int) or before is None else before for before, after in zip(old, new, strict=True)
    ]

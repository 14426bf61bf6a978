"""Raises the default operator set to at least a minimum, with ONNX's version converter.

What the converter gets wrong is put right or refused by name: Hardmax below 13 works on a flattened tensor; Upsample,
and Resize of opset 10, sample asymmetrically; constants made for Clip and Pad are float32 whatever the tensor is;
Upsample loses its names; new operands become Constant nodes where initializers are wanted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx
import onnx.version_converter
from onnx import helper, numpy_helper

from qdqtool.errors import ModelError
from qdqtool.graphs import model
from qdqtool.graphs.light import light_proto, restore
from qdqtool.passes_api import Fact, State
from qdqtool.recipe import BASE_OPSET

_REMEDY: Final = "Export the model again with opset_version=17"
_REPLACED: Final = {"Upsample": "Resize", "Scatter": "ScatterElements"}
_TYPED_BY_DATA: Final = {"Clip": (1, 2), "Pad": (2,)}


@dataclass(frozen=True)
class RaiseOpset:
    """Raise a model of an older operator set to opset ``minimum``; newer ones stay as they are."""

    minimum: int = BASE_OPSET

    name: ClassVar[str] = "raise-opset"
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    # Nodes and tensors keep their names, and with them what is planned, observed and chosen.
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES, Fact.FOLDED, Fact.QDQ})

    def run(self, state: State) -> int:
        """Convert the model; returns 1 where it was older, else 0.

        Raises:
            ModelError: an operator cannot be converted; names it and the opset reached.
        """
        start = state.graph.opset
        if start >= self.minimum:
            return 0
        light, large = light_proto(state.graph, state.header)
        del light.graph.value_info[:]  # what the model says of types may be wrong, or will be
        for graph in _graphs(light.graph):
            for node in graph.node:
                _refuse(node, graph, start)
        raised = _raised(light, start, self.minimum)
        old = state.graph
        state.graph, _ = model.to_graph(raised)
        restore(state.graph, large)
        for name in ("producer_name", "producer_version", "doc_string"):
            setattr(state.graph, name, getattr(old, name))
        state.notes.append(f"raised the model from opset {start} to {self.minimum}")
        return 1


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.HasField("g"):
                yield from _graphs(attribute.g)


def _refuse(node: onnx.NodeProto, graph: onnx.GraphProto, start: int) -> None:
    """Raise for what the converter would change silently."""
    reason = None
    if node.op_type == "BatchNormalization" and start < 9 and _attribute(node, "spatial", 1) == 0:
        reason = "its spatial = 0 has no successor"
    if node.op_type == "Dropout" and start < 10 and any(_is_read(name, graph) for name in node.output[1:] if name):
        reason = "its mask is read, and changes its type"
    if node.op_type == "Scan" and start < 9:
        reason = "its batch axis has no successor"
    if reason:
        raise ModelError(f"{node.op_type} {node.name!r} of opset {start} cannot be raised: {reason}. {_REMEDY}")


def _is_read(name: str, graph: onnx.GraphProto) -> bool:
    return any(name in n.input for inner in _graphs(graph) for n in inner.node) or any(
        o.name == name for o in graph.output
    )


def _attribute(node: onnx.NodeProto, name: str, default: object) -> object:
    return next((helper.get_attribute_value(a) for a in node.attribute if a.name == name), default)


def _raised(light: onnx.ModelProto, start: int, target: int) -> onnx.ModelProto:
    """The model in the newer opset; it has no values of large constants, which only cost time."""
    if light.graph.sparse_initializer or light.functions:
        what = "sparse initializers" if light.graph.sparse_initializer else "model-local functions"
        raise ModelError(f"a model of opset {start} with {what} cannot be raised to {target}. {_REMEDY}")
    if start < 13 <= target:
        taken = _names(light.graph)
        for graph in list(_graphs(light.graph)):
            _flatten_hardmax(graph, taken)
    raised = _convert(_with_shapes(light), start, target)
    for graph in _graphs(raised.graph):
        del graph.value_info[:]  # the converter leaves types behind that no longer hold
    _restore_names(light.graph, raised.graph)
    if start < 11:
        for graph in _graphs(raised.graph):
            _sample_asymmetrically(graph)
    _match_types(raised)
    for graph in _graphs(raised.graph):
        _lift_operands(graph)
    _check(raised, start, target)
    return raised


def _with_shapes(light: onnx.ModelProto) -> onnx.ModelProto:
    """The converter writes a simple Softmax where it knows that the axis is the last."""
    try:
        return onnx.shape_inference.infer_shapes(light, data_prop=True)
    except Exception:  # the C++ side raises several unrelated types; the conversion is right without shapes too
        return light


def _convert(light: onnx.ModelProto, start: int, target: int) -> onnx.ModelProto:
    try:
        return onnx.version_converter.convert_version(light, target)
    except Exception as error:  # RuntimeError, ConvertError and others of the C++ side
        found = re.search(r"From Version \$?(\d+) for (\w+)", str(error))
        place = f"operator {found[2]} has no way beyond opset {found[1]}" if found else _complaint(error)
        raise ModelError(f"the model cannot be raised from opset {start} to {target}: {place}. {_REMEDY}") from error


def _check(raised: onnx.ModelProto, start: int, target: int) -> None:
    try:
        if all(
            output.type.tensor_type.HasField("shape") for output in raised.graph.output
        ):  # else the checker objects to that
            onnx.checker.check_model(raised)
        onnx.shape_inference.infer_shapes(raised, check_type=True)
    except Exception as error:  # the C++ side raises several unrelated types
        message = f"raised from opset {start} to {target}, the model is not valid: {_complaint(error)}"
        raise ModelError(f"{message}. {_REMEDY}") from error


def _complaint(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".")


def _names(graph: onnx.GraphProto) -> set[str]:
    return {name for inner in _graphs(graph) for node in inner.node for name in (*node.input, *node.output)}


def _flatten_hardmax(graph: onnx.GraphProto, taken: set[str]) -> None:
    """Write Hardmax over the flattened tensor out: Flatten, Hardmax(axis = 1), Reshape mean the same in every opset."""
    nodes: list[onnx.NodeProto] = []
    for node in graph.node:
        axis = _attribute(node, "axis", 1)
        if node.op_type != "Hardmax" or node.domain or axis == -1:
            nodes.append(node)
            continue
        flat, hard, shape = (f"{node.output[0]}.{part}" for part in ("flat", "hard", "shape"))
        if taken & {flat, hard, shape}:
            raise ModelError(f"Hardmax {node.name!r} cannot be raised: a name like {flat!r} is taken. {_REMEDY}")
        nodes += [
            helper.make_node("Shape", [node.input[0]], [shape]),
            helper.make_node("Flatten", [node.input[0]], [flat], axis=axis),
            helper.make_node("Hardmax", [flat], [hard], node.name, axis=1),
            helper.make_node("Reshape", [hard, shape], list(node.output)),
        ]
    if len(nodes) > len(graph.node):
        _set_nodes(graph, [onnx.NodeProto.FromString(node.SerializeToString()) for node in nodes])


def _restore_names(old: onnx.GraphProto, new: onnx.GraphProto) -> None:
    """Give an operator that was replaced by another its node and value names again."""
    survivors = {node.name: node for node in new.node if node.name}
    gone = [node for node in old.node if node.op_type in _REPLACED and node.name not in survivors]
    successors = [node for node in new.node if not node.name and node.op_type in _REPLACED.values()]
    if [_REPLACED[node.op_type] for node in gone] == [node.op_type for node in successors]:
        renamed = {}
        for before, after in zip(gone, successors, strict=True):
            after.name = before.name
            renamed.update({b: a for b, a in zip(after.output, before.output, strict=True) if a != b})
        _rename(new, renamed)
    for node in old.node:
        bodies = {a.name: a.g for a in node.attribute if a.HasField("g")}
        for attribute in survivors[node.name].attribute if bodies and node.name in survivors else ():
            if attribute.name in bodies:
                _restore_names(bodies[attribute.name], attribute.g)


def _rename(graph: onnx.GraphProto, names: Mapping[str, str]) -> None:
    for inner in _graphs(graph):
        for node in inner.node:
            for values in (node.input, node.output):
                for index, name in enumerate(values):
                    if name in names:
                        values[index] = names[name]


def _constants(graph: onnx.GraphProto) -> dict[str, onnx.TensorProto]:
    found = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant" and node.attribute and node.attribute[0].HasField("t"):
            found[node.output[0]] = node.attribute[0].t
    return found


def _sample_asymmetrically(graph: onnx.GraphProto) -> None:
    """Say what Upsample, and Resize of opset 10, did without saying: x_old = x_new / scale."""
    constants = _constants(graph)
    for node in graph.node:
        if node.op_type != "Resize" or node.domain:
            continue
        scales = numpy_helper.to_array(constants[node.input[2]]) if node.input[2] in constants else np.ones(1)
        nearest = _attribute(node, "mode", b"nearest") == b"nearest"
        if nearest and (scales < 1).any() and (scales > 1).any():
            raise ModelError(
                f"Resize {node.name!r} enlarges one axis and shrinks another, which changed with opset 11. {_REMEDY}"
            )
        node.attribute.append(helper.make_attribute("coordinate_transformation_mode", "asymmetric"))
        if nearest:  # the runtime rounds down to enlarge, up to shrink
            node.attribute.append(helper.make_attribute("nearest_mode", "ceil" if (scales < 1).any() else "floor"))


def _lift_operands(graph: onnx.GraphProto) -> None:
    """Make initializers of the Constant nodes that the converter added; the model's own have names."""
    kept = []
    for node in graph.node:
        if node.op_type == "Constant" and not node.name and node.attribute[0].name == "value":
            graph.initializer.append(node.attribute[0].t)
            graph.initializer[-1].name = node.output[0]
        else:
            kept.append(onnx.NodeProto.FromString(node.SerializeToString()))
    _set_nodes(graph, kept)


def _set_nodes(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    del graph.node[:]
    graph.node.extend(nodes)


def _match_types(raised: onnx.ModelProto) -> None:
    """Store the bounds of Clip and the filling of Pad in the type of the tensor."""
    inferred = onnx.shape_inference.infer_shapes(raised)
    for graph, known in zip(_graphs(raised.graph), _graphs(inferred.graph), strict=True):
        constants = _constants(graph)
        values = (*known.value_info, *known.input, *known.output)
        types = {value.name: value.type.tensor_type.elem_type for value in values}
        types.update({tensor.name: tensor.data_type for tensor in graph.initializer})
        for node in graph.node:
            wanted = types.get(node.input[0], 0) if node.op_type in _TYPED_BY_DATA else 0
            for index in _TYPED_BY_DATA[node.op_type] if wanted else ():
                tensor = constants.get(node.input[index]) if index < len(node.input) else None
                if tensor is not None and tensor.data_type != wanted:
                    array = numpy_helper.to_array(tensor).astype(helper.tensor_dtype_to_np_dtype(wanted))
                    tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))

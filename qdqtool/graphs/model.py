"""The only module that loads and saves ONNX files, and that knows what a trip through onnx-graphsurgeon loses.

A model is an ``onnx.ModelProto`` at the edges of the tool and an ``onnx_graphsurgeon.Graph`` beside a :class:`Header`
inside it.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
from google.protobuf.message import DecodeError

from qdqtool.errors import ModelError
from qdqtool.graphs import external, functions, value_types
from qdqtool.graphs.scopes import bodies, hoist_shared_constants, make_names_unique

if TYPE_CHECKING:
    import onnx_graphsurgeon as gs

ModelSource = str | os.PathLike[str] | onnx.ModelProto

MIN_OPSET: Final = 7
MAX_OPSET: Final = 26  # the newest that onnxruntime 1.31 loads
MAX_IR: Final = 13  # likewise
DEFAULT_DOMAIN: Final = ("", "ai.onnx")  # two spellings of it
_QDQ_OPSET: Final = 13  # the least with a scale for each channel
_IR_OF_OPSET: Final = ((21, 10), (23, 11), (24, 12), (25, 13))  # least IR version that a newer opset's types need
_PROTOBUF_LIMIT: Final = 2**31 - 1
_WORTH_SPARING: Final = 2**26
_ROOM: Final = 2**24  # for everything but the data of initializers
_BITS: Final = {
    number: 4
    if name.endswith(("INT4", "FLOAT4E2M1"))
    else 2
    if name.endswith("INT2")
    else 8 * onnx.helper.tensor_dtype_to_np_dtype(number).itemsize
    for name, number in onnx.TensorProto.DataType.items()
    if name not in ("UNDEFINED", "STRING")
}
_LARGE_CONSTANT: Final = 4096  # bytes; shape inference reads the values of small constants only


@dataclass(frozen=True)
class InputInfo:
    """What a model wants at one input: name, element type and shape (a name or None where a dimension is free).

    Where even the rank is free (``ranked`` is false) the shape is ().
    """

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | str | None, ...]
    ranked: bool = True

    def __str__(self) -> str:
        dims = ", ".join("?" if d is None else str(d) for d in self.shape) if self.ranked else "..."
        return f"{self.name}: {self.dtype.name}[{dims}]"


@dataclass(frozen=True)
class Header:
    """What onnx-graphsurgeon does not keep: documentation and metadata of model and nodes, and the versions."""

    ir_version: int
    model_version: int = 0
    domain: str = ""
    doc_string: str = ""
    metadata: Mapping[str, str] = field(default_factory=dict)
    graph_metadata: Mapping[str, str] = field(default_factory=dict)
    node_docs: Mapping[str, str] = field(default_factory=dict)
    node_metadata: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    value_types: Mapping[str, onnx.TypeProto] = field(default_factory=dict)
    type_attributes: Mapping[str, onnx.AttributeProto] = field(default_factory=dict)
    """Types of values that are no tensors, by name, and attributes that hold such a type, by node."""


def load(source: ModelSource) -> onnx.ModelProto:
    """Read a model with its external data, its local functions inlined; a ModelProto is copied, and stays as it is.

    Raises:
        ModelError: the file is missing, truncated or no ONNX model, or its opset is out of the supported range.
    """
    proto = _copy(source) if isinstance(source, onnx.ModelProto) else _read(Path(source))
    name = "the model" if isinstance(source, onnx.ModelProto) else str(source)
    if not proto.graph.output:
        raise ModelError(f"{name} has no graph outputs: it is no complete ONNX model")
    proto.ir_version = min(proto.ir_version, MAX_IR)  # newer ones only add to the format; what is new has an opset
    _import_default_domain(proto)
    version = opset(proto)
    if version > MAX_OPSET:
        raise ModelError(
            f"{name} uses opset {version}; the newest that the runtime loads is {MAX_OPSET}. "
            f"Export it again with opset_version <= {MAX_OPSET}"
        )
    if version < MIN_OPSET:
        raise ModelError(
            f"{name} uses opset {version}; the oldest supported is {MIN_OPSET}. "
            f"Export it again, or raise it with onnx.version_converter"
        )
    functions.inline(proto)
    return proto


def _import_default_domain(proto: onnx.ModelProto) -> None:
    """Name a version of the default operator set, of which Q/DQ are, where every node is of another domain."""
    named = any(entry.domain in DEFAULT_DOMAIN for entry in proto.opset_import)
    nodes = [node for graph in (proto.graph, *bodies(proto.graph)) for node in graph.node]
    nodes += [node for function in proto.functions for node in function.node]
    if not named and all(node.domain not in DEFAULT_DOMAIN for node in nodes):
        proto.opset_import.add(domain="", version=_QDQ_OPSET)


def _copy(proto: onnx.ModelProto) -> onnx.ModelProto:
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    return copied


def _read(path: Path) -> onnx.ModelProto:
    if not path.exists():
        raise ModelError(f"model file {path} does not exist")
    if path.is_dir():
        raise ModelError(f"{path} is a folder; name the .onnx file inside it")
    try:
        proto = onnx.load(path)
    except DecodeError as error:
        raise ModelError(f"{path} is no ONNX model, or is truncated: {error}") from error
    except (onnx.checker.ValidationError, FileNotFoundError) as error:
        raise ModelError(f"the external data of {path} cannot be read: {error}") from error
    except OSError as error:
        raise ModelError(f"{path} cannot be read: {error}") from error
    if not proto.ir_version and not proto.graph.node:
        raise ModelError(f"{path} is no ONNX model: it holds no graph")
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.DEFAULT:  # written out where the values came from another file
            tensor.ClearField("data_location")
    return proto


def opset(proto: onnx.ModelProto) -> int:
    """Version of the default operator set; 1 where the model names none."""
    return next((entry.version for entry in proto.opset_import if entry.domain in DEFAULT_DOMAIN), 1)


def fingerprint(proto: onnx.ModelProto) -> str:
    """SHA-256 of the model's content in hexadecimal, equal for equal models however they were stored."""
    if fits_protobuf(proto):
        return hashlib.sha256(proto.SerializeToString(deterministic=True)).hexdigest()
    light = without_large_constants(proto)
    onnx.helper.set_model_props(light, metadata(proto))
    state = hashlib.sha256(light.SerializeToString(deterministic=True))
    for tensor in proto.graph.initializer:
        state.update(tensor.SerializeToString(deterministic=True))
    return state.hexdigest()


def inputs(proto: onnx.ModelProto) -> tuple[InputInfo, ...]:
    """The inputs that a caller must feed: graph inputs that no initializer fills.

    Raises:
        ModelError: an input is no tensor (a sequence, a map or an optional).
    """
    filled = {tensor.name for tensor in proto.graph.initializer}
    found = []
    for value in proto.graph.input:
        if value.name in filled:
            continue
        if not value.type.HasField("tensor_type"):
            raise ModelError(
                f"model input {value.name!r} is no tensor; only tensor inputs can be fed from calibration data"
            )
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else (d.dim_param or None) for d in tensor.shape.dim)
        dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
        found.append(InputInfo(value.name, dtype, shape, ranked=tensor.HasField("shape")))
    return tuple(found)


def metadata(proto: onnx.ModelProto) -> dict[str, str]:
    """The model's metadata properties as a dictionary."""
    return {entry.key: entry.value for entry in proto.metadata_props}


def _props(entries: Iterable[onnx.StringStringEntryProto]) -> dict[str, str]:
    return {entry.key: entry.value for entry in entries}


def to_graph(proto: onnx.ModelProto) -> tuple[gs.Graph, Header]:
    """Import a model into onnx-graphsurgeon; nodes without a name or with another's name get ``<operator>_<index>``.

    Tensors of control-flow bodies get names that no other graph of the model uses. The graph refers to the tensors of
    ``proto``, which must not be changed afterwards.
    """
    import onnx_graphsurgeon as gs

    gs.logger.G_LOGGER.severity = gs.logger.G_LOGGER.CRITICAL
    hoist_shared_constants(proto.graph)
    make_names_unique(proto.graph)
    name_nodes(proto.graph, set())
    header = Header(
        ir_version=proto.ir_version,
        model_version=proto.model_version,
        domain=proto.domain,
        doc_string=proto.doc_string,
        metadata=metadata(proto),
        graph_metadata=_props(proto.graph.metadata_props),
        node_docs={node.name: node.doc_string for node in proto.graph.node if node.doc_string},
        node_metadata={node.name: _props(node.metadata_props) for node in proto.graph.node if node.metadata_props},
        value_types=value_types.find(proto.graph),
        type_attributes=value_types.find_attributes(proto.graph),
    )
    graph = gs.import_onnx(proto)
    value_types.hide(graph)
    # Initializers listed as inputs (IR version 3) are constants: nobody feeds them.
    graph.inputs = [tensor for tensor in graph.inputs if isinstance(tensor, gs.Variable)]
    return graph, header


def name_nodes(graph: onnx.GraphProto, taken: set[str]) -> None:
    """Give nodes without a name, or with a ``taken`` one, ``<operator>_<index>``; bodies too. ``taken`` grows."""
    named = {node.name for node in graph.node}
    for index, node in enumerate(graph.node):
        if not node.name or node.name in taken:
            name = f"{node.op_type}_{index}"
            while name in taken or name in named:
                name += "_"
            node.name = name
        taken.add(node.name)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                name_nodes(attribute.g, taken)


def to_proto(graph: gs.Graph, header: Header, extra_metadata: Mapping[str, str] | None = None) -> onnx.ModelProto:
    """Export a graph and give back what the round trip loses; ``extra_metadata`` is added to the model's own."""
    import onnx_graphsurgeon as gs

    least = max([6, *(ir for version, ir in _IR_OF_OPSET if graph.opset >= version)])
    graph.ir_version = min(max(header.ir_version, least), MAX_IR)
    graph.import_domains = _domains(graph)
    proto: onnx.ModelProto = gs.export_onnx(graph, do_type_check=False)
    hoist_shared_constants(proto.graph)
    value_types.restore(proto.graph, header.value_types)
    value_types.restore_attributes(proto.graph, header.type_attributes)
    proto.model_version, proto.domain, proto.doc_string = header.model_version, header.domain, header.doc_string
    onnx.helper.set_model_props(proto, {**header.metadata, **(extra_metadata or {})})
    _set_props(proto.graph.metadata_props, header.graph_metadata)
    for node in proto.graph.node:
        node.doc_string = header.node_docs.get(node.name, "")
        _set_props(node.metadata_props, header.node_metadata.get(node.name, {}))
    return proto


def _domains(graph: gs.Graph) -> list[onnx.OperatorSetIdProto]:
    """The graph's operator sets, the default one at the graph's own version (a pass may have raised it)."""
    others = [d for d in graph.import_domains or [] if d.domain not in DEFAULT_DOMAIN]
    return [onnx.helper.make_opsetid("", graph.opset), *others]


def _set_props(entries: Any, values: Mapping[str, str]) -> None:
    for key, value in values.items():
        entries.add(key=key, value=value)


def without_large_constants(proto: onnx.ModelProto) -> onnx.ModelProto:
    """A copy for shape inference: constants over 4 KiB become graph inputs of their type and shape.

    Weights tell inference nothing beyond their shape, and this copy stays under protobuf's 2 GiB.
    """
    light = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    graph = light.graph
    graph.name = proto.graph.name
    graph.node.extend(proto.graph.node)
    graph.input.extend(proto.graph.input)
    graph.output.extend(proto.graph.output)
    listed = {value.name for value in proto.graph.input}
    for tensor in proto.graph.initializer:
        if _value_bytes(tensor) <= _LARGE_CONSTANT:
            graph.initializer.append(tensor)
        elif tensor.name not in listed:
            graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    return light


def fits_protobuf(proto: onnx.ModelProto) -> bool:
    """Whether the model can be one message: under 2 GiB. Protobuf itself cannot tell: counting means serializing."""
    return _tensor_bytes(proto) < _PROTOBUF_LIMIT - _ROOM


def _tensor_bytes(proto: onnx.ModelProto) -> int:
    """Bytes of the initializers' values, from their shapes: to look at a message's values is to copy them."""
    return sum(map(_value_bytes, proto.graph.initializer))


def _value_bytes(tensor: onnx.TensorProto) -> int:
    return math.prod(tensor.dims) * _BITS.get(tensor.data_type, 64) // 8


def is_large(proto: onnx.ModelProto) -> bool:
    """Whether the model is worth sparing a copy of: 64 MiB of tensors or more."""
    return _tensor_bytes(proto) >= _WORTH_SPARING


def size(proto: onnx.ModelProto) -> int:
    """Bytes of the model with its tensors; over 2 GiB to within some bytes for each of them."""
    if fits_protobuf(proto):
        return proto.ByteSize()
    large = (_value_bytes(tensor) for tensor in proto.graph.initializer)
    return without_large_constants(proto).ByteSize() + sum(count for count in large if count > _LARGE_CONSTANT)


def check(proto: onnx.ModelProto) -> None:
    """Run ONNX's checker, over 2 GiB without the values of large constants; ModelError says what it found."""
    open_ranks = not all(value.type.tensor_type.HasField("shape") for value in _tensors(proto.graph))
    candidate = without_large_constants(proto) if open_ranks or not fits_protobuf(proto) else proto
    for value in _tensors(candidate.graph) if open_ranks else ():
        value.type.tensor_type.shape.SetInParent()  # the checker insists on a shape; the runtime does without
    try:
        onnx.checker.check_model(candidate)
    except (onnx.checker.ValidationError, ValueError) as error:
        raise ModelError(f"the ONNX checker refuses the model: {error}") from error


def _tensors(graph: onnx.GraphProto) -> list[onnx.ValueInfoProto]:
    """Inputs and outputs that are tensors."""
    return [value for value in (*graph.input, *graph.output) if value.type.HasField("tensor_type")]


def save(proto: onnx.ModelProto, path: str | os.PathLike[str], *, external_data: bool | None = None) -> Path:
    """Write a model atomically: the file appears whole under its name, or not at all.

    Args:
        proto: the model; it is not changed.
        path: target file; its folder must exist.
        external_data: tensors over 1 KiB go to ``<name>.data`` beside the file; None: where the model is over 2 GB.

    Raises:
        ModelError: the folder does not exist or cannot be written.
    """
    target = Path(path)
    if external_data is None:
        external_data = not fits_protobuf(proto)
    with _staging(target) as folder:
        staged = folder / target.name
        if external_data:
            data = folder / f"{target.name}.data"
            external.write(proto, staged, data)
            os.replace(data, target.with_name(data.name))
        else:
            staged.write_bytes(proto.SerializeToString(deterministic=True))
        os.replace(staged, target)
    return target


@contextlib.contextmanager
def _staging(target: Path) -> Iterator[Path]:
    """A temporary folder on the target's file system, removed at the end."""
    if target.is_dir():
        raise ModelError(f"cannot write {target}: it is a folder; name a file")
    if not target.parent.is_dir():
        raise ModelError(f"cannot write {target}: the folder {target.parent} does not exist")
    try:
        with tempfile.TemporaryDirectory(prefix=".qdqtool-", dir=target.parent) as folder:
            yield Path(folder)
    except OSError as error:
        raise ModelError(f"cannot write {target}: {error}") from error

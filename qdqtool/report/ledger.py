"""Where every byte of a quantized model's file goes: by what it is, and by layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from qdqtool.graphs import model as models
from qdqtool.graphs.links import CONVERSIONS, Links

WEIGHTS = "weights in integers: codes"
SCALES = "weights in integers: scales and zero points"
BIASES = "biases in integers"
FLOATS = "constants in float"
RANGES = "scales and zero points of activations"
OTHERS = "other constants (shapes, axes, indices)"
NODES = "nodes: operators, names, attributes"
TYPES = "names, types and shapes of tensors"
METADATA = "metadata: the recipe, versions"
REST = "headers"
_FLOATS = frozenset(
    getattr(onnx.TensorProto, name)
    for name in ("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16")
    if hasattr(onnx.TensorProto, name)
)


@dataclass(frozen=True)
class Ledger:
    """The bytes of a file.

    Attributes:
        total: of the whole file (and of the one beside it that holds tensors, where there is one).
        parts: what they are -> how many, all of them: their sum is ``total``.
        layers: node -> bytes of its weights, biases and other constants; one that several nodes read counts for the
            first of them.
    """

    total: int
    parts: Mapping[str, int]
    layers: Mapping[str, int]


def ledger(proto: onnx.ModelProto) -> Ledger:
    """Account for every byte of a model."""
    parts: Counter[str] = Counter()
    layers: Counter[str] = Counter()
    inner = 0
    for links in Links.of(proto.graph).everywhere():
        for tensor in links.graph.initializer:
            part, owner = _role(tensor, links)
            size = tensor.ByteSize()
            parts[part] += size
            inner += size if links.graph is not proto.graph else 0
            if owner:
                layers[owner] += size
    parts[NODES] += sum(node.ByteSize() for node in proto.graph.node) - inner
    parts[TYPES] += sum(v.ByteSize() for v in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output))
    parts[METADATA] += sum(entry.ByteSize() for entry in proto.metadata_props)
    total = models.size(proto)
    parts[REST] = total - sum(parts.values())
    order = (WEIGHTS, SCALES, BIASES, FLOATS, RANGES, OTHERS, NODES, TYPES, METADATA, REST)
    return Ledger(total, {name: parts[name] for name in order if parts[name]}, dict(layers))


def _role(tensor: onnx.TensorProto, links: Links) -> tuple[str, str]:
    """What an initializer is, and the node that it belongs to ("" for none)."""
    readers = links.read(tensor.name)
    reader = readers[0] if readers else None
    if reader is None:
        return OTHERS, ""
    if reader.op_type not in CONVERSIONS:
        return (FLOATS if tensor.data_type in _FLOATS else OTHERS), reader.name
    stored = reader.input[0] in links.constants
    if not stored:
        return RANGES, ""
    owner = _behind(reader, links)
    if reader.input[0] != tensor.name:
        return SCALES, owner
    return (BIASES if tensor.data_type == onnx.TensorProto.INT32 else WEIGHTS), owner


def _behind(node: onnx.NodeProto, links: Links) -> str:
    """The first node behind conversions that reads what a constant's DequantizeLinear gives back."""
    while node.op_type in CONVERSIONS:
        readers = links.read(node.output[0])
        if not readers:
            return ""
        node = readers[0]
    return str(node.name)

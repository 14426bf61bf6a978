"""A model as rules see it: its graphs indexed, its conversions with their numbers, and what the target makes of it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from qdqtool.errors import ModelError
from qdqtool.graphs import model as models
from qdqtool.graphs.links import CONVERSIONS, Links
from qdqtool.graphs.model import DEFAULT_DOMAIN, ModelSource
from qdqtool.graphs.scopes import bodies, make_names_unique
from qdqtool.planning.target import Target
from qdqtool.verification import placement

Shape = tuple[int | None, ...]
LAYERS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
"""Operators whose input 1 may be a weight in integers, with an int32 bias beside it."""


@dataclass(frozen=True)
class Conversion:
    """A QuantizeLinear or DequantizeLinear with what the graph tells of it.

    Attributes:
        node: the node.
        links: the index of its graph.
        codes: number of the integers' element type; None where the graph does not tell.
        scale: values as they are stored; None where they are computed.
        zero_point: values; None where there is none, or where it is computed.
        axis: of the scales, as written.
        block_size: elements that share a scale along ``axis``; 0 where there are no blocks.
    """

    node: onnx.NodeProto
    links: Links
    codes: int | None
    scale: npt.NDArray[Any] | None
    zero_point: npt.NDArray[np.int64] | None
    axis: int
    block_size: int

    @property
    def quantizes(self) -> bool:
        """Whether it is a QuantizeLinear."""
        return self.node.op_type == "QuantizeLinear"

    @property
    def source(self) -> str:
        """The tensor that it converts."""
        return str(self.node.input[0])

    @property
    def result(self) -> str:
        """The tensor that it puts out."""
        return str(self.node.output[0])

    @property
    def stored(self) -> onnx.TensorProto | None:
        """The constant that it converts; None where the tensor is computed."""
        return self.links.constants.get(self.source)

    @property
    def zero_type(self) -> int | None:
        """Number of the zero point's element type; None where it has none."""
        name = self.node.input[2] if len(self.node.input) > 2 else ""
        constant = self.links.constants.get(name)
        return constant.data_type if constant is not None else self.links.types.get(name)

    def same_codes(self, other: Conversion) -> bool:
        """Whether both map values to codes alike; False where either's parameters are not known."""
        if self.scale is None or other.scale is None or self.codes != other.codes:
            return False
        grouped = (self.axis, self.block_size) == (other.axis, other.block_size) or self.scale.size == 1
        return grouped and np.array_equal(self.scale, other.scale) and np.array_equal(_zero(self), _zero(other))


def _zero(conversion: Conversion) -> npt.NDArray[np.int64]:
    assert conversion.scale is not None
    zero = conversion.zero_point
    return np.zeros(conversion.scale.shape, np.int64) if zero is None else zero


def load(source: ModelSource) -> onnx.ModelProto:
    """Read a model so that rules can name and find everything in it.

    Nodes without a name get one, tensors in control-flow bodies a name of their own, and what Constant nodes hold
    becomes initializers, as the runtime does.

    Raises:
        ModelError: the file is no model that can be read.
    """
    proto = models.load(source)
    make_names_unique(proto.graph)
    models.name_nodes(proto.graph, set())
    for graph in (proto.graph, *bodies(proto.graph)):
        _lift_constants(graph)
    return proto


def _lift_constants(graph: onnx.GraphProto) -> None:
    values = {i: node.attribute[0].t for i, node in enumerate(graph.node) if _holds_tensor(node)}
    for index, value in values.items():
        graph.initializer.add().CopyFrom(value)
        graph.initializer[-1].name = graph.node[index].output[0]
    for index in reversed(values):
        del graph.node[index]


def _holds_tensor(node: onnx.NodeProto) -> bool:
    return node.op_type == "Constant" and [a.name for a in node.attribute] == ["value"]


class Subject:
    """A model under the rules; made anew after a change of the model."""

    def __init__(self, proto: onnx.ModelProto, target: Target | None) -> None:
        """``proto`` comes from :func:`load`; ``target`` is None where rules of targets are left out."""
        self.proto, self.target = proto, target
        self.opset = models.opset(proto)
        self.graphs = list(Links.of(proto.graph).everywhere())
        self.by_result: dict[str, Conversion] = {}
        for links in self.graphs:
            for node in links.graph.node:
                if node.op_type in CONVERSIONS and is_default(node) and node.input and node.output:
                    self.by_result[node.output[0]] = self._read(node, links)

    @property
    def conversions(self) -> list[Conversion]:
        """Every QuantizeLinear and DequantizeLinear, bodies included."""
        return list(self.by_result.values())

    def nodes(self) -> Iterator[tuple[onnx.NodeProto, Links]]:
        """Every node of the default domain that is no conversion, with the index of its graph."""
        for links in self.graphs:
            for node in links.graph.node:
                if node.op_type not in CONVERSIONS and is_default(node):
                    yield node, links

    def dequantizer(self, tensor: str) -> Conversion | None:
        """The DequantizeLinear that puts a tensor out; None where something else does."""
        found = self.by_result.get(tensor)
        return None if found is None or found.quantizes else found

    def quantizer(self, tensor: str) -> Conversion | None:
        """The QuantizeLinear that puts a tensor out; None where something else does."""
        found = self.by_result.get(tensor)
        return found if found is not None and found.quantizes else None

    def operand(self, node: onnx.NodeProto, index: int) -> Conversion | None:
        """The DequantizeLinear before an input of a node; None where there is none."""
        return self.dequantizer(node.input[index]) if index < len(node.input) else None

    def constant(self, tensor: str, links: Links) -> npt.NDArray[Any] | None:
        """Values of a constant; None for a computed tensor. ModelError where they do not fit its type and shape."""
        found = links.constants.get(tensor)
        try:
            return None if found is None else numpy_helper.to_array(found)
        except ValueError as error:
            raise ModelError(f"the constant {tensor!r} cannot be read: {error}") from error

    def _read(self, node: onnx.NodeProto, links: Links) -> Conversion:
        inputs = [*node.input, "", ""][:3]
        attributes = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
        zero = self.constant(inputs[2], links)
        return Conversion(
            node=node,
            links=links,
            codes=self._codes(node, links, attributes.get("output_dtype", 0)),
            scale=self.constant(inputs[1], links),
            zero_point=None if zero is None or zero.dtype.kind == "f" else zero.astype(np.int64),
            axis=attributes.get("axis", 1),
            block_size=attributes.get("block_size", 0),
        )

    def _codes(self, node: onnx.NodeProto, links: Links, output_dtype: int) -> int | None:
        if node.op_type == "QuantizeLinear":
            zero = node.input[2] if len(node.input) > 2 else ""
            return links.types.get(zero) or output_dtype or (None if zero else onnx.TensorProto.UINT8)
        maker = self.quantizer(node.input[0])
        return maker.codes if maker is not None else links.types.get(node.input[0])

    @cached_property
    def invalid(self) -> str | None:
        """Why ONNX's checker refuses the model; None where it does not."""
        try:
            models.check(self.proto)
        except ModelError as error:
            return str(error)
        return None

    @cached_property
    def optimized(self) -> onnx.ModelProto:
        """The graph that the CPU provider makes of the model; ModelError where it refuses to."""
        return placement.load(self.proto)[0]

    @cached_property
    def shapes(self) -> dict[str, Shape]:
        """Shapes of tensors, as far as constants, the model and shape inference tell; None is a free dimension."""
        light = models.without_large_constants(self.proto)
        inferred = onnx.shape_inference.infer_shapes(light).graph
        found: dict[str, Shape] = {}
        for graph in (inferred, *bodies(inferred)):
            for value in (*graph.input, *graph.output, *graph.value_info):
                tensor = value.type.tensor_type
                if tensor.HasField("shape"):
                    found[value.name] = tuple(
                        d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim
                    )
        for links in self.graphs:
            found |= {tensor.name: tuple(tensor.dims) for tensor in links.graph.initializer}
        return found


def is_default(node: onnx.NodeProto) -> bool:
    """Whether a node is of the default domain."""
    return node.domain in DEFAULT_DOMAIN


def weight_axis(node: onnx.NodeProto, rank: int) -> int | None:
    """Axis of a layer's weight that runs over its output channels; None where no single one does."""
    attributes = {a.name: a.i for a in node.attribute if a.type == onnx.AttributeProto.INT}
    if node.op_type == "Conv":
        return 0
    if node.op_type == "ConvTranspose":
        return 1 if attributes.get("group", 1) == 1 else None
    if node.op_type == "Gemm":
        return 0 if attributes.get("transB", 0) else 1
    return 1 if rank == 2 else None


def type_name(number: int | None) -> str:
    """An element type as ONNX calls it, in lower case."""
    return "unknown" if not number else onnx.TensorProto.DataType.Name(number).lower()

"""A graph in ONNX's own form, indexed: who makes a tensor, who reads it, and of which type it is."""

from __future__ import annotations

from collections import ChainMap, defaultdict
from collections.abc import Iterator, MutableMapping
from dataclasses import dataclass, field, replace

import onnx

from qdqtool.graphs.scopes import held, read_by

CONVERSIONS = frozenset({"QuantizeLinear", "DequantizeLinear"})


@dataclass(frozen=True)
class Links:
    """An index over one graph of a model; reads inside control-flow bodies count as the reads of their node.

    What a body's outer graphs make, hold and know of types is known in it too.

    Attributes:
        graph: what is indexed.
        makers: tensor -> the node that puts it out.
        readers: tensor -> the nodes that read it, once each.
        constants: initializers by name.
        types: tensor -> number of its element type, where the graph tells.
        outputs: tensors that the graph gives out.
    """

    graph: onnx.GraphProto
    makers: MutableMapping[str, onnx.NodeProto] = field(default_factory=dict)
    readers: dict[str, list[onnx.NodeProto]] = field(default_factory=lambda: defaultdict(list))
    constants: MutableMapping[str, onnx.TensorProto] = field(default_factory=dict)
    types: MutableMapping[str, int] = field(default_factory=dict)
    outputs: frozenset[str] = frozenset()

    @staticmethod
    def of(graph: onnx.GraphProto, outer: Links | None = None) -> Links:
        """Index a graph, a body in ``outer`` if that is given; linear in its nodes."""
        found = Links(graph, outputs=frozenset(value.name for value in graph.output))
        if outer is not None:
            makers, constants, types = outer.makers, outer.constants, outer.types
            found = replace(
                found, makers=ChainMap({}, makers), constants=ChainMap({}, constants), types=ChainMap({}, types)
            )
        for node in graph.node:
            found.makers.update(dict.fromkeys(filter(None, node.output), node))
            for name in dict.fromkeys(filter(None, read_by(node))):
                found.readers[name].append(node)
        for tensor in graph.initializer:
            found.constants[tensor.name] = tensor
            found.types[tensor.name] = tensor.data_type
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type:
                found.types[value.name] = value.type.tensor_type.elem_type
        return found

    def everywhere(self) -> Iterator[Links]:
        """The index of this graph and of every body under it."""
        yield self
        for node in self.graph.node:
            for body in held(node):
                yield from Links.of(body, self).everywhere()

    def read(self, tensor: str) -> list[onnx.NodeProto]:
        """The nodes that read the tensor."""
        return self.readers.get(tensor, [])

    def dequantizer(self, tensor: str) -> onnx.NodeProto | None:
        """The DequantizeLinear that puts the tensor out; None where something else does."""
        maker = self.makers.get(tensor)
        return maker if maker is not None and maker.op_type == "DequantizeLinear" else None

"""The model without the values of its large constants, and letting go of those that nothing needs any more.

A model of gigabytes must not be copied for steps that look at its structure alone.
"""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues, SparseValues

from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.lazy import Derived

if TYPE_CHECKING:
    from qdqtool.graphs.model import Header
    from qdqtool.passes_api import State

_LARGE: Final = 4096
"""Bytes; shape inference reads the values of small constants only."""


class _Shell(LazyValues):  # type: ignore[misc]  # the library has no type hints
    """Type and shape of a constant's values."""

    def __init__(self, values: Any) -> None:
        self.shape, self.dtype, self.nbytes = values.shape, values.dtype, 0

    @property
    def tensor(self) -> onnx.TensorProto:
        return onnx.TensorProto(data_type=_code(self.dtype), dims=self.shape)


def light_proto(graph: gs.Graph, header: Header) -> tuple[onnx.ModelProto, dict[str, Any]]:
    """Export a graph whose constants over 4 KiB are graph inputs of their type and shape.

    Returns:
        The model, and the values of those constants by name, for :func:`restore`.
    """
    large = {name: tensor._values for name, tensor in graph.tensors().items() if _is_large(tensor)}
    constants = {name: tensor for name, tensor in graph.tensors().items() if name in large}
    try:
        for name, tensor in constants.items():
            tensor._values = _Shell(large[name])
        proto = models.to_proto(graph, header)
    finally:
        for name, tensor in constants.items():
            tensor._values = large[name]
    kept = onnx.GraphProto(initializer=[t for t in proto.graph.initializer if t.name not in large])
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept.initializer)
    listed = {value.name for value in proto.graph.input}
    for name, values in large.items():
        if name not in listed:
            shell = onnx.helper.make_tensor_value_info(name, _code(values.dtype), list(values.shape))
            proto.graph.input.append(shell)
    return proto, large


def restore(graph: gs.Graph, large: dict[str, Any]) -> None:
    """Give a graph that was made from a light model the values of its large constants again."""
    graph.inputs = [tensor for tensor in graph.inputs if tensor.name not in large]
    for _, inner in graphs.all_graphs(graph):
        for name, tensor in inner.tensors().items():
            if name in large and isinstance(tensor, gs.Variable):
                tensor.to_constant(large[name])


def release_float(state: State) -> None:
    """Let go of the float model once nothing will be compared with it; the quantized graph keeps what it reads."""
    assert state.quantized is not None
    assert state.original is not None
    for _, graph in graphs.all_graphs(state.quantized):
        for tensor in graph.tensors().values():
            values = getattr(tensor, "_values", None)
            # What refers to a part of the float model's message, be it a shape, would keep all of it.
            if isinstance(tensor, gs.Variable):
                tensor.shape = None if tensor.shape is None else list(tensor.shape)
            elif isinstance(values, Derived):
                tensor.values = values.load()
            elif isinstance(values, LazyValues):
                own = type(values.tensor)()
                own.CopyFrom(values.tensor)
                tensor.values = type(values)(own)
    state.graph, state.original = state.quantized, onnx.ModelProto(ir_version=state.original.ir_version)
    gc.collect()  # nodes and tensors refer to each other, and would hold the message until some later time


def _is_large(tensor: gs.Tensor) -> bool:
    if not isinstance(tensor, gs.Constant) or isinstance(tensor._values, SparseValues):
        return False
    return bool(tensor._values.nbytes > _LARGE and tensor.dtype != np.object_)


def _code(dtype: Any) -> int:
    """ONNX's number of a type as the graph library spells it."""
    return dtype if isinstance(dtype, int) else int(onnx.helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

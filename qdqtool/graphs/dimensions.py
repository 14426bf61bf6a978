"""Shape, Size, and Gather or Slice of a Shape, answered from known dimensions where others are symbolic."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs

Dims = list[int | None]


def fold_dimensions(graph: gs.Graph, outputs: set[int]) -> int:
    """Make constants of one graph's nodes that only read known dimensions; returns of how many.

    ``outputs`` comes from :func:`qdqtool.graphs.graph.output_ids`; what the model gives out stays.
    """
    partial: dict[int, Dims] = {}
    changes = 0
    for node in graph.nodes:
        value = None if node.domain else _dimensions(node, partial)
        if value is None or id(node.outputs[0]) in outputs:
            continue
        tensor = node.outputs[0]
        flat = value if isinstance(value, list) else [value]
        if None not in flat:
            graphs.unlink(node)
            tensor.to_constant(np.array(value, dtype=np.int64))
            changes += 1
        elif isinstance(value, list):
            partial[id(tensor)] = value
    return changes


def _dimensions(node: gs.Node, partial: Mapping[int, Dims]) -> Dims | int | None:
    """What is known of a node's integer result: a list for one of rank 1, a number for a scalar, None for nothing."""
    if node.op in ("Shape", "Size"):
        shape = node.inputs[0].shape
        if shape is None:
            return None
        dims: Dims = [d if isinstance(d, int) and d >= 0 else None for d in shape]
        if node.op == "Shape":
            return dims[node.attrs.get("start", 0) : node.attrs.get("end", len(dims))]
        return None if None in dims else math.prod(d for d in dims if d is not None)
    if node.op not in ("Gather", "Slice") or id(node.inputs[0]) not in partial:
        return None
    return _picked(node, partial[id(node.inputs[0])])


def _picked(node: gs.Node, dims: Dims) -> Dims | int | None:
    """What a Gather or Slice with constant operands takes from a vector of dimensions."""
    operands = [graphs.constant(tensor) for tensor in node.inputs[1:]]
    if not operands or any(values is None or values.size == 0 for values in operands):
        return None
    if node.op == "Gather":
        indices = operands[0]
        assert indices is not None
        if indices.ndim > 1 or (np.abs(indices + 0.5) > len(dims)).any():
            return None
        return [dims[int(i)] for i in indices] if indices.ndim else dims[int(indices)]
    start, end, *rest = (int(values.reshape(-1)[0]) for values in operands if values is not None)
    step = rest[1] if len(rest) > 1 else 1
    return dims[start:end:step] if step > 0 else None

"""Nodes that keep the runtime from fusing across a tensor, so that its bits do not depend on what else is observed.

The runtime fuses a node with the next one only where nobody else reads what is between them, and what is fused may
round elsewhere: the sum of a residual block, for one, is then computed inside of the convolution. An output of the
model is read by somebody. So without more, observing one tensor would change the last bits of others, and statistics of
a few tensors would not be those of all. A fence is a reader that costs nothing: a Size, whose result nobody fetches.

A tensor needs no fence where that would change nothing: one that follows from another (:mod:`qdqtool.derive`) and is
not observed for that reason, and one between a convolution and the activation function that alone reads it, which
rounds alike in either form. Where such a tensor is observed all the same (a recipe may exclude the activation
function), it is fenced too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Final

import onnx

from qdqtool.derive import all_derivations
from qdqtool.scopes import read_by

_PREFIX: Final = "qdqtool.fence."
_FUSED_ALIKE: Final = frozenset({"Clip", "LeakyRelu", "Relu"})


def fences(proto: onnx.ModelProto, observed: Iterable[str], follows: Iterable[str] | None = None) -> frozenset[str]:
    """Names of the tensors that get a fence where these are observed: mostly the same ones whatever is observed.

    Args:
        proto: the model.
        observed: names of tensors.
        follows: the tensors that follow from others, where the caller knows them.
    """
    values = (*proto.graph.value_info, *proto.graph.output)
    floats = {v.name for v in values if v.type.tensor_type.elem_type == onnx.TensorProto.FLOAT}
    return frozenset(floats - _bare(proto, follows)) | frozenset(observed)


def _bare(proto: onnx.ModelProto, follows: Iterable[str] | None) -> set[str]:
    readers = Counter(name for node in proto.graph.node for name in read_by(node))
    readers.update(output.name for output in proto.graph.output)
    constants = {tensor.name for tensor in proto.graph.initializer}
    convolved = {node.output[0] for node in proto.graph.node if node.op_type == "Conv"}
    fused = {
        node.input[0]
        for node in proto.graph.node
        if node.op_type in _FUSED_ALIKE and readers[node.input[0]] == 1 and constants.issuperset(node.input[1:])
    }
    return {*(all_derivations(proto) if follows is None else follows)} | (convolved & fused)


def add_fences(proto: onnx.ModelProto, names: frozenset[str]) -> None:
    """Put fences behind those of the named tensors that nodes of the model compute; each is an output of the model."""
    nodes = []
    for node in proto.graph.node:
        nodes.append(node)
        for name in names.intersection(node.output):
            nodes.append(onnx.helper.make_node("Size", [name], [_PREFIX + name]))
            proto.graph.output.append(onnx.helper.make_tensor_value_info(_PREFIX + name, onnx.TensorProto.INT64, []))
    copied = onnx.GraphProto(node=nodes)
    del proto.graph.node[:]
    proto.graph.node.extend(copied.node)


def without_fences(outputs: Iterable[str]) -> list[str]:
    """Those of a model's outputs that are no fences."""
    return [name for name in outputs if not name.startswith(_PREFIX)]

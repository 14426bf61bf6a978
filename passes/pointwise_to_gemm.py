"""Turn a 1x1 convolution of a single position that is then flattened into Flatten and Gemm.

    Flatten(Conv(x, W[M, C, 1, 1], b)) = Gemm(Flatten(x), W[M, C], b, transB=1)    for x of shape [N, C, 1, 1]

Classifier heads are exported this way. An integer Gemm can put out floats, an integer Conv cannot: behind a Conv the
model's result would be rounded to 8 bits for nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.linear import LinearLayer, replace_constant
from qdqtool.passes_api import Fact, State


@dataclass(frozen=True)
class PointwiseToGemm:
    """Turn a 1x1 convolution of a single position that is then flattened into Flatten and Gemm."""

    name: ClassVar[str] = "pointwise-to-gemm"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAN, Fact.STATISTICS, Fact.PARAMS, Fact.QDQ})

    def run(self, state: State) -> int:
        """Rewrite the graph and its control-flow bodies; returns the number of convolutions turned."""
        outputs = graphs.leaving_ids(state.graph)
        taken = graphs.tensor_names(state.graph)
        count = 0
        for conv in list(graphs.all_nodes(state.graph)):
            flatten = _flattened(conv, outputs)
            if flatten is None:
                continue
            reason = _obstacle(conv)
            if reason is not None:
                state.skip(self.name, conv.name, reason)
                continue
            _turn(conv, flatten, taken)
            count += 1
        if count:
            graphs.sweep(state.graph)
        return count


def _flattened(conv: gs.Node, outputs: set[int]) -> gs.Node | None:
    """The only reader of a convolution's result, where that flattens [N, M, 1, 1] to [N, M]."""
    if conv.op != "Conv" or not graphs.is_constant(conv.inputs[1]):
        return None
    reader = graphs.single_use(conv.outputs[0], outputs)
    if reader is None or reader.op not in ("Flatten", "Reshape", "Squeeze"):
        return None
    shape = reader.outputs[0].shape
    if reader.op == "Flatten":
        return reader if reader.attrs.get("axis", 1) == 1 else None
    channels = conv.inputs[1].shape[0]
    return reader if shape is not None and len(shape) == 2 and shape[1] == channels else None


def _obstacle(conv: gs.Node) -> str | None:
    shape, weight = conv.inputs[0].shape, conv.inputs[1].shape
    if shape is None or len(shape) < 3 or any(extent != 1 for extent in shape[2:]):
        return "its input is not known to be a single position"
    if any(extent != 1 for extent in weight[2:]) or any(conv.attrs.get("pads", ())):
        return "its kernel is larger than 1, or it pads"
    return None if conv.attrs.get("group", 1) == 1 else "it is grouped"


def _turn(conv: gs.Node, flatten: gs.Node, taken: set[str]) -> None:
    source, weight = conv.inputs[0], conv.inputs[1]
    flat = gs.Variable(
        graphs.fresh_name(f"{source.name}_flat", taken), dtype=source.dtype, shape=[source.shape[0], source.shape[1]]
    )
    bias = LinearLayer(conv).bias
    result = flatten.outputs[0]
    graphs.unlink(flatten)
    flatten.op, flatten.attrs = "Flatten", {"axis": 1}
    flatten.inputs, flatten.outputs = [source], [flat]
    values = weight.values.reshape(weight.shape[0], weight.shape[1])
    replace_constant(conv, 1, values, f"{conv.name}.weight", taken)
    conv.op, conv.attrs = "Gemm", {"transB": 1}
    conv.inputs = [flat, conv.inputs[1], *([bias] if bias is not None else [])]
    conv.outputs = [result]

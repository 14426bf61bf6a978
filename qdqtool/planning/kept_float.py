"""What keeps ONNX Runtime from taking to integers at load what a model leaves in float.

* Where the input of a Conv, ConvTranspose or Gemm comes from a DequantizeLinear with one scale, the CPU provider
  quantizes the layer's float weight, with one scale for all channels, and its bias. A layer that was left out because
  integers cost too much would run in them after all. A DequantizeLinear with a scale for each channel, all alike, gives
  the same values and is passed by.
* A MatMul whose input has scales of channels fuses to a kernel that refuses them when it runs. A Max with the least
  value there is, between the two, changes nothing else.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.layer_input import LayerInput
from qdqtool.spec import QuantParams, per_channel

_QUANTIZED_AT_LOAD: Final = frozenset({"Conv", "ConvTranspose", "Gemm"})


def spread(params: QuantParams, node: gs.Node) -> QuantParams | None:
    """The same parameters for each channel that a float layer reads; None where the runtime leaves the layer alone."""
    layer = LayerInput.of(node, 0) if node.op in _QUANTIZED_AT_LOAD else None
    if layer is None or params.scale.size != 1 or layer.layer.weight.dtype != np.float32 or layer.channels < 2:
        return None
    if node.op == "ConvTranspose":
        channels, axis = int(layer.layer.weight.shape[0]), 1
    else:
        channels, axis = layer.channels, 0 if node.op == "Gemm" and node.attrs.get("transA", 0) else 1
    bias = graphs.input_at(node, 2)
    if bias is not None and (not graphs.is_constant(bias) or len(bias.shape) != 1):
        return None
    spec = replace(params.spec, granularity=per_channel(axis))
    scale, zero = (np.full(channels, part.reshape(-1)[0]) for part in (params.scale, params.zero_point))
    return QuantParams(spec, scale, zero, params.method)


def least(params: QuantParams, tensor: gs.Tensor) -> npt.NDArray[Any]:
    """The least value that codes of an activation stand for, in its type: no value is below it."""
    return np.asarray(params.range.lo.min(), tensor.dtype)

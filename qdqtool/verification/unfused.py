"""Why the runtime left a node of a quantized graph float, as far as the graph tells.

An integer kernel takes the place of a node whose inputs all come from a DequantizeLinear and whose outputs all go to a
QuantizeLinear and nowhere else, in 8 bits and with the bias in int32. Between the node and that QuantizeLinear only a
Relu or Clip may stand, which its codes make redundant; a matrix product may put out float. Whether codes are signed
does not matter: the runtime rewrites them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import onnx
from onnx import numpy_helper

from qdqtool.graphs.links import Links
from qdqtool.planning.target import Emit, OpRule

_BITS = {"int8": 8, "uint8": 8, "int16": 16, "uint16": 16, "int4": 4, "uint4": 4, "int2": 2, "uint2": 2}
_ABSORBED = frozenset({"Relu", "Clip"})
_EPSILON = float(np.finfo(np.float32).eps)
UNKNOWN = "the runtime left it float, and the graph does not tell why"
_EIGHT: Final = "give it an 8-bit dtype with --tensor, or leave the node in float with --exclude"
_ALONE: Final = "quantize what reads it too, or leave this node in float with --exclude"


@dataclass(frozen=True)
class Cause:
    """Why a node runs in float, and what would change that."""

    reason: str
    remedy: str = ""


def why_float(node: onnx.NodeProto, links: Links, rule: OpRule) -> str:
    """The reason of :func:`cause_of`, alone."""
    return cause_of(node, links, rule).reason


def cause_of(node: onnx.NodeProto, links: Links, rule: OpRule) -> Cause:
    """The first cause that is found for a node of a quantized graph that runs in float after all.

    Args:
        node: the node as it is in the quantized graph.
        links: that graph.
        rule: how the target quantizes its operator.
    """
    return next(_causes(node, links, rule), Cause(UNKNOWN))


def _causes(node: onnx.NodeProto, links: Links, rule: OpRule) -> Iterator[Cause]:
    bias = 2 if rule.weight and len(node.input) > 2 and node.input[2] else None
    read = [i for i in _operands(node, rule) if i != bias]
    for index in read:
        if links.dequantizer(node.input[index]) is None:
            yield Cause(f"its input {node.input[index]!r} is not quantized", "quantize what makes that input")
    for source in filter(None, (links.dequantizer(node.input[index]) for index in read)):
        if _BITS.get(_codes(source, links), 8) != 8:
            reason = f"its input {_named(source)!r} has {_codes(source, links)} codes; integer kernels take 8 bits"
            yield Cause(reason, _EIGHT)
    yield from _wrong_output(node, links, rule)
    if bias is not None:
        stored = links.dequantizer(node.input[bias])
        if stored is None:
            yield Cause(f"its bias {node.input[bias]!r} is float", "quantize for a target whose biases are int32")
        elif _codes(stored, links) not in ("int32", ""):
            reason = f"its bias {_named(stored)!r} has {_codes(stored, links)} codes; integer kernels take int32"
            yield Cause(reason, "store it in int32, at the scales of activation and weight")


def _operands(node: onnx.NodeProto, rule: OpRule) -> list[int]:
    indices = range(len(node.input)) if rule.activations is None else rule.activations
    wanted = sorted({*indices, *((0, 1) if rule.weight else ())})
    return [i for i in wanted if i < len(node.input) and node.input[i]]


def _codes(conversion: onnx.NodeProto | None, links: Links) -> str:
    """Name of the integer type on the other side of a Q or DQ; "" where the graph does not tell."""
    if conversion is None:
        return ""
    zero = conversion.input[2] if len(conversion.input) > 2 else ""
    quantized = conversion.output[0] if conversion.op_type == "QuantizeLinear" else conversion.input[0]
    number = links.types.get(quantized) or links.types.get(zero)
    return "" if number is None else onnx.TensorProto.DataType.Name(number).lower()


def _named(conversion: onnx.NodeProto) -> str:
    """The tensor that a DequantizeLinear gives back, as the float model calls it."""
    return str(conversion.input[0]).removesuffix("_quantized")


def _wrong_output(node: onnx.NodeProto, links: Links, rule: OpRule) -> Iterator[Cause]:
    for output in filter(None, node.output):
        behind = _behind(output, links)
        tensor = output if behind is None else behind.output[0]
        readers = links.read(tensor)
        quantizers = [reader for reader in readers if reader.op_type == "QuantizeLinear"]
        others = [f"{r.op_type} {r.name!r}" for r in readers if r not in quantizers]
        if not quantizers:
            if rule.output is not Emit.WANTED:
                reason = f"its output {tensor!r} is not quantized, and its integer kernel puts out integers alone"
                yield Cause(reason, _ALONE)
            continue
        if others or tensor in links.outputs:
            reader = others[0] if others else "who runs the model"
            yield Cause(f"its output {tensor!r} is read in float too, by {reader}", _ALONE)
        if behind is not None and not _redundant(behind, quantizers[0], links):
            reason = (
                f"{behind.op_type} {behind.name!r} behind it stays, because codes of {tensor!r} go beyond its limits"
            )
            yield Cause(reason, "quantize that tensor asymmetrically, its least code at the lower limit")
        if _BITS.get(_codes(quantizers[0], links), 8) != 8:
            reason = f"its output {tensor!r} has {_codes(quantizers[0], links)} codes; integer kernels put out 8 bits"
            yield Cause(reason, _EIGHT)
        if rule.output is Emit.SAME and not _same_scale(node, quantizers[0], links):
            yield Cause("its output has another scale than its input", "give both the same range with --tensor")


def _behind(output: str, links: Links) -> onnx.NodeProto | None:
    """The activation function that alone reads the tensor."""
    readers = links.read(output)
    alone = len(readers) == 1 and output not in links.outputs and readers[0].op_type in _ABSORBED
    return readers[0] if alone else None


def _redundant(behind: onnx.NodeProto, quantizer: onnx.NodeProto, links: Links) -> bool:
    """Whether the codes of a QuantizeLinear reach no value that the activation function before it would change."""
    scale, zero = (_value(name, links) for name in (*quantizer.input[1:3], "")[:2])
    name = _codes(quantizer, links)
    if scale is None or _BITS.get(name) is None:
        return False
    least = 0 if name.startswith("u") else -(1 << (_BITS[name] - 1))
    offset = 0.0 if zero is None else zero
    # As the runtime compares: in float32, and within its epsilon.
    codes = (least, least + (1 << _BITS[name]) - 1)
    lo, hi = (float(np.float32((code - offset) * scale)) for code in codes)
    if behind.op_type == "Relu":
        return lo >= 0
    ends = [_value(i, links) for i in (*behind.input[1:], "", "")[:2]]
    return (ends[0] is None or ends[0] - lo <= _EPSILON) and (ends[1] is None or hi - ends[1] <= _EPSILON)


def _same_scale(node: onnx.NodeProto, quantizer: onnx.NodeProto, links: Links) -> bool:
    source = links.dequantizer(node.input[0])
    if source is None:
        return True
    pairs = zip(source.input[1:3], quantizer.input[1:3], strict=False)
    return all(_value(a, links) == _value(b, links) for a, b in pairs)


def _value(tensor: str, links: Links) -> float | None:
    """The value of a constant of one element."""
    found = links.constants.get(tensor)
    array = None if found is None else np.asarray(numpy_helper.to_array(found))
    return float(array.reshape(-1)[0].item()) if array is not None and array.size == 1 else None

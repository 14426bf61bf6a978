"""Why a node stays float although its target runs its operator in integers."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.linear import LinearLayer, weight_inputs
from qdqtool.planning.target import OpRule, Target

_MASK: Final = 1e4
"""Magnitude from which a constant operand is taken for a mask: models write -1e4, -65504, -1e9 or -3.4e38."""


def obstacle(node: gs.Node, rule: OpRule, target: Target, opset: int) -> str | None:
    """Why a node of an operator that the target runs in integers stays float after all; None where it does not.

    Args:
        node: a node of the operator that ``rule`` is about, with types and shapes inferred.
        rule: the target's rule.
        target: the execution provider.
        opset: version of the default operator set.
    """
    reason = _no_float32(node, rule) or _quantized_already(node, rule)
    if reason is None and opset < rule.min_opset:
        reason = f"{node.op} has an integer form only from opset {rule.min_opset} on"
    if reason is None and rule.weight_only and not all(graphs.is_constant(node.inputs[i]) for i in weight_inputs(node)):
        reason = "its weight is computed at run time"
    if reason is None and target.bias_int32 and not rule.weight_only:
        reason = _no_integer_bias(node)
    return reason or _SPECIAL.get(node.op, lambda _: None)(node) or _extreme_constant(node, rule)


def is_dequantized(tensor: gs.Tensor) -> bool:
    """Whether the model itself has the tensor in integers: a DequantizeLinear of its own makes it."""
    maker = graphs.producer(tensor)
    return maker is not None and maker.op == "DequantizeLinear"


def is_quantized_behind(tensor: gs.Tensor) -> bool:
    """Whether the model itself quantizes the tensor, which would be rounded twice where it is quantized here too."""
    return any(reader.op in ("QuantizeLinear", "DynamicQuantizeLinear") for reader in tensor.outputs)


def _quantized_already(node: gs.Node, rule: OpRule) -> str | None:
    """Nodes with Q/DQ of the model's own stay as they are."""
    operands = _operands(node, rule)
    weight = graphs.input_at(node, 1) if rule.weight else None
    if weight is not None and is_dequantized(weight) and graphs.is_constant(weight.inputs[0].inputs[0]):
        return "its weight is quantized already"
    if operands and all(map(is_dequantized, operands)) and all(map(is_quantized_behind, node.outputs)):
        return "it is quantized already"
    return None


def _operands(node: gs.Node, rule: OpRule) -> list[gs.Tensor]:
    """The inputs that would be quantized: activations and weight."""
    indices = (
        range(len(node.inputs))
        if rule.activations is None
        else (*rule.activations, *(weight_inputs(node) if rule.weight else ()))
    )
    found = (graphs.input_at(node, i) for i in dict.fromkeys(indices))
    return [tensor for tensor in found if tensor is not None]


def _no_float32(node: gs.Node, rule: OpRule) -> str | None:
    operands = _operands(node, rule)
    implied = rule.weight and any(graphs.is_constant(t) for t in operands)  # a layer has one type: its weight's
    for tensor in (*operands, node.outputs[0]):
        if tensor.dtype is None and implied:
            continue
        if tensor.dtype is None:
            return f"the type of {tensor.name!r} is not known"
        if tensor.dtype != np.float32:
            return f"{tensor.name!r} is {np.dtype(tensor.dtype).name}, not float32"
    return None


def _no_integer_bias(node: gs.Node) -> str | None:
    layer = LinearLayer.of(node)
    if layer is None or layer.bias is None:
        return None
    if not graphs.is_constant(layer.bias) or len(layer.bias.shape) != 1:
        return "its bias is no constant vector, as integer kernels need it"
    factors = [name for name in ("alpha", "beta") if node.op == "Gemm" and node.attrs.get(name, 1.0) != 1.0]
    return f"integer kernels know no {factors[0]}" if factors else None


def _extreme_constant(node: gs.Node, rule: OpRule) -> str | None:
    """A mask (-inf, -3.4e38, -1e4 where attention must not look) has no place among the codes of ordinary values."""
    for tensor in _operands(node, rule):
        values = graphs.constant(tensor)
        if values is None or values.size == 0:
            continue
        least, greatest = float(values.min()), float(values.max())
        if not math.isfinite(least) or not math.isfinite(greatest):
            return f"its constant {tensor.name!r} holds NaN or infinite values"
        is_weight = rule.weight and any(tensor is node.inputs[i] for i in weight_inputs(node))
        if not is_weight and max(-least, greatest) >= _MASK:
            return f"its constant {tensor.name!r} reaches {least if -least > greatest else greatest:.3g}, as masks do"
    return None


def _resize_obstacle(node: gs.Node) -> str | None:
    mode = node.attrs.get("mode", "nearest")
    return None if mode == "nearest" else f"Resize in mode {mode!r} computes new values; it runs in float"


def _pad_obstacle(node: gs.Node) -> str | None:
    tensor = graphs.input_at(node, 2)
    value = graphs.constant(tensor)
    if node.attrs.get("mode", "constant") != "constant" or tensor is None or (value is not None and not value.any()):
        return None
    return "it pads with a value other than 0"


_SPECIAL: Final[dict[str, Callable[[gs.Node], str | None]]] = {"Resize": _resize_obstacle, "Pad": _pad_obstacle}

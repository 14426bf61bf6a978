"""What float16 can hold and which inputs and outputs of a node may have it, as the operator's own schema tells.

float16 reaches from 6e-8 to 65504; below 6.1e-5 it has fewer than eleven bits of precision.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qdqtool.graphs.graph import Array

GREATEST: Final = 65504.0
LEAST_NORMAL: Final = 2.0**-14
ROOM: Final = 2.0
"""Observed values must stay this many times below the greatest number: other data reach further than a few samples."""
_LOST: Final = 0.1
"""Share of a constant's values that may become 0."""

TYPED_BY_ATTRIBUTE: Final = frozenset(
    {"Bernoulli", "BitCast", "BlackmanWindow", "CastLike", "Constant", "EyeLike", "HammingWindow", "HannWindow",
     "MelWeightMatrix", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"}
)  # fmt: skip
"""Operators whose result has the type that an attribute or another operand names; the runtime gives few of them out in
float16."""
QUANTIZED: Final = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
BOUNDS: Final = {"Clip": (1, 2), "Min": None, "Max": None}
"""Inputs that only limit others; where they become infinite they limit as little as before. None: all inputs."""
ANY_TYPE: Final = frozenset({"Cast", "Shape", "Size"})
"""Operators that read either type as it comes."""
EXACT: Final = frozenset(
    {"Abs", "Add", "Cast", "Ceil", "Clip", "Concat", "Cos", "CumSum", "Div", "Exp", "Expand", "Flatten", "Floor",
     "Gather", "GatherElements", "GatherND", "Identity", "Log", "Max", "Min", "Mod", "Mul", "Neg", "Pow", "Range",
     "Reciprocal", "ReduceMax", "ReduceMin", "ReduceProd", "ReduceSum", "Reshape", "Round", "Sign", "Sin", "Slice",
     "Split", "Sqrt", "Squeeze", "Sub", "Tile", "Transpose", "Unsqueeze", "Where"}
)  # fmt: skip
"""Arithmetic that positions, sizes and masks go through before they meet what a layer computes."""
MOVES: Final = frozenset(
    {"Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "Pad",
     "Reshape", "Slice", "SpaceToDepth", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze"}
)  # fmt: skip
"""Operators that only move values."""
HANDS_ON: Final = MOVES | {"Add", "Cast", "Max", "Min", "Mul", "Neg", "ScatterND", "Sub", "Where"}
"""Operators behind which a mask of -3e38 is still one."""


@dataclass(frozen=True)
class Slots:
    """Indices of the inputs and outputs of a node that may be float16; they change together."""

    inputs: frozenset[int]
    outputs: frozenset[int]


def slots(node: gs.Node, opset: int) -> Slots | str:
    """Which of a node's float32 inputs and outputs its operator also takes in float16, or why none."""
    if any(isinstance(value, gs.Graph) for value in node.attrs.values()):
        return "it holds graphs of its own"
    if node.domain not in (None, "", "ai.onnx"):
        return f"{node.op} of domain {node.domain!r} says nothing of float16"
    if node.op in QUANTIZED:
        return "it converts between integers and float32"
    if node.op in TYPED_BY_ATTRIBUTE:
        return f"an attribute or operand of {node.op} names the type of its result"
    if "Sequence" in node.op or "Optional" in node.op:
        return f"{node.op} is about sequences or optionals, which keep the type of their tensors"
    if node.attrs.get("reduction", "none") != "none":
        return f"{node.op} with a reduction has no float16 kernel"
    if node.attrs.get("training_mode", 0):
        return "it is in training mode"
    try:
        schema = onnx.defs.get_schema(node.op, opset)
    except onnx.defs.SchemaError:
        return f"{node.op} is no operator of opset {opset}"
    tensors = (*node.inputs, *node.outputs)
    unknown = [t.name for t in tensors if not t.is_empty() and (t.dtype is None or not is_tensor(t))]
    if unknown:
        return f"the type of {unknown[0]!r} is not known, or that of no tensor"
    half = {c.type_param_str for c in schema.type_constraints if "tensor(float16)" in c.allowed_type_strs}
    found = Slots(_taking(node.inputs, schema.inputs, half), _taking(node.outputs, schema.outputs, half))
    return found if found.inputs or found.outputs else f"{node.op} of opset {opset} takes no float16"


def _taking(tensors: Sequence[gs.Tensor], formal: Sequence[Any], half: set[str]) -> frozenset[int]:
    """Indices of float32 tensors at parameters of a type that float16 is one of."""
    found = set()
    for index, tensor in enumerate(tensors):
        if is_float32(tensor) and formal and formal[min(index, len(formal) - 1)].type_str in half:
            found.add(index)
    return frozenset(found)


def is_tensor(tensor: gs.Tensor) -> bool:
    """Whether a value is a tensor: no sequence, map or optional."""
    return not isinstance(tensor, gs.Variable) or tensor.type in (None, "tensor_type")


def is_float32(tensor: gs.Tensor) -> bool:
    """Whether a value is known to be a tensor of float32."""
    return is_tensor(tensor) and not tensor.is_empty() and tensor.dtype is not None and tensor.dtype == np.float32


def has_float32(node: gs.Node) -> bool:
    """Whether a node reads or makes any float32 at all."""
    return any(is_float32(tensor) for tensor in (*node.inputs, *node.outputs))


class Misfit(NamedTuple):
    """Why values do not fit into float16, as the end of a sentence, and whether they are too large for it."""

    reason: str
    overflow: bool


def misfit(values: Array) -> Misfit | None:
    """Why a constant cannot be stored in float16; None where it can. Infinite values stay what they are."""
    with np.errstate(over="ignore"):  # the overflow is what is looked for
        stored = values.astype(np.float16)
    beyond = np.isinf(stored) & np.isfinite(values)
    if beyond.any():
        worst = values[beyond]
        return Misfit(f"reaches {worst[np.abs(worst).argmax()]:.3g}, beyond float16's {GREATEST:g}", True)
    there = np.count_nonzero(values)
    lost = there - np.count_nonzero(stored)
    if lost <= _LOST * there:
        return None
    return Misfit(f"loses {100 * lost / there:.0f} % of its values, which are too small for float16", False)


def observed_misfit(lo: float, hi: float) -> Misfit | None:
    """Why an activation that was seen between ``lo`` and ``hi`` does not fit into float16; None where it does."""
    most = max(-lo, hi)
    if most > GREATEST / ROOM:
        return Misfit(f"reaches {hi if hi >= -lo else lo:.3g}; float16 ends at {GREATEST:g}", True)
    if 0 < most < LEAST_NORMAL:
        return Misfit(f"reaches {most:.2g} at most, where float16 is coarse", False)
    return None

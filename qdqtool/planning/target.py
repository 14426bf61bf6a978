"""What one execution provider runs in integers, as data: number formats, operators, and where Q/DQ belong.

The facts were found on onnxruntime 1.31 by building each form, loading it and reading the optimized graph back. A table
of rules is all that the planner knows of a target.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Final

from qdqtool.errors import RecipeError, nearest


class Emit(enum.StrEnum):
    """What becomes of the output of an operator whose inputs come in integers."""

    ALWAYS = "quantized: the integer kernel puts out integers"
    WANTED = "quantized where a reader wants integers, else float"
    SAME = "integers with the parameters of its first input: values are only moved or selected"
    NEVER = "float"


@dataclass(frozen=True)
class OpRule:
    """How one operator is quantized on a target.

    Attributes:
        op: operator of the default domain.
        activations: inputs that are quantized as activations; None: all.
        weight: whether input 1, where constant, is quantized as a weight and input 2 (or a following Add) is a bias.
        output: what becomes of the result.
        follows: quantized only where its activations come in integers anyway, because converting them for this operator
            alone costs more than its integer kernel gains.
        weight_only: there is no integer kernel, the weight alone is stored in integers.
        bound: interval that the results never leave.
        min_opset: least opset in which the runtime knows the integer form.
        kernel: whether the runtime drops the Q/DQ around it; else it runs in float between them and loses nothing.
        named: quantized only where the recipe names the operator in op_types_to_quantize, because it costs time.
    """

    op: str
    activations: tuple[int, ...] | None = (0,)
    weight: bool = False
    output: Emit = Emit.ALWAYS
    follows: bool = True
    weight_only: bool = False
    bound: tuple[float, float] | None = None
    min_opset: int = 0
    kernel: bool = True
    named: bool = False


@dataclass(frozen=True)
class WeightRule:
    """What a target makes of MatMul by a weight in integers, and of a table of integers that Gather reads.

    Attributes:
        block_sizes: bits of a code -> numbers of elements that may share a scale; none: one scale for each channel.
        asymmetric: whether codes may have a zero point.
        tables: whether Gather can read integers that are turned into floats behind it.
    """

    block_sizes: Mapping[int, frozenset[int]] = field(default_factory=dict, hash=False)
    asymmetric: bool = True
    tables: bool = True


@dataclass(frozen=True)
class Target:
    """An execution provider as the planner sees it.

    Attributes:
        name: what users call it.
        summary: one line for listings.
        providers: onnxruntime's provider names, in the order a session asks for them.
        activation: number format of activations.
        activation_symmetric: whether activations need zero point 0.
        weight: number format of weights, always symmetric.
        bias_int32: whether the kernels take the bias as int32 behind a DequantizeLinear.
        absorbed: activation functions that vanish into the Q behind a kernel.
        residual: at an Add that follows a convolution, only the other branch is quantized: Conv, Add, Relu fuse.
        share_concat: inputs of a Concat that nothing else reads take over the Concat's range, which makes it a copy.
        equal_scales: operators whose inputs must share one scale; qdqtool check reports others.
        rules: one entry an operator.
        weights: how weights alone are stored in integers, activations staying float.
        float32_ops: operators that run in float32 only, so that a model in float16 keeps them there.
    """

    name: str
    summary: str
    providers: tuple[str, ...]
    activation: str
    activation_symmetric: bool
    bias_int32: bool
    weight: str = "int8"
    absorbed: frozenset[str] = frozenset()
    residual: bool = False
    share_concat: bool = False
    equal_scales: frozenset[str] = frozenset()
    rules: tuple[OpRule, ...] = ()
    weights: WeightRule = field(default_factory=WeightRule)
    float32_ops: frozenset[str] = frozenset()
    by_op: MappingProxyType[str, OpRule] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "by_op", MappingProxyType({rule.op: rule for rule in self.rules}))

    @property
    def for_cpu(self) -> bool:
        """Whether its files are for ONNX Runtime's CPU provider, which is always there to try them on."""
        return self.providers[:1] == ("CPUExecutionProvider",)


def _moves(*ops: str, output: Emit = Emit.SAME) -> tuple[OpRule, ...]:
    return tuple(OpRule(op, output=output) for op in ops)


_BLOCKS: Final = frozenset({16, 32, 64, 128, 256})  # in others, DequantizeLinear and MatMul stay two nodes
_BLOCKS_OF_2_BITS: Final = frozenset({32, 64, 128})  # others become one node, which unpacks the weight at every run
_NONE: Final[frozenset[int]] = frozenset()

_CPU: Final = Target(
    name="cpu",
    summary="ONNX Runtime's CPU provider on x86: uint8 activations, int8 weights per channel, int32 bias",
    providers=("CPUExecutionProvider",),
    activation="uint8",
    activation_symmetric=False,
    bias_int32=True,
    absorbed=frozenset({"Relu", "Clip"}),
    share_concat=True,
    rules=(
        OpRule("Conv", weight=True, follows=False),
        OpRule("Gemm", weight=True, output=Emit.WANTED, follows=False),
        OpRule("MatMul", (0, 1), weight=True, output=Emit.WANTED, follows=False),
        OpRule("ConvTranspose", (), weight=True, weight_only=True, output=Emit.NEVER, follows=False),
        # Their weights would be dequantized at every run, which also keeps the kernel from packing them at load: 1.0 to
        # 1.3 times the time at 100 steps, 1.7 to 6 times at a single one (hidden sizes 128 and 512). No Q/DQ form
        # becomes the integer kernel that there is for one of them, DynamicQuantizeLSTM.
        *(
            OpRule(op, (), weight=True, weight_only=True, named=True, output=Emit.NEVER, follows=False)
            for op in ("GRU", "LSTM", "RNN")
        ),
        OpRule("Add", None),
        OpRule("Mul", None),
        OpRule("Concat", None),
        OpRule("Where", (1, 2)),
        OpRule("AveragePool"),
        OpRule("GlobalAveragePool"),
        OpRule("LeakyRelu"),
        OpRule("Sigmoid", bound=(0.0, 1.0)),
        OpRule("Softmax", bound=(0.0, 1.0)),
        OpRule("MaxPool", output=Emit.SAME, min_opset=12),
        *_moves(
            "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose", "Slice", "Split", "Gather", "GatherElements"
        ),
        *_moves("Expand", "Tile", "DepthToSpace", "Resize", "ReduceMax"),
        OpRule("Pad", output=Emit.SAME, kernel=False),
    ),
    weights=WeightRule(MappingProxyType({8: _BLOCKS, 4: _BLOCKS, 2: _BLOCKS_OF_2_BITS})),
)

_NO_FLOAT16: Final = frozenset({"GridSample", "IsInf", "Range", "RoiAlign"})
"""Operators with a kernel for float32 but none for float16 in the CUDA provider's registry."""

_TENSORRT: Final = Target(
    name="tensorrt",
    summary="TensorRT: symmetric int8 inputs of Conv, Gemm and MatMul, int8 weights per channel, float bias",
    providers=("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
    activation="int8",
    activation_symmetric=True,
    bias_int32=False,
    residual=True,
    equal_scales=frozenset({"Add", "Concat"}),
    rules=(
        OpRule("Conv", weight=True, output=Emit.NEVER, follows=False),
        OpRule("ConvTranspose", weight=True, output=Emit.NEVER, follows=False),
        OpRule("Gemm", weight=True, output=Emit.NEVER, follows=False),
        OpRule("MatMul", (0, 1), weight=True, output=Emit.NEVER, follows=False),
    ),
    weights=WeightRule(MappingProxyType({8: _NONE, 4: _BLOCKS}), asymmetric=False, tables=False),
    float32_ops=_NO_FLOAT16,
)

_CUDA: Final = Target(
    name="cuda",
    summary="placed as for TensorRT: accurate on the CUDA provider, fast where TensorRT compiles the file",
    providers=("CUDAExecutionProvider", "CPUExecutionProvider"),
    activation=_TENSORRT.activation,
    activation_symmetric=_TENSORRT.activation_symmetric,
    bias_int32=_TENSORRT.bias_int32,
    residual=_TENSORRT.residual,
    equal_scales=_TENSORRT.equal_scales,
    rules=_TENSORRT.rules,
    # The provider runs a blocked DequantizeLinear of 8 bits only where it becomes part of a MatMulNBits.
    weights=WeightRule(MappingProxyType({8: _NONE, 4: _BLOCKS, 2: _BLOCKS_OF_2_BITS})),
    float32_ops=_NO_FLOAT16,
)

TARGETS: Final = {target.name: target for target in (_CPU, _CUDA, _TENSORRT)}


def target(name: str | Target) -> Target:
    """Look a target up by name; RecipeError names the nearest known one. A target of the user's own is itself."""
    found = known_target(name)
    if found is None:
        known = f"known: {', '.join(TARGETS)}.{nearest(str(name), TARGETS)}"
        raise RecipeError(f"unknown target {name!r}; {known} One of your own is a .toml file")
    return found


def known_target(name: str | Target) -> Target | None:
    """The same, but None for an unknown name."""
    return name if isinstance(name, Target) else TARGETS.get(name)

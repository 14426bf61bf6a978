"""The fields of a recipe, and what follows from each."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    field_validator,
    model_validator,
)

from qdqtool.data.images import ImagePreprocessing
from qdqtool.errors import RecipeError, nearest
from qdqtool.planning import target_file
from qdqtool.planning.precision import FEW_BITS, INTEGER_PRECISIONS, Precision, Storage, weight_spec
from qdqtool.planning.target import TARGETS, Target, target
from qdqtool.spec import FORMATS, Allocation, Format

BASE_OPSET = 13
"""Opset that every model is raised to: the first with a scale for each channel."""
_FLOAT16_SCALES = 19  # least opset whose DequantizeLinear gives out float16
_BLOCKS = 21  # least opset whose DequantizeLinear takes a scale for each block
_BLOCK_SIZE = 32
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
Names = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v), Field(strict=False)]
Interval = Annotated[tuple[float, float], Field(strict=False)]


class Choice(BaseModel):
    """A calibrator by name with its options beside it: ``name = "percentile"``, ``percentile = 99.99``."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    name: str

    @property
    def options(self) -> dict[str, object]:
        """The options, without the name."""
        return dict(self.model_extra or {})


def _as_choice(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class Override(BaseModel):
    """What one tensor or node gets instead of the target's own choice.

    dtype:       number format of the codes, e.g. "int16".
    symmetric:   zero point 0.
    granularity: "per_tensor" or "per_channel" (weights).
    range:       [lo, hi], set instead of calibrated.
    calibrator:  of a tensor: who chooses its range, by name or as a table with options, instead of the recipe's own.
    precision:   of a node: bits of its weight and inputs, as in "w8a8", instead of the recipe's own; of single nodes
                 also "w3a8", "w5a8", "w6a8" and "w16a16", which runs in float between 16-bit codes.
    """

    model_config = _STRICT

    dtype: str | None = None
    symmetric: bool | None = None
    granularity: Literal["per_tensor", "per_channel"] | None = None
    range: Interval | None = None
    calibrator: Annotated[Choice | None, BeforeValidator(_as_choice)] = None
    precision: Literal["w8a8", "w4a8", "w4a4", "w8a4", "w2a8", "w3a8", "w5a8", "w6a8", "w16a16"] | None = None

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and (value not in FORMATS or value == "int32"):
            known = [name for name in FORMATS if name != "int32"]
            raise ValueError(f"unknown number format {value!r}; known: {', '.join(known)}.{nearest(value, known)}")
        return value

    @field_validator("range")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError(f"the range must ascend, not {list(value)}")
        return value


def _as_target(value: object) -> str | Target:
    if isinstance(value, str) and not target_file.is_file(value):
        return value
    try:
        found = target_file.resolve(value)
    except RecipeError as error:
        raise ValueError(str(error)) from error
    return found.name if TARGETS.get(found.name) == found else found


def _target_value(value: str | Target) -> object:
    return target_file.values(value) if isinstance(value, Target) else value


class Fields(BaseModel):
    """Everything a user can choose; unknown keys are errors.

    target:               "cpu", "cuda" or "tensorrt", or a TOML file or table with a target of your own
                          (``qdqtool targets --show NAME`` prints one to start from); stored as a table.
    precision:            "w8a8": weights and activations in 8 bits; "w4a8", "w4a4", "w8a4" or "w2a8": in so many;
                          "w8a16", "w4a16" or "w2a16": weights alone in so many bits, activations as they are in the
                          model; "fp16": no integers, all in float16.
    storage:              codes of fewer than 8 bits beside quantized activations: "packed": in types of 4 bits, the
                          smallest file; "int8": the same codes in 8 bits, which integer kernels take; "split": with
                          bits_per_channel, channels apart by the type that holds their width, put together at run time.
    first_last_8bit:      the first and the last layer have 8 bits; default: so with w4a4.
    block_size:           weights alone: so many elements along the inputs share a scale, a power of two from 16 to 256;
                          default: 32 where the target takes blocks of that precision, else a scale for each channel.
    weight_symmetric:     weights alone: no zero point; default: so for 8 and 4 bits, with one for 2 bits.
    float16:              with weights alone in integers: everything else in float16.
    keep_io_types:        a model turned into float16 keeps its inputs and outputs in float32.
    calibrator:           name, or a table with name and options.
    weight_calibrator:    "minmax": weights cover all their values; "mse": each scale makes the least squared error;
                          "auto": mse for 2 bits, of which else most were 0, and minmax for more.
    weight_rounding:      "nearest"; "stochastic": up or down by chance, seeded; "gptq": so that the layer's outputs err
                          least on calibration data; "adaround": for the same by gradients, with PyTorch where it is
                          installed; "auto": gptq up to 4 bits, else nearest.
    weight_correction:    scale each channel of a weight of up to 4 bits so that it keeps its norm.
    per_channel:          weights get a scale for each output channel.
    activation_per_channel: activations get a scale for each channel, and no integer kernel.
    bits_per_channel:     of "weights", "activations" or "both": some channels have more bits than others, from 0 to 8,
                          on average those of the precision; "off". Such activations have a scale for each channel and
                          are emulated, no kernel takes them.
    bit_allocation:       how: "mean_width": least error of all channels together; "published": levels in proportion to
                          the channel's range to the power of 2/3, weights between their own least and greatest value.
    op_types_to_quantize: operators that may be quantized; default: all that the target runs in integers.
    nodes_to_quantize:    regular expressions on whole node names; only these are quantized.
    nodes_to_exclude:     regular expressions on whole node names; these stay float.
    tensors, nodes:       overrides by whole tensor name, or by regular expression on whole node names (their inputs).
    samples:              number of calibration samples, chosen by content; default: all.
    equalization:         rescale consecutive layers so that their weights' channels are alike; default: where weights
                          have one scale, that is without per_channel.
    smoothing:            make the channels of activations alike: "free": by factors that LayerNormalization, MatMul and
                          Gemm around them take up; "inputs" (default): by a Mul behind model inputs, where that is
                          worth a bit; "all"; "off".
    bias_correction:      shift biases so that every layer keeps its mean.
    bias_correction_method: "empirical": its mean on calibration data; "analytic": what rounded weights do to it, told
                          from BatchNormalization without data; "auto": empirical, without data analytic.
    reduce_range:         7-bit weights, for x86 processors without VNNI, whose 16-bit sums of u8 x s8 saturate.
    seed:                 of everything that is random.
    min_sqnr:             dB; a model below it on calibration samples is not written.
    external_data:        store tensors beside the model; default: where it is over 2 GB.
    images:               preprocessing of a folder of images.
    """

    model_config = _STRICT

    target: Annotated[str | Target, PlainValidator(_as_target), PlainSerializer(_target_value)] = "cuda"
    precision: Literal["w8a8", "w4a8", "w4a4", "w8a4", "w2a8", "w8a16", "w4a16", "w2a16", "fp16"] = "w8a8"
    storage: Storage = "packed"
    first_last_8bit: bool | None = None
    block_size: int | None = None
    weight_symmetric: bool | None = None
    float16: bool = False
    keep_io_types: bool = True
    calibrator: Annotated[Choice, BeforeValidator(_as_choice)] = Choice(name="mse")
    weight_calibrator: Literal["auto", "minmax", "mse"] = "auto"
    weight_rounding: Literal["auto", "nearest", "stochastic", "gptq", "adaround"] = "auto"
    weight_correction: bool = False
    per_channel: bool = True
    activation_per_channel: bool = False
    bits_per_channel: Literal["off", "weights", "activations", "both"] = "off"
    bit_allocation: Allocation = "mean_width"
    op_types_to_quantize: Names | None = None
    nodes_to_quantize: Names | None = None
    nodes_to_exclude: Names = ()
    tensors: dict[str, Override] = Field(default_factory=dict)
    nodes: dict[str, Override] = Field(default_factory=dict)
    samples: Annotated[int, Field(ge=1)] | None = None
    equalization: bool | None = None
    smoothing: Literal["off", "free", "inputs", "all"] = "inputs"
    bias_correction: bool = True
    bias_correction_method: Literal["auto", "empirical", "analytic"] = "auto"
    reduce_range: bool = False
    seed: int = 0
    min_sqnr: float | None = None
    external_data: bool | None = None
    images: ImagePreprocessing | None = None

    @model_validator(mode="after")
    def _patterns_compile(self) -> Self:
        for pattern in (*(self.nodes_to_quantize or ()), *self.nodes_to_exclude, *self.nodes):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return self

    def values(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain values for TOML, YAML or JSON."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude_none=True)

    @property
    def weight_bits(self) -> int | None:
        """Width of a weight's codes where weights alone are stored in integers; None where they are not."""
        return {"w8a16": 8, "w4a16": 4, "w2a16": 2}.get(self.precision)

    def block_of(self, bits: int) -> int | None:
        """Elements of a weight of so many bits that share a scale on the target; None: all those of a channel."""
        sizes = target(self.target).weights.block_sizes.get(bits)
        return (self.block_size or _BLOCK_SIZE) if sizes else None

    @property
    def to_float16(self) -> bool:
        """Whether what stays float becomes float16."""
        return self.float16 or self.precision == "fp16"

    @property
    def equalized(self) -> bool:
        """Whether consecutive layers are rescaled: only where activations are quantized."""
        return self.needs_data and (not self.per_channel if self.equalization is None else self.equalization)

    @property
    def needs_data(self) -> bool:
        """Whether ranges of activations are wanted, which only calibration data or statistics tell."""
        return self.precision in INTEGER_PRECISIONS

    @property
    def bits(self) -> Precision:
        """Bits of weights and activations where both are quantized; 8 and 8 for other precisions."""
        return Precision.of(self.precision) if self.needs_data else Precision()

    @property
    def few_bits(self) -> bool:
        """Whether some weights beside quantized activations may have so few bits that their rounding matters."""
        overrides = [*self.tensors.values(), *self.nodes.values()]
        named = [Precision.of(o.precision).few for o in overrides if o.precision is not None]
        typed = [FORMATS[o.dtype].bits <= FEW_BITS for o in overrides if o.dtype is not None]
        return self.needs_data and any([self.bits.few, *named, *typed])

    @property
    def rounding(self) -> Literal["nearest", "stochastic", "gptq", "adaround"]:
        """How weights are rounded; with "auto", those of few bits alone."""
        if self.weight_rounding != "auto":
            return self.weight_rounding
        return "gptq" if self.few_bits else "nearest"

    def allocates(self, what: Literal["weights", "activations"]) -> bool:
        """Whether channels of weights, or of activations, have bits of their own."""
        return self.bits_per_channel in (what, "both")

    @property
    def activations_by_channel(self) -> bool:
        """Whether activations have a scale for each channel: as asked for, or because bits are shared out by them."""
        few = self.bits.activations < Precision.activations
        return self.activation_per_channel or (few and self.allocates("activations"))

    @property
    def ends_in_8_bits(self) -> bool:
        """Whether the first and the last layer have 8 bits."""
        return self.precision == "w4a4" if self.first_last_8bit is None else self.first_last_8bit

    @property
    def weight_format(self) -> Format:
        """Number format of weights that the precision names."""
        bits = self.weight_bits
        if bits is None:
            return FORMATS[target(self.target).weight]
        symmetric = bits > 2 if self.weight_symmetric is None else self.weight_symmetric
        return FORMATS[f"{'' if symmetric else 'u'}int{bits}"]

    @property
    def min_opset(self) -> int:
        """Least opset of the default domain that has per-channel Q/DQ and every number format asked for."""
        wanted = [o.dtype for o in (*self.tensors.values(), *self.nodes.values()) if o.dtype is not None]
        if self.needs_data:
            wanted.append(target(self.target).activation)
        formats = [self.weight_format, *(FORMATS[name] for name in wanted), *self._narrow_formats()]
        bits = self.weight_bits
        scales = BASE_OPSET if bits is None else _BLOCKS if self.block_of(bits) else _FLOAT16_SCALES
        return max([scales, *(one.min_opset for one in formats)])

    def _narrow_formats(self) -> Iterator[Format]:
        """Types of weights beside quantized activations."""
        overrides = (o.precision for o in self.nodes.values() if o.precision is not None)
        for name in (self.precision, *overrides) if self.needs_data else ():
            yield weight_spec(self.weight_format, Precision.of(name).weights, self.storage).format

"""Frozen values that say how a tensor is quantized: number formats, granularity, specs and parameters.

A :class:`QuantSpec` holds what is decided before any number is known (format, symmetry, granularity); a
:class:`QuantParams` adds scale and zero point. Both are plain values without ONNX objects.
"""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Final, Literal

import numpy as np
import numpy.typing as npt

from qdqtool.errors import RecipeError, nearest

FloatArray = npt.NDArray[np.float64]
IntArray = npt.NDArray[np.int64]
Allocation = Literal["mean_width", "published"]
"""How bits are shared out among the channels of a tensor (:mod:`qdqtool.arithmetic.bit_allocation`)."""


@dataclass(frozen=True)
class Format:
    """An integer number format as QuantizeLinear knows it.

    Attributes:
        name: ONNX's name of the type in lower case, e.g. ``"uint8"``.
        bits: width of one code.
        signed: whether codes are two's complement.
        min_opset: least default-domain opset whose QuantizeLinear and DequantizeLinear take the type.
    """

    name: str
    bits: int
    signed: bool
    min_opset: int

    @property
    def qmin(self) -> int:
        """Least code."""
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def qmax(self) -> int:
        """Greatest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1


FORMATS: Final = {
    f.name: f
    for f in (
        Format("int8", 8, True, 10),
        Format("uint8", 8, False, 10),
        Format("int16", 16, True, 21),
        Format("uint16", 16, False, 21),
        Format("int4", 4, True, 21),
        Format("uint4", 4, False, 21),
        Format("int2", 2, True, 25),
        Format("uint2", 2, False, 25),
        Format("int32", 32, True, 10),
    )
}


def number_format(name: str) -> Format:
    """Look a format up by name; RecipeError names the nearest known one."""
    try:
        return FORMATS[name]
    except KeyError:
        raise RecipeError(
            f"unknown number format {name!r}; known: {', '.join(FORMATS)}.{nearest(name, FORMATS)}"
        ) from None


class Scheme(enum.StrEnum):
    """How many elements share one scale."""

    PER_TENSOR = "per_tensor"
    PER_CHANNEL = "per_channel"
    PER_BLOCK = "per_block"


@dataclass(frozen=True)
class Granularity:
    """Which elements share a scale: the whole tensor, one index of ``axis``, or ``block_size`` indices along it."""

    scheme: Scheme = Scheme.PER_TENSOR
    axis: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        if (self.axis is None) != (self.scheme is Scheme.PER_TENSOR):
            raise RecipeError(f"{self.scheme} granularity {'takes no' if self.axis is not None else 'needs an'} axis")
        if (self.block_size is None) == (self.scheme is Scheme.PER_BLOCK):
            raise RecipeError("block_size goes with per_block granularity, and only with it")

    def __str__(self) -> str:
        if self.scheme is Scheme.PER_TENSOR:
            return str(self.scheme)
        block = f", block {self.block_size}" if self.block_size else ""
        return f"{self.scheme}(axis {self.axis}{block})"


PER_TENSOR: Final = Granularity()
_TERNARY: Final = 2  # bits of which a narrow range would lose a level of four


def per_channel(axis: int) -> Granularity:
    """One scale for each index of ``axis``."""
    return Granularity(Scheme.PER_CHANNEL, axis)


@dataclass(frozen=True)
class Range:
    """The real interval ``[lo, hi]`` that codes cover: float64 arrays of shape () or (channels,).

    Attributes:
        lo, hi: its ends.
        errors: where a calibrator chose among others: the expected squared error of each, by name.
    """

    lo: FloatArray
    hi: FloatArray
    errors: Mapping[str, float] = field(default_factory=dict, kw_only=True)

    @property
    def winner(self) -> str:
        """The calibrator whose range it is, of those compared; "" where none were."""
        return min(self.errors, key=self.errors.__getitem__, default="")

    def __post_init__(self) -> None:
        for name in ("lo", "hi"):
            array = np.array(getattr(self, name), dtype=np.float64)
            array.setflags(write=False)
            object.__setattr__(self, name, array)

    def __str__(self) -> str:
        if self.lo.ndim == 0:
            return f"[{self.lo:.5g}, {self.hi:.5g}]"
        return f"{self.lo.size} channels within [{self.lo.min():.5g}, {self.hi.max():.5g}]"


@dataclass(frozen=True)
class QuantSpec:
    """How one use of a tensor is quantized, before any number is known.

    Attributes:
        format: type of the codes.
        symmetric: zero point 0 for signed formats and a range symmetric around 0 for weights.
        granularity: which elements share a scale.
        narrow: signed codes leave the least code out ([-127, 127]), so that the range is symmetric.
        fixed: a range (lo, hi) that is set by the user and not chosen by a calibrator.
        bound: an interval that the values provably never leave (Clip, Sigmoid); the chosen range is kept inside it.
        bits: codes use only so many bits of the format (7-bit weights in int8), on average where they are allocated;
            None: all.
        headroom: the chosen range is widened by this factor, for values beyond those that were observed.
        negative_weight: squared errors of values below 0 count so much beside those of values above: a LeakyRelu that
            alone reads the tensor scales them.
        allocation: how the bits are shared out among the channels; None: all have the same.
        split: channels are stored apart, by the type that holds their width.
    """

    format: Format
    symmetric: bool = False
    granularity: Granularity = PER_TENSOR
    narrow: bool = False
    fixed: tuple[float, float] | None = None
    bound: tuple[float, float] | None = None
    bits: int | None = None
    headroom: float = 1.0
    negative_weight: float = 1.0
    allocation: Allocation | None = None
    split: bool = False

    @property
    def qmin(self) -> int:
        """Least code in use."""
        least = self.format.qmin if self.bits is None or not self.format.signed else -(1 << self.bits >> 1)
        return least + (1 if self.narrow and self.format.signed else 0)

    @property
    def qmax(self) -> int:
        """Greatest code in use."""
        if self.bits is None:
            return self.format.qmax
        return (1 << max(self.bits - self.format.signed, 0)) - 1

    @property
    def steps(self) -> int:
        """Number of steps, n = qmax - qmin."""
        return self.qmax - self.qmin

    def of_width(self, bits: int) -> QuantSpec:
        """The spec of a channel whose codes have so many bits of the format, from 0; those of 2 use all four."""
        return replace(self, bits=bits, narrow=self.narrow and bits > _TERNARY, allocation=None)

    def limits(self, channel_bits: IntArray | None = None) -> tuple[IntArray, IntArray]:
        """Least and greatest code: int64 of shape (), or (channels,) where each channel has its own bits."""
        if channel_bits is None:
            return np.asarray(self.qmin, np.int64), np.asarray(self.qmax, np.int64)
        widths, which = np.unique(channel_bits, return_inverse=True)
        specs = [self.of_width(bits) for bits in widths.tolist()]
        ends = np.array([[spec.qmin, spec.qmax] for spec in specs], np.int64).reshape(-1, 2)
        return ends[which, 0], ends[which, 1]

    def __str__(self) -> str:
        return f"{self.format.name} {'symmetric' if self.symmetric else 'asymmetric'} {self.granularity}"


@dataclass(frozen=True)
class QuantParams:
    """A spec with its numbers.

    Attributes:
        spec: what was decided in the plan.
        scale: float32 array of shape (), (channels,), or the tensor's with its block axis divided by the block size.
        zero_point: int64 array of scale's shape, inside the format's codes.
        method: who chose the range, e.g. ``"mse"``.
        channel_bits: int64 (channels,), bits of each channel's codes, from 0; None: all have those of the spec.
    """

    spec: QuantSpec
    scale: npt.NDArray[np.float32]
    zero_point: IntArray
    method: str = ""
    channel_bits: IntArray | None = None

    def __post_init__(self) -> None:
        wanted: list[tuple[str, type[np.generic]]] = [("scale", np.float32), ("zero_point", np.int64)]
        if self.channel_bits is not None:
            wanted.append(("channel_bits", np.int64))
        for name, dtype in wanted:
            array = np.asarray(getattr(self, name), dtype=dtype)
            if array.flags.writeable:  # what cannot change is shared: one zero broadcast to a million blocks, say
                array = array.copy()
                array.setflags(write=False)
            object.__setattr__(self, name, array)

    @property
    def range(self) -> Range:
        """The real interval that the codes cover."""
        scale, zero = self.scale.astype(np.float64), self.zero_point
        return Range(scale * (self.qmin - zero), scale * (self.qmax - zero))

    @property
    def qmin(self) -> IntArray:
        """Least code in use: int64 of shape (), or of each channel where they differ (channels,)."""
        return self.spec.limits(self.channel_bits)[0]

    @property
    def qmax(self) -> IntArray:
        """Greatest code in use: int64 of shape (), or of each channel where they differ (channels,)."""
        return self.spec.limits(self.channel_bits)[1]

    @property
    def mean_bits(self) -> float:
        """Bits of a code, on average where channels differ."""
        if self.channel_bits is None:
            return float(self.spec.bits or self.spec.format.bits)
        return float(self.channel_bits.mean())

    def same_codes(self, other: QuantParams) -> bool:
        """Whether both quantize every value to the same code of the same type."""
        return (
            self.spec.format == other.spec.format
            and self.spec.granularity == other.spec.granularity
            and np.array_equal(self.scale, other.scale)
            and np.array_equal(self.zero_point, other.zero_point)
            and np.array_equal(self.qmin, other.qmin)
            and np.array_equal(self.qmax, other.qmax)
        )


@dataclass(frozen=True)
class QuantizedWeight:
    """A constant in integers: ``codes`` (int64, the constant's shape) and the parameters that give it back."""

    codes: npt.NDArray[np.integer]
    params: QuantParams

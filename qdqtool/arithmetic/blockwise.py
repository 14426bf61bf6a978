"""Scales and codes of weights whose elements share a scale in blocks along one axis; numpy only, no ONNX.

    symmetric:   S = max(hi / qmax, lo / qmin),  Z = 0: the end of the block that lies nearer to its own last code
                 does not widen the scale, so that all codes are in use
    asymmetric:  S = (hi - lo) / (qmax - qmin),  Z = clamp(round(qmin - lo / S)),  lo <= 0 <= hi

Weights are the bulk of a model: everything here runs over them in pieces that stay in the processor's cache, so that
the temporaries beside the codes are small whatever the size of the weight.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, Final, cast

import numpy as np
import numpy.typing as npt

from qdqtool.arithmetic import affine
from qdqtool.spec import FloatArray, QuantParams, QuantSpec, Range, Scheme

Array = npt.NDArray[Any]
_PIECE: Final = 2**17  # elements handled at a time


def weight_params(values: Array, spec: QuantSpec, stored: npt.DTypeLike = np.float32) -> QuantParams | None:
    """Scale and zero point for every group of a weight, from its least and greatest value or the spec's fixed range.

    Args:
        values: float array.
        spec: any granularity; a block may be cut short by the end of the axis.
        stored: type in which the scales are stored, float32 or float16; they are rounded to it here, so that codes are
            made with the very scale that the runtime multiplies with.

    Returns:
        None where the weight holds NaN or infinite values.
    """
    ends = value_range(values, spec)
    if not (np.isfinite(ends.lo).all() and np.isfinite(ends.hi).all()):
        return None
    if spec.fixed is not None:
        ends = Range(np.full_like(ends.lo, spec.fixed[0]), np.full_like(ends.hi, spec.fixed[1]))
    lo, hi = np.minimum(ends.lo, 0.0), np.maximum(ends.hi, 0.0)
    method = "minmax" if spec.fixed is None else "set by the user"
    if spec.symmetric and spec.format.signed:
        scale = _rounded(np.maximum(hi / spec.qmax, lo / spec.qmin), spec, stored)
        return QuantParams(spec, scale, np.broadcast_to(np.int64(0), scale.shape), method)
    scale = _rounded((hi - lo) / spec.steps, spec, stored)
    if spec.symmetric:
        zero: FloatArray = np.full(scale.shape, (spec.qmin + spec.qmax + 1) // 2, np.float64)
        scale = _rounded(np.maximum(hi, -lo) / (spec.qmax - zero), spec, stored)
    else:
        zero = np.clip(np.rint(spec.qmin - lo / scale.astype(np.float64)), spec.qmin, spec.qmax)
    return QuantParams(spec, scale, zero.astype(np.int64), method)


def _rounded(scale: FloatArray, spec: QuantSpec, stored: npt.DTypeLike) -> npt.NDArray[np.float32]:
    """Scales as they are stored: never 0 where the group is not, and no code beyond the greatest number of the type."""
    found = scale.astype(np.float32)
    least, greatest = 2.0**-126, float(np.finfo(np.float32).max)
    if np.dtype(stored) == np.float16:
        half = scale.astype(np.float16)  # rounded down, small scales would cut off a good part of the block
        found = np.where(half < scale, np.nextafter(half, np.float16(np.inf)), half).astype(np.float32)
        least, greatest = 2.0**-24, 65504.0
    most = np.float32(_half_digits(greatest / max(spec.qmax, -spec.qmin)))
    kept: npt.NDArray[np.float32] = np.where(scale > 0, np.clip(found, np.float32(least), most), np.float32(1))
    return kept


def _half_digits(value: float) -> float:
    """The next number towards 0 that has no more digits than a float16."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(math.floor(mantissa * 2**10) / 2**10, exponent)


def value_range(values: Array, spec: QuantSpec) -> Range:
    """Least and greatest value of each group that shares a scale: float64 arrays of the scales' shape.

    NaN where the group holds one.
    """
    granularity = spec.granularity
    if values.size == 0 or granularity.scheme is not Scheme.PER_BLOCK:
        return affine.tensor_range(values, spec)
    axis, block = cast(int, granularity.axis) % values.ndim, cast(int, granularity.block_size)
    shape = [-(-n // block) if i == axis else n for i, n in enumerate(values.shape)]
    lo, hi = np.empty(shape), np.empty(shape)
    for part, place in _blocks(values, axis, block):
        lo_part, hi_part = lo[place], hi[place]
        for piece in _pieces(part):
            x = part[piece].astype(np.float32, copy=False)
            lo_part[piece], hi_part[piece] = x.min(axis + 1), x.max(axis + 1)
    return Range(lo, hi)


def quantize(values: Array, params: QuantParams) -> npt.NDArray[np.integer]:
    """Codes of a weight in the container type of its format (8 bits for 2 and 4), same shape; C order.

    The same codes as :func:`qdqtool.arithmetic.affine.quantize`, without temporaries of the weight's size.
    """
    spec, granularity = params.spec, params.spec.granularity
    codes = np.empty(values.shape, affine.container(spec))
    scale, zero = params.scale, params.zero_point.astype(np.float32) if params.zero_point.any() else None
    if granularity.scheme is not Scheme.PER_BLOCK:
        shape: list[int] = [1] * values.ndim
        if granularity.axis is not None:
            shape[granularity.axis] = -1
        zero = None if zero is None else zero.reshape(shape)
        _round_to_codes(values, scale.reshape(shape), zero, affine.limits(params, values.shape), codes)
        return codes
    axis, block = cast(int, granularity.axis) % values.ndim, cast(int, granularity.block_size)
    for (part, place), (out, _) in zip(_blocks(values, axis, block), _blocks(codes, axis, block), strict=True):
        along = np.expand_dims(scale[place], axis + 1)
        cut = None if zero is None else np.expand_dims(zero[place], axis + 1)
        _round_to_codes(part, along, cut, affine.limits(params, values.shape), out)
    return codes


def _round_to_codes(values: Array, scale: Array, zero: Array | None, limits: tuple[Array, Array], out: Array) -> None:
    """Write clip(round(values / scale) + zero) to ``out``; scale, zero and limits broadcast against the values."""
    least, greatest = (end.astype(np.float32) for end in limits)
    for piece in _pieces(values):
        along = piece if scale.ndim and scale.shape[0] > 1 else ...
        found = np.asarray(np.divide(values[piece], scale[along], dtype=np.float32))
        np.rint(found, out=found)
        if zero is not None:
            found += zero[along]
        ends = piece if least.ndim and least.shape[0] > 1 else ...
        np.maximum(found, least[ends], out=found)
        np.minimum(found, greatest[ends], out=found)
        np.copyto(out[piece], found, casting="unsafe")


def _blocks(values: Array, axis: int, block: int) -> Iterator[tuple[Array, tuple[slice, ...]]]:
    """Views whose ``axis`` is cut into (blocks, block size), and the place of these blocks among the scales.

    One view holds the whole blocks; where the axis ends inside of one, a second view holds that.
    """
    whole, rest = divmod(values.shape[axis], block)
    for first, count, width in ((0, whole, block), (whole, 1, rest)):
        if count and width:
            begin = first * block
            part = values[(slice(None),) * axis + (slice(begin, begin + count * width),)]
            cut = part.reshape(*values.shape[:axis], count, width, *values.shape[axis + 1 :])  # cutting copies nothing
            yield cut, (slice(None),) * axis + (slice(first, first + count),)


def _pieces(values: Array) -> Iterator[slice | Any]:
    """Slices along the first axis that hold about :data:`_PIECE` elements each."""
    if values.ndim == 0:
        yield ...
        return
    step = max(1, _PIECE // max(math.prod(values.shape[1:]), 1))
    for start in range(0, values.shape[0], step):
        yield slice(start, start + step)


def pack(codes: npt.NDArray[Any], bits: int) -> bytes:
    """Codes of 2 or 4 bits as ONNX stores them: the first element of a byte in its lowest bits.

    Args:
        codes: integers of any type; only their lowest ``bits`` bits count.
        bits: 2 or 4.
    """
    flat = np.ascontiguousarray(codes).reshape(-1)
    per_byte = 8 // bits
    packed = np.empty(-(-flat.size // per_byte), np.uint8)
    step = _PIECE * per_byte
    for start in range(0, flat.size, step):
        piece = flat[start : start + step].astype(np.int8, copy=False)
        if piece.size % per_byte:
            piece = np.append(piece, np.zeros(-piece.size % per_byte, np.int8))
        _pack_piece(piece, bits, packed[start // per_byte : (start + piece.size) // per_byte])
    return packed.tobytes()


def _pack_piece(codes: npt.NDArray[np.int8], bits: int, out: npt.NDArray[np.uint8]) -> None:
    """Take the elements of a byte as one integer and move them together, all bytes at once."""
    word = codes.view("<u2" if bits == 4 else "<u4")
    mask = (1 << bits) - 1
    found = word & mask
    for position in range(1, 8 // bits):
        moved = word >> ((8 - bits) * position)
        moved &= mask << (bits * position)
        found |= moved
    np.copyto(out, found, casting="unsafe")

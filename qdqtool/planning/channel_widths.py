"""Parameters of tensors whose channels have bits of their own: allocated, ranged, and stored by width.

Each channel's error is known at every width with the range it would get there, a calibrator's or a weight's own; the
allocation (:mod:`qdqtool.arithmetic.bit_allocation`) takes the widths from that, and the ranges follow from the widths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Final, cast

import numpy as np

from qdqtool.arithmetic import affine, bit_allocation, channel_error
from qdqtool.arithmetic.weight_scale import least_squares
from qdqtool.graphs.graph import Array
from qdqtool.spec import FORMATS, FloatArray, Format, IntArray, QuantizedWeight, QuantParams, QuantSpec, Range
from qdqtool.statistics.channel_statistics import ChannelStatistics

GREATEST: Final = 8
"""Bits that a channel has at most."""
REDUCED: Final = 6
"""The same where sums may saturate at 16 bits: without its zero point a code has a bit more."""
_PACKED_BITS: Final = 4


def activation(
    chosen: Callable[[QuantSpec], Range], seen: ChannelStatistics, spec: QuantSpec, method: str
) -> QuantParams:
    """Parameters of an activation whose spec has an allocation.

    Args:
        chosen: the range of every channel for a spec, as the calibrator has it.
        seen: statistics of its channels.
        spec: with the mean of the bits.
        method: name of the calibrator.
    """
    assert spec.bits is not None
    ranges = {bits: chosen(spec.of_width(bits)) for bits in range(1, GREATEST + 1)}
    if spec.allocation == "published":
        mean = ranges[spec.bits]
        widths = bit_allocation.published(np.maximum(mean.hi, 0) - np.minimum(mean.lo, 0), spec.bits)
    else:
        errors = [channel_error.of_statistics(seen, one, spec.of_width(bits)) for bits, one in ranges.items()]
        widths = bit_allocation.mean_width(np.stack([seen.second_moment, *errors], axis=1), spec.bits)
    return affine.params_from_range(_picked(ranges, widths), spec, f"{method}, {_words(spec)}", widths)


def _picked(ranges: Mapping[int, Range], widths: IntArray) -> Range:
    """Of each channel the range for its width; 0 where that is 0."""
    lo, hi = np.zeros(widths.size), np.zeros(widths.size)
    for bits, one in ranges.items():
        lo[widths == bits], hi[widths == bits] = one.lo[widths == bits], one.hi[widths == bits]
    return Range(lo, hi)


def _words(spec: QuantSpec) -> str:
    return f"{spec.bits} bits on average ({spec.allocation})"


def weight(values: Array, spec: QuantSpec, calibrator: str, most: int = GREATEST) -> QuantizedWeight:
    """Codes of a weight whose spec has an allocation, at most ``most`` bits a channel, rounded to nearest.

    Args:
        values: the float weight.
        spec: with the mean of the bits; per channel.
        calibrator: "minmax" or "mse".
        most: greatest width.
    """
    assert spec.bits is not None
    axis = cast(int, spec.granularity.axis)
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1).astype(np.float64)
    if spec.allocation == "published":
        widths = bit_allocation.published(rows.std(axis=1) if rows.shape[1] else np.zeros(len(rows)), spec.bits, most)
    else:
        widths = bit_allocation.mean_width(_errors(rows, spec, most, least=calibrator == "mse"), spec.bits)
    ends = affine.tensor_range(values, spec)
    amax, full = np.maximum(-ends.lo, ends.hi), widths == GREATEST  # without a zero point these would need nine bits
    ends = Range(np.where(full, -amax, ends.lo), np.where(full, amax, ends.hi))
    params = affine.params_from_range(ends, spec, f"{calibrator}, {_words(spec)}", widths)
    if calibrator == "mse":
        params = replace(least_squares(values, params), method=params.method)
    return QuantizedWeight(affine.quantize(values, params), params)


def _errors(rows: FloatArray, spec: QuantSpec, most: int, *, least: bool) -> FloatArray:
    """Mean squared error of each channel at 0, 1, ... bits, float64 (channels, most + 1)."""
    none = np.mean(rows**2, axis=1) if rows.shape[1] else np.zeros(len(rows))
    each = [channel_error.of_weight(rows, spec.of_width(bits), least=least) for bits in range(1, most + 1)]
    return np.stack([none, *each], axis=1)


def packed(value: QuantizedWeight) -> QuantizedWeight:
    """The same codes in the smallest type that holds all widths of the weight."""
    widths = value.params.channel_bits
    if widths is None or widths.max(initial=0) > _PACKED_BITS:
        return value
    return _in_format(value, _narrow(value.params.spec.format))


def groups(value: QuantizedWeight) -> list[tuple[IntArray, QuantizedWeight]]:
    """Channels and their part of the weight by the type that holds their width, those of few bits first."""
    widths = value.params.channel_bits
    assert widths is not None
    few = widths <= _PACKED_BITS
    found = []
    for which, number_format in ((few, _narrow(value.params.spec.format)), (~few, value.params.spec.format)):
        channels = np.flatnonzero(which)
        if channels.size:
            found.append((channels, _in_format(_part(value, channels), number_format)))
    return found


def _narrow(wide: Format) -> Format:
    return FORMATS[f"{'' if wide.signed else 'u'}int{_PACKED_BITS}"]


def _part(value: QuantizedWeight, channels: IntArray) -> QuantizedWeight:
    params = value.params
    widths = params.channel_bits
    assert widths is not None
    codes = np.take(value.codes, channels, axis=cast(int, params.spec.granularity.axis))
    scale, zero = params.scale[channels], params.zero_point[channels]
    return QuantizedWeight(codes, replace(params, scale=scale, zero_point=zero, channel_bits=widths[channels]))


def _in_format(value: QuantizedWeight, number_format: Format) -> QuantizedWeight:
    return replace(value, params=replace(value.params, spec=replace(value.params.spec, format=number_format)))


def centred(value: QuantizedWeight) -> QuantizedWeight:
    """The same values by codes without zero points, where the type of allocated channels has room for them.

    Kernels want it so: TensorRT takes no zero point at all. The codes are those in the file, and no longer inside the
    limits that rounding keeps.
    """
    params = value.params
    if params.channel_bits is None or not params.zero_point.any() or params.spec.format.bits <= _PACKED_BITS:
        return value
    _, zero = affine.expanded(params, value.codes.shape)
    codes = value.codes.astype(np.int64) - zero.astype(np.int64)
    return QuantizedWeight(codes, replace(params, zero_point=np.zeros_like(params.zero_point)))

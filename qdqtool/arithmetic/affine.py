"""Affine arithmetic: r = S(q - Z) between real values and integer codes; numpy only, no ONNX.

S = (hi - lo)/n with n = qmax - qmin, Z = clamp(round(qmin - lo/S)), q = clamp(round(r/S) + Z), rounding half to even as
QuantizeLinear does. Zero is exactly representable: a range that misses it is widened to include it.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, cast

import numpy as np
import numpy.typing as npt

from qdqtool.spec import FloatArray, IntArray, QuantParams, QuantSpec, Range, Scheme
from qdqtool.statistics.distribution import partial_moments

if TYPE_CHECKING:
    from qdqtool.statistics.histogram import Bins

_TINY = float(np.finfo(np.float32).tiny)
_FEW_STEPS = 4095  # up to here summing by code is cheaper than by bin


def params_from_range(
    chosen: Range, spec: QuantSpec, method: str = "", channel_bits: IntArray | None = None
) -> QuantParams:
    """Turn a range into scale and zero point for ``spec``, whose channels may have ``channel_bits`` (channels,) each.

    A range of no width (a tensor that is always 0) gets scale 1, so that zero stays zero; so does a channel of 0 bits,
    all of which becomes zero. The scale never falls below the least normal float32: a smaller one would be flushed to 0
    by some kernels.
    """
    qmin, qmax = spec.limits(channel_bits)
    lo, hi = np.minimum(chosen.lo, 0.0), np.maximum(chosen.hi, 0.0)
    if spec.symmetric and spec.format.signed:
        amax = np.maximum(-lo, hi)
        scale = _float32_scale(amax / np.maximum(qmax, 1), np.where(qmax > qmin, amax, 0))
        return QuantParams(spec, scale, np.zeros(scale.shape, np.int64), method, channel_bits)
    if spec.symmetric:  # unsigned codes of a symmetric spec: [0, hi], the zero point is the least code
        lo = np.where(lo < 0, -np.maximum(-lo, hi), lo)
        hi = np.where(lo < 0, -lo, hi)
    steps = qmax - qmin
    scale = _float32_scale((hi - lo) / np.maximum(steps, 1), np.where(steps > 0, hi - lo, 0))
    zero = np.clip(np.rint(qmin - lo / scale.astype(np.float64)), qmin, qmax)
    if (
        spec.symmetric
    ):  # the middle lies between two codes: always take the upper one, whichever way the scale was rounded
        zero = np.where(lo < 0, (qmin + qmax + 1) // 2, zero)
    if spec.bound is not None:
        scale = _scale_inside(scale, zero, (qmin, qmax), spec.bound)
    return QuantParams(spec, scale, zero.astype(np.int64), method, channel_bits)


def _float32_scale(scale: FloatArray, width: FloatArray) -> npt.NDArray[np.float32]:
    return np.where(width > 0, np.maximum(scale, _TINY), 1.0).astype(np.float32)


def _scale_inside(
    scale: npt.NDArray[np.float32], zero: FloatArray, codes: tuple[IntArray, IntArray], bound: tuple[float, float]
) -> npt.NDArray[np.float32]:
    """Step the float32 scale down by one unit where its rounding up pushes the end codes over the bound.

    A runtime drops a Clip(0, 6) before QuantizeLinear only where the codes end inside [0, 6].
    """
    lo, hi = bound
    bottom, top = (scale * end.astype(np.float32) - scale * zero for end in codes)
    outside = ((top > hi) & (top < hi * (1 + 1e-6))) | ((bottom < lo) & (bottom > lo * (1 + 1e-6)))
    return np.where(outside, np.nextafter(scale, np.float32(0)), scale).astype(np.float32)


def _expand(values: npt.NDArray[np.generic], params: QuantParams, shape: tuple[int, ...]) -> npt.NDArray[np.generic]:
    """Shape ``values`` (scale or zero point) so that it broadcasts against a tensor of ``shape``."""
    granularity = params.spec.granularity
    if granularity.scheme is Scheme.PER_TENSOR:
        return values
    axis = cast(int, granularity.axis) % len(shape)
    if granularity.scheme is Scheme.PER_CHANNEL:
        return values.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    expanded = np.repeat(values, cast(int, granularity.block_size), axis)
    return expanded.take(np.arange(shape[axis]), axis)


def expanded(params: QuantParams, shape: tuple[int, ...]) -> tuple[npt.NDArray[np.generic], npt.NDArray[np.generic]]:
    """Scale and zero point in shapes that broadcast against a tensor of ``shape``."""
    return _expand(params.scale, params, shape), _expand(params.zero_point, params, shape)


def limits(params: QuantParams, shape: tuple[int, ...]) -> tuple[IntArray, IntArray]:
    """Least and greatest code in shapes that broadcast against a tensor of ``shape``."""
    ends = (params.qmin, params.qmax)
    if params.channel_bits is None:
        return ends
    least, greatest = (cast(IntArray, _expand(end, params, shape)) for end in ends)
    return least, greatest


def quantize(x: npt.NDArray[np.floating], params: QuantParams) -> npt.NDArray[np.integer]:
    """Codes of ``x`` in the container type of the format (int8 for 2 and 4 bits), same shape."""
    spec = params.spec
    scale = _expand(params.scale, params, x.shape).astype(np.float32)
    codes = np.asarray(np.divide(x, scale, dtype=np.float32))
    np.rint(codes, out=codes)
    codes += _expand(params.zero_point, params, x.shape)
    np.clip(codes, *limits(params, x.shape), out=codes)
    stored: npt.NDArray[np.integer] = codes.astype(container(spec))
    return stored


def dequantize(codes: npt.NDArray[np.integer], params: QuantParams) -> npt.NDArray[np.float32]:
    """Real values of ``codes``, float32, same shape."""
    shifted = codes.astype(np.float32) - _expand(params.zero_point, params, codes.shape).astype(np.float32)
    return shifted * _expand(params.scale, params, codes.shape).astype(np.float32)


def fake_quantize(x: npt.NDArray[np.floating], params: QuantParams) -> npt.NDArray[np.float32]:
    """What ``x`` becomes after QuantizeLinear and DequantizeLinear."""
    return dequantize(quantize(x, params), params)


def container(spec: QuantSpec) -> np.dtype[np.integer]:
    """The numpy type that holds the codes; formats under 8 bits use 8."""
    bits = max(spec.format.bits, 8)
    return np.dtype(f"{'int' if spec.format.signed else 'uint'}{bits}")


def tensor_range(x: npt.NDArray[np.floating], spec: QuantSpec) -> Range:
    """Least and greatest value of each group of ``x`` that shares a scale (minmax of a constant).

    Returns float64 arrays of shape (), (channels,), or the blocked shape.
    """
    granularity = spec.granularity
    if x.size == 0:
        return Range(np.zeros(()), np.zeros(()))
    if granularity.scheme is Scheme.PER_TENSOR:
        return Range(x.min().astype(np.float64), x.max().astype(np.float64))
    axis = cast(int, granularity.axis) % x.ndim
    if granularity.scheme is Scheme.PER_CHANNEL:
        others = tuple(i for i in range(x.ndim) if i != axis)
        return Range(x.min(axis=others).astype(np.float64), x.max(axis=others).astype(np.float64))
    starts = np.arange(0, x.shape[axis], cast(int, granularity.block_size))
    return Range(
        np.minimum.reduceat(x, starts, axis).astype(np.float64), np.maximum.reduceat(x, starts, axis).astype(np.float64)
    )


def expected_error(bins: Bins, lo: npt.ArrayLike, hi: npt.ArrayLike, spec: QuantSpec) -> FloatArray:
    """Mean squared error that each candidate range makes on a histogram, float64 of the candidates' shape (m,).

    Values are spread evenly over their bin and rounded to the codes of :func:`params_from_range`, so that the end
    codes and the rounded zero point count too; values beyond the range err by their distance to its end.
    """
    lows, highs = np.atleast_1d(np.asarray(lo, np.float64)), np.atleast_1d(np.asarray(hi, np.float64))
    params = params_from_range(Range(lows, highs), dataclasses.replace(spec, bound=None))
    scale, least = params.scale.astype(np.float64)[:, None], spec.qmin - params.zero_point[:, None]
    summed = _error_by_code if spec.steps <= _FEW_STEPS else error_by_bin
    return np.maximum(summed(bins, scale, least, spec.steps), 0) / max(bins.total, 1)


def _error_by_code(bins: Bins, scale: FloatArray, least: IntArray, steps: int) -> FloatArray:
    """Sum over codes q of Σx² - 2·Sq·Σx + (Sq)²·Σ1, the sums running over the values that round to q."""
    codes = least + np.arange(steps + 1)
    sums = partial_moments(bins, scale * (codes[:, :-1] + 0.5))
    ends = [np.broadcast_to(bins.prefix[:, i, None, None], (3, scale.size, 1)) for i in (0, -1)]
    count, first, second = np.diff(np.concatenate([ends[0], sums, ends[1]], axis=2), axis=2)
    values = scale * codes
    total: FloatArray = (second - 2 * values * first + values**2 * count).sum(axis=1)
    return total


def error_by_bin(bins: Bins, scale: FloatArray, least: IntArray, steps: int) -> FloatArray:
    """Squared error summed over bins, for formats with more codes than the histogram has bins; float64 (m,).

    In units of the step, a bin of width w <= 1 whose centre lies d from its code errs by d² + w²/12, less
    max(d + w/2 - 1/2, 0)²/w for the part of it that rounds to the next code; a wider one errs by 1/12.

    Args:
        bins: the histogram, or one with counts (m, n) of a channel for each row.
        scale: step of each candidate (m, 1).
        least: its least code without the zero point (m, 1).
        steps: its number of steps.
    """
    position = bins.center / scale
    codes = np.clip(np.rint(position), least, least + steps)
    inside = (codes > least) & (codes < least + steps)
    width = (bins.hi - bins.lo) / scale
    width = np.where(inside, np.minimum(width, 1), width)
    distance = np.abs(position - codes)
    error = distance**2 + width**2 / 12
    over = inside & (distance + width / 2 > 0.5) & (width > 0)
    error[over] -= (distance[over] + width[over] / 2 - 0.5) ** 2 / width[over]
    total: FloatArray = (error * bins.count).sum(axis=1) * scale[:, 0] ** 2
    return total

"""Share bits out among the channels of a tensor, so that they err least together; numpy only, no ONNX.

A channel of range α and M bits errs by about α² 4^(-M). Two budgets are known (Banner et al., Post training 4-bit
quantization of convolutional networks for rapid-deployment, NeurIPS 2019, section 3):

    mean width   Σ M_i = n M                M_i = M + log2 α_i - mean_j log2 α_j
    published    Σ 2^(M_i) = n 2^M          2^(M_i) = n 2^M α_i^(2/3) / Σ_j α_j^(2/3)

The mean width is what a file's size follows from. Its widths are made integer by minimising Σ_i e_i(M_i), e_i(w) the
error that channel i really makes at w bits, exactly: a Lagrange multiplier λ gives widths that are best for their sum
and, by the dual bound Σ_i min_w (e_i(w) + λw) - λ n M, says which other widths can still be part of a better solution
(reduced costs; Everett, Generalized Lagrange multiplier method, 1963); dynamic programming over those closes the gap.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

from qdqtool.spec import FloatArray, IntArray

WIDTHS: Final = 9
"""Widths that a channel may have: 0 to 8 bits."""
_BISECTIONS: Final = 200
_EXACT: Final = 1e-13  # of the error: below it a gap is rounding


def closed_form(alpha: FloatArray, mean: float) -> FloatArray:
    """M + log2 α_i - mean(log2 α), the real widths of least Σ α_i² 4^(-M_i) with the mean M; -inf where α_i is 0.

    Args:
        alpha: range of each channel, float64 (channels,), none negative.
        mean: M. Channels of range 0 leave their bits to the others.
    """
    live = alpha > 0
    logs = np.log2(alpha, out=np.full(alpha.shape, -np.inf), where=live)
    if not live.any():
        return logs
    share: FloatArray = logs - logs[live].mean() + mean * alpha.size / live.sum()
    return share


def levels(alpha: FloatArray, quota: float) -> FloatArray:
    """B α_i^(2/3) / Σ_j α_j^(2/3): levels of each channel, of ``quota`` B in all; 0 each where every range is 0."""
    weight = alpha ** (2 / 3)
    total = float(weight.sum())
    return quota * weight / total if total > 0 else np.zeros(alpha.shape)


def published(alpha: FloatArray, bits: int, most: int = WIDTHS - 1) -> IntArray:
    """log2 of each channel's levels, rounded and kept in 0..most, by the quota that makes their sum channels * bits.

    A channel of range 0 gets 0 bits. Where several channels reach a half at the same quota, the first get the bit.

    Args:
        alpha: range of each channel, float64 (channels,).
        bits: mean width.
        most: greatest width.
    """
    live = alpha > 0
    total = _total(alpha.size * bits, int(live.sum()), most)
    with np.errstate(divide="ignore"):
        wanted = np.log2(levels(alpha, 1.0))

    def widths(log_quota: float) -> IntArray:
        return np.asarray(np.where(live, np.clip(np.rint(wanted + log_quota), 0, most), 0), np.int64)

    low, high = -1.0, 2.0 * WIDTHS - float(wanted[live].min(initial=0))
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if widths(middle).sum() <= total else (low, middle)
    found, more = widths(low), widths(high)
    flipping = np.flatnonzero(more > found)[: total - int(found.sum())]
    found[flipping] += 1
    return found


def mean_width(errors: FloatArray, bits: int) -> IntArray:
    """The widths of least total error whose sum is channels * bits, exact.

    Args:
        errors: error of each channel at 0, 1, 2, ... bits, float64 (channels, widths), finite.
        bits: mean width.

    Returns:
        int64 (channels,). A channel without error at 0 bits gets none; where the others cannot hold all, they are full.
    """
    live = np.flatnonzero(errors[:, 0] > 0)
    found = np.zeros(len(errors), np.int64)
    if live.size:
        table = errors[live] / errors[live, 0].max()
        found[live] = _least(table, _total(len(errors) * bits, live.size, table.shape[1] - 1))
    return found


def _total(wanted: int, live: int, most: int) -> int:
    return min(wanted, live * most)


def _least(errors: FloatArray, total: int) -> IntArray:
    """Widths of least total error with this sum."""
    price = _price(errors, total)
    costs = errors + price * np.arange(errors.shape[1])
    found = _filled(errors, costs.argmin(axis=1), total)
    least = costs.min(axis=1, keepdims=True)
    error = float(np.take_along_axis(errors, found[:, None], axis=1).sum())
    gap = error - (float(least.sum()) - price * total)
    if gap <= _EXACT * float(errors[:, 0].sum()):
        return found
    open_ = costs - least <= gap * (1 + 1e-9)
    return _by_dynamic_programming(np.where(open_, errors, np.inf), total)


def _price(errors: FloatArray, total: int) -> float:
    """The λ of which the widths of least e + λw use no more than ``total`` bits, and at anything less would."""
    widths = np.arange(errors.shape[1])
    low, high = 0.0, 2.0 * float(errors[:, 0].max())
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if middle in (low, high):
            break
        if (errors + middle * widths).argmin(axis=1).sum() <= total:
            high = middle
        else:
            low = middle
    return high


def _filled(errors: FloatArray, widths: IntArray, total: int) -> IntArray:
    """The widths with bits added one by one, each where it helps most, until their sum is ``total``."""
    found, channels = widths.copy(), np.arange(len(errors))
    padded = np.concatenate([errors, np.full((len(errors), 1), np.inf)], axis=1)
    for _ in range(total - int(found.sum())):
        gain = padded[channels, found + 1] - padded[channels, found]
        found[int(gain.argmin())] += 1
    return found


def _by_dynamic_programming(errors: FloatArray, total: int) -> IntArray:
    """Widths of least total error with this sum; widths that are not open have infinite error, one of each is open.

    ``best[b]`` is the least error of the channels so far with b bits above their narrowest open widths.
    """
    is_open = np.isfinite(errors)
    narrowest = is_open.argmax(axis=1)
    most = int(total - narrowest.sum())
    free = np.flatnonzero(is_open.sum(axis=1) > 1)
    best = np.full(most + 1, np.inf)
    best[0] = 0.0
    choices: list[npt.NDArray[np.int8]] = []
    for channel in free.tolist():
        choice, reached = np.zeros(most + 1, np.int8), np.full(most + 1, np.inf)
        for extra in np.flatnonzero(is_open[channel, narrowest[channel] :]).tolist():
            if extra <= most:
                candidate = best[: most + 1 - extra] + errors[channel, narrowest[channel] + extra]
                better = candidate < reached[extra:]
                reached[extra:][better], choice[extra:][better] = candidate[better], extra
        best = reached
        choices.append(choice)
    found: IntArray = narrowest.astype(np.int64)
    left = most
    for channel, choice in zip(reversed(free.tolist()), reversed(choices), strict=True):
        found[channel] += choice[left]
        left -= int(choice[left])
    return found

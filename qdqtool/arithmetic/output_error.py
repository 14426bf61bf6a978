"""Codes of a weight by which the layer's output errs least, checked on samples that were kept apart.

Codes are chosen for a weight moved towards the one that fits the inputs the layer reads in the quantized model
(:func:`qdqtool.arithmetic.gptq.compensated`), as far as samples kept apart bear it out: a fit has an unknown for each
input, and from few samples learns what holds for these alone. Where the codes do worse than the nearest ones on the
samples kept apart, with the inputs of the quantized or of the float model, half of that is tried, and none.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np

from qdqtool.arithmetic.gptq import compensated
from qdqtool.arithmetic.grid import Grid
from qdqtool.arithmetic.second_moments import Moments, SecondMoments
from qdqtool.spec import FloatArray, IntArray

Rounding = Callable[[FloatArray, FloatArray, Grid], IntArray]
"""A method: weights, second moments H and grid -> codes; see :func:`qdqtool.arithmetic.gptq.rounded`."""
_ENOUGH: Final = 4
"""Samples kept apart of which fewer do not tell whether a fit holds, which has an unknown for each input."""


def chosen(
    weights: FloatArray, grid: Grid, rounding: Rounding, fit: SecondMoments, apart: SecondMoments, *, centred: bool
) -> IntArray | None:
    """The codes; None where the nearest ones err less on the samples kept apart.

    Args:
        weights: float64 (groups, outputs of a group, inputs of a group).
        grid: the codes that each output may have.
        rounding: the method.
        fit: moments over the samples to choose by, at least one.
        apart: over the samples to check on; without any, nothing is checked.
        centred: a bias makes up for the mean of the error.
    """
    whole = (fit | apart).shrunk(centred=centred)
    if not apart.samples:
        return _rounded(weights, grid, rounding, whole, np.zeros(()))
    nearest, known, seen = grid.nearest(weights), fit.shrunk(centred=centred), apart.mean(centred=centred)
    bounds = [error(weights, grid.values(nearest)) for error in (seen.error, seen.exact_error)]
    fitted = _borne_out(weights, known, seen) if apart.samples >= _ENOUGH else np.zeros(())
    for share in (fitted, fitted / 2, np.zeros(())):
        values = grid.values(_rounded(weights, grid, rounding, known, share))
        if seen.error(weights, values) <= bounds[0] and seen.exact_error(weights, values) <= bounds[1]:
            return _rounded(weights, grid, rounding, whole, share)
    return None


def _borne_out(weights: FloatArray, known: Moments, seen: Moments) -> FloatArray:
    """How much of each output's fit makes the least error on the samples kept apart, 0 to 1: (groups, outputs, 1).

    Moved by a share s of the way Δ to its fit, a weight w errs there by s² ΔHΔᵀ - 2s ΔDᵀwᵀ, besides a constant.
    """
    way = compensated(weights, known.h, known.drift) - weights
    gain = (way * (weights @ seen.drift)).sum(axis=2, keepdims=True)
    curve = (way * (way @ seen.h)).sum(axis=2, keepdims=True)
    share: FloatArray = np.clip(np.divide(gain, curve, out=np.zeros_like(gain), where=curve > 0), 0, 1)
    return share


def _rounded(weights: FloatArray, grid: Grid, rounding: Rounding, moments: Moments, share: FloatArray) -> IntArray:
    """Codes for the weight moved by a share of the way to the one that fits the inputs best."""
    wanted = weights
    if share.any():
        wanted = weights + share * (compensated(weights, moments.h, moments.drift) - weights)
    return rounding(wanted, moments.h, grid)

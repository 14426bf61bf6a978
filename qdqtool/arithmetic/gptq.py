"""Round a weight so that the layer's output, not each weight by itself, errs least: GPTQ.

Input by input, the weights of all outputs are rounded, and what that costs is made good by those not yet rounded. With
U the upper Cholesky factor of H⁻¹ = Uᵀ U, H = E[x xᵀ], and e_i = (w_i - q_i) / U_ii:

    w_j <- w_j - e_i U_ij    for j > i

(Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, ICLR 2023; the rule
is that of Frantar and Alistarh, Optimal Brain Compression, NeurIPS 2022, and of Hassibi and Stork, Optimal Brain
Surgeon, 1993.) Inputs with the largest second moment come first, while there are most others to make up for them.

What so comes out is where a descent starts: input by input again, codes move to where (w - q) H (w - q)ᵀ is least with
all others as they are. Every move lowers it.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from qdqtool.arithmetic.grid import Grid
from qdqtool.spec import FloatArray, IntArray

_DAMPING: Final = 0.01  # share of the mean of H's diagonal that is added to it, as in the paper
_BLOCK: Final = 128
"""Inputs after which the later ones are updated, all at once."""
_RIDGE: Final = 1e-3
"""Share of the mean of H's diagonal that is added to it where a weight is fitted."""
_SWEEPS: Final = 3
"""Rounds of the descent, of which the later ones hardly find anything to move."""


def rounded(weights: FloatArray, moments: FloatArray, grid: Grid) -> IntArray:
    """Codes of a weight.

    Args:
        weights: float64 (groups, outputs of a group, inputs of a group).
        moments: H, float64 (groups, inputs, inputs), symmetric and positive semidefinite.
        grid: the codes that each output may have.

    Returns:
        int64, the weights' shape.
    """
    return descended(substituted(weights, moments, grid), weights, damped(moments), grid)


def substituted(weights: FloatArray, moments: FloatArray, grid: Grid) -> IntArray:
    """The codes that the rule of GPTQ gives, without the descent; arguments as for :func:`rounded`."""
    order = np.argsort(-np.diagonal(moments, axis1=1, axis2=2), axis=1, kind="stable")
    w = np.take_along_axis(weights, order[:, None, :], axis=2)
    codes = np.empty(w.shape, np.int64)
    factor = _inverse_factor(moments, order)
    inputs = w.shape[2]
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        errors = np.empty((*w.shape[:2], stop - start))
        for i in range(start, stop):
            here = slice(i, i + 1)
            codes[..., here] = grid.nearest(w[..., here])
            error = (w[..., here] - grid.values(codes[..., here]))[..., 0] / factor[:, i, i, None]
            w[..., i + 1 : stop] -= error[..., None] * factor[:, None, i, i + 1 : stop]
            errors[..., i - start] = error
        w[..., stop:] -= errors @ factor[:, start:stop, stop:]
    found: IntArray = np.empty_like(codes)
    np.put_along_axis(found, np.broadcast_to(order[:, None, :], codes.shape), codes, axis=2)
    return found


def descended(codes: IntArray, weights: FloatArray, moments: FloatArray, grid: Grid) -> IntArray:
    """The codes after a descent of (w - q) H (w - q)ᵀ, one input at a time; H positive definite."""
    codes = codes.copy()
    slope = (weights - grid.values(codes)) @ moments  # half the derivative by each weight's value, with a minus
    diagonal = np.diagonal(moments, axis1=1, axis2=2)
    for _ in range(_SWEEPS):
        moved = False
        for i in range(moments.shape[1]):
            here = slice(i, i + 1)
            better = np.rint(slope[..., here] / (diagonal[:, None, here] * grid.scale))
            steps = np.clip(codes[..., here] + better.astype(np.int64), grid.least, grid.greatest) - codes[..., here]
            if steps.any():
                moved = True
                codes[..., here] += steps
                slope -= steps * grid.scale * moments[:, i, None, :]
        if not moved:
            break
    return codes


def compensated(weights: FloatArray, moments: FloatArray, drift: FloatArray) -> FloatArray:
    """The weight that does best on inputs that are no longer those of the float model: w + w D H⁻¹.

    It minimises E[(w x - v y)²] over v, with y what the layer reads now, H = E[y yᵀ] and D = E[(x - y) yᵀ] (the term of
    Li et al., GPTAQ: Efficient Finetuning-Free Quantization for Asymmetric Calibration, ICML 2025, as a regression).

    Args:
        weights: float64 (groups, outputs of a group, inputs of a group).
        moments: H, float64 (groups, inputs, inputs).
        drift: D, alike.
    """
    from scipy.linalg import cho_factor, cho_solve

    wanted = (weights @ drift).swapaxes(1, 2)
    h = damped(moments, _RIDGE)
    shift = np.stack([cho_solve(cho_factor(own), right) for own, right in zip(h, wanted, strict=True)])
    found: FloatArray = weights + shift.swapaxes(1, 2)
    return found


def damped(moments: FloatArray, share: float = _DAMPING) -> FloatArray:
    """The moments with a share of the mean of their diagonal added to it, so that they can be inverted.

    An input that is always 0 gets the mean of the others: whatever its weight is, it makes no error.
    """
    h = moments.copy()
    diagonal = np.diagonal(moments, axis1=1, axis2=2)
    mean = diagonal.mean(axis=1, keepdims=True)
    mean = np.where(mean > 0, mean, 1.0)
    inputs = np.arange(h.shape[1])
    h[:, inputs, inputs] += share * mean + np.where(diagonal > 0, 0.0, mean)
    return h


def _inverse_factor(moments: FloatArray, order: IntArray) -> FloatArray:
    """The upper Cholesky factor of the inverse of the damped moments, their inputs in the order given."""
    from scipy.linalg import lapack

    sorted_rows = np.take_along_axis(damped(moments), order[:, :, None], axis=1)
    h = np.take_along_axis(sorted_rows, order[:, None, :], axis=2)
    # H = L Lᵀ in reverse order of the inputs makes H⁻¹ = Uᵀ U with U = L⁻¹ reversed again: no inverse is formed of H.
    lower = np.linalg.cholesky(h[:, ::-1, ::-1])
    inverse = np.stack([lapack.dtrtri(one, lower=1)[0] for one in lower])
    upper: FloatArray = inverse[:, ::-1, ::-1]
    return upper

"""Round a weight so that the layer's output, not each weight by itself, errs least: GPTQ.

Input by input, the weights of all outputs are rounded, and what that costs is made good by those not yet rounded. With
U the upper Cholesky factor of H⁻¹ = Uᵀ U, H = E[x xᵀ], and e_i = (w_i - q_i) / U_ii:

    w_j <- w_j - e_i U_ij    for j > i

(Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers, ICLR 2023; the rule
is that of Frantar and Alistarh, Optimal Brain Compression, NeurIPS 2022, and of Hassibi and Stork, Optimal Brain
Surgeon, 1993.) Inputs with the largest second moment come first, while there are most others to make up for them.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from qdqtool.spec import FloatArray, IntArray, QuantSpec

_DAMPING: Final = 0.01  # share of the mean of H's diagonal that is added to it, as in the paper
_BLOCK: Final = 128
"""Inputs after which the later ones are updated, all at once."""


def rounded(weights: FloatArray, moments: FloatArray, scale: FloatArray, zero: FloatArray, spec: QuantSpec) -> IntArray:
    """Codes of a weight.

    Args:
        weights: float64 (groups, outputs of a group, inputs of a group).
        moments: H, float64 (groups, inputs, inputs), symmetric and positive semidefinite.
        scale: scale of each output, float64 (groups, outputs, 1).
        zero: zero points, alike.
        spec: limits of the codes.

    Returns:
        int64, the weights' shape.
    """
    order = np.argsort(-np.diagonal(moments, axis1=1, axis2=2), axis=1, kind="stable")
    w = np.take_along_axis(weights, order[:, None, :], axis=2)
    codes = np.empty(w.shape, np.int64)
    factor = _inverse_factor(moments, order)
    inputs = w.shape[2]
    for start in range(0, inputs, _BLOCK):
        stop = min(start + _BLOCK, inputs)
        errors = np.empty((*w.shape[:2], stop - start))
        for i in range(start, stop):
            codes[..., i : i + 1] = np.clip(np.rint(w[..., i : i + 1] / scale) + zero, spec.qmin, spec.qmax)
            left = w[..., i] - (codes[..., i] - zero[..., 0]) * scale[..., 0]
            error = left / factor[:, i, i, None]
            w[..., i + 1 : stop] -= error[..., None] * factor[:, None, i, i + 1 : stop]
            errors[..., i - start] = error
        w[..., stop:] -= errors @ factor[:, start:stop, stop:]
    found: IntArray = np.empty_like(codes)
    np.put_along_axis(found, np.broadcast_to(order[:, None, :], codes.shape), codes, axis=2)
    return found


def _inverse_factor(moments: FloatArray, order: IntArray) -> FloatArray:
    """The upper Cholesky factor of the inverse of the damped moments, their inputs in the order given.

    An input that is always 0 gets the mean of the others: whatever its weight is, it makes no error.
    """
    sorted_rows = np.take_along_axis(moments, order[:, :, None], axis=1)
    h = np.take_along_axis(sorted_rows, order[:, None, :], axis=2)
    diagonal = np.diagonal(h, axis1=1, axis2=2)
    mean = diagonal.mean(axis=1, keepdims=True)
    mean = np.where(mean > 0, mean, 1.0)
    inputs = np.arange(h.shape[1])
    h[:, inputs, inputs] += _DAMPING * mean + np.where(diagonal > 0, 0.0, mean)
    # H = L Lᵀ in reverse order of the inputs makes H⁻¹ = Uᵀ U with U = L⁻¹ reversed again: no inverse is formed of H.
    lower = np.linalg.cholesky(h[:, ::-1, ::-1])
    inverse = np.linalg.solve(lower, np.broadcast_to(np.eye(h.shape[1]), h.shape))
    upper: FloatArray = inverse[:, ::-1, ::-1]
    return upper

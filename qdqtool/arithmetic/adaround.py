"""Round each weight down or up, all of them together, so that the layer's output errs least: AdaRound.

In units of the step, with p the position of a weight between codes, one minimises over V

    (c - p) H (c - p)ᵀ / mean diag H + λ Σ (1 - |2 h(V) - 1|^β),    c = ⌊p⌋ + h(V),
    h(V) = clip(σ(V) (ζ - γ) + γ, 0, 1),    ζ = 1.1, γ = -0.1

where β falls from 20 to 2, by which each h is driven to 0 or 1 (Nagel et al., Up or Down? Adaptive Rounding for
Post-Training Quantization, ICML 2020, equations 21 to 24). The layer's error is the quadratic form of its inputs'
second moments H instead of a sum over samples, so a step costs one product of the weight with H. Where PyTorch is
installed it does the arithmetic, else numpy: the steps are the same. A descent moves what is left in between.
"""

from __future__ import annotations

import importlib.util
from typing import Any, Final

import numpy as np

from qdqtool.arithmetic.gptq import damped, descended
from qdqtool.arithmetic.grid import Grid
from qdqtool.spec import FloatArray, IntArray

_ZETA, _GAMMA = 1.1, -0.1
_LAMBDA: Final = 0.4
_BETA: Final = (20.0, 2.0)
_WARM: Final = 0.2  # share of the steps before the regulariser sets in
_STEPS: Final = 400
_RATE: Final = 0.03
_ADAM: Final = (0.9, 0.999, 1e-8)  # decay of both moments and the least denominator (Kingma and Ba, ICLR 2015)


def rounded(weights: FloatArray, moments: FloatArray, grid: Grid) -> IntArray:
    """Codes of a weight; arguments and result as for :func:`qdqtool.arithmetic.gptq.rounded`."""
    h = damped(moments)
    mean = np.diagonal(h, axis1=1, axis2=2).mean(axis=1)[:, None, None]
    position = weights / grid.scale + grid.zero
    floor = np.clip(np.floor(position), grid.least, np.maximum(grid.greatest - 1, grid.least))
    up = _choice(_arrays(), position - floor, h / mean)
    codes = np.clip(floor.astype(np.int64) + up, grid.least, grid.greatest)
    return descended(codes, weights, h, grid)


def _arrays() -> Any:
    """The module that does the arithmetic."""
    if importlib.util.find_spec("torch") is None:
        return np
    import torch

    return torch


def _choice(xp: Any, position: FloatArray, moments: FloatArray) -> IntArray:
    """Which weights are rounded up, 0 or 1.

    Args:
        xp: numpy or torch.
        position: of the weights above the lower code, in steps: (groups, outputs, inputs).
        moments: H of mean diagonal 1, (groups, inputs, inputs).
    """
    p, h = (xp.asarray(np.ascontiguousarray(part, np.float32)) for part in (position, moments))
    start = (xp.clip(p, 0.01, 0.99) - _GAMMA) / (_ZETA - _GAMMA)
    v = xp.log(start / (1 - start))
    first, second = xp.zeros_like(v), xp.zeros_like(v)
    for step in range(1, _STEPS + 1):
        gradient = _gradient(xp, v, p, h, step / _STEPS)
        first = _ADAM[0] * first + (1 - _ADAM[0]) * gradient
        second = _ADAM[1] * second + (1 - _ADAM[1]) * gradient**2
        rate = _RATE / (1 - _ADAM[0] ** step)
        v = v - rate * first / (xp.sqrt(second / (1 - _ADAM[1] ** step)) + _ADAM[2])
    up: IntArray = np.asarray(v >= 0).astype(np.int64)
    return up


def _gradient(xp: Any, v: Any, position: Any, moments: Any, progress: float) -> Any:
    """Derivative of the objective by V, ``progress`` of the steps being done."""
    sigma = 1 / (1 + xp.exp(-v))
    stretched = sigma * (_ZETA - _GAMMA) + _GAMMA
    h = xp.clip(stretched, 0, 1)
    slope = 2 * (h - position) @ moments
    if progress > _WARM:
        rest = (progress - _WARM) / (1 - _WARM)
        beta = _BETA[1] + 0.5 * (_BETA[0] - _BETA[1]) * (1 + np.cos(rest * np.pi))
        side = 2 * h - 1
        slope = slope - 2 * _LAMBDA * beta * xp.abs(side) ** (beta - 1) * xp.sign(side)
    inside = (stretched > 0) & (stretched < 1)
    return xp.where(inside, slope * (_ZETA - _GAMMA) * sigma * (1 - sigma), xp.zeros_like(v))

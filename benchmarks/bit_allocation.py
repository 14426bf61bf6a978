"""The experiment of the source of bit allocation: Gaussian channels that share levels, or bits, against every split.

    python -m benchmarks.bit_allocation

Two channels share 32 levels, their ranges α being their standard deviations, 1 to 16 times apart: levels in proportion
to α^(2/3) are compared with the best of all splits. Then several channels share bits, 4 on average: widths of least
expected error are compared with the best of all. In both, each channel has the step that errs least for its levels.
Banner et al., Post training 4-bit quantization of convolutional networks for rapid-deployment, NeurIPS 2019, section 3.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import numpy as np

from qdqtool.arithmetic import bit_allocation
from qdqtool.spec import FloatArray, IntArray

LEVELS = 32
RATIOS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0)
CHANNELS = ((1.0, 1.0, 1.0), (1.0, 2.0, 4.0), (0.1, 1.0, 10.0), (1.0, 1.1, 1.3, 9.0), (0.01, 1.0, 3.0, 20.0))
_SECTIONS = 80
_GOLDEN = (math.sqrt(5) - 1) / 2


def gaussian_errors(most: int) -> FloatArray:
    """Mean squared error of a standard normal rounded to 1, 2, ..., ``most`` evenly spaced levels at the best step."""
    return np.array([1.0, *(_least_error(levels) for levels in range(2, most + 1))])


def _least_error(levels: int) -> float:
    """Golden-section search over the step, in which the error has one minimum."""
    low, high = 0.0, 4.0
    for _ in range(_SECTIONS):
        left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
        low, high = (low, right) if _error(levels, left) < _error(levels, right) else (left, high)
    return _error(levels, (low + high) / 2)


def _error(levels: int, step: float) -> float:
    """Σ E[(x - v)²] over the cells of the levels v, from the normal distribution's partial moments."""
    values = (np.arange(levels) - (levels - 1) / 2) * step
    inner = (values[1:] + values[:-1]) / 2
    below = np.array([0.0, *((1 + math.erf(edge / math.sqrt(2))) / 2 for edge in inner.tolist()), 1.0])
    density = np.concatenate([[0.0], np.exp(-(inner**2) / 2) / math.sqrt(2 * math.pi), [0.0]])
    zeroth, first = np.diff(below), -np.diff(density)
    second = zeroth - np.diff(np.concatenate([[0.0], inner, [0.0]]) * density)
    return float((second - 2 * values * first + values**2 * zeroth).sum())


def shared_levels(ratio: float, errors: FloatArray) -> tuple[IntArray, int, float]:
    """Levels by α^(2/3), the best split's levels of the first channel, and the ratio of both errors."""
    alpha = np.array([1.0, ratio])
    first = int(np.rint(bit_allocation.levels(alpha, LEVELS)[0]))

    def error(levels: int) -> float:
        return float(errors[levels - 1] + ratio**2 * errors[LEVELS - levels - 1])

    best = min(range(1, LEVELS), key=error)
    return np.array([first, LEVELS - first]), best, error(first) / error(best)


def shared_bits(sigma: Sequence[float], mean: int, errors: FloatArray) -> tuple[IntArray, float]:
    """Widths by :func:`bit_allocation.mean_width`, and the ratio of their error to that of the best widths of all."""
    widths = np.arange(bit_allocation.WIDTHS)
    table = np.square(sigma)[:, None] * errors[(1 << widths) - 1]
    found = bit_allocation.mean_width(table, mean)
    splits = (s for s in itertools.product(widths.tolist(), repeat=len(sigma)) if sum(s) == mean * len(sigma))
    rows = np.arange(len(sigma))
    best = min(float(table[rows, list(split)].sum()) for split in splits)
    return found, float(table[rows, found].sum()) / best


def main() -> None:
    errors = gaussian_errors(256)
    print("| ratio of ranges | levels by α^(2/3) | best split | error / least error |\n|---|---|---|---|")
    for ratio in RATIOS:
        levels, best, excess = shared_levels(ratio, errors)
        print(f"| {ratio:g} | {levels[0]} + {levels[1]} | {best} + {LEVELS - best} | {excess:.4f} |")
    print("\n| ranges | M + log2 α - mean | widths | error / least error |\n|---|---|---|---|")
    for sigma in CHANNELS:
        found, excess = shared_bits(sigma, 4, errors)
        start = bit_allocation.closed_form(np.array(sigma), 4)
        real = ", ".join(f"{width:.2f}" for width in start)
        print(f"| {', '.join(f'{s:g}' for s in sigma)} | {real} | {', '.join(map(str, found))} | {excess:.6f} |")


if __name__ == "__main__":
    main()

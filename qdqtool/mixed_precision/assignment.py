"""The best width for every layer, exactly: a multiple-choice knapsack as an integer program.

    minimise sum_lw noise_lw x_lw   subject to   sum_lw cost_lw x_lw <= limit,   sum_w x_lw = 1,   x binary

with what layers add to the noise of the outputs taken as independent of each other; or the least cost for so much
noise, with the parts of noise and cost exchanged. Solved by branch and bound (scipy.optimize.milp, HiGHS).
"""

from __future__ import annotations

import contextlib
import math
import os
import sys
from collections.abc import Iterator
from typing import Final

import numpy as np
import numpy.typing as npt

from qdqtool.spec import FloatArray

_SCALE: Final = 1e4
"""The objective's size at the optimum: the solver's own tolerances are absolute, near 1e-6."""
_SLACK: Final = 1e-9
_ROUNDS: Final = 3


def least(objective: FloatArray, cost: FloatArray, limit: float) -> npt.NDArray[np.intp] | None:
    """Choose one entry of every row with the least sum of ``objective``, where the sum of ``cost`` may be ``limit``.

    Args:
        objective: float64 (layers, widths); inf where a width must not be chosen.
        cost: float64 (layers, widths), at least 0.
        limit: of the sum of costs.

    Returns:
        The column of each row, (layers,); None where no choice keeps the limit.
    """
    if not np.all(np.isfinite(objective).any(axis=1)):
        return None
    cheapest = np.where(np.isfinite(objective), cost, np.inf).min(axis=1).sum()
    if cheapest > limit * (1 + _SLACK):
        return None
    finite = np.where(np.isfinite(objective), objective, 0.0)
    scale, chosen, tight = 1.0 / max(float(np.abs(finite).max()), 1e-300), None, limit
    for _ in range(_ROUNDS):  # the first solution tells the objective's size, which the next is scaled by
        found = _solved(objective, finite * scale, cost, tight)
        if found is None:
            return chosen
        if _total(cost, found) > limit * (1 + _SLACK):  # by the solver's tolerance
            tight *= 1 - 1e-6
            continue
        if chosen is None or _total(finite, found) < _total(finite, chosen):
            chosen = found
        value = _total(finite, found)
        if value <= 0.0:
            break
        scale = _SCALE / value
    return chosen


def _total(values: FloatArray, columns: npt.NDArray[np.intp]) -> float:
    return math.fsum(values[np.arange(len(columns)), columns])


def _solved(objective: FloatArray, scaled: FloatArray, cost: FloatArray, limit: float) -> npt.NDArray[np.intp] | None:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import csr_array

    layers, widths = objective.shape
    each = csr_array((np.ones(objective.size), (np.repeat(np.arange(layers), widths), np.arange(objective.size))))
    size = limit if limit > 0 else 1.0
    constraints = [
        LinearConstraint(each, 1, 1),
        LinearConstraint(cost.reshape(1, -1) / size, -np.inf, limit / size),
    ]
    allowed = Bounds(0, np.isfinite(objective).reshape(-1).astype(np.float64))
    with _quiet():
        found = milp(
            scaled.reshape(-1),
            integrality=np.ones(objective.size, np.int64),
            bounds=allowed,
            constraints=constraints,
            options={"mip_rel_gap": 0.0},
        )
    return None if found.x is None else found.x.reshape(layers, widths).argmax(axis=1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Send to nowhere what the solver's native code prints on standard output, where a program may read JSON."""
    sys.stdout.flush()
    saved = os.dup(1)
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 1)
        yield
    finally:
        os.dup2(saved, 1)
        os.close(saved)

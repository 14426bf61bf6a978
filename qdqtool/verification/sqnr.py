"""Signal to quantization noise ratio, the measure of how near two tensors are."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]


@dataclass
class Sqnr:
    """Signal to quantization noise ratio, summed over batches: 10 log10(sum x^2 / sum (x - x_q)^2) in dB."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Array, value: Array) -> None:
        """Add a batch; where the reference is not finite (a mask of -inf) the value must equal it, uncounted."""
        x, y = reference.astype(np.float64), value.astype(np.float64)
        finite = np.isfinite(x)
        if not finite.all():
            same = np.array_equal(x[~finite], y[~finite], equal_nan=True)
            self.noise += 0.0 if same else math.inf
            x, y = x[finite], y[finite]
        self.signal += float(np.vdot(x, x))
        with np.errstate(invalid="ignore"):
            error = x - y
            self.noise += float(np.vdot(error, error)) if np.isfinite(error).all() else math.inf

    @property
    def db(self) -> float:
        """dB; inf where both are equal (an all-zero signal too), -inf where an all-zero signal has noise."""
        if self.noise == 0.0:
            return math.inf
        if self.signal == 0.0 or math.isinf(self.noise):
            return -math.inf
        return 10 * math.log10(self.signal / self.noise)

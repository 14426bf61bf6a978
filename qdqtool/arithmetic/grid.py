"""The values that a weight's codes stand for, output by output, for methods that choose among them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qdqtool.spec import FloatArray, IntArray, QuantParams


@dataclass(frozen=True)
class Grid:
    """Codes that the weights of each output may have: all arrays are (groups, outputs of a group, 1).

    Attributes:
        scale: float64.
        zero: zero points, int64.
        least: least code, int64; outputs may differ in it, as they may have codes of different widths.
        greatest: greatest code, alike.
    """

    scale: FloatArray
    zero: IntArray
    least: IntArray
    greatest: IntArray

    @staticmethod
    def of(params: QuantParams, groups: int, outputs: int) -> Grid:
        """The grid of a weight with one scale, or one for each of its ``groups * outputs`` outputs."""
        every = (groups * outputs,)
        scale = np.broadcast_to(params.scale.astype(np.float64), every).reshape(groups, outputs, 1)
        codes = (params.zero_point, params.qmin, params.qmax)
        return Grid(scale, *(np.broadcast_to(part, every).reshape(groups, outputs, 1) for part in codes))

    def nearest(self, weights: FloatArray) -> IntArray:
        """The nearest codes, int64 in the weights' shape (groups, outputs, any)."""
        codes: IntArray = np.clip(np.rint(weights / self.scale) + self.zero, self.least, self.greatest).astype(np.int64)
        return codes

    def values(self, codes: IntArray) -> FloatArray:
        """What the codes stand for, float64."""
        found: FloatArray = (codes - self.zero) * self.scale
        return found

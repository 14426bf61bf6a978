"""ACIQ with the prior that suits the tensor: the clip of a Laplace or of a Gaussian distribution.

Banner et al. choose the prior by its distance to the data. What a prior is wanted for is its clip, so the two clips
are compared by the squared error each makes on the histogram (:func:`qdqtool.arithmetic.affine.expected_error`); on
data of either distribution that finds the distribution.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import ClassVar, Final

import numpy as np

from qdqtool.arithmetic.affine import expected_error
from qdqtool.calibrator_api import Calibrator, Stat, choose
from qdqtool.calibrators.aciq_gauss import AciqGauss
from qdqtool.calibrators.aciq_laplace import AciqLaplace
from qdqtool.spec import QuantSpec, Range
from qdqtool.statistics.distribution import ChannelPriors
from qdqtool.statistics.tensor import TensorStatistics

_BETWEEN: Final = (math.sqrt(1 / 2) + math.sqrt(2 / math.pi)) / 2


@dataclass(frozen=True)
class Aciq:
    """The better of aciq_laplace and aciq_gauss for each tensor; :meth:`explain` reports both."""

    name: ClassVar[str] = "aciq"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES, Stat.HISTOGRAM})

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the range of the prior that errs less, Laplace's on a tie; for channels, of the one that fits each."""
        if spec.granularity.axis is not None:
            return _of_channels(stats, spec)
        ranges, errors = _compared(stats, spec)
        prior = AciqGauss.name if errors[AciqGauss.name] < errors[AciqLaplace.name] else AciqLaplace.name
        return replace(ranges[prior], errors=errors)

    def explain(self, stats: TensorStatistics, spec: QuantSpec) -> dict[str, float]:
        """Expected squared error under each prior, by the name of its calibrator."""
        return _compared(stats, spec)[1]


def _of_channels(stats: TensorStatistics, spec: QuantSpec) -> Range:
    """Each channel by the prior whose b/σ is nearer to its own: 1/√2 for Laplace, √(2/π) for Gauss."""
    priors = ChannelPriors.of(stats, spec)
    laplace = priors.b < _BETWEEN * priors.sigma
    ranges = [choose(p, stats, spec) for p in (AciqLaplace(), AciqGauss())]
    lo, hi = (np.where(laplace, getattr(ranges[0], end), getattr(ranges[1], end)) for end in ("lo", "hi"))
    return Range(lo, hi)


def _compared(stats: TensorStatistics, spec: QuantSpec) -> tuple[dict[str, Range], dict[str, float]]:
    priors: tuple[Calibrator, ...] = (AciqLaplace(), AciqGauss())
    ranges = {p.name: choose(p, stats, spec) for p in priors}
    bins = stats.bins.weighted(spec.negative_weight)
    errors = expected_error(bins, [r.lo for r in ranges.values()], [r.hi for r in ranges.values()], spec)
    return ranges, {name: float(error) for name, error in zip(ranges, errors, strict=True)}

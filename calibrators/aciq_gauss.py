"""The clip that is optimal for a Gaussian prior (ACIQ).

Two-sided [m - α, m + α], α/σ minimising (1 + α²)(1 - erf(α/√2)) - √(2/π)·α·e^(-α²/2) + α²/(3n²); one-sided data, as
behind a ReLU, [0, α] with σ² = E[Y² | Y > 0] and α²/(12n²) as the last term. Banner et al.: Post-training 4-bit
quantization of convolution networks for rapid-deployment, 2019.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from qdqtool.calibrator_api import Stat
from qdqtool.spec import QuantSpec, Range
from qdqtool.statistics.distribution import ChannelPriors, Side, gauss_clip, is_zero, nonzero, within
from qdqtool.statistics.tensor import TensorStatistics


@dataclass(frozen=True)
class AciqGauss:
    """Optimal clip of a Gaussian prior, never beyond what was seen.

    Exact zeros do not count, as they are kept without error.
    """

    name: ClassVar[str] = "aciq_gauss"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES, Stat.HISTOGRAM})

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return [m - α, m + α], or the one-sided or symmetric form of it; or that of each channel."""
        if spec.granularity.axis is not None:
            priors = ChannelPriors.of(stats, spec)
            return priors.range(priors.sigma, spec.steps, gauss_clip)
        if is_zero(stats):
            return within(stats, 0, 0)
        bins, side = nonzero(stats.bins), Side.of(stats, spec)
        mean = bins.mean(bins.center) if side is Side.BOTH else 0.0
        sigma = math.sqrt(bins.mean((bins.center - mean) ** 2))
        clip = sigma * gauss_clip(spec.steps, one_sided=side in {Side.POSITIVE, Side.NEGATIVE})
        lo, hi = side.ends(clip)
        return within(stats, mean + lo, mean + hi)

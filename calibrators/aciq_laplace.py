"""The clip that is optimal for a Laplace prior (ACIQ).

Two-sided [m - α, m + α] with m = E X, b = E|X - m| and α = b·W(3n²), W being Lambert's function. One-sided data, as
behind a ReLU, [0, α] with b = E[Y | Y > 0] and α = b·W(12n²): the zeros of a ReLU belong to the lower half of X and
would shrink b; for m = 0 what is left has exactly X's b. Banner et al.: Post-training 4-bit quantization of
convolution networks for rapid-deployment, 2019.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qdqtool.calibrator_api import Stat
from qdqtool.spec import QuantSpec, Range
from qdqtool.statistics.distribution import ChannelPriors, Side, is_zero, laplace_clip, mean_deviation, nonzero, within
from qdqtool.statistics.tensor import TensorStatistics


@dataclass(frozen=True)
class AciqLaplace:
    """Optimal clip of a Laplace prior, never beyond what was seen.

    Exact zeros do not count, as they are kept without error.
    """

    name: ClassVar[str] = "aciq_laplace"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES, Stat.HISTOGRAM})

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return [m - α, m + α], or the one-sided or symmetric form of it; or that of each channel."""
        if spec.granularity.axis is not None:
            priors = ChannelPriors.of(stats, spec)
            return priors.range(priors.b, spec.steps, laplace_clip)
        if is_zero(stats):
            return within(stats, 0, 0)
        bins, side = nonzero(stats.bins), Side.of(stats, spec)
        mean = bins.mean(bins.center) if side is Side.BOTH else 0.0
        clip = mean_deviation(bins, mean) * laplace_clip(spec.steps, one_sided=side in {Side.POSITIVE, Side.NEGATIVE})
        lo, hi = side.ends(clip)
        return within(stats, mean + lo, mean + hi)

"""The catalogue of range choosers: one frozen dataclass a file, listed here in order."""

from __future__ import annotations

from qdqtool.calibrators.aciq import Aciq
from qdqtool.calibrators.aciq_gauss import AciqGauss
from qdqtool.calibrators.aciq_laplace import AciqLaplace
from qdqtool.calibrators.auto import Auto
from qdqtool.calibrators.entropy import Entropy
from qdqtool.calibrators.hfmg import Hfmg
from qdqtool.calibrators.ifmr import Ifmr
from qdqtool.calibrators.minmax import MinMax
from qdqtool.calibrators.moving_average import MovingAverage
from qdqtool.calibrators.mse import Mse
from qdqtool.calibrators.percentile import Percentile

BUILTIN = (MinMax, MovingAverage, Percentile, Entropy, Mse, AciqLaplace, AciqGauss, Aciq, Ifmr, Hfmg, Auto)

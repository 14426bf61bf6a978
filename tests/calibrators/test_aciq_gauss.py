from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy.optimize import minimize_scalar

from qdqtool.calibrators.aciq_gauss import AciqGauss
from qdqtool.spec import FORMATS, QuantSpec
from qdqtool.statistics.distribution import gauss_clip
from qdqtool.statistics.tensor import TensorStatistics

Array = npt.NDArray[np.float32]
Observe = Callable[..., TensorStatistics]


@pytest.mark.parametrize(
    ("steps", "one_sided", "published"),
    [(4, False, 1.71), (8, False, 2.15), (16, False, 2.56), (4, True, 2.15), (8, True, 2.56), (16, True, 2.94)],
)
def test_published_clips(steps: int, one_sided: bool, published: float) -> None:
    assert gauss_clip(steps, one_sided) == pytest.approx(published, abs=6e-3)


@pytest.mark.parametrize("steps", [3, 15, 255])
def test_clip_is_where_the_published_error_is_least(steps: int) -> None:
    def error(a: float) -> float:
        tail = (1 + a * a) * (1 - math.erf(a / math.sqrt(2))) - math.sqrt(2 / math.pi) * a * math.exp(-a * a / 2)
        return tail + a * a / (3 * steps**2)

    assert gauss_clip(steps, one_sided=False) == pytest.approx(minimize_scalar(error, bounds=(0.5, 6)).x, abs=1e-3)


def test_two_sided_range_lies_around_the_mean(observe: Observe, samples: dict[str, Array]) -> None:
    x = samples["gauss"] + np.float32(0.5)
    chosen = AciqGauss().choose(observe(x), QuantSpec(FORMATS["uint4"]))
    clip = x.std() * gauss_clip(15, one_sided=False)
    assert chosen.lo == pytest.approx(x.mean() - clip, rel=1e-3)
    assert chosen.hi == pytest.approx(x.mean() + clip, rel=1e-3)


def test_behind_a_relu_sigma_comes_from_the_positive_values(observe: Observe, samples: dict[str, Array]) -> None:
    chosen = AciqGauss().choose(observe(samples["relu"]), QuantSpec(FORMATS["uint4"]))
    assert chosen.hi == pytest.approx(gauss_clip(15, one_sided=True), rel=0.02)  # σ of the tensor before the ReLU is 1
    mirrored = AciqGauss().choose(observe(-samples["relu"]), QuantSpec(FORMATS["uint4"]))
    assert [mirrored.lo, mirrored.hi] == [-chosen.hi, 0]

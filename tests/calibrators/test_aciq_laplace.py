from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from qdqtool.calibrators.aciq_laplace import AciqLaplace
from qdqtool.spec import FORMATS, QuantSpec
from qdqtool.statistics.distribution import laplace_clip
from qdqtool.statistics.tensor import TensorStatistics

Array = npt.NDArray[np.float32]
Observe = Callable[..., TensorStatistics]


@pytest.mark.parametrize(
    ("steps", "one_sided", "published"),
    [(4, False, 2.831), (8, False, 3.897), (16, False, 5.029), (4, True, 3.897), (8, True, 5.029), (16, True, 6.205)],
)
def test_published_clips(steps: int, one_sided: bool, published: float) -> None:
    assert laplace_clip(steps, one_sided) == pytest.approx(published, abs=5e-4)


def test_two_sided_range_lies_around_the_mean(observe: Observe, samples: dict[str, Array]) -> None:
    x = samples["laplace"] + np.float32(0.5)
    chosen = AciqLaplace().choose(observe(x), QuantSpec(FORMATS["uint4"]))
    clip = np.abs(x - x.mean()).mean() * laplace_clip(15, one_sided=False)
    assert chosen.lo == pytest.approx(x.mean() - clip, rel=1e-3)
    assert chosen.hi == pytest.approx(x.mean() + clip, rel=1e-3)


def test_behind_a_relu_b_is_the_mean_of_the_positive_values(observe: Observe, samples: dict[str, Array]) -> None:
    x = np.maximum(samples["laplace"], 0)
    chosen = AciqLaplace().choose(observe(x), QuantSpec(FORMATS["uint4"]))
    assert chosen.lo == 0
    assert chosen.hi == pytest.approx(x[x > 0].mean() * laplace_clip(15, one_sided=True), rel=1e-3)
    assert chosen.hi == pytest.approx(
        laplace_clip(15, one_sided=True), rel=0.03
    )  # b of the tensor before the ReLU is 1


def test_symmetric_range_has_its_middle_at_zero(observe: Observe, samples: dict[str, Array]) -> None:
    chosen = AciqLaplace().choose(observe(samples["laplace"]), QuantSpec(FORMATS["int4"], symmetric=True))
    assert chosen.hi == -chosen.lo == pytest.approx(laplace_clip(15, one_sided=False), rel=0.02)


def test_never_beyond_what_was_seen(observe: Observe) -> None:
    x = np.random.default_rng(0).uniform(-1, 2, 1000).astype(np.float32)
    chosen = AciqLaplace().choose(observe(x), QuantSpec(FORMATS["uint8"]))
    assert (chosen.lo, chosen.hi) == (x.min(), x.max())

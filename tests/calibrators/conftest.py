from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import ndtr

from qdqtool.affine import fake_quantize, params_from_range
from qdqtool.spec import QuantSpec, Range
from qdqtool.statistics import TensorStatistics

Array = npt.NDArray[np.float32]


def observed(x: npt.ArrayLike, samples: int = 1) -> TensorStatistics:
    """Statistics of ``x`` seen in one batch of ``samples`` equal parts."""
    stats = TensorStatistics()
    stats.observe(np.asarray(x, np.float32), [(b"%015d" % i, i) for i in range(samples)])
    return stats


def measured_sqnr_db(x: Array, chosen: Range, spec: QuantSpec) -> float:
    """10·log10 of signal over error after a real quantize and dequantize."""
    error = x.astype(np.float64) - fake_quantize(x, params_from_range(chosen, spec))
    return float(10 * np.log10((x.astype(np.float64) ** 2).sum() / max((error**2).sum(), 1e-300)))


@pytest.fixture(scope="session")
def observe() -> Callable[..., TensorStatistics]:
    return observed


@pytest.fixture(scope="session")
def sqnr_db() -> Callable[[Array, Range, QuantSpec], float]:
    return measured_sqnr_db


@pytest.fixture(scope="session")
def samples() -> dict[str, Array]:
    rng = np.random.default_rng(0)
    gauss = rng.standard_normal(20_000)
    drawn = {
        "gauss": gauss,
        "laplace": rng.laplace(size=20_000),
        "relu": np.maximum(rng.standard_normal(20_000), 0),
        "t3": rng.standard_t(3, 20_000),
        "gelu": gauss * ndtr(gauss),
    }
    return {name: values.astype(np.float32) for name, values in drawn.items()}

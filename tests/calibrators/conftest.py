from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from scipy.special import ndtr

from qdqtool.arithmetic.affine import fake_quantize, params_from_range
from qdqtool.spec import QuantSpec, Range
from qdqtool.statistics.tensor import TensorStatistics

Array = npt.NDArray[np.float32]


def observed(x: npt.ArrayLike, samples: int = 1) -> TensorStatistics:
    """Statistics of ``x`` seen in one batch of ``samples`` equal parts."""
    stats = TensorStatistics()
    stats.observe(np.asarray(x, np.float32), [(b"%015d" % i, i) for i in range(samples)])
    return stats


def measured_sqnr_db(x: Array, chosen: Range, spec: QuantSpec) -> float:
    """10·log10 of signal over error after a real quantize and dequantize."""
    exact = x.astype(np.float64)
    error = exact - fake_quantize(x, params_from_range(chosen, spec))
    return float(10 * np.log10(np.square(exact).sum() / max(np.square(error).sum(), 1e-300)))


@pytest.fixture(scope="session")
def observe() -> Callable[..., TensorStatistics]:
    return observed


@pytest.fixture(scope="session")
def sqnr_db() -> Callable[[Array, Range, QuantSpec], float]:
    return measured_sqnr_db


def drawn(size: int) -> dict[str, Array]:
    """Values as activations have them: two-sided, heavy-tailed, behind a ReLU, behind a GELU; float32 (size,)."""
    rng = np.random.default_rng(0)
    gauss = rng.standard_normal(size)
    values = {
        "gauss": gauss,
        "laplace": rng.laplace(size=size),
        "relu": np.maximum(rng.standard_normal(size), 0),
        "t3": rng.standard_t(3, size),
        "gelu": gauss * ndtr(gauss),
    }
    return {name: found.astype(np.float32) for name, found in values.items()}


@pytest.fixture(scope="session")
def samples() -> dict[str, Array]:
    return drawn(20_000)


@pytest.fixture(scope="session")
def many_samples() -> dict[str, Array]:
    return drawn(200_000)

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from qdqtool.affine import expected_error
from qdqtool.calibrators.auto import Auto
from qdqtool.spec import FORMATS, QuantSpec
from qdqtool.statistics import TensorStatistics

Array = npt.NDArray[np.float32]
Observe = Callable[..., TensorStatistics]


@pytest.mark.parametrize("name", ["gauss", "t3", "gelu"])
@pytest.mark.parametrize("fmt", ["uint8", "int4"])
def test_range_makes_the_least_error_of_all_candidates(
    observe: Observe, samples: dict[str, Array], name: str, fmt: str
) -> None:
    stats, spec = observe(samples[name]), QuantSpec(FORMATS[fmt], symmetric=fmt.startswith("int"))
    chosen, errors = Auto().choose(stats, spec), Auto().explain(stats, spec)
    assert expected_error(stats.bins, chosen.lo, chosen.hi, spec)[0] == pytest.approx(min(errors.values()))


def test_candidates_are_all_others_that_depend_on_no_order(observe: Observe) -> None:
    errors = Auto().explain(observe([1, 2]), QuantSpec(FORMATS["uint8"]))
    assert list(errors)[:7] == ["minmax", "percentile", "entropy", "mse", "aciq_laplace", "aciq_gauss", "aciq"]
    assert "auto" not in errors
    assert "moving_average" not in errors

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from qdqtool.calibrator_api import Calibrator
from qdqtool.calibrators.aciq import Aciq
from qdqtool.calibrators.aciq_gauss import AciqGauss
from qdqtool.calibrators.aciq_laplace import AciqLaplace
from qdqtool.spec import FORMATS, QuantSpec
from qdqtool.statistics.tensor import TensorStatistics

Array = npt.NDArray[np.float32]
Observe = Callable[..., TensorStatistics]


@pytest.mark.parametrize("fmt", ["uint4", "int4", "uint8", "int8"])
@pytest.mark.parametrize(("name", "prior"), [("gauss", AciqGauss()), ("laplace", AciqLaplace())])
@pytest.mark.parametrize("behind_relu", [False, True])
def test_prior_that_made_the_data_is_found(
    observe: Observe, samples: dict[str, Array], *, name: str, prior: Calibrator, fmt: str, behind_relu: bool
) -> None:
    x = np.maximum(samples[name], 0) if behind_relu else samples[name]
    stats, spec = observe(x), QuantSpec(FORMATS[fmt], symmetric=fmt.startswith("int"))
    assert str(Aciq().choose(stats, spec)) == str(prior.choose(stats, spec))
    errors = Aciq().explain(stats, spec)
    assert errors[prior.name] == min(errors.values())
    assert set(errors) == {"aciq_laplace", "aciq_gauss"}

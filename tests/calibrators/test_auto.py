from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from qdqtool.arithmetic.affine import expected_error
from qdqtool.calibrators.auto import Auto
from qdqtool.errors import RecipeError
from qdqtool.registry import make
from qdqtool.spec import FORMATS, QuantSpec
from qdqtool.statistics.tensor import TensorStatistics

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


@pytest.mark.parametrize("auto", [Auto(), Auto(("hfmg", "minmax", "ifmr"))], ids=["default", "named"])
def test_explanation_is_the_expected_error_of_every_candidates_own_range(
    observe: Observe, samples: dict[str, Array], auto: Auto
) -> None:
    stats, spec = observe(samples["t3"]), QuantSpec(FORMATS["uint4"])
    for name, error in auto.explain(stats, spec).items():
        own = make("calibrators", name, {}).choose(stats, spec)
        assert error == pytest.approx(expected_error(stats.bins, own.lo, own.hi, spec)[0], rel=1e-12), name


def test_candidates_are_all_others_that_depend_on_no_order_and_are_not_mse_again(observe: Observe) -> None:
    errors = Auto().explain(observe([1, 2]), QuantSpec(FORMATS["uint8"]))
    assert list(errors)[:7] == ["minmax", "percentile", "entropy", "mse", "aciq_laplace", "aciq_gauss", "aciq"]
    assert not {"auto", "moving_average", "ifmr", "hfmg"} & errors.keys()


def test_candidates_can_be_named_in_a_recipe(observe: Observe, samples: dict[str, Array]) -> None:
    auto = make("calibrators", "auto", {"candidates": ["minmax", "ifmr", "hfmg"]})
    stats, spec = observe(samples["laplace"]), QuantSpec(FORMATS["uint4"])
    errors = auto.explain(stats, spec)
    assert list(errors) == ["minmax", "ifmr", "hfmg"]
    assert errors["hfmg"] == min(errors.values())
    assert str(auto.choose(stats, spec)) == str(make("calibrators", "hfmg", {}).choose(stats, spec))


@pytest.mark.parametrize(
    ("candidate", "message"),
    [
        ("moving_average", "'moving_average' cannot be a candidate, as it depends on the order of the data"),
        ("auto", "'auto' cannot be a candidate, as it is auto itself"),
        ("entropi", "unknown calibrator 'entropi'.*Did you mean 'entropy'"),
    ],
)
def test_a_name_that_cannot_be_a_candidate_is_refused(candidate: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Auto(("mse", candidate))

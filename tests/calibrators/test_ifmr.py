from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qdqtool.arithmetic.affine import expected_error
from qdqtool.calibrators.ifmr import Ifmr
from qdqtool.calibrators.minmax import MinMax
from qdqtool.errors import RecipeError
from qdqtool.spec import FORMATS, QuantSpec, Range
from qdqtool.statistics.tensor import TensorStatistics

Array = npt.NDArray[np.float32]
Observe = Callable[..., TensorStatistics]
Sqnr = Callable[[Array, Range, QuantSpec], float]
SPECS = [QuantSpec(FORMATS[f], symmetric=f.startswith("int")) for f in ("int8", "uint8", "int4", "uint4")]
ASYMMETRIC, SYMMETRIC = SPECS[1], SPECS[0]
ONLY_PERCENTILES = {"search_range_start": 1.0, "search_range_end": 1.0}


def test_factors_run_from_start_to_end() -> None:
    np.testing.assert_allclose(Ifmr().factors, np.linspace(0.7, 1.3, 61))
    np.testing.assert_allclose(
        Ifmr(search_range_start=0.5, search_range_end=0.92, search_step=0.2).factors, [0.5, 0.7, 0.9]
    )


def test_search_starts_from_the_percentiles(observe: Observe) -> None:
    x = np.random.default_rng(0).gumbel(size=100_000).astype(np.float32)
    chosen = Ifmr(0.999, 0.99, **ONLY_PERCENTILES).choose(observe(x), ASYMMETRIC)
    np.testing.assert_allclose([chosen.lo, chosen.hi], np.quantile(x.astype(np.float64), [0.01, 0.999]), rtol=1e-3)


def test_symmetric_search_starts_from_the_farther_percentile(observe: Observe) -> None:
    x = np.random.default_rng(0).gumbel(size=100_000).astype(np.float32)
    chosen = Ifmr(0.999, 0.99, **ONLY_PERCENTILES).choose(observe(-x), SYMMETRIC)
    assert chosen.lo == pytest.approx(np.quantile(-x, 0.01), rel=1e-3)
    assert chosen.hi == (-x).max() < -chosen.lo  # cut at what was seen


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", ["gauss", "relu", "t3", "gelu"])
def test_no_pair_of_factors_rebuilds_the_tensor_noticeably_better(
    observe: Observe, samples: dict[str, Array], name: str, spec: QuantSpec
) -> None:
    stats, ifmr = observe(samples[name]), Ifmr(0.999, 0.999, search_step=0.02)
    start = Ifmr(0.999, 0.999, **ONLY_PERCENTILES).choose(stats, spec)
    pairs = np.array(list(itertools.product(ifmr.factors, repeat=2)))
    if spec.symmetric:
        pairs = pairs[pairs[:, 0] == pairs[:, 1]]
    tried = expected_error(stats.bins, pairs[:, 0] * start.lo, pairs[:, 1] * start.hi, spec)
    chosen = ifmr.choose(stats, spec)
    assert expected_error(stats.bins, chosen.lo, chosen.hi, spec)[0] < 1.01 * tried.min()
    assert tried.max() > 1.1 * tried.min()  # the choice matters


def test_two_ends_are_cut_apart(observe: Observe) -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate([-rng.uniform(0, 3, 50_000), rng.exponential(size=50_000)]).astype(np.float32)
    chosen = Ifmr(search_range_start=0.3).choose(observe(x), QuantSpec(FORMATS["uint4"]))
    assert chosen.lo < -2.7
    assert chosen.hi < 0.6 * x.max()


def test_outliers_beyond_the_percentile_are_cut_off(observe: Observe, sqnr_db: Sqnr, samples: dict[str, Array]) -> None:
    x = np.append(samples["gauss"], np.float32(50))
    stats, spec = observe(x), QuantSpec(FORMATS["uint4"])
    body, minmax, ifmr = samples["gauss"], MinMax().choose(stats, spec), Ifmr(0.9999, 0.9999).choose(stats, spec)
    assert sqnr_db(body, ifmr, spec) > sqnr_db(body, minmax, spec) + 15


@pytest.mark.parametrize("spec", [ASYMMETRIC, SYMMETRIC], ids=str)
def test_factors_above_one_end_at_what_was_seen(observe: Observe, samples: dict[str, Array], spec: QuantSpec) -> None:
    x = samples["relu"]
    assert Ifmr(search_range_start=1.2).choose(observe(x), spec).hi == x.max()
    assert Ifmr(search_range_start=1.2).choose(observe(-x), spec).lo == -x.max()


@pytest.mark.parametrize("spec", [ASYMMETRIC, SYMMETRIC], ids=str)
def test_percentiles_of_nearly_nothing_but_zeros_do_not_make_the_range_empty(observe: Observe, spec: QuantSpec) -> None:
    x = np.zeros(1000, np.float32)
    x[:4] = 1, 2, 3, 4
    assert Ifmr(0.9, 0.9, **ONLY_PERCENTILES).choose(observe(x), spec).hi == 4
    assert Ifmr(0.9, 0.9, **ONLY_PERCENTILES).choose(observe(-x), spec).lo == -4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_percentile": 99.9999}, "max_percentile is 99.9999; give a share above 0.5 and at most 1"),
        ({"min_percentile": 0.5}, "min_percentile is 0.5"),
        ({"search_range_start": 0.0}, "from 0.0 to 1.3; give 0 < start <= end"),
        ({"search_range_start": 1.4}, "from 1.4 to 1.3"),
        ({"search_range_end": float("inf")}, "from 0.7 to inf"),
        ({"search_step": 0.0}, "search_step is 0.0; give one above 0"),
        ({"search_step": -0.1}, "search_step is -0.1"),
        ({"search_step": 1e-9}, "at most 1000 factors"),
        ({"search_step": float("nan")}, "search_step is nan"),
    ],
)
def test_options_outside_their_intervals_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Ifmr(**options)

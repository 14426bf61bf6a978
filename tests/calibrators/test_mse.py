from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest

from qdqtool.arithmetic.affine import expected_error, fake_quantize, params_from_range
from qdqtool.calibrators.minmax import MinMax
from qdqtool.calibrators.mse import Mse, _merged_far_below_top
from qdqtool.registry import make
from qdqtool.spec import FORMATS, QuantSpec, Range
from qdqtool.statistics.tensor import TensorStatistics

Array = npt.NDArray[np.float32]
Observe = Callable[..., TensorStatistics]
Sqnr = Callable[[Array, Range, QuantSpec], float]
SPECS = [QuantSpec(FORMATS[f], symmetric=f.startswith("int")) for f in ("int8", "uint8", "int4", "uint4", "uint2")]


def best_by_brute_force(x: Array, spec: QuantSpec, sqnr_db: Sqnr) -> float:
    """SQNR of the best clip, each tried on the real values: a coarse grid on some of them, a fine one on all; dB."""
    lo, hi = float(x.min()), float(x.max())

    def measured(values: Array, u: float, v: float) -> float:
        ends = (-v * max(-lo, hi), v * max(-lo, hi)) if spec.symmetric else (u * min(lo, 0), v * hi)
        return sqnr_db(values, Range(*map(np.array, ends)), spec)

    if spec.symmetric or lo >= 0:
        v = max(np.geomspace(0.02, 1, 160), key=lambda share: measured(x[::10], 1, share))
        return max(measured(x, 1, min(share, 1)) for share in v * np.geomspace(0.9, 1.1, 41))
    around = np.geomspace(0.78, 1.28, 10)
    coarse = itertools.product(np.geomspace(0.02, 1, 15), repeat=2)
    u, v = max(coarse, key=lambda point: measured(x[::10], *point))
    return max(measured(x, min(a, 1), min(b, 1)) for a, b in itertools.product(u * around, v * around))


@pytest.mark.parametrize("spec", SPECS, ids=str)
@pytest.mark.parametrize("name", ["gauss", "laplace", "relu", "t3", "gelu"])
def test_measured_error_is_that_of_the_best_clip(
    observe: Observe, sqnr_db: Sqnr, many_samples: dict[str, Array], name: str, spec: QuantSpec
) -> None:
    x = many_samples[name]
    stats = observe(x)
    found = sqnr_db(x, Mse().choose(stats, spec), spec)
    assert found >= sqnr_db(x, MinMax().choose(stats, spec), spec)
    assert found >= best_by_brute_force(x, spec, sqnr_db) - 0.1


def test_integers_in_their_own_format_keep_their_exact_range(observe: Observe, sqnr_db: Sqnr) -> None:
    x = np.random.default_rng(0).binomial(255, 0.2, 5000).astype(np.float32)
    x[:2] = 0, 255
    chosen = Mse().choose(observe(x), QuantSpec(FORMATS["uint8"]))
    assert [chosen.lo, chosen.hi] == [0, 255]


def test_outlier_that_weighs_more_than_all_else_is_kept(observe: Observe, samples: dict[str, Array]) -> None:
    x = np.append(samples["gauss"], np.float32(1000))
    assert Mse().choose(observe(x), QuantSpec(FORMATS["uint8"])).hi > 990


def test_two_ends_are_cut_apart(observe: Observe) -> None:
    rng = np.random.default_rng(1)
    x = np.concatenate([-rng.uniform(0, 3, 50_000), rng.exponential(size=50_000)]).astype(np.float32)
    chosen = Mse().choose(observe(x), QuantSpec(FORMATS["uint4"]))
    assert chosen.lo < -2.7
    assert chosen.hi < 0.6 * x.max()


@pytest.mark.parametrize("sign", [1, -1])
def test_merging_small_values_changes_no_error(observe: Observe, sign: int) -> None:
    rng = np.random.default_rng(2)
    x = np.append(rng.standard_t(3, 400_000) * np.exp(rng.standard_normal(400_000)), np.zeros(1000)) * sign
    bins = observe(x).bins
    merged = _merged_far_below_top(bins)
    assert merged.count.size < 0.8 * bins.count.size
    assert (merged.total, merged.zeros, merged.lo[0], merged.hi[-1]) == (x.size, 1000, bins.lo[0], bins.hi[-1])
    assert (merged.lo[1:] >= merged.hi[:-1]).all()
    for spec, share in itertools.product(SPECS, (1.0, 0.1, 0.01)):
        ends = share * bins.lo[0], share * bins.hi[-1], spec
        assert expected_error(merged, *ends) == pytest.approx(expected_error(bins, *ends), rel=1e-4)


@pytest.mark.parametrize("fmt", ["uint2", "uint4", "uint8", "uint16"])
@pytest.mark.parametrize("seed", range(20))
def test_never_worse_than_minmax_on_the_histogram(observe: Observe, seed: int, fmt: str) -> None:
    rng = np.random.default_rng(seed)
    drawn = rng.choice([rng.standard_normal(50), rng.standard_cauchy(50), rng.integers(-3, 9, 50)])
    x = drawn * 10.0 ** rng.integers(-20, 20)
    stats, spec = observe(x), QuantSpec(FORMATS[fmt])
    chosen = Mse().choose(stats, spec)
    mine, minmax = expected_error(stats.bins, np.array([chosen.lo, stats.lo]), np.array([chosen.hi, stats.hi]), spec)
    assert mine <= minmax


def test_pixels_scaled_to_minus_one_to_one_do_not_all_fall_between_two_codes(observe: Observe) -> None:
    x = (np.arange(256, dtype=np.float32) / 127.5 - 1).repeat(4)
    stats, spec = observe(x), QuantSpec(FORMATS["uint8"])
    chosen = params_from_range(Mse().choose(stats, spec), spec)
    minmax = params_from_range(Range(np.array(stats.lo), np.array(stats.hi)), spec)
    assert np.mean((fake_quantize(x, chosen) - x) ** 2) < 0.5 * np.mean((fake_quantize(x, minmax) - x) ** 2)


@pytest.mark.parametrize("name", ["mse", "auto"])
def test_the_range_serves_what_a_leaky_relu_puts_out(observe: Observe, samples: dict[str, Array], name: str) -> None:
    """Errors below 0 hardly count behind it: the range gives up least values for a finer step."""
    x = np.where(samples["laplace"] < 0, 4, 1) * samples["laplace"]
    spec, calibrator = QuantSpec(FORMATS["uint8"]), make("calibrators", name, {})

    def behind(spec: QuantSpec) -> float:
        chosen = calibrator.choose(observe(x), spec)
        got = fake_quantize(x, params_from_range(chosen, spec))
        return float(np.square(np.where(got < 0, 0.1, 1) * got - np.where(x < 0, 0.1, 1) * x).mean())

    assert behind(replace(spec, negative_weight=0.1**2)) < 0.8 * behind(spec)

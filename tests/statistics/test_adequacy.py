"""Whether calibration data suffice, on data whose answer is known."""

from __future__ import annotations

import functools
import hashlib
import operator
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qdqtool.data.batching import Sample
from qdqtool.statistics.adequacy import TOLERANCE, Adequacy, Outlier, SetEnds, assess
from qdqtool.statistics.extremes import SampleId
from qdqtool.statistics.tensor import Statistics, TensorStatistics

Array = npt.NDArray[Any]


def key(index: int, seed: int = 0) -> bytes:
    """The hash of sample ``index``: it has no relation to the position."""
    return hashlib.blake2b(f"{seed}:{index}".encode(), digest_size=15).digest() + b"\1"


def sample(index: int, seed: int = 0) -> SampleId:
    return SampleId.of(index, key(index, seed))


def in_hash_order(count: int, seed: int = 0) -> list[int]:
    return sorted(range(count), key=lambda index: key(index, seed))


def observed(
    tensors: Mapping[str, npt.ArrayLike], order: Iterable[int] | None = None, *, batch: int = 50, seed: int = 0
) -> Statistics:
    """Statistics of arrays (samples, values), seen in the given order of samples, some at a time."""
    found, count = {}, 0
    for name, given_values in tensors.items():
        values = np.asarray(given_values, np.float32)
        values = values.reshape(len(values), -1)
        found[name] = TensorStatistics()
        rows = list(range(len(values)) if order is None else order)
        for start in range(0, len(rows), batch):
            part = rows[start : start + batch]
            found[name].observe(values[part], [(key(row, seed), row) for row in part])
        count = len(rows)
    return Statistics(found, count)


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


DRAWS: dict[str, Callable[..., Array]] = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "laplace": lambda rng, shape: rng.laplace(size=shape),
    "lognormal": lambda rng, shape: rng.lognormal(size=shape),
    "relu": lambda rng, shape: np.maximum(rng.standard_normal(shape), 0),
}


class TestTheOrderOfSamplesDoesNotCount:
    tensors: Mapping[str, Array] = {"a": drawn(90, 20), "b": drawn(90, 1), "c": np.maximum(drawn(90, 5), 0)}

    def test_shuffled(self) -> None:
        whole = assess(observed(self.tensors))
        for seed in range(3):
            order = np.random.default_rng(seed).permutation(90).tolist()
            assert assess(observed(self.tensors, order, batch=64)) == whole

    def test_merged_of_parts(self) -> None:
        parts = [observed(self.tensors, range(*ends)) for ends in ((50, 90), (0, 13), (13, 50))]
        assert assess(functools.reduce(operator.or_, parts)) == assess(observed(self.tensors))


class TestConvergence:
    @given(hnp.arrays(np.float32, (20, 2), elements=st.integers(-5, 5)), st.integers(0, 3))
    @settings(max_examples=200, deadline=None)
    def test_stable_after_is_where_the_running_range_stays_within_the_tolerance(self, values: Array, seed: int) -> None:
        ordered = values[in_hash_order(20, seed)].astype(np.float64)
        lo = np.minimum(np.minimum.accumulate(ordered.min(axis=1)), 0)
        hi = np.maximum(np.maximum.accumulate(ordered.max(axis=1)), 0)
        tolerance = TOLERANCE * (hi[-1] - lo[-1])
        away = [i for i in range(20) if lo[i] > lo[-1] + tolerance or hi[i] < hi[-1] - tolerance]
        found = assess(observed({"x": values}, seed=seed))
        assert found.tensors["x"].stable_after == max(away, default=-1) + 2
        assert found.stable_after == found.last_stable_after == found.tensors["x"].stable_after

    @pytest.mark.parametrize(("late", "after"), [(0, 5), (4, 5), (5, 50)])
    def test_most_tensors_and_the_last_one_are_told_apart(self, late: int, after: int) -> None:
        ordered = in_hash_order(50)
        greatest = [ordered[-1 if i < late else 4] for i in range(40)]
        found = assess(observed({f"t{i}": np.where(np.arange(50) == g, 5.0, 1.0) for i, g in enumerate(greatest)}))
        assert (found.stable_after, found.last_stable_after) == (after, 50 if late else 5)

    @pytest.mark.parametrize(("alone", "settled"), [(0, True), (7, True), (9, False)])
    def test_settled_allows_one_range_in_ten_to_grow(self, alone: int, settled: bool) -> None:
        steady, lone = np.ones(50), np.where(np.arange(50) == 30, 5.0, 1.0)
        found = assess(observed({f"t{i}": lone if i < alone else steady for i in range(40)}))
        assert found.growing == pytest.approx(alone / 2)
        assert found.settled is settled

    def test_a_range_includes_zero(self) -> None:
        found = assess(observed({"x": 100 + np.linspace(0, 1, 40)})).tensors["x"]
        assert (found.stable_after, found.growth_chance < 1e-6) == (1, True)
        assert found.sole_share < 0.001

    def test_bounded_values_settle_and_a_power_law_never_does(self) -> None:
        rng = np.random.default_rng(0)
        bounded = assess(observed({f"t{i}": rng.uniform(-1, 1, (500, 20)) for i in range(20)}))
        assert bounded.settled
        assert bounded.stable_after < 50
        heavy = assess(observed({f"t{i}": rng.standard_cauchy((500, 20)) for i in range(20)}))
        assert not heavy.settled
        assert heavy.growing > 10
        assert heavy.last_stable_after > 250

    @pytest.mark.parametrize("draw", ["normal", "laplace", "lognormal"])
    def test_growth_foretold_is_what_as_many_samples_again_bring(self, draw: str) -> None:
        values = DRAWS[draw](np.random.default_rng(0), (400, 128, 4)).astype(np.float32)
        foretold = assess(observed({str(i): tensor[:64] for i, tensor in enumerate(values)})).growing
        lo, hi = (np.minimum(values.min(axis=2), 0), np.maximum(values.max(axis=2), 0))
        tolerance = TOLERANCE * (hi.max(1) - lo.min(1))
        grew_lo = lo[:, :64].min(1) - lo.min(1) > tolerance
        grew = int((grew_lo | (hi.max(1) - hi[:, :64].max(1) > tolerance)).sum())
        assert 0.9 * grew < foretold < 1.4 * grew  # too many where tails are light and growth slows down

    def test_one_sample_s_share_of_a_range(self) -> None:
        values = np.ones(20)
        values[7], values[9] = 10, -2
        found = assess(observed({"x": values})).tensors["x"]
        assert found.sole_share == pytest.approx(9 / 12)
        assert found.growth_chance == pytest.approx(0.75)

    def test_one_sample_that_sets_both_ends_is_missed_once(self) -> None:
        values = np.ones((20, 2))
        values[7] = -10, 10
        assert assess(observed({"x": values})).tensors["x"].growth_chance == pytest.approx(0.5)

    def test_repeats_are_no_samples_of_their_own(self) -> None:
        values = np.repeat(np.arange(1, 11.0), 6)
        rows = [(key(index // 6), index) for index in range(60)]
        stats = TensorStatistics()
        stats.observe(values[:, None], rows)
        found = assess(Statistics({"x": stats}, 60))
        assert (found.samples, found.repeats, found.distinct) == (60, 50, 10)
        assert found.tensors["x"].stable_after <= 10
        assert found.tensors["x"].hi_sample == SampleId.of(54, key(9))


class TestWhoSetsARange:
    def test_the_samples_of_both_ends(self) -> None:
        values = drawn(40, 6)
        values[11, 3], values[25, 0] = -9, 8
        found = assess(observed({"x": values})).tensors["x"]
        assert (found.lo_sample, found.hi_sample) == (sample(11), sample(25))
        assert str(sample(11)) == f"sample 11 ({key(11).hex()[:6]}…)"

    def test_an_end_that_several_samples_reach_is_set_by_none(self) -> None:
        found = assess(observed({"x": np.maximum(drawn(40, 6), 0)})).tensors["x"]
        assert found.lo_sample is None
        assert found.hi_sample is not None

    def test_samples_that_set_most_ends(self) -> None:
        tensors = {f"t{i}": drawn(40, 6, seed=i) for i in range(10)}
        for i, values in enumerate(tensors.values()):
            values[30, 0] = 20
            values[5 if i < 4 else 6 + i, 1] = -20
        setters = assess(observed(tensors)).setters
        assert setters[:2] == (SetEnds(sample(30), 10), SetEnds(sample(5), 4))
        assert [setter.ends for setter in setters[2:]] == [1, 1, 1]


class TestOutliers:
    @pytest.mark.parametrize("draw", DRAWS)
    @pytest.mark.parametrize("width", [1, 50])
    @pytest.mark.parametrize("count", [10, 100, 3000])
    def test_well_behaved_samples_are_none(self, draw: str, width: int, count: int) -> None:
        for seed in range(3):
            rng = np.random.default_rng([seed, count])
            assert assess(observed({name: DRAWS[draw](rng, (count, width)) for name in "abc"})).outliers == ()

    @pytest.mark.parametrize("draw", ["normal", "laplace", "relu"])
    @pytest.mark.parametrize("count", [10, 100, 3000])
    def test_a_sample_twenty_times_too_large_is_named(self, draw: str, count: int) -> None:
        rng = np.random.default_rng(count)
        tensors = {name: DRAWS[draw](rng, (count, 1000)) for name in "abcd"}
        for name in "abc":
            tensors[name][7] *= 20
        (found,) = assess(observed(tensors)).outliers
        assert (found.sample, found.tensors) == (sample(7), 3)
        assert 10 < found.ratio < 40

    def test_a_heavy_tail_excuses_what_a_light_one_does_not(self) -> None:
        light, heavy = drawn(500, 100), np.random.default_rng(0).standard_t(1.5, (500, 100))
        light[7], heavy[7] = (
            8 * values[7] / np.abs(values[7]).max() * np.median(np.abs(values).max(1)) for values in (light, heavy)
        )
        (found,) = assess(observed({"light": light, "heavy": heavy})).outliers
        assert found == Outlier(sample(7), 1, found.ratio)
        assert found.ratio == pytest.approx(8, rel=0.05)

    def test_several_come_with_the_worst_first(self) -> None:
        tensors = {name: drawn(200, 500, seed=ord(name)) for name in "abc"}
        for name, values in tensors.items():
            values[20] *= 100
            values[30] *= 1000 if name == "a" else 1
            values[40] *= 30
        assert [found.sample for found in assess(observed(tensors)).outliers] == [sample(20), sample(40), sample(30)]

    def test_one_in_ten_scaled_wrongly_are_all_found(self) -> None:
        values = drawn(100, 500)
        values[::10] *= 255
        assert {o.sample.position for o in assess(observed({"x": values})).outliers} == set(range(0, 100, 10))

    def test_where_most_samples_reach_the_same_value(self) -> None:
        values = np.ones((100, 3))
        values[3], values[4] = 3.9, 4.5
        assert assess(observed({"x": values})).outliers == (Outlier(sample(4), 1, 4.5),)

    def test_a_tensor_that_is_mostly_zero_names_none(self) -> None:
        values = np.zeros((100, 3))
        values[:50] = np.geomspace(1, 1e6, 50)[:, None]
        assert assess(observed({"x": values})).outliers == ()

    def test_small_samples_are_none(self) -> None:
        values = drawn(100, 500)
        values[3], values[4] = values[3] / 1e6, 0
        assert assess(observed({"x": values})).outliers == ()

    def test_too_few_samples_show_nothing_usual(self) -> None:
        values = np.ones((7, 3))
        values[3] = 1000
        assert assess(observed({"x": values})).outliers == ()


class TestTensorsOfOneValueOrNone:
    def test_zero_constant_and_varied(self) -> None:
        found = assess(observed({"zero": np.zeros((20, 3)), "one": np.ones((20, 3)), "x": drawn(20, 3)}))
        assert {n: t.content for n, t in found.tensors.items()} == {"zero": "zero", "one": "constant", "x": "varied"}
        assert found.tensors["zero"].sole_share == found.tensors["one"].sole_share == 0
        assert found.tensors["one"].growth_chance < 1e-5

    def test_values_that_are_not_finite_are_counted_and_located(self) -> None:
        values = drawn(20, 3)
        values[9, 1], values[4, 2], values[4, 0] = np.nan, np.inf, -np.inf
        found = assess(observed({"x": values}, reversed(range(20)))).tensors["x"]
        assert (found.content, found.nan, found.inf, found.first_non_finite) == ("varied", 1, 2, sample(4))

    def test_nothing_finite(self) -> None:
        found = assess(observed({"x": np.full((20, 3), np.nan), "y": drawn(20, 3), "z": np.empty((20, 0))}))
        assert {n: t.content for n, t in found.tensors.items()} == {"x": "nothing", "y": "varied", "z": "nothing"}
        assert found.stable_after == found.tensors["y"].stable_after

    def test_a_sample_without_finite_values_is_passed_over(self) -> None:
        values = drawn(30, 50)
        bare = assess(observed({"x": values})).tensors["x"]
        values[next(i for i in range(30) if sample(i) not in (bare.lo_sample, bare.hi_sample))] = np.nan
        found = assess(observed({"x": values})).tensors["x"]
        assert (found.stable_after, found.lo_sample) == (bare.stable_after, bare.lo_sample)

    def test_a_tensor_that_only_some_samples_reach(self) -> None:
        whole, part = observed({"x": drawn(40, 3)}), observed({"y": drawn(40, 3)}, range(20, 40))
        found = assess(Statistics({**whole.tensors, **part.tensors}, 40))
        alone = assess(part).tensors["y"]
        assert found.distinct == 40
        assert found.tensors["x"] == assess(whole).tensors["x"]
        assert (found.tensors["y"].lo_sample, found.tensors["y"].hi_sample) == (alone.lo_sample, alone.hi_sample)
        assert found.tensors["y"].stable_after > alone.stable_after

    def test_tensors_that_saw_equally_many_but_other_samples(self) -> None:
        one, other = observed({"x": drawn(40, 3)}, range(20)), observed({"y": drawn(40, 3)}, range(20, 40))
        found = assess(Statistics({**one.tensors, **other.tensors}, 40))
        for name, part in (("x", one), ("y", other)):
            assert found.tensors[name].hi_sample == assess(part).tensors[name].hi_sample
        assert found.tensors["x"].hi_sample != found.tensors["y"].hi_sample

    def test_nothing_observed(self) -> None:
        assert assess(Statistics({}, 12)) == Adequacy(samples=12)
        assert assess(Statistics({"x": TensorStatistics()}, 0)).tensors["x"].content == "nothing"


def test_inputs_that_look_random_are_named() -> None:
    rng = np.random.default_rng(0)
    held = [Sample({"x": rng.random((1, 50), np.float32)}, key(i), i) for i in range(40)]
    assert assess(Statistics({}, 40), held).random_inputs == {"x": "uniform"}


def test_many_tensors_and_samples_are_judged_in_a_moment() -> None:
    one = observed({"x": drawn(10_000, 1)}, batch=10_000)["x"]
    start = time.perf_counter()
    found = assess(Statistics({f"t{i}": one for i in range(300)}, 10_000))
    assert time.perf_counter() - start < 3  # a tenth of it on an idle machine; quadratic work would take minutes
    assert len(found.tensors) == 300

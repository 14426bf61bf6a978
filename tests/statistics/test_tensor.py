from __future__ import annotations

import functools
import operator

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qdqtool.errors import StatisticsError
from qdqtool.statistics.tensor import Statistics, TensorStatistics

Array = npt.NDArray[np.float32]
LEAST = 2.0**-136
MAX = float(np.finfo(np.float32).max)
anything = st.floats(width=32, allow_nan=True, allow_infinity=True)
finite = st.one_of(
    st.floats(width=32, allow_nan=False, allow_infinity=False),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, 1e-41, LEAST, 1.0, -1.0, 1.0009765625, MAX, -MAX]),
)
batches = hnp.arrays(np.float32, st.tuples(st.integers(1, 8), st.integers(1, 6)), elements=anything)


def sample_id(row: int, x: Array) -> bytes:
    content: bytes = x[row].tobytes()
    return b"%03d" % row + content[:8].replace(b"\0", b"0")


def seen(x: Array, rows: list[int]) -> TensorStatistics:
    stats = TensorStatistics()
    if rows:
        stats.observe(x[rows], [(sample_id(r, x), r) for r in rows])
    return stats


def flat(x: npt.ArrayLike) -> TensorStatistics:
    stats = TensorStatistics()
    stats.observe(np.asarray(x), [(b"x", 0)])
    return stats


def merged_as_a_tree(parts: list[TensorStatistics], data: st.DataObject) -> TensorStatistics:
    while len(parts) > 1:
        i = data.draw(st.integers(0, len(parts) - 2))
        parts[i : i + 2] = [parts[i] | parts[i + 1]]
    return parts[0]


@given(x=batches, data=st.data())
@settings(deadline=None)
def test_any_partition_order_and_merge_tree_give_the_same_statistics(x: Array, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(len(x))))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(x) - 1, 1)))))
    groups = [list(g) for g in np.split(np.array(order), cuts)]
    merged = merged_as_a_tree([seen(x, [int(i) for i in g]) for g in groups], data)
    whole = seen(x, list(range(len(x))))
    assert merged == whole
    assert (merged.lo, merged.hi, merged.count, merged.nan, merged.inf) == (
        whole.lo,
        whole.hi,
        whole.count,
        whole.nan,
        whole.inf,
    )
    for name in ("lo", "hi", "count"):
        assert getattr(merged.bins, name).tobytes() == getattr(whole.bins, name).tobytes()


@given(x=hnp.arrays(np.float32, st.integers(1, 80), elements=finite))
@settings(deadline=None)
def test_bins_hold_exactly_the_values_between_their_edges(x: Array) -> None:
    bins = flat(x).bins
    values = np.sort(x.astype(np.float64))
    values[np.abs(values) < LEAST] = 0
    assert bins.total == x.size
    assert bins.zeros == (values == 0).sum()
    assert (bins.lo <= bins.hi).all()
    assert (bins.hi[:-1] <= bins.lo[1:]).all()
    for lo, hi, count in zip(bins.lo, bins.hi, bins.count, strict=True):
        far = lo if lo < 0 else hi  # a bin's edge away from 0 belongs to the next bin, unless there is none
        owned = lo == hi or far in {-MAX, MAX} or not ((bins.lo if far > 0 else bins.hi) == far).any()
        assert count == ((values >= lo) & (values <= hi) & ((values != far) | owned)).sum()


@given(x=hnp.arrays(np.float32, st.integers(1, 80), elements=finite))
@settings(deadline=None)
def test_extremes_are_exact(x: Array) -> None:
    stats = flat(x)
    assert (stats.lo, stats.hi) == (x.min(), x.max())
    assert not np.signbit(stats.lo) or stats.lo < 0


@pytest.mark.parametrize("scale", [1e-40, 1e-38, 1e-10, 1.0, 1e10, 3e37])
def test_counts_agree_with_numpy(scale: float) -> None:
    x = (np.random.default_rng(0).standard_t(2, 30_000).clip(-10, 10) * scale).astype(np.float32)
    x[:100] = 0
    bins = flat(x).bins
    edges = np.append(bins.lo[bins.hi > 0], bins.hi[-1])
    positive = x[x >= LEAST].astype(np.float64)
    counted, _ = np.histogram(positive, edges)
    assert np.array_equal(counted, bins.count[bins.hi > 0])
    assert bins.zeros == (np.abs(x) < LEAST).sum()


def test_bins_are_at_most_a_thousandth_of_their_value_wide() -> None:
    bins = flat(np.random.default_rng(0).standard_normal(10_000)).bins
    assert ((bins.hi - bins.lo) <= 2.0**-10 * np.maximum(abs(bins.lo), abs(bins.hi))).all()


def test_values_near_the_greatest_float32_are_counted() -> None:
    bins = flat(np.array([MAX, -MAX, MAX * 0.999, 1.0], np.float32)).bins
    assert bins.total == 4
    assert (bins.lo[0], bins.hi[-1]) == (-MAX, MAX)


def test_values_far_below_the_greatest_are_counted_in_their_own_bins() -> None:
    bins = flat(np.array([1e30, 1.0, -1e-30, 1e-40, 0], np.float32)).bins
    assert bins.count.tolist() == [1, 1, 1, 1, 1]
    np.testing.assert_allclose(bins.center, [-1e-30, 0, 1e-40, 1, 1e30], rtol=0.03)  # wide where subnormal


def test_subnormals_too_small_for_a_bin_count_as_zeros_but_show_in_the_extremes() -> None:
    stats = flat(np.array([1e-45, 3e-45], np.float32))
    assert stats.bins.zeros == 2
    assert stats.lo > 0
    assert (stats.bins.lo <= stats.bins.hi).all()


def test_negative_zero_is_zero() -> None:
    stats = flat(np.array([-0.0, -0.0], np.float32))
    assert stats == flat(np.zeros(2, np.float32))
    assert stats.bins.zeros == 2


def test_non_finite_values_are_facts_and_not_counted() -> None:
    stats = TensorStatistics()
    x = np.array([[1, 2], [np.nan, 5], [np.inf, -np.inf]], np.float32)
    stats.observe(x, [(b"a", 7), (b"b", 4), (b"c", 3)])
    assert (stats.nan, stats.inf, stats.count) == (1, 2, 3)
    assert stats.first_non_finite == (3, b"c")
    assert (stats.lo, stats.hi) == (1, 5)
    assert stats.records["position"].tolist() == [3, 4, 7]
    np.testing.assert_array_equal(stats.records["lo"], [np.nan, 5, 1])


def test_nothing_finite_leaves_an_empty_range() -> None:
    stats = flat(np.full(3, np.nan, np.float32))
    assert (stats.lo, stats.hi, stats.count, stats.nan) == (0, 0, 0, 3)


@pytest.mark.parametrize("shape", [(0,), (2, 0, 3)])
def test_zero_size_arrays_leave_nothing_but_a_record_of_their_samples(shape: tuple[int, ...]) -> None:
    stats = TensorStatistics()
    stats.observe(np.zeros(shape, np.float32), [(b"a", 0), (b"b", 1)])
    assert np.isnan(stats.records["lo"]).all()
    assert (len(stats.records), stats.lo, stats.hi, stats.count, stats.nan) == (2, 0, 0, 0, 0)
    assert stats.bins.total == 0
    assert stats.bins.prefix.shape == (3, 1)


def test_float16_and_float64_are_counted_as_the_same_float32() -> None:
    x = np.array([0.1, -65504, 6e-8, 0], np.float16)
    assert flat(x) == flat(x.astype(np.float32)) == flat(x.astype(np.float64))


def test_float64_beyond_float32_is_reported_as_infinite() -> None:
    stats = flat(np.array([1e300, 1.0]))
    assert (stats.inf, stats.hi) == (1, 1)


def test_rows_of_different_length_merge() -> None:
    parts = [flat(np.arange(n, dtype=np.float32)) for n in (1, 5, 2)]
    assert functools.reduce(operator.or_, parts).count == 8


@given(x=hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(-1e3, 1e3, width=32)))
@settings(deadline=None)
def test_prefix_sums_are_the_moments_from_zero_outwards(x: Array) -> None:
    bins = flat(x).bins
    values = np.where(np.abs(x) < LEAST, 0, x).astype(np.float64)
    nonzero = values[values != 0]
    assert bins.prefix[0, -1] - bins.prefix[0, 0] == nonzero.size
    second = bins.prefix[2, -1] - bins.prefix[2, 0]
    assert second == pytest.approx((nonzero**2).sum(), rel=3e-3, abs=1e-70)


def test_tensors_of_a_model_merge_by_name() -> None:
    first, second = Statistics({"a": flat([1.0])}, 1), Statistics({"a": flat([2.0]), "b": flat([3.0])}, 2)
    merged = first | second
    assert (merged.samples, merged["a"].count, merged["b"].count) == (3, 2, 1)
    with pytest.raises(StatisticsError, match="'c' was not observed"):
        merged["c"]

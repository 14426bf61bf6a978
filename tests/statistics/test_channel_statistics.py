from __future__ import annotations

import io
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qdqtool.errors import StatisticsError
from qdqtool.statistics import channel_statistics
from qdqtool.statistics.channel_statistics import ChannelStatistics

Array = npt.NDArray[np.float32]
PROPERTIES = (
    *("count", "positive", "lo", "hi", "mean", "second_moment", "mean_abs", "variance", "b"),
    *("mean_positive", "rms_positive"),
)
MAX = float(np.finfo(np.float32).max)
values = st.one_of(
    st.floats(width=32),
    st.floats(-4, 4, width=32),
    st.sampled_from([0.0, -0.0, 1e-45, -1e-45, MAX, -MAX, 1.0, -1.0, float("nan"), float("inf"), float("-inf")]),
)
LAYOUTS = [
    (1, (3, 4)),
    (1, (1, 9)),
    (1, (5,)),
    (2, (7, 3)),
    (-1, (5, 2)),
    (-1, (3, 2, 2)),
    (2, (2, 3, 2)),
    (-3, (2, 3, 1)),
]


def seen(x: npt.NDArray[Any], axis: int, batches: Iterable[list[int]]) -> ChannelStatistics:
    stats = ChannelStatistics(axis)
    for rows in batches:
        stats.observe(x[rows], len(rows))
    return stats


def whole(x: npt.ArrayLike, axis: int = 1) -> ChannelStatistics:
    array = np.asarray(x)
    return seen(array, axis, [list(range(len(array)))])


def channel(x: npt.ArrayLike) -> ChannelStatistics:
    """One sample of one channel with these values."""
    return whole(np.reshape(x, (1, 1, -1)))


def assert_identical(first: ChannelStatistics, second: ChannelStatistics) -> None:
    assert first == second
    ours, theirs = first.arrays(), second.arrays()
    assert ours.keys() == theirs.keys()
    for name, array in ours.items():
        assert array.tobytes() == theirs[name].tobytes(), name
    for name in PROPERTIES:
        assert getattr(first, name).tobytes() == getattr(second, name).tobytes(), name


@given(layout=st.sampled_from(LAYOUTS), data=st.data())
@settings(deadline=None)
def test_any_batches_order_and_merge_tree_give_the_same_statistics(
    layout: tuple[int, tuple[int, ...]], data: st.DataObject
) -> None:
    axis, shape = layout
    x = data.draw(hnp.arrays(np.float32, (data.draw(st.integers(1, 7)), *shape), elements=values))
    order = np.array(data.draw(st.permutations(range(len(x)))))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(x) - 1, 1)))))
    parts = [seen(x, axis, [part.tolist()]) for part in np.split(order, cuts)]
    while len(parts) > 1:
        i = data.draw(st.integers(0, len(parts) - 2))
        parts[i : i + 2] = [parts[i] | parts[i + 1]]
    assert_identical(parts[0], whole(x, axis))
    assert_identical(parts[0], seen(x, axis, [[int(row)] for row in order]))


@pytest.mark.parametrize(
    ("axis", "shape"),
    [
        *[(1, (64, channels, inner)) for channels in (1, 3, 64) for inner in (1, 2, 7, 8, 9, 49, 129, 1000)],
        *[(-1, (64, positions, channels)) for channels in (1, 5, 17, 192) for positions in (1, 2, 9, 197)],
        *[(1, (64, 1)), (1, (64, 300)), (1, (9, 2, 130, 130)), (1, (3, 2, 300, 300)), (-1, (3, 9, 700, 20))],
        *[(2, (16, 5, 6, 7)), (1, (5, 9000, 9)), (-2, (16, 33, 4, 1))],
    ],
)
def test_a_sample_counts_the_same_alone_and_in_any_batch(axis: int, shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(0)
    x = (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)
    together = whole(x, axis)
    rows = range(len(x))
    assert_identical(together, seen(x, axis, [[row] for row in reversed(rows)]))
    assert_identical(together, seen(x, axis, [list(rows[:2]), list(rows[2:])]))


@pytest.mark.parametrize("chunk", [1, 50, 700, 1 << 30])
@pytest.mark.parametrize("axis", [1, 2, 3])
def test_the_parts_a_batch_is_looked_at_in_do_not_matter(
    axis: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = np.random.default_rng(0).standard_normal((6, 5, 40, 3)).astype(np.float32)
    x[2, 1, 3, 1], x[:, :, :, 0] = np.nan, np.abs(x[:, :, :, 0])
    expected = whole(x, axis)
    monkeypatch.setattr(channel_statistics, "_CHUNK", chunk)
    assert_identical(whole(x, axis), expected)


@pytest.mark.parametrize(("axis", "shape"), [(1, (9, 4, 13, 11)), (-1, (9, 30, 4)), (2, (9, 5, 4, 6))])
@pytest.mark.parametrize("shift", [0.0, 3.0, -0.4])
def test_moments_are_those_of_the_values(axis: int, shape: tuple[int, ...], shift: float) -> None:
    x = (np.random.default_rng(0).standard_normal(shape) + shift).astype(np.float32)
    stats = whole(x, axis)
    by_channel = np.moveaxis(x, axis, 0).reshape(4, -1).astype(np.float64)
    assert stats.channels == 4
    assert stats.count.tolist() == [by_channel.shape[1]] * 4
    assert stats.positive.tolist() == (by_channel > 0).sum(axis=1).tolist()
    assert stats.lo.tolist() == by_channel.min(axis=1).tolist()
    assert stats.hi.tolist() == by_channel.max(axis=1).tolist()
    for found, expected in (
        (stats.mean, by_channel.mean(axis=1)),
        (stats.second_moment, (by_channel**2).mean(axis=1)),
        (stats.mean_abs, np.abs(by_channel).mean(axis=1)),
        (stats.variance, by_channel.var(axis=1)),
        (stats.mean_positive, [v[v > 0].mean() for v in by_channel]),
    ):
        np.testing.assert_allclose(found, expected, rtol=1e-12)
    np.testing.assert_allclose(stats.rms_positive, [np.sqrt((v[v > 0] ** 2).mean()) for v in by_channel], rtol=0.01)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("shift", [0.0, 0.01, 0.5, 2.0, 30.0])
@pytest.mark.parametrize("kind", ["laplace", "normal", "exponential", "uniform"])
def test_b_is_the_mean_deviation(kind: str, shift: float, sign: int) -> None:
    x = (sign * (getattr(np.random.default_rng(0), kind)(size=20_000) + shift)).astype(np.float32)
    exact = np.abs(x.astype(np.float64) - x.mean(dtype=np.float64)).mean()
    assert channel(x).b[0] == pytest.approx(exact, rel=5e-3 if shift < 30 else 0.3)  # bins are 1 or 2 wide near 30


def test_b_is_exact_where_no_value_lies_between_zero_and_the_mean() -> None:
    assert channel([-3, -1.5, 1, 3.5]).b.tolist() == [2.25]
    x = np.array([-3.0, -1.0, 2.0, 7.0, 0.0])
    assert channel(x).mean.tolist() == [1]
    assert channel(x).b[0] == pytest.approx(np.abs(x - 1).mean(), rel=1e-15)


@given(x=hnp.arrays(np.float32, st.integers(1, 30), elements=st.floats(-(2.0**60), 2.0**60, width=32)))
@settings(deadline=None)
def test_moments_keep_their_order(x: Array) -> None:
    stats = channel(x)
    assert stats.lo[0] <= stats.mean[0] <= stats.hi[0]
    assert 0 <= stats.b[0] <= np.sqrt(stats.variance[0]) <= (stats.hi[0] - stats.lo[0]) / 2 * (1 + 1e-9)
    assert abs(stats.mean[0]) <= stats.mean_abs[0] * (1 + 1e-15)


@pytest.mark.parametrize("value", [0.1, -7.3, 1e-40, 3e38, 0.0])
def test_a_constant_channel_has_no_spread(value: float) -> None:
    stats = channel(np.full(77, value, np.float32))
    assert (stats.variance[0], stats.b[0]) == (0, 0)
    assert stats.mean.tolist() == stats.lo.tolist() == stats.hi.tolist() == [np.float32(value)]


def test_a_rectified_tensor_tells_the_scales_of_the_tensor_before_it() -> None:
    rng = np.random.default_rng(0)
    x = np.stack([rng.laplace(0, 2, (8, 40_000)), rng.normal(0, 3, (8, 40_000))], axis=1)
    stats = whole(np.maximum(x, 0).astype(np.float32))
    assert stats.mean_positive[0] == pytest.approx(2, rel=0.01)
    assert stats.rms_positive[1] == pytest.approx(3, rel=0.01)
    y = np.maximum(x, 0).astype(np.float32).astype(np.float64)
    positive = (y > 0).sum(axis=(0, 2))
    np.testing.assert_allclose(stats.mean_positive, y.sum(axis=(0, 2)) / positive, rtol=1e-13)
    np.testing.assert_allclose(stats.rms_positive, np.sqrt((y**2).sum(axis=(0, 2)) / positive), rtol=1e-13)


def test_channels_without_positive_values_give_zero() -> None:
    stats = whole([[[-1.0, -2.0], [0.0, -0.0]]])
    assert stats.positive.tolist() == [0, 0]
    assert stats.mean_positive.tolist() == stats.rms_positive.tolist() == [0, 0]
    assert stats.hi.tolist() == [-1, 0]
    assert not np.signbit(stats.hi[1])


def test_values_that_are_not_finite_are_left_out() -> None:
    x = np.array([[[1, np.nan, 3], [np.inf, -np.inf, np.nan]], [[-5, np.inf, 1], [2, -4, np.nan]]], np.float32)
    stats = whole(x)
    assert stats.count.tolist() == [4, 2]
    assert stats.positive.tolist() == [3, 1]
    assert (stats.lo.tolist(), stats.hi.tolist()) == ([-5, -4], [3, 2])
    assert stats.mean.tolist() == [0, -1]
    assert stats.second_moment.tolist() == [9, 10]
    assert stats.mean_abs.tolist() == [2.5, 3]


def test_a_channel_of_nothing_finite_gives_zeros() -> None:
    stats = whole(np.array([[[np.nan, np.inf], [2.0, 4.0]]], np.float32))
    assert stats.count.tolist() == [0, 2]
    assert all(getattr(stats, name)[0] == 0 for name in PROPERTIES)
    assert stats.mean.tolist() == [0, 3]


def test_nothing_seen_is_no_channels() -> None:
    stats = ChannelStatistics(1)
    stats.observe(np.zeros((2, 0, 3), np.float32), 2)
    assert stats.channels == 0
    assert all(getattr(stats, name).shape == (0,) for name in PROPERTIES)
    some = whole([[1.0, 2.0]])
    assert_identical(stats | some, some)
    assert_identical(some | stats, some)


def test_the_least_and_the_greatest_float32_count() -> None:
    stats = channel(np.array([MAX, -MAX, 1e-45, -1e-45, -0.0], np.float32))
    assert (stats.positive[0], stats.lo[0], stats.hi[0]) == (2, -MAX, MAX)
    assert stats.mean_abs[0] == pytest.approx(MAX * 0.4, rel=1e-15)
    assert channel(np.array([1e-45], np.float32)).mean_positive[0] == np.float32(1e-45)


def test_float16_and_float64_count_as_the_same_float32() -> None:
    x = np.array([[[0.1, -65504, 6e-8, 0]]], np.float16)
    assert whole(x) == whole(x.astype(np.float32)) == whole(x.astype(np.float64))
    assert whole([[[1e300, 1.0]]]).count.tolist() == [1]


def test_a_fixed_feed_is_one_sample_whatever_its_leading_extent() -> None:
    x = np.random.default_rng(0).standard_normal((6, 4, 5)).astype(np.float32)
    stats = ChannelStatistics(1)
    stats.observe(x, 1)
    np.testing.assert_allclose(stats.mean, x.mean(axis=(0, 2), dtype=np.float64), rtol=1e-12)
    assert stats.arrays()["addends"] == 1
    vector = ChannelStatistics(0)
    vector.observe(np.array([1.0, 2.0]), 1)
    assert vector.mean.tolist() == [1, 2]


def test_samples_may_take_several_rows_of_the_first_axis() -> None:
    x = np.random.default_rng(0).standard_normal((3, 8, 4, 5)).astype(np.float32)
    joined, apart = ChannelStatistics(1), ChannelStatistics(1)
    joined.observe(x.reshape(24, 4, 5), 3)
    for sample in x:
        apart.observe(sample, 1)
    assert_identical(joined, apart)


def test_arrays_that_are_not_contiguous_count_as_their_copies() -> None:
    x = np.random.default_rng(0).standard_normal((4, 6, 5)).astype(np.float32)
    assert_identical(whole(x.transpose(0, 2, 1)), whole(np.ascontiguousarray(x.transpose(0, 2, 1))))


def test_another_number_of_channels_is_refused_and_leaves_no_trace() -> None:
    stats = whole(np.ones((1, 3, 2)))
    with pytest.raises(StatisticsError, match=r"axis 1 has 4 channels, and had 3 .* per tensor"):
        stats.observe(np.ones((1, 4, 2)), 1)
    assert_identical(stats, whole(np.ones((1, 3, 2))))


@pytest.mark.parametrize(("axis", "shape", "text"), [(2, (4, 3), "no axis 2"), (0, (4, 3), "axis 0 .* its 4 samples")])
def test_an_axis_that_holds_no_channels_is_refused(axis: int, shape: tuple[int, ...], text: str) -> None:
    with pytest.raises(StatisticsError, match=text):
        whole(np.ones(shape), axis)


def test_statistics_of_other_channels_or_axes_do_not_merge() -> None:
    with pytest.raises(StatisticsError, match="3 channels on axis 1 do not merge with those of 2 on axis 1"):
        whole(np.ones((1, 3))) | whole(np.ones((1, 2)))
    with pytest.raises(StatisticsError, match="on axis -1"):
        whole(np.ones((1, 3))) | whole(np.ones((1, 3)), -1)
    assert whole(np.ones((1, 3))) != whole(np.ones((1, 3)), -1)


def test_merging_leaves_the_parts_as_they_were() -> None:
    first, second = whole([[1.0, -2.0]]), whole([[3.0, 5.0]])
    merged = first | second
    first.observe(np.array([[100.0, 100.0]]), 1)
    assert_identical(merged, whole([[1.0, -2.0], [3.0, 5.0]]))
    assert_identical(second, whole([[3.0, 5.0]]))


def test_what_is_asked_follows_what_was_seen_since() -> None:
    stats = whole([[1.0]])
    assert stats.mean.tolist() == [1]
    stats.observe(np.array([[3.0]]), 1)
    assert stats.mean.tolist() == [2]
    stats.count[0] = 99
    assert stats.count.tolist() == [2]


def test_arrays_are_a_state_of_their_own() -> None:
    stats = whole([[1.0, -2.0]])
    arrays = stats.arrays()
    stats.observe(np.array([[5.0, -7.0]]), 1)
    assert_identical(ChannelStatistics.from_arrays(1, arrays), whole([[1.0, -2.0]]))
    ChannelStatistics.from_arrays(1, arrays).observe(np.array([[5.0, -7.0]]), 1)
    assert_identical(ChannelStatistics.from_arrays(1, arrays), whole([[1.0, -2.0]]))


def loaded(axis: int, arrays: Any) -> ChannelStatistics:
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    with np.load(file, allow_pickle=False) as read:
        return ChannelStatistics.from_arrays(axis, dict(read))


@given(x=hnp.arrays(np.float32, st.tuples(st.integers(1, 3), st.integers(1, 3), st.integers(1, 5)), elements=values))
@settings(deadline=None)
def test_saved_statistics_are_the_same_and_go_on_counting(x: Array) -> None:
    again = loaded(1, whole(x).arrays())
    assert_identical(again, whole(x))
    again.observe(x, len(x))
    assert_identical(again, whole(x) | whole(x))


def test_statistics_of_nothing_can_be_saved() -> None:
    again = loaded(1, ChannelStatistics(1).arrays())
    again.observe(np.ones((1, 2)), 1)
    assert_identical(again, whole(np.ones((1, 2))))


def test_counts_pass_what_thirty_two_bits_hold() -> None:
    x = np.ones((1, 1, 3), np.float32)
    arrays = whole(x).arrays()
    assert arrays["bins"].dtype == np.uint32
    arrays["count"][:] = 2**32 - 2
    arrays["bins"][arrays["bins"] > 0] = 2**32 - 2
    many = ChannelStatistics.from_arrays(1, arrays)
    for more in (many | whole(x), whole(x) | many):
        assert more.count.tolist() == more.positive.tolist() == [2**32 + 1]
        assert more.arrays()["bins"].dtype == np.int64
        assert_identical(loaded(1, more.arrays()), more)
    many.observe(x, 1)
    assert many.positive.tolist() == [2**32 + 1]


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("count", np.array([2, 2, 2])),
        ("count", np.array([1, 2])),
        ("count", np.array([2.0, 2.0])),
        ("lo", np.zeros(2)),
        ("hi", np.zeros(3, np.float32)),
        ("pages", np.array([127, 127, 129])),
        ("pages", np.array([127, 128, 255])),
        ("pages", np.array([127, 128])),
        ("pages", np.array([127.0, 128.0, 129.0])),
        ("bins", np.zeros((3, 2, 8), np.uint32)),
        ("bins", np.full((3, 2, 16), -1)),
        ("bins", np.zeros((3, 2, 16))),
        ("counters", np.zeros((1, 2, 5), np.int64)),
    ],
)
def test_damaged_arrays_are_refused(name: str, array: npt.NDArray[Any]) -> None:
    arrays = whole([[[1.5, 3.0], [1.5, 6.0]]]).arrays()
    assert arrays["pages"].size == 3
    with pytest.raises(StatisticsError, match="damaged"):
        ChannelStatistics.from_arrays(1, arrays | {name: array})
    with pytest.raises(StatisticsError, match="damaged"):
        ChannelStatistics.from_arrays(1, {n: a for n, a in arrays.items() if n != name})

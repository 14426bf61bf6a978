from __future__ import annotations

import io
import math
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qdqtool.errors import StatisticsError
from qdqtool.statistics.exact_sum import BINS, CAPACITY, CoarseBins, ExactSum

Array = npt.NDArray[np.float64]
TINY = 5e-324
MAX = float(np.finfo(np.float64).max)
HALF = 1 << 30
floats = st.one_of(
    st.floats(allow_nan=False, allow_infinity=False),
    st.floats(-4, 4),
    st.sampled_from([0.0, -0.0, TINY, -TINY, 2.0**-1022, MAX, -MAX, 1.0, -1.0, 2.0**53, 1 + 2.0**-52]),
)
tables = hnp.arrays(np.float64, st.tuples(st.integers(1, 9), st.integers(1, 4)), elements=floats)


def added(values: npt.ArrayLike) -> ExactSum:
    table = np.atleast_2d(np.asarray(values, np.float64))
    sums = ExactSum(table.shape[1])
    sums.add(table)
    return sums


def column(*values: float) -> ExactSum:
    return added(np.array(values)[:, None])


def is_nearest(found: float, values: Array) -> bool:
    """Whether no float64 is nearer to the exact sum, without a division that rounds."""
    exact = sum((Fraction(float(v)) for v in values), Fraction(0))
    if math.isinf(found):
        return exact * int(math.copysign(1, found)) >= 2**1024 - 2**970  # half a step beyond the greatest float64
    others = [f for f in (math.nextafter(found, math.inf), math.nextafter(found, -math.inf)) if math.isfinite(f)]
    return all(abs(Fraction(found) - exact) <= abs(Fraction(other) - exact) for other in others)


def saved(arrays: Any) -> dict[str, npt.NDArray[Any]]:
    file = io.BytesIO()
    np.savez(file, **arrays)
    file.seek(0)
    with np.load(file, allow_pickle=False) as loaded:
        return dict(loaded)


@given(table=tables, data=st.data())
@settings(deadline=None)
def test_any_partition_order_and_merge_tree_give_the_same_counters(table: Array, data: st.DataObject) -> None:
    order = np.array(data.draw(st.permutations(range(len(table)))))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(len(table) - 1, 1)))))
    parts = [added(part) if len(part) else ExactSum(table.shape[1]) for part in np.split(table[order], cuts)]
    while len(parts) > 1:
        i = data.draw(st.integers(0, len(parts) - 2))
        parts[i : i + 2] = [parts[i] | parts[i + 1]]
    whole = added(table)
    assert parts[0] == whole
    assert parts[0].value().tobytes() == whole.value().tobytes()
    for name, array in whole.arrays().items():
        assert parts[0].arrays()[name].tobytes() == array.tobytes()


@given(table=tables)
@settings(deadline=None)
def test_a_sum_is_the_float_nearest_to_the_exact_one(table: Array) -> None:
    assert all(is_nearest(found, values) for found, values in zip(added(table).value().tolist(), table.T, strict=True))


@given(table=tables)
@settings(deadline=None)
def test_saved_sums_are_the_same_sums(table: Array) -> None:
    sums = added(table)
    loaded = ExactSum.from_arrays(saved(sums.arrays()))
    assert loaded == sums
    assert loaded.value().tobytes() == sums.value().tobytes()


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ((1e300, 1.0, -1e300), 1.0),
        ((1.0, 2.0**-53), 1.0),  # a tie goes to the even mantissa
        ((1.0, 2.0**-53, TINY), 1 + 2.0**-52),
        ((1 + 2.0**-52, 2.0**-53), 1 + 2.0**-51),
        ((TINY, TINY, TINY), 3 * TINY),
        ((2.0**-1022, -TINY), 2.0**-1022 - TINY),
        ((MAX, MAX), math.inf),
        ((-MAX, -MAX, 1.0), -math.inf),
        ((MAX, MAX, -MAX), MAX),
        ((-0.0, 0.0), 0.0),
    ],
)
def test_sums_that_are_hard_to_round(values: tuple[float, ...], total: float) -> None:
    assert column(*values).value().tolist() == [total]


def test_a_sum_of_zero_has_no_sign_and_no_counters() -> None:
    sums = column(-0.0, 1.5, -1.5)
    assert not np.signbit(sums.value()).any()
    assert sums.arrays()["windows"].size == 0
    assert sums.addends == 3


def test_values_that_cancel_leave_the_same_state_in_one_part_and_in_two() -> None:
    assert column(1.0) | column(-1.0) == column(1.0, -1.0)
    assert column(1.0) | column(-1.0) != column(1.0, -1.0, 0.0)


def test_sums_of_nothing() -> None:
    assert ExactSum(2).value().tolist() == [0, 0]
    assert ExactSum(0).value().size == 0
    assert ExactSum(2) != ExactSum(3)
    assert ExactSum.from_arrays(ExactSum(0).arrays()) == ExactSum(0)


def test_many_rows_at_once_are_the_same_as_one_after_the_other() -> None:
    table = np.random.default_rng(0).standard_normal((70_001, 2)) * 1e-3
    whole = added(table)
    assert whole == added(table[:65_000]) | added(table[65_000:])
    assert whole.value().tolist() == [math.fsum(values) for values in table.T]


def test_one_value_for_each_channel_is_one_row() -> None:
    sums = ExactSum(3)
    sums.add(np.array([1.0, 2.0, 3.0]))
    assert (sums.addends, sums.value().tolist()) == (1, [1, 2, 3])


def test_merging_leaves_the_parts_as_they_were() -> None:
    first, second = column(1.0), column(2.0)
    merged = first | second
    merged.add(np.array([4.0]))
    first.add(np.array([8.0]))
    assert (first.value()[0], second.value()[0], merged.value()[0]) == (9, 2, 7)


@pytest.mark.parametrize("values", [np.ones(2), np.ones((1, 2)), np.ones((1, 1, 3))])
def test_values_of_another_shape_are_refused(values: Array) -> None:
    with pytest.raises(ValueError, match="cannot be added to sums of 3 channels"):
        ExactSum(3).add(values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused_and_leave_no_trace(value: float) -> None:
    sums = ExactSum(2)
    with pytest.raises(ValueError, match="NaN and infinite"):
        sums.add(np.array([1.0, value]))
    assert sums == ExactSum(2)


def test_sums_of_other_channels_do_not_merge() -> None:
    with pytest.raises(StatisticsError, match="1 and of 2 channels"):
        ExactSum(1) | ExactSum(2)


def full(lower: int, upper: int) -> ExactSum:
    arrays = {"addends": np.array(CAPACITY), "windows": np.array([0]), "counters": np.array([[[lower], [upper]]])}
    return ExactSum.from_arrays(arrays)


def test_counters_hold_all_that_their_capacity_allows() -> None:
    lower, upper = CAPACITY * (HALF - 1), -CAPACITY * HALF
    assert full(lower, upper).value().tolist() == [(upper * HALF + lower) / 2**53]


@given(value=floats)
def test_halves_of_a_value_stay_within_thirty_bits(value: float) -> None:
    for lower, upper in column(value).arrays()["counters"][:, :, 0].tolist():
        assert 0 <= lower < HALF
        assert -HALF <= upper < HALF


def test_more_addends_than_counters_hold_are_an_error() -> None:
    sums = full(0, 0)
    with pytest.raises(StatisticsError, match=rf"{CAPACITY + 1} samples are more"):
        sums.add(np.zeros(1))
    with pytest.raises(StatisticsError, match="observe fewer"):
        sums | column(1.0)
    assert sums.addends == CAPACITY


@pytest.mark.parametrize(
    ("name", "array"),
    [
        ("addends", np.array(-1)),
        ("addends", np.array(CAPACITY + 1)),
        ("addends", np.array([2])),
        ("addends", np.array(2.0)),
        ("windows", np.array([0, 0])),
        ("windows", np.array([0])),
        ("windows", np.array([[0, 1]])),
        ("counters", np.zeros((2, 3, 1), np.int64)),
        ("counters", np.zeros((2, 2), np.int64)),
        ("counters", np.full((2, 2, 1), 2 * HALF + 1)),
        ("counters", np.full((2, 2, 1), np.iinfo(np.int64).min)),
    ],
)
def test_damaged_arrays_are_refused(name: str, array: npt.NDArray[Any]) -> None:
    arrays = column(1.0, 1e5).arrays()
    assert arrays["windows"].size == 2
    with pytest.raises(StatisticsError, match="damaged"):
        ExactSum.from_arrays(arrays | {name: array})
    with pytest.raises(StatisticsError, match="damaged"):
        ExactSum.from_arrays({n: a for n, a in arrays.items() if n != name})


def edges(bins: CoarseBins) -> list[tuple[float, float, int]]:
    """Lower and upper edge with their sign, and count, of every occupied bin of channel 0."""
    return [
        (sign * float(lo), sign * float(hi), int(count))
        for sign in (-1, 1)
        for los, his, counts in bins._side(sign < 0)
        for lo, hi, count in zip(los, his, counts[0], strict=True)
        if count
    ]


@given(
    x=hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))
)
@settings(deadline=None)
def test_bins_hold_the_values_above_one_edge_and_up_to_the_other(x: npt.NDArray[np.float32]) -> None:
    bins = CoarseBins(1)
    bins.add(x[None], 0)
    found = edges(bins)
    assert sum(count for _, _, count in found) == np.count_nonzero(x)
    magnitude = np.abs(x.astype(np.float64))
    for lo, hi, count in found:
        same_sign = np.signbit(x) == (hi < 0)
        assert count == (same_sign & (magnitude > abs(lo)) & (magnitude <= abs(hi))).sum()
        assert abs(hi - lo) <= max(abs(lo) / BINS, 2.0**-130)


def test_values_at_the_ends_of_float32_have_bins() -> None:
    greatest, least = np.finfo(np.float32).max, np.float32(1e-45)
    bins = CoarseBins(1)
    bins.add(np.array([[greatest, -greatest, least, -least, 0.0, -0.0]], np.float32), 0)
    assert [(bins.total(negative=True)[0], bins.total(negative=False)[0]), len(edges(bins))] == [(2, 2), 4]
    assert edges(bins)[-1][1] == 2.0**128


def test_bins_of_several_channels_stay_apart_when_pages_appear_later() -> None:
    bins = CoarseBins(3)
    bins.add(np.array([[1.0, 1.0], [-2.0, 0.0]], np.float32), 1)
    bins.add(np.array([[100.0], [1.0], [-1e-3]], np.float32), 0)
    assert bins.total(negative=False).tolist() == [1, 3, 0]
    assert bins.total(negative=True).tolist() == [0, 0, 2]
    pages, counts = bins.ordered()
    assert (np.diff(pages) > 0).all()
    assert counts.sum(axis=(0, 2)).tolist() == [1, 3, 2]


def test_shortfall_and_squares_are_those_of_the_values() -> None:
    x = np.random.default_rng(0).standard_normal((1, 50_000)).astype(np.float32)
    bins = CoarseBins(1)
    bins.add(x, 0)
    positive, size = x[x > 0].astype(np.float64), np.array([0.7])
    assert bins.shortfall(size, negative=False)[0] == pytest.approx(np.maximum(0.7 - positive, 0).sum(), rel=1e-4)
    assert bins.squares(negative=False)[0] == pytest.approx((positive**2).sum(), rel=1e-3)
    assert bins.shortfall(-size, negative=True).tolist() == [0]

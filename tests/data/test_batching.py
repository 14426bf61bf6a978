"""Samples are cut out of whatever the user feeds and joined where that changes nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qdqtool.data.batching import MAX_BATCH, Batch, Batching, Sample, choose, digest, plan_batching
from qdqtool.data.fit import Feeds
from qdqtool.graphs.model import InputInfo

Array = npt.NDArray[Any]


def info(name: str, *shape: int | str | None, dtype: Any = np.float32) -> InputInfo:
    return InputInfo(name, np.dtype(dtype), shape)


def ramp(*shape: int) -> Array:
    return np.arange(np.prod(shape), dtype=np.float32).reshape(shape) / 7


def rows(array: Array, size: int = 1) -> list[Feeds]:
    return [{"x": array[i : i + size]} for i in range(0, len(array), size)]


X = info("x", "N", 3)


class Model:
    """Stands for a session: computes with numpy and remembers what it was given."""

    def __init__(self, **outputs: Any) -> None:
        self.outputs, self.calls = outputs, 0

    def __call__(self, feeds: Feeds) -> Mapping[str, Array]:
        self.calls += 1
        return {name: np.asarray(function(**feeds)) for name, function in self.outputs.items()}


def softmax(x: Array, axis: int) -> Array:
    powers = np.exp(x - x.max(axis=axis, keepdims=True))
    return np.asarray(powers / powers.sum(axis=axis, keepdims=True))


# Planning


def test_independent_samples_are_joined() -> None:
    model = Model(y=lambda x: softmax(x, 1))
    plan = plan_batching([X], rows(ramp(5, 3)), model)
    assert plan.rows
    assert plan.size == MAX_BATCH
    assert model.calls == 3


@pytest.mark.parametrize(
    "mixing",
    [
        lambda x: softmax(x, 0),
        lambda x: x - x.mean(axis=0),
        lambda x: x.sum(axis=0),
        lambda x: x.reshape(-1)[:3],
        lambda x: np.sort(x, axis=0),
    ],
    ids=["softmax", "centred", "sum", "first row", "sorted"],
)
def test_a_model_that_mixes_over_axis_0_is_found_out(mixing: Any) -> None:
    descending = ramp(5, 3)[::-1]
    plan = plan_batching([X], rows(descending), Model(fine=lambda x: x, mixed=mixing))
    assert not plan.rows
    assert plan.size == 1
    batches = plan.batches(plan.samples(rows(descending, 2)))
    assert [batch.feeds["x"].shape for batch in batches] == [(2, 3), (2, 3), (1, 3)]


def test_rounding_differences_do_not_count_as_mixing_but_nan_does() -> None:
    noisy = Model(y=lambda x: x * np.float32(1 + 1e-6 * len(x)))
    assert plan_batching([X], rows(ramp(4, 3)), noisy).rows
    both_nan = Model(y=lambda x: np.where(x > 0.5, np.nan, x))
    assert plan_batching([X], rows(ramp(4, 3)), both_nan).rows
    nan_when_joined = Model(y=lambda x: np.where(len(x) > 1, np.nan, x))
    assert not plan_batching([X], rows(ramp(4, 3)), nan_when_joined).rows


def test_integer_outputs_must_agree_exactly() -> None:
    assert plan_batching([X], rows(ramp(4, 3)), Model(y=lambda x: x.argmax(1))).rows
    assert not plan_batching([X], rows(ramp(4, 3)), Model(y=lambda x: np.full(len(x), x.argmax()))).rows


def test_the_trial_takes_two_samples_that_differ() -> None:
    same = np.zeros((3, 3), np.float32)
    model = Model(y=lambda x: x.mean(axis=0, keepdims=True) + 0 * x)
    plan = plan_batching([X], rows(np.concatenate([same, ramp(3, 3)])), model)
    assert not plan.rows


def test_equal_samples_cannot_be_tried_and_run_one_by_one() -> None:
    model = Model(y=lambda x: x)
    assert plan_batching([X], rows(np.zeros((5, 3), np.float32)), model) == Batching(rows=True, size=1)
    assert plan_batching([X], rows(np.zeros((6, 3), np.float32), 2), model) == Batching(rows=False, size=1)
    assert plan_batching([X], [], model) == Batching(rows=False, size=1)
    assert model.calls == 0


@pytest.mark.parametrize(
    "inputs",
    [[info("x")], [info("x", 1, 3)], [X, info("state", 2, "N", 4)], [X, info("rate", dtype=np.int64)], []],
    ids=["rank 0", "batch of one", "a state with another axis", "a scalar beside", "no inputs"],
)
def test_inputs_without_a_free_first_axis_run_as_they_came(inputs: Sequence[InputInfo]) -> None:
    model = Model(y=lambda x: x)
    assert plan_batching(inputs, rows(ramp(4, 3)), model) == Batching(rows=False, size=1)
    assert model.calls == 0


def test_large_activations_make_small_batches() -> None:
    model = Model(y=lambda x: np.repeat(x, 1 << 21, axis=1))
    plan = plan_batching([info("x", "N", 1)], rows(ramp(4, 1)), model)
    assert plan.rows
    assert 1 <= plan.size < 16
    assert plan.together(4).size >= 4
    assert plan.together(10**6).size < 1000


# Cutting and joining


def test_a_fixed_batch_is_filled_by_repeating_the_last_sample() -> None:
    plan = plan_batching([info("x", 4, 3)], rows(ramp(6, 3)), Model())
    assert plan == Batching(rows=True, size=4, fixed=True)
    batches = list(plan.batches(plan.samples(rows(ramp(6, 3)))))
    assert [batch.feeds["x"].shape for batch in batches] == [(4, 3), (4, 3)]
    assert [len(batch.samples) for batch in batches] == [4, 2]
    np.testing.assert_array_equal(batches[1].feeds["x"], ramp(6, 3)[[4, 5, 5, 5]])
    kept = batches[1].real(batches[1].feeds["x"] * 2)
    np.testing.assert_array_equal(kept, 2 * ramp(6, 3)[4:])
    assert plan.together(100) == plan


def test_what_belongs_to_the_samples_of_a_filled_batch() -> None:
    samples = tuple(Batching(rows=True, size=4, fixed=True).samples(rows(ramp(3, 3))))
    batch = Batch({}, samples, rows=4)
    deep = np.arange(24.0).reshape(4, 3, 2)
    np.testing.assert_array_equal(batch.real(deep), deep[:3])
    np.testing.assert_array_equal(batch.real(deep.reshape(8, 3)), deep.reshape(4, 6)[:3])
    np.testing.assert_array_equal(batch.real(np.array(5.0)), [5.0, 5.0, 5.0])
    full = Batch({}, (*samples, samples[0]), rows=4)
    assert full.real(deep) is deep
    assert full.real(np.ones(3)).shape == (4, 3)


def test_feeds_of_the_whole_fixed_batch_are_samples_themselves() -> None:
    feeds: list[Feeds] = [{"x": ramp(4, 3)}, {"x": ramp(2, 3) + 9}]
    plan = plan_batching([info("x", 4, 3)], feeds, Model())
    assert plan == Batching(rows=False, size=1, fill=4)
    whole, short = plan.batches(plan.samples(feeds))
    assert (len(whole.samples), len(short.samples)) == (1, 1)
    np.testing.assert_array_equal(short.feeds["x"], feeds[1]["x"][[0, 1, 1, 1]])
    np.testing.assert_array_equal(short.real(short.feeds["x"]), feeds[1]["x"])


def test_several_inputs_are_cut_and_joined_together() -> None:
    feeds: list[Feeds] = [{"x": ramp(2, 3) + i, "ids": np.full((2, 1), i)} for i in range(3)]
    plan = Batching(rows=True, size=4)
    batches = list(plan.batches(plan.samples(feeds)))
    assert [len(batch.samples) for batch in batches] == [4, 2]
    np.testing.assert_array_equal(batches[0].feeds["ids"], [[0], [0], [1], [1]])
    np.testing.assert_array_equal(batches[1].feeds["x"], ramp(2, 3) + 2)
    assert [position for batch in batches for _, position in batch.keys] == list(range(6))


def test_samples_of_differing_shapes_are_joined_by_shape() -> None:
    feeds: list[Feeds] = [{"x": ramp(1, length) + i} for i, length in enumerate([5, 3, 5, 3, 5, 4])]
    plan = Batching(rows=True, size=2)
    shapes = sorted(batch.feeds["x"].shape for batch in plan.batches(plan.samples(feeds)))
    assert shapes == [(1, 4), (1, 5), (2, 3), (2, 5)]


def test_whatever_batches_came_the_samples_are_the_same() -> None:
    x = ramp(13, 3)
    plan = Batching(rows=True, size=8)
    found = [[(s.digest, s.position) for s in plan.samples(rows(x, size))] for size in (1, 5, 13)]
    assert found[0] == found[1] == found[2]
    assert len({key for key, _ in found[0]}) == 13


# Hashes


def test_a_hash_says_content_name_type_and_shape() -> None:
    x = ramp(2, 3)
    assert digest({"x": x, "y": x}) == digest({"y": x.copy(), "x": np.asfortranarray(x)})
    different = [{"x": x}, {"z": x}, {"x": x.T}, {"x": x.astype(np.float64)}, {"x": x + 1}, {"x": x.reshape(3, 2)}]
    assert len({digest(feeds) for feeds in different}) == len(different)
    assert digest({"x": np.array(1.0)}) != digest({"x": np.array([1.0])})
    assert all(len(digest(feeds)) == 16 and digest(feeds)[-1] for feeds in different)


def test_samples_are_chosen_by_content() -> None:
    samples = [Sample({}, digest({"x": row}), i) for i, row in enumerate(ramp(50, 3))]
    chosen = choose(samples, 10)
    assert len(chosen) == 10
    assert choose(samples[::-1], 10) == chosen
    assert {s.digest for s in chosen} <= {s.digest for s in choose(samples, 20)}
    assert [s.digest for s in choose(samples, 100)] == sorted(s.digest for s in samples)

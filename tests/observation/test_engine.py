"""Work on this machine's threads: all items, each once, few in memory, and the first failure ends it."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from qdqtool.observation.engine import Engine, Job, Local, cpus
from tests.toy_job import NOTHING, Fail, Items, Numbers, Sum, Summing, Wait, item, whole

THREADS = (1, 2, 5)
COUNT = 23
EXPECTED = Sum(COUNT, np.sum([item(number) for number in range(COUNT)], axis=0))


def test_local_is_an_engine_and_the_toy_a_job() -> None:
    engine: Engine = Local()
    job: Job[Numbers, Sum] = Summing()
    assert whole(engine.run(job, [item(0)])) == Sum(1, item(0))
    assert 1 <= engine.threads <= cpus()


@pytest.mark.parametrize("threads", THREADS)
def test_sums_every_item_once(threads: int) -> None:
    items = Items(COUNT)
    (found,) = Local(threads).run(Summing(), items, taken=items.taken)
    assert found == EXPECTED
    assert items.each_once()


@pytest.mark.parametrize("seed", range(3))
def test_order_of_items_does_not_matter(seed: int) -> None:
    order = np.random.default_rng(seed).permutation(COUNT)
    assert whole(Local(3).run(Summing(), (item(int(number)) for number in order))) == EXPECTED


@pytest.mark.parametrize("threads", THREADS)
def test_holds_one_item_more_than_there_are_threads(threads: int) -> None:
    items = Items(60)
    assert whole(Local(threads).run(Summing(Wait(0.002)), items, taken=items.taken)).count == 60
    assert items.most == threads + 1


def test_items_are_taken_side_by_side() -> None:
    both = threading.Barrier(2)

    def meet(number: int) -> None:
        both.wait(timeout=10)

    assert whole(Local(2).run(Summing(meet), Items(4))).count == 4


@pytest.mark.parametrize("threads", THREADS)
def test_pause_cuts_the_whole_into_parts(threads: int) -> None:
    items = Items(COUNT)
    asked = itertools.count(1)
    parts = list(Local(threads).run(Summing(), items, taken=items.taken, pause=lambda seconds: next(asked) % 5 == 0))
    assert [part.count for part in parts] == [5, 5, 5, 5, 3]
    assert whole(parts) == EXPECTED
    assert items.each_once()


def test_pause_is_told_the_seconds_since_the_last_part() -> None:
    told: list[float] = []

    def pause(seconds: float) -> bool:
        told.append(seconds)
        return len(told) == 3

    assert len(list(Local(1).run(Summing(Wait(0.1)), Items(4), pause=pause))) == 2
    assert 0 <= told[0] <= told[1] <= told[2]
    assert told[2] >= 0.1
    assert told[3] < told[2]


def test_without_items_there_is_one_result_of_nothing() -> None:
    assert list(Local().run(Summing(), [])) == [NOTHING]


def test_first_failure_ends_the_run_as_it_was_raised(tmp_path: Path) -> None:
    items = Items(10_000)
    job = Summing(Fail(4, lambda: ZeroDivisionError("at four"), tmp_path / "attempts"))
    with pytest.raises(ZeroDivisionError, match="at four"):
        list(Local(2).run(job, items, taken=items.taken))
    assert len(items.drawn) < 10
    assert (tmp_path / "attempts").read_text() == "4\n"
    assert 4 not in {int(done[0]) for done in items.done}


def test_failure_of_the_data_ends_the_run() -> None:
    def data() -> Iterator[Numbers]:
        yield item(0)
        raise OSError("disk")

    with pytest.raises(OSError, match="disk"):
        list(Local(2).run(Summing(), data()))


def test_reader_that_stops_reading_ends_the_run() -> None:
    items = Items(10_000)
    parts = Local(2).run(Summing(), items, pause=lambda seconds: True)
    next(parts)
    parts.close()  # type: ignore[attr-defined]  # a generator, by its type any iterator
    assert len(items.drawn) == 1
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("qdqtool")]

"""A small job whose results are exact, for the tests of engines; its workers can be made to fail."""

from __future__ import annotations

import functools
import operator
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

WIDTH = 20_000
"""Numbers in an item: a finding of so many is beyond what Ray keeps with the driver."""
Numbers = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Sum:
    """How many items there were, and their sum."""

    count: int
    total: Numbers

    def __or__(self, other: Sum) -> Sum:
        return Sum(self.count + other.count, self.total + other.total)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sum) and self.count == other.count and np.array_equal(self.total, other.total)

    def __hash__(self) -> int:
        return hash((self.count, self.total.tobytes()))


NOTHING = Sum(0, np.zeros(WIDTH, np.int64))


@dataclass(frozen=True)
class Summing:
    """Sum items; ``before`` is called with the first number of each, and may fail or wait.

    Every start of a worker adds a line with the process to the file ``starts``.
    """

    before: Callable[[int], None] = lambda number: None
    starts: Path | None = None

    def start(self) -> Adder:
        """A worker that has seen nothing."""
        if self.starts is not None:
            append(self.starts, os.getpid())
        return Adder(self.before)

    def merge(self, one: Sum, other: Sum) -> Sum:
        """Both."""
        return one | other


class Adder:
    """The worker; refuses to tell its result while it takes an item."""

    def __init__(self, before: Callable[[int], None]) -> None:
        self._before = before
        self._lock = threading.Lock()
        self._active = 0
        self._sum = NOTHING

    def take(self, item: Numbers) -> None:
        """Add the item."""
        with self._lock:
            self._active += 1
        self._before(int(item[0]))
        with self._lock:
            self._sum |= Sum(1, item)
            self._active -= 1

    def result(self) -> Sum:
        """The sum since the last call."""
        assert not self._active
        found, self._sum = self._sum, NOTHING
        return found


@dataclass(frozen=True)
class Fail:
    """Raise ``error`` at one item; every attempt adds a line to ``attempts``."""

    at: int
    error: Callable[[], Exception]
    attempts: Path

    def __call__(self, number: int) -> None:
        if number == self.at:
            append(self.attempts, number)
            raise self.error()


@dataclass(frozen=True)
class KillOnce:
    """End the process without a word at one item, the first time."""

    at: int
    marker: Path

    def __call__(self, number: int) -> None:
        if number == self.at and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class Wait:
    """Take some seconds for each item, a little at a time, so that the process hears when it is to stop."""

    seconds: float

    def __call__(self, number: int) -> None:
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            time.sleep(0.01)


@dataclass(frozen=True)
class Await:
    """Write down where in Ray each item is taken, as lines of node and number; others wait until ``node`` had four."""

    node: str
    places: Path

    def __call__(self, number: int) -> None:
        import ray

        here = ray.get_runtime_context().get_node_id()
        append(self.places, f"{here} {number}")
        end = time.monotonic() + 30
        while here != self.node and self.places.read_text().count(self.node) < 4 and time.monotonic() < end:
            time.sleep(0.01)


class Untransportable(Exception):
    """Pickles, but cannot be made again from its pickle."""

    def __init__(self, word: str, number: int) -> None:
        super().__init__(f"{word} {number}")


class Items:
    """Items 0, 1, 2, ..., that knows how many were drawn, how many are done, and the most that were neither."""

    def __init__(self, count: int) -> None:
        self.drawn: list[Numbers] = []
        self.done: list[Numbers] = []
        self.most = 0
        self._count = count

    def __iter__(self) -> Iterator[Numbers]:
        for number in range(self._count):
            self.drawn.append(item(number))
            self.most = max(self.most, len(self.drawn) - len(self.done))
            yield self.drawn[-1]

    def taken(self, item: Numbers) -> None:
        """To be told of each item."""
        self.done.append(item)

    def each_once(self) -> bool:
        """Whether everything drawn was told of once, as the same object."""
        return sorted(map(id, self.drawn)) == sorted(map(id, self.done))


def item(number: int) -> Numbers:
    """An item that begins with its number."""
    return number + np.arange(WIDTH, dtype=np.int64) * (number + 1)


def whole(parts: Iterable[Sum]) -> Sum:
    """All parts as one."""
    return functools.reduce(operator.or_, parts, NOTHING)


def append(path: Path, value: Any) -> None:
    """Add a line, from any process."""
    with path.open("a") as file:
        file.write(f"{value}\n")

"""Where work over many items runs: on this machine's threads, or on many machines. The result is the same bits.

Work is a :class:`Job`: started anywhere, any number of times, it gives workers that take items in any order and say
what they found; findings merge exactly. Nothing else may matter to the result: not the number of workers, not which of
them took which item, nor when one was lost and its items taken again.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Final, Protocol, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")
Item_contra = TypeVar("Item_contra", contravariant=True)
Result_co = TypeVar("Result_co", covariant=True)

_MOST_THREADS: Final = 8  # each holds a batch


class Worker(Protocol[Item_contra, Result_co]):
    """Takes items, from several threads at once, and tells what it found in them."""

    def take(self, item: Item_contra) -> None:
        """Work on one item."""
        ...

    def result(self) -> Result_co:
        """What was found since the last call; called while no item is being taken."""
        ...


class Job(Protocol[Item_contra, Result]):
    """Work that can be cut into items; an engine for many machines pickles it once for each of them."""

    def start(self) -> Worker[Item_contra, Result]:
        """Make ready what items need (load a model, say)."""
        ...

    def merge(self, one: Result, other: Result) -> Result:
        """Both findings as one; exact, so that neither order nor grouping matters."""
        ...


class Engine(Protocol):
    """Runs jobs."""

    @property
    def threads(self) -> int:
        """How many items each worker takes at once."""
        ...

    def run(
        self,
        job: Job[Item, Result],
        items: Iterable[Item],
        *,
        taken: Callable[[Item], None] = lambda item: None,
        pause: Callable[[float], bool] = lambda seconds: False,
    ) -> Iterator[Result]:
        """Yield what was found, in one or several parts that do not overlap and together cover every item.

        Args:
            job: the work.
            items: drawn as they are needed, so that few are in memory at once.
            taken: told of each item when it is done, on the calling thread.
            pause: asked now and then, with the seconds since the last part, whether a part is wanted now (to save it).

        Raises:
            Exception: whatever the job raises; the first failure ends the run.
        """
        ...


def cpus() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Local:
    """One worker in this process, whose items are taken by ``threads`` threads at once."""

    threads: int = min(cpus(), _MOST_THREADS)

    def run(
        self,
        job: Job[Item, Result],
        items: Iterable[Item],
        *,
        taken: Callable[[Item], None] = lambda item: None,
        pause: Callable[[float], bool] = lambda seconds: False,
    ) -> Iterator[Result]:
        """As :meth:`Engine.run`; one item more than there are threads is in memory."""
        worker = job.start()
        since = time.monotonic()
        with ThreadPoolExecutor(self.threads, "qdqtool") as pool:
            pending: dict[Future[None], Item] = {}
            try:
                for item in items:
                    pending[pool.submit(worker.take, item)] = item
                    if len(pending) > self.threads:
                        _collect(pending, taken, FIRST_COMPLETED)
                    if pause(time.monotonic() - since):
                        _collect(pending, taken)
                        yield worker.result()
                        since = time.monotonic()
                _collect(pending, taken)
            finally:  # a failure, or a reader that stops reading: what has not begun is not begun
                for future in pending:
                    future.cancel()
        yield worker.result()


def _collect(pending: dict[Future[None], Item], taken: Callable[[Item], None], until: str = "ALL_COMPLETED") -> None:
    """Wait for items, raise what they raised, and tell of those that are done."""
    done, _ = wait(pending, return_when=until)
    for future in done:
        item = pending.pop(future)
        future.result()
        taken(item)

"""An engine on Ray: items go to the processors of this machine or of a cluster; what is lost on the way is done again.

The driver (the process that runs a job) draws items and sends them in chunks. A task takes the items of a chunk and
gives two objects: how it went, which the driver reads, and what was found, which stays where it was found. Tasks merge
findings, and merge what they merged; what is made of enough chunks travels to the driver. That bounds memory as well:
as long as an object might be lost with its machine, Ray keeps all that it was made of, down to the items.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Final, Generic

from qdqtool.errors import RecipeError, RuntimeUnavailableError
from qdqtool.observation.engine import Item, Job, Result
from qdqtool.observation.engine_ray_task import Call, Packed, pack, shipped, size, unpack, versions

_AHEAD: Final = 2  # tasks sent for each processor: while one runs, the items of the next arrive
_TOGETHER: Final = 8  # findings that one task merges
_AWAY: Final = 64  # chunks at most whose merged findings are not yet with the driver
_SECONDS: Final = 0.25  # of work in a task at least; Ray itself takes some milliseconds for each
_BYTES: Final = 50e6  # of a finding for each second of work; it is moved and merged at some 1e9 a second
_MOST_ITEMS: Final = 64
_RETRIES: Final = 5
_PATIENCE: Final = 10.0  # seconds until a cluster must answer
_RECOUNT: Final = 5.0  # seconds between two looks at the size of a cluster, which may grow
_SKIPPED: Final = "RAY_DEDUP_LOGS_SKIP_REGEX"  # lines that Ray does not print


@dataclass(frozen=True)
class Ray:
    """Worker processes of Ray, each with one worker (a loaded model, say) for the length of a run.

    Where Ray is already initialised in this process, that one is used; else it is started, or the cluster connected to,
    for as long as the run: a run that ends early then ends all its tasks, while one on a Ray that was already
    initialised leaves what was sent, two chunks a processor at most, to finish unheard (Ray can cancel a task, but
    aborts the whole process if the task is just done). Machines of a cluster give the same bits if their processors
    are of one kind.

    Attributes:
        address: of a running cluster that this machine belongs to ("host:6379"; "auto": the one found here); None: a
            Ray of its own on this machine.
        cpus: processors of a Ray started here; None: all.
        chunk_items: items a task takes; None: for a quarter of a second, or longer where findings are large.
        chunk_bytes: a chunk is sent at this size even if it has fewer items.
    """

    address: str | None = None
    cpus: int | None = None
    chunk_items: int | None = None
    chunk_bytes: int = 8 << 20

    def __post_init__(self) -> None:
        if self.address is not None and self.cpus is not None:
            raise RecipeError(f"the Ray cluster at {self.address!r} has its own processors; leave out address or cpus")
        for name, value in (("cpus", self.cpus), ("chunk_items", self.chunk_items), ("chunk_bytes", self.chunk_bytes)):
            if value is not None and value < 1:
                raise RecipeError(f"{name} of the Ray engine is {value}; give 1 or more")

    @property
    def threads(self) -> int:
        """Items that each worker takes at once: a task has one processor."""
        return 1

    def run(
        self,
        job: Job[Item, Result],
        items: Iterable[Item],
        *,
        taken: Callable[[Item], None] = lambda item: None,
        pause: Callable[[float], bool] = lambda seconds: False,
    ) -> Iterator[Result]:
        """As an engine runs a job; items in memory are those of two chunks a processor and one chunk more.

        Arrays in an item are read-only where it is taken.

        Raises:
            RuntimeUnavailableError: Ray is not installed, the cluster cannot be reached, a machine of it has other
                versions of qdqtool or onnxruntime, or work was lost more often than it is done again.
            Exception: whatever the job raises, with a note of where.
        """
        with _connected(self) as ray:
            active = _Run(ray, self, job, taken)
            since = time.monotonic()
            for item in items:
                active.add(item)
                if pause(time.monotonic() - since):
                    yield active.finish()
                    since = time.monotonic()
            yield active.finish()


class _Run(Generic[Item, Result]):
    """A run of one job: items on their way out, tasks at work, findings on their way back."""

    def __init__(self, ray: Any, engine: Ray, job: Job[Item, Result], taken: Callable[[Item], None]) -> None:
        self._ray, self._engine, self._job, self._taken = ray, engine, job, taken
        self._task = ray.remote(num_cpus=1, num_returns=2, max_retries=_RETRIES)(shipped())
        self._call: Call = (uuid.uuid4().hex, [self._put(pack(job))], versions())
        self._chunk: list[tuple[Item, Packed]] = []
        self._bytes = 0
        self._items = engine.chunk_items or 1  # a chunk
        self._tasks: dict[Any, tuple[list[Item], Any, int]] = {}  # status -> items, finding, chunks it is made of
        self._findings: list[tuple[Any, int]] = []  # of tasks that are done, and their chunks
        self._sum: list[Result] = []  # at most one: what has reached the driver, merged
        self._counted, self._cpus = -_RECOUNT, 1.0

    def add(self, item: Item) -> None:
        """Send the item as soon as its chunk is full and a task may begin; see what is done meanwhile."""
        packed = pack(item)
        self._chunk.append((item, packed))
        self._bytes += size(packed)
        if len(self._chunk) >= self._items or self._bytes >= self._engine.chunk_bytes:
            self._send()
        self._collect(wait=False)

    def finish(self) -> Result:
        """Wait for everything sent and return what was found since the last call: of no item, where none came."""
        if self._chunk or not (self._tasks or self._findings or self._sum):
            self._send()
        while self._tasks or self._findings:
            if self._tasks:
                self._collect(wait=True)
            elif len(self._findings) > 1:
                self._merge()
            else:
                self._bring(self._findings.pop()[0])
        return self._sum.pop()

    def _send(self) -> None:
        while len(self._tasks) >= _AHEAD * self._processors():
            self._collect(wait=True)
        chunk = self._put([packed for _, packed in self._chunk])
        status, finding = self._task.remote(self._call, "take", chunk)
        self._tasks[status] = [item for item, _ in self._chunk], finding, 1
        self._chunk, self._bytes = [], 0

    def _collect(self, *, wait: bool) -> None:
        """Deal with the tasks that are done; ``wait``: until one is."""
        if not self._tasks:
            return
        with _losses(self._ray):
            done, _ = self._ray.wait(
                list(self._tasks), num_returns=1 if wait else len(self._tasks), timeout=None if wait else 0
            )
        for status in done:
            self._done(status)

    def _done(self, status: Any) -> None:
        items, finding, chunks = self._tasks.pop(status)
        with _losses(self._ray):
            how, detail, nbytes = self._ray.get(status)
        if how == "failed":
            raise unpack(detail)
        if how == "refused":
            raise RuntimeUnavailableError(detail)
        for item in items:
            self._taken(item)
        if items and self._engine.chunk_items is None:
            wanted = max(_SECONDS, nbytes / _BYTES) * len(items) / max(detail, 1e-6)
            self._items = max(1, int(min(wanted, 2 * self._items, _MOST_ITEMS)))
        if chunks >= _AWAY:
            self._bring(finding)
            return
        self._findings.append((finding, chunks))
        if len(self._findings) == _TOGETHER:
            self._merge()

    def _merge(self) -> None:
        findings, self._findings = self._findings, []
        status, finding = self._task.remote(self._call, "merge", *(finding for finding, _ in findings))
        self._tasks[status] = [], finding, sum(chunks for _, chunks in findings)

    def _bring(self, finding: Any) -> None:
        """Add a finding to what the driver has; Ray may then forget what it was made of."""
        with _losses(self._ray):
            found: Result = unpack(self._ray.get(finding), own=True)
        self._sum = [self._job.merge(self._sum[0], found) if self._sum else found]

    def _put(self, packed: Packed | list[Packed]) -> Any:
        with _losses(self._ray):
            return self._ray.put(packed)

    def _processors(self) -> float:
        if time.monotonic() - self._counted > _RECOUNT:
            with _losses(self._ray):
                self._cpus = max(1.0, self._ray.cluster_resources().get("CPU", 1.0))
            self._counted = time.monotonic()
        return self._cpus


@contextlib.contextmanager
def _losses(ray: Any) -> Iterator[None]:
    """Say what Ray gave up."""
    try:
        yield
    except ray.exceptions.RayError as error:
        summary = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise RuntimeUnavailableError(
            f"Ray gave up: {summary} If processes were killed for want of memory, give each machine fewer processors."
        ) from error


@contextlib.contextmanager
def _connected(engine: Ray) -> Iterator[Any]:
    """Ray, ready; shut down afterwards if it was made ready here."""
    ray = _imported()
    if ray.is_initialized():
        yield ray
        return
    try:
        _connect(ray, engine)
        yield ray
    finally:
        ray.shutdown()


def _imported() -> Any:
    """Ray, silent about processes that it lost and replaces: it would print them where a report may be written."""
    silent = {_SKIPPED: "."} if _SKIPPED not in os.environ else {}
    os.environ.update(silent)  # Ray looks at it once, when it is imported
    try:
        import ray
    except ImportError as error:
        raise RuntimeUnavailableError("this needs Ray; install it: pip install qdqtool[ray]") from error
    finally:
        for name in silent:
            del os.environ[name]
    return ray


def _connect(ray: Any, engine: Ray) -> None:
    if engine.address is None:
        options = {"num_cpus": engine.cpus, "include_dashboard": False}
        trouble, advice = "Ray does not start on this machine", "its log is in /tmp/ray/session_latest/logs"
    else:
        options = {}
        trouble = f"the Ray cluster at {engine.address!r} cannot be used"
        advice = (
            "give the address (host:port) of a running cluster that this machine belongs to, and that has the same "
            "versions of Python and Ray; 'ray start' makes a cluster, or a machine part of one"
        )
    try:
        _must_answer(os.environ.get("RAY_ADDRESS", "") if engine.address == "auto" else engine.address or "")
        ray.init(engine.address or "local", log_to_driver=False, logging_level="error", **options)
    except Exception as error:  # of many kinds, some of them plain
        raise RuntimeUnavailableError(f"{trouble}: {error}; {advice}") from error


def _must_answer(address: str) -> None:
    """Raise OSError unless something listens at "host:port"; Ray itself would try for minutes."""
    host, colon, port = address.rpartition(":")
    if colon and "/" not in host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), _PATIENCE).close()

"""What runs in a worker process of Ray: one task of the Ray engine, and how values travel to it and back.

Whatever passes through Ray is pickled and unpickled here and is bytes to Ray, so that a machine without qdqtool, or
with another version of it, says so rather than fail somewhere in Ray.
"""

from __future__ import annotations

import functools
import pickle
import platform
import time
import traceback
from collections.abc import Callable, Iterable
from typing import Any, Final, Generic

from qdqtool.observation.engine import Item, Job, Result, Worker

Packed = tuple[bytes, list[Any]]
"""A pickle, and the memory of the arrays in it, which all processes of a machine share."""
Call = tuple[str, list[Any], dict[str, str]]
"""What every task of a run is told: the run's own name, where the packed job is, and the versions it must meet."""
Status = tuple[str, Any, int]
"""How a task went, as "done", seconds of work, bytes found; "failed", packed exception, 0; or "refused", why, 0."""


def pack(value: object) -> Packed:
    """The value as it travels; memory of arrays in it is not copied."""
    from ray import cloudpickle  # takes what a script itself defines, too

    buffers: list[pickle.PickleBuffer] = []
    return cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append), buffers


def unpack(packed: Packed, *, own: bool = False) -> Any:
    """The value; ``own``: in memory of its own, not in Ray's, which is read-only and may end before the value does."""
    data, buffers = packed
    return pickle.loads(data, buffers=[bytearray(buffer) for buffer in buffers] if own else buffers)


def size(packed: Packed) -> int:
    """Bytes that travel."""
    return len(packed[0]) + sum(memoryview(buffer).nbytes for buffer in packed[1])


def shipped() -> Callable[..., tuple[Status, Packed | None]]:
    """:func:`serve` as Ray gets it; being local it is sent as code, and so can tell that qdqtool is missing."""

    def qdqtool_task(call: Any, step: str, *packed: Any) -> Any:
        try:
            from qdqtool.observation.engine_ray_task import serve
        except ImportError as error:
            import platform

            why = f"{platform.node()} cannot import qdqtool ({error}); install the same version of it on every node"
            return ("refused", why, 0), None
        return serve(call, step, *packed)

    return qdqtool_task


class _Kept(Generic[Item, Result]):
    """What a worker process keeps between the tasks of a run."""

    def __init__(self, run: str, job: Job[Item, Result]) -> None:
        self.run, self._job = run, job

    @functools.cached_property
    def _worker(self) -> Worker[Item, Result]:
        return self._job.start()

    def take(self, items: Iterable[Packed]) -> tuple[Packed, float]:
        """What is in the items, and the seconds it took, without those the worker took to start."""
        worker = self._worker
        since = time.monotonic()
        for packed in items:
            worker.take(unpack(packed))
        return pack(worker.result()), time.monotonic() - since

    def merge(self, findings: Iterable[Packed]) -> tuple[Packed, float]:
        """Several findings as one, and no seconds, for how much a task merges is fixed."""
        return pack(functools.reduce(self._job.merge, (unpack(packed, own=True) for packed in findings))), 0.0


_KEPT: Final[list[_Kept[Any, Any]]] = []  # one at most; a worker process has no other place for it between two tasks


def serve(call: Call, step: str, *packed: Any) -> tuple[Status, Packed | None]:
    """Do one task.

    Args:
        call: see :data:`Call`.
        step: "take" or "merge".
        packed: to take: one list of packed items; to merge: packed findings.

    Returns:
        How it went, and what was found, packed; None where it did not go well.
    """
    run, job, expected = call
    if (here := versions()) != expected:
        return ("refused", _differing(here, expected), 0), None
    try:
        if not (_KEPT and _KEPT[0].run == run):
            _KEPT.clear()  # before another model is loaded
            import ray

            _KEPT.append(_Kept(run, unpack(ray.get(job[0]))))
        found, seconds = _KEPT[0].take(packed[0]) if step == "take" else _KEPT[0].merge(packed)
        return ("done", seconds, size(found)), found
    except Exception as error:
        return ("failed", _portable(error), 0), None


def versions() -> dict[str, str]:
    """Versions that must be one everywhere, for other code may give other bits."""
    import onnxruntime

    import qdqtool

    return {"qdqtool": qdqtool.__version__, "onnxruntime": onnxruntime.__version__}


def _differing(here: dict[str, str], expected: dict[str, str]) -> str:
    pairs = [
        f"{name} {here[name]} but {expected[name]} started the run" for name in here if here[name] != expected[name]
    ]
    return f"{platform.node()} has {', '.join(pairs)}; install the same versions on every node, or results may differ"


def _portable(error: Exception) -> Packed:
    """An exception as it can travel, its traceback as a note; one that cannot is replaced by a RuntimeError."""
    note = f"raised on {platform.node()}:\n{''.join(traceback.format_exception(error))}"
    error.add_note(note)
    try:
        packed = pack(error)
        unpack(packed)
    except Exception:  # whatever its own code raises while it is pickled
        replacement = RuntimeError(f"{type(error).__qualname__}: {error}")
        replacement.add_note(note)
        return pack(replacement)
    return packed

"""Model and data to statistics: one pass, one batch in memory, whatever batches the user's data came in."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import onnx

from qdqtool import batching, runtime
from qdqtool import model as models
from qdqtool.batching import Batching, Sample
from qdqtool.data import Data
from qdqtool.errors import DataError
from qdqtool.fit import Feeds
from qdqtool.statistics import Statistics, TensorStatistics

Progress = Callable[[str, int, int | None], None]
"""Called with the step's name, samples done and samples in all (None while unknown)."""

HELD: Final = batching.MAX_BATCH
"""Samples kept for the steps behind observation (bias correction, verification), chosen by content."""


@dataclass(frozen=True)
class Observation:
    """What one pass over the data gives.

    Attributes:
        statistics: of every tensor asked for.
        held: up to :data:`HELD` samples of least hash, in the order of their hashes.
        batching: how samples were joined.
    """

    statistics: Statistics
    held: tuple[Sample, ...]
    batching: Batching


def observe(
    proto: onnx.ModelProto,
    tensors: Sequence[str],
    data: Data,
    *,
    samples: int | None = None,
    provider: str = "cpu",
    progress: Progress | None = None,
) -> Observation:
    """Run the float model over the data and collect statistics of ``tensors``.

    Args:
        proto: the prepared float model.
        tensors: names of float tensors; graph inputs may be among them.
        data: calibration data.
        samples: use only so many samples, chosen by the hash of their content; None: all.
        provider: execution provider, already known to load.
        progress: told after every batch.

    Raises:
        DataError: no sample came.
        ModelError: the runtime cannot run the model on the data.
    """
    feeds = {info.name for info in models.inputs(proto)}
    wanted = [name for name in tensors if name not in feeds]
    threads = max(1, (os.cpu_count() or 1) - _observers())
    active = runtime.session(with_outputs(proto, wanted), provider=provider, threads=threads)
    names = [output.name for output in active.get_outputs()]

    def run(fed: Feeds) -> dict[str, object]:
        return dict(zip(names, runtime.run(active, names, fed), strict=True))

    plan = batching.plan_batching(models.inputs(proto), data, run)  # type: ignore[arg-type]  # tensor outputs are arrays
    found = {name: TensorStatistics() for name in tensors}
    held: list[Sample] = []
    done = 0
    with ThreadPoolExecutor(_observers(), "observe") as pool:
        pending: list[Future[None]] = []
        for batch in plan.batches(_chosen(plan, data, samples)):
            outputs = runtime.run(active, wanted, batch.feeds) if wanted else []
            for task in pending:  # one batch runs while the one before it is counted: two are in memory at most
                task.result()
            seen = {name: batch.feeds[name] for name in feeds & found.keys()} | dict(zip(wanted, outputs, strict=True))
            pending = [
                pool.submit(found[name].observe, batch.real(values), batch.keys) for name, values in seen.items()
            ]
            held = batching.choose([*held, *batch.samples], HELD)
            done += len(batch.samples)
            if progress is not None:
                progress("observe", done, samples if samples is not None else data.count)
        for task in pending:
            task.result()
    if done == 0:
        raise DataError(f"{data.description} holds no samples; calibration needs at least one")
    return Observation(Statistics(found, done), tuple(held), plan)


def _observers() -> int:
    """Threads that count while the runtime computes the next batch."""
    return max(1, (os.cpu_count() or 1) // 4)


def _chosen(plan: Batching, data: Data, samples: int | None) -> Iterator[Sample]:
    if samples is None:
        yield from plan.samples(data)
        return
    least = batching.choose((Sample({}, s.digest, s.position) for s in plan.samples(data)), samples)
    positions = {sample.position for sample in least}
    yield from (sample for sample in plan.samples(data) if sample.position in positions)


def with_outputs(proto: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """The model with more float tensors among its outputs; weights are shared with ``proto`` only by value."""
    extended = onnx.ModelProto()
    extended.CopyFrom(proto)
    known = {value.name for value in proto.graph.output}
    for name in tensors:
        if name not in known:
            extended.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return extended

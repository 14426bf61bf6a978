"""Model and data to statistics: one pass, a few batches in memory, whatever batches the user's data came in.

Batches run side by side, each on one thread of its own that runs the model and then counts what came out: neither
waits for the other, and a result computed on one thread does not depend on the batch it was part of.
"""

from __future__ import annotations

import functools
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final, Protocol

import numpy as np
import numpy.typing as npt
import onnx

from qdqtool import runtime
from qdqtool.data import batching
from qdqtool.data.batching import Batch, Batching, Held, Sample
from qdqtool.data.fit import Feeds
from qdqtool.data.source import Data
from qdqtool.errors import DataError, StatisticsError
from qdqtool.graphs import model as models
from qdqtool.graphs.scopes import bodies, read_by
from qdqtool.observation import device, sweeps
from qdqtool.observation.bodies import computed_inside, expose
from qdqtool.observation.device import DeviceStatistics, Library
from qdqtool.observation.engine import Engine, Local
from qdqtool.observation.fence import add_fences, fences, without_fences
from qdqtool.observation.sweeps import Sweeps
from qdqtool.statistics.tensor import Statistics, TensorStatistics

Progress = Callable[[str, int, int | None], None]
"""Called with the step's name, samples done and samples in all (None while unknown)."""

Told = Callable[[str], None]
"""Called with a line that the user should read."""

HELD: Final = 64
"""Samples kept for the steps behind observation (bias correction, verification), chosen by content."""
_FIRST_SAVE: Final = 2.0  # seconds until what was found is first saved
_COUNTED: Final = 3  # threads of which one may count at a time
_SAVING_SHARE: Final = 0.05  # of the time may go into saving


class Keeper(Protocol):
    """Keeps what was found of some tensors, so that an interrupted run can go on."""

    def partial(self, tensors: Sequence[str], axes: Mapping[str, int], plan: Batching) -> Statistics | None:
        """What an interrupted run found of exactly these tensors, on part of the samples; None where there is none."""
        ...

    def keep(self, statistics: Statistics, *, whole: bool, plan: Batching) -> None:
        """Save statistics of a group of tensors; ``whole``: on all samples."""
        ...


@dataclass(frozen=True)
class Observing:
    """How to observe; none of it changes what is found.

    Attributes:
        memory: bytes that observed activations may take at any time, on the GPU where they stay there; None: half of
            the machine's memory, or of what the GPU has free.
        engine: where batches run.
        told: told in a line, before the work begins, that the data pass several times, or that memory will not do.
    """

    memory: int | None = None
    engine: Engine = field(default_factory=Local)
    told: Told = lambda note: None


@dataclass(frozen=True)
class Observation:
    """What one pass over the data gives.

    Attributes:
        statistics: of every tensor asked for.
        held: up to :data:`HELD` samples of least hash, in the order of their hashes.
        batching: how samples were joined.
        sweeps: which tensors were observed together.
        resumed: samples that an interrupted run had observed already.
        notes: what the user should know.
    """

    statistics: Statistics
    held: tuple[Sample, ...]
    batching: Batching
    sweeps: Sweeps
    resumed: int = 0
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class ObserveJob:
    """Run a float model on batches and collect statistics of ``tensors``; an :class:`~qdqtool.observation.engine.Job`.

    Attributes:
        model: its outputs are the tensors, and perhaps more.
        tensors: names of float tensors; graph inputs may be among them.
        axes: tensor -> channel axis, where each channel's statistics are wanted too.
        provider: execution provider, already known to load.
        at_once: batches at once, however many threads bring some.
        library: counts activations on the device where they are computed; None: they come to the host.
    """

    model: onnx.ModelProto
    tensors: tuple[str, ...]
    axes: Mapping[str, int]
    provider: str = "cpu"
    at_once: int = 1
    library: Library | None = None

    def start(self) -> _Observer:
        """Load the model."""
        return _Observer(self)

    def merge(self, one: Statistics, other: Statistics) -> Statistics:
        """Statistics of both."""
        return one | other

    def run(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """Every output of the model that can be compared, by name."""
        names = without_fences(runtime.comparable(self.session))
        return dict(zip(names, runtime.run(self.session, names, feeds), strict=True))

    def compare(self, feeds: Feeds) -> dict[str, npt.NDArray[Any]]:
        """The same without what control-flow bodies compute, whose values lie in the order of the iterations."""
        inside = {name for node in self.model.graph.node for name in computed_inside(node)}
        return {name: values for name, values in self.run(feeds).items() if name not in inside}

    @functools.cached_property
    def session(self) -> Any:
        """The loaded model; each process has its own."""
        # On one thread a result does not depend on the batch it is part of, and with its fences the model computes the
        # same bits whatever is observed; to leave out all optimizations takes up to three times as long.
        return runtime.session(self.model, provider=self.provider, threads=1)

    def __getstate__(self) -> dict[str, Any]:
        """Without the session, which stays where it is."""
        return {name: value for name, value in self.__dict__.items() if name != "session"}


class _Observer:
    """Collects statistics of batches, from several threads at once."""

    def __init__(self, job: ObserveJob) -> None:
        inputs = {info.name for info in models.inputs(job.model)}
        self._session = job.session
        self._tensors, self._axes, self._library = job.tensors, job.axes, job.library
        self._inside = {name for node in job.model.graph.node for name in computed_inside(node)}
        self._fed = [name for name in job.tensors if name in inputs]
        self._wanted = [name for name in job.tensors if name not in inputs]
        self._room = threading.BoundedSemaphore(job.at_once)
        self._locks = {name: threading.Lock() for name in job.tensors}
        self._total = threading.Lock()
        self._counting = threading.BoundedSemaphore(max(1, job.at_once // _COUNTED))
        self._clear()

    def _clear(self) -> None:
        self._found = {name: self._counter(name) for name in self._tensors}
        self._samples = 0

    def _counter(self, name: str) -> TensorStatistics | DeviceStatistics:
        """On the device where the tensor is computed there, unless its channels are counted too."""
        if self._library is None or name in self._fed or self._on_host(name):
            return TensorStatistics(self._axes.get(name))
        return DeviceStatistics(self._library)

    def _on_host(self, name: str) -> bool:
        return name in self._axes or name in self._inside

    def take(self, batch: Batch) -> None:
        """Run the model on a batch and count what comes out."""
        keys = batch.keys
        with self._room:
            outputs = self._outputs(batch.feeds) if self._wanted else []
            # Fewer threads count than run the model: between its long loops counting wants the interpreter's lock, and
            # threads that hand it to and fro spend more time on that than on counting.
            with self._counting:
                for name in self._fed:
                    self._count(name, batch.feeds[name], batch, keys)
                for name in reversed(self._wanted):  # each is let go as soon as it is counted
                    self._count(name, outputs.pop(), batch, keys)
                with self._total:
                    self._samples += len(batch.samples)

    def _outputs(self, feeds: Feeds) -> list[Any]:
        """The tensors wanted: arrays, but where a library counts them on the device, what lies there."""
        if self._library is None:
            return runtime.run(self._session, self._wanted, feeds)
        places = {name: "cpu" if self._on_host(name) else self._library.device for name in self._wanted}
        outputs = runtime.run_bound(self._session, places, feeds)
        return [v.numpy() if self._on_host(name) else v for name, v in zip(self._wanted, outputs, strict=True)]

    def _count(self, name: str, values: Any, batch: Batch, keys: list[tuple[bytes, int]]) -> None:
        found = self._found[name]
        if isinstance(found, DeviceStatistics):
            with self._locks[name]:
                found.observe(values, batch)
            return
        # Nobody knows which values of a body belong to which sample; where samples run together, each has them all.
        shared = name in self._inside
        real = np.broadcast_to(values, (len(keys), *values.shape)) if shared else batch.real(values)
        if name in self._axes and real.ndim != values.ndim:
            raise StatisticsError(
                f"the batch of tensor {name!r} is not its axis 0, so its channels cannot be told apart; "
                "quantize it per tensor"
            )
        with self._locks[name]:
            found.observe(real, keys)

    def result(self) -> Statistics:
        """Statistics of the batches since the last call."""
        found = {n: f.result() if isinstance(f, DeviceStatistics) else f for n, f in self._found.items()}
        total = Statistics(found, self._samples)
        self._clear()
        return total


def observe(
    proto: onnx.ModelProto,
    tensors: Sequence[str],
    data: Data,
    *,
    axes: Mapping[str, int] | None = None,
    samples: int | None = None,
    provider: str = "cpu",
    options: Observing | None = None,
    progress: Progress | None = None,
    keeper: Keeper | None = None,
    fenced: frozenset[str] | None = None,
) -> Observation:
    """Run the float model over the data and collect statistics of ``tensors``.

    Args:
        proto: the prepared float model.
        tensors: names of float tensors; graph inputs may be among them.
        data: calibration data.
        axes: tensor -> channel axis, where each channel's statistics are wanted too.
        samples: use only so many samples, chosen by the hash of their content; None: all.
        provider: execution provider, already known to load.
        options: memory and engine.
        progress: told after every batch.
        keeper: saves what was found now and then, and gives what an interrupted run has saved.
        fenced: tensors that the runtime must not fuse across; None: see :func:`qdqtool.observation.fence.fences`.

    Raises:
        DataError: no sample came.
        ModelError: the runtime cannot run the model on the data.
    """
    options = options or Observing()
    library, note = device.find(provider)
    whole = ObserveJob(proto, tuple(tensors), axes or {}, provider, library=library)
    plan = _plan(whole, data, options)
    jobs = _Jobs(whole, plan, fences(proto, tensors) if fenced is None else fenced)
    cut = _batching(jobs, data, plan)
    if not cut.rows and (again := _plan(whole, data, options, rows=False)) != plan:  # feeds may have many rows
        plan, jobs = again, replace(jobs, plan=again)
    notes = (*plan.notes(), *filter(None, [note]))
    for line in notes:
        options.told(line)
    run = _Run(data, samples, cut, options.engine, progress, keeper, len(plan.groups))
    found: dict[str, TensorStatistics] = {}
    for job in jobs:
        found.update(run.sweep(job).tensors)
    return Observation(Statistics(found, run.samples), tuple(run.held.samples), cut, plan, run.resumed, notes)


@dataclass
class _Run:
    """The sweeps of one observation, one after the other."""

    data: Data
    count: int | None
    batching: Batching
    engine: Engine
    progress: Progress | None
    keeper: Keeper | None
    sweeps: int
    samples: int = 0
    resumed: int = 0
    held: Held = field(default_factory=lambda: Held(HELD))
    swept: int = 0
    drawn: bool = False
    pace: float = field(default_factory=lambda: _FIRST_SAVE)

    def sweep(self, job: ObserveJob) -> Statistics:
        """Statistics of one group of tensors on all samples."""
        total = self._partial(job)
        done = frozenset() if total is None else total.positions
        self.resumed = max(self.resumed, len(done))
        self.samples, self.drawn = 0, False
        reported = len(done)

        def tell(batch: Batch) -> None:
            nonlocal reported
            reported += len(batch.samples)
            if self.progress is not None:
                each = self.count if self.count is not None else self.data.count
                name = "observe" if self.sweeps == 1 else f"observe (sweep {self.swept + 1} of {self.sweeps})"
                self.progress(name, reported, each)

        batches = self.batching.batches(self._new(done))
        for part in self.engine.run(job, batches, taken=tell, pause=self._saves_now):
            total = part if total is None else job.merge(total, part)
            if not self.drawn:
                self._keep(total, whole=False)
        if total is None or not self.samples:
            raise DataError(f"{self.data.description} holds no samples; calibration needs at least one")
        self.swept += 1
        if self.swept < self.sweeps:
            self._keep(total, whole=True)
        return total

    def _partial(self, job: ObserveJob) -> Statistics | None:
        axes = {name: axis for name, axis in job.axes.items() if name in job.tensors}
        return self.keeper.partial(job.tensors, axes, self.batching) if self.keeper and job.tensors else None

    def _new(self, done: frozenset[int]) -> Iterator[Sample]:
        """The samples chosen, without those that were observed before; all of them are counted and may be held."""
        for sample in chosen(self.batching, self.data, self.count):
            self.samples += 1
            if not self.swept:
                self.held.add(sample)
            if sample.position not in done:
                yield sample
        self.drawn = True

    def _saves_now(self, seconds: float) -> bool:
        return self.keeper is not None and seconds >= self.pace

    def _keep(self, found: Statistics, *, whole: bool) -> None:
        if self.keeper is not None:
            start = time.monotonic()
            self.keeper.keep(found, whole=whole, plan=self.batching)
            self.pace = max(_FIRST_SAVE, (time.monotonic() - start) / _SAVING_SHARE)


def chosen(plan: Batching, data: Data, samples: int | None) -> Iterator[Sample]:
    """The samples to use: all of them, or so many of least hash, in the order of the data."""
    if samples is None:
        yield from plan.samples(data)
        return
    least = batching.choose((Sample({}, s.digest, s.position) for s in plan.samples(data)), samples)
    positions = {sample.position for sample in least}
    yield from (sample for sample in plan.samples(data) if sample.position in positions)


def _plan(whole: ObserveJob, data: Data, options: Observing, *, rows: bool = True) -> Sweeps:
    """Which tensors are observed together; ``rows``: a sample is a row, as it may turn out to be."""
    sizes = sweeps.known_sizes(whole.model, whole.tensors, rows=rows)
    if sizes is None:  # the first feed tells
        active = runtime.session(sweeps.measuring(whole.model, whole.tensors), provider=whole.provider)
        feed = batching.first_feed(models.inputs(whole.model), data)
        names = [sweeps.size_name(name) for name in whole.tensors]
        counts = (int(value) for value in runtime.run(active, names, feed))
        sizes = {name: 4 * count for name, count in zip(whole.tensors, counts, strict=True)}
    sizes |= {info.name: 0 for info in models.inputs(whole.model) if info.name in sizes}  # they are there anyway
    tried = rows and batching.tried(models.inputs(whole.model))
    return sweeps.plan_sweeps(sizes, *_limits(options, whole.library), sweeps.TRIAL if tried else 1)


def _limits(options: Observing, library: Library | None) -> tuple[int | None, int]:
    """Bytes that observed activations may take (None: half of the machine's memory), and batches at once."""
    if library is None:
        return options.memory, options.engine.threads
    return options.memory or library.free_bytes() // 2, min(options.engine.threads, device.AT_ONCE)


@dataclass(frozen=True)
class _Jobs:
    """A job for each sweep; the last one runs the whole model, those before only what their tensors need."""

    whole: ObserveJob
    plan: Sweeps
    fenced: frozenset[str]

    def __iter__(self) -> Iterator[ObserveJob]:
        """Each is made when it is wanted, as it holds a copy of the model's weights; one that is alone is kept."""
        if len(self.plan.groups) == 1:
            yield self._only
        else:
            yield from (self._job(group) for group in self.plan.groups)

    @functools.cached_property
    def _only(self) -> ObserveJob:
        return self._job(self.plan.groups[0])

    def _job(self, group: tuple[str, ...]) -> ObserveJob:
        inputs = {info.name for info in models.inputs(self.whole.model)}
        wanted = [name for name in group if name not in inputs]
        last = group == self.plan.groups[-1]
        model = (with_outputs if last else pruned)(self.whole.model, wanted)
        add_fences(model, self.fenced)
        return replace(self.whole, model=model, tensors=group, at_once=self.plan.threads)


def _batching(jobs: Iterable[ObserveJob], data: Data, plan: Sweeps) -> Batching:
    """How samples may be joined: as every sweep allows, and no more of them than the largest has room for."""
    found = []
    for job in jobs:
        _ = job.session  # loaded before several threads want it
        found.append(batching.plan_batching(models.inputs(job.model), data, job.compare, plan.batch_bytes))
        if any(True for _ in bodies(job.model.graph)):  # which branch runs may depend on what is joined
            return found[-1].alone()
        if not found[-1].rows or found[-1].fixed:
            return found[-1]
    return min(found, key=lambda cut: cut.size)


def with_outputs(proto: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """The model with more float tensors among its outputs; weights are shared with ``proto`` only by value."""
    extended = onnx.ModelProto()
    extended.CopyFrom(proto)
    known = {value.name for value in proto.graph.output}
    tensors = list(tensors)
    expose(extended.graph, dict.fromkeys(tensors, onnx.TensorProto.FLOAT))
    for name in tensors:
        if name not in known:
            extended.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return extended


def pruned(proto: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """The part of the model that computes ``tensors``, which are its only outputs."""
    needed = set(tensors)
    kept: list[onnx.NodeProto] = []
    for node in reversed(proto.graph.node):
        if needed.intersection(node.output) or not needed.isdisjoint(computed_inside(node)):
            kept.append(node)
            needed.update(read_by(node))
    part = onnx.ModelProto(ir_version=proto.ir_version, opset_import=proto.opset_import, functions=proto.functions)
    part.graph.name = proto.graph.name
    part.graph.node.extend(reversed(kept))
    part.graph.input.extend(proto.graph.input)
    part.graph.initializer.extend(t for t in proto.graph.initializer if t.name in needed)
    part.graph.sparse_initializer.extend(t for t in proto.graph.sparse_initializer if t.values.name in needed)
    return with_outputs(part, tensors)

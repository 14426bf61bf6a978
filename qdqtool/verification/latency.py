"""How long models take, side by side: interleaved runs in random order, bound inputs and outputs, honest intervals.

Every round runs each model once, in an order of its own, so that what disturbs the machine disturbs all of them alike.
The ratio of two models is the ratio of their medians; its interval is a bootstrap over blocks of consecutive rounds, as
a disturbance lasts longer than a round (Künsch: The jackknife and the bootstrap for general stationary observations,
1989).
"""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from qdqtool import runtime
from qdqtool.data import batching
from qdqtool.data.fit import Feeds
from qdqtool.data.source import Data
from qdqtool.errors import DataError, ModelError
from qdqtool.graphs import model as models
from qdqtool.graphs.model import InputInfo, ModelSource
from qdqtool.spec import FloatArray
from qdqtool.verification import placement

WARM_UP: Final = 15
"""Runs of each model that do not count."""
LEAST_ROUNDS: Final = 100
_RESAMPLED: Final = 2000
_BLOCKS: Final = 20  # of consecutive rounds
_PERCENT: Final = 95.0

Clock = Callable[[], float]


@dataclass(frozen=True)
class Latency:
    """One model's times, in milliseconds."""

    p50: float
    p90: float
    p99: float
    mean: float


@dataclass(frozen=True)
class Ratio:
    """A model's median time relative to the first model's, and the ends of its 95 % interval."""

    value: float
    lo: float
    hi: float


@dataclass(frozen=True)
class Bench:
    """What :func:`bench` measured.

    Attributes:
        provider: execution provider.
        threads: threads that a model runs on, each on a processor of its own; 0: as the runtime chooses, unpinned.
        batch: samples a run.
        rounds: runs of each model that counted.
        latency: by model, in the order given.
        ratios: of every model but the first.
        operators: operator -> count in the graph that runs, by model.
    """

    provider: str
    threads: int
    batch: int
    rounds: int
    latency: Mapping[str, Latency]
    ratios: Mapping[str, Ratio]
    operators: Mapping[str, Mapping[str, int]]


def bench(
    sources: Mapping[str, ModelSource],
    feeds: Feeds,
    *,
    provider: str = "cpu",
    threads: int = 0,
    seconds: float = 10.0,
    cuda_graph: bool = False,
    seed: int = 0,
) -> Bench:
    """Measure models side by side.

    Args:
        sources: by name, the first being what the others are compared with; same inputs.
        feeds: one run's inputs.
        provider: execution provider, already known to load.
        threads: run each model on so many threads, pinned to processors; 0: as the runtime chooses.
        seconds: time to spend, warm-up apart; at least 100 rounds are made.
        cuda_graph: let CUDA replay one captured graph of the whole model.
        seed: of the order in each round and of the bootstrap.

    Raises:
        DataError: no model was named, or fewer processors than threads are there.
        ModelError: a model does not load or does not run on the feeds.
    """
    if not sources:
        raise DataError("there is no model to measure; name at least one")
    replayed = {"enable_cuda_graph": "1"} if cuda_graph else {}
    operators: dict[str, dict[str, int]] = {}
    with _pinned(threads) as config:
        runners = []
        for name, source in sources.items():
            operators[name], active = _loaded(
                models.load(source), provider=provider, threads=threads, config=config, provider_options=replayed
            )
            runners.append(_runner(active, feeds, "cpu" if provider == "cpu" else "cuda"))
        times = measured(runners, seconds=seconds, seed=seed)
    names = list(sources)
    rows = next(iter(feeds.values())).shape
    return Bench(
        provider=provider,
        threads=threads,
        batch=rows[0] if rows else 1,
        rounds=times.shape[1],
        latency={name: latency_of(row) for name, row in zip(names, times, strict=True)},
        ratios={name: ratio_of(times[0], row, seed) for name, row in zip(names[1:], times[1:], strict=True)},
        operators=operators,
    )


def batch_of(inputs: Sequence[InputInfo], data: Data, count: int) -> Feeds:
    """One run's inputs out of the data: ``count`` samples of one shape, repeated where there are fewer.

    Args:
        inputs: what the model wants; where its batch is fixed, so many samples are taken.
        data: the samples.
        count: samples wanted.

    Raises:
        DataError: there are no samples, or the model takes one at a time and more are wanted.
    """
    if not batching.tried(inputs):
        feed = batching.first_feed(inputs, data)
        if count not in {1, *(array.shape[0] for array in feed.values() if array.ndim)}:
            raise DataError(f"the model's inputs do not leave their first axis free: {count} samples cannot be joined")
        return feed
    samples = list(itertools.islice(batching.Batching(rows=True, size=1).samples(data), count))
    if not samples:
        raise DataError(f"{data.description} holds no samples")
    alike = [s.feeds for s in samples if all(s.feeds[n].shape == a.shape for n, a in samples[0].feeds.items())]
    chosen = [alike[i % len(alike)] for i in range(count)]
    return {name: np.concatenate([feeds[name] for feeds in chosen]) for name in chosen[0]}


def measured(
    runners: Sequence[Callable[[], None]],
    *,
    seconds: float,
    seed: int = 0,
    clock: Clock = time.perf_counter,
) -> FloatArray:
    """Milliseconds of every run that counts, float64 (runners, rounds)."""
    rng = np.random.default_rng(seed)
    for run in runners:
        for _ in range(WARM_UP):
            run()
    rounds: list[list[float]] = []
    end = clock() + seconds
    while len(rounds) < LEAST_ROUNDS or clock() < end:
        taken = [0.0] * len(runners)
        for index in rng.permutation(len(runners)):  # whoever runs behind the largest model finds the caches cold
            start = clock()
            runners[index]()
            taken[index] = (clock() - start) * 1e3
        rounds.append(taken)
    return np.array(rounds).T


def latency_of(times: FloatArray) -> Latency:
    """Percentiles and mean of milliseconds (rounds,)."""
    p50, p90, p99 = np.percentile(times, [50, 90, 99])
    return Latency(float(p50), float(p90), float(p99), float(times.mean()))


def ratio_of(reference: FloatArray, times: FloatArray, seed: int = 0) -> Ratio:
    """Ratio of the medians of two models measured in the same rounds, float64 (rounds,) each."""
    rng = np.random.default_rng(seed)
    length = max(1, math.ceil(times.size / _BLOCKS))
    starts = rng.integers(0, times.size, (_RESAMPLED, math.ceil(times.size / length)))
    index = (starts[:, :, None] + np.arange(length)).reshape(_RESAMPLED, -1)[:, : times.size] % times.size
    ratios = np.median(times[index], axis=1) / np.median(reference[index], axis=1)
    outside = (100 - _PERCENT) / 2
    lo, hi = np.percentile(ratios, [outside, 100 - outside])
    return Ratio(float(np.median(times) / np.median(reference)), float(lo), float(hi))


def _loaded(proto: onnx.ModelProto, **options: Any) -> tuple[dict[str, int], Any]:
    """Operators in the graph that runs, and the session."""
    with tempfile.TemporaryDirectory(prefix="qdqtool-") as folder:
        path = Path(folder) / "optimized.onnx"
        active = runtime.session(proto, optimized_path=path, **options)
        return placement.operators(onnx.load(path, load_external_data=False)), active


def _runner(active: Any, feeds: Feeds, device: str) -> Callable[[], None]:
    """One run on inputs that lie on the device, into outputs that lie there, each in the same place every time."""
    import onnxruntime as ort

    half = {given.name for given in active.get_inputs() if given.type == "tensor(float16)"}
    outputs = [output.name for output in active.get_outputs()]
    try:
        binding = active.io_binding()
        for name, value in feeds.items():
            fed = value.astype(np.float16) if name in half else value
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(fed, device, 0))
        for name in outputs:
            binding.bind_output(name, device)
        active.run_with_iobinding(binding)  # tells the outputs' shapes
        made = binding.get_outputs()
        binding.clear_binding_outputs()
        for name, value in zip(outputs, made, strict=True):
            binding.bind_ortvalue_output(name, value)
    except Exception as error:  # the runtime's own exceptions share no base but Exception
        raise ModelError(f"ONNX Runtime cannot run the model on these inputs: {error}") from error

    def run() -> None:
        active.run_with_iobinding(binding)
        if device != "cpu":
            binding.synchronize_outputs()

    return run


@contextlib.contextmanager
def _pinned(threads: int) -> Iterator[dict[str, str]]:
    """Pin this thread to a processor, and give the configuration that pins a session's others."""
    spinning = {"session.intra_op.allow_spinning": "1"}  # the runtime's own default, and so what users meet
    if not threads:
        yield spinning
        return
    if not hasattr(os, "sched_setaffinity"):
        raise DataError("threads cannot be pinned on this system; leave --threads out")
    before = os.sched_getaffinity(0)
    if threads > len(before):
        raise DataError(f"{threads} threads were asked for, and this process may use {len(before)} processors")
    first, *others = sorted(before)[:threads]
    pinned = {"session.intra_op_thread_affinities": ";".join(str(cpu + 1) for cpu in others)} if others else {}
    os.sched_setaffinity(0, {first})
    try:
        yield {**spinning, **pinned}
    finally:
        os.sched_setaffinity(0, before)

"""How long models take, side by side: interleaved runs in random order, bound inputs and outputs, honest intervals.

Every round runs each model once, in an order of its own, so that what disturbs the machine disturbs all of them alike.
The ratio of two models is the ratio of their medians; its interval is a bootstrap over blocks of consecutive rounds, as
a disturbance lasts longer than a round (Künsch: The jackknife and the bootstrap for general stationary observations,
1989).
"""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from qdqtool.data import batching
from qdqtool.data.fit import Feeds
from qdqtool.data.source import Data
from qdqtool.errors import DataError, ModelError
from qdqtool.graphs import model as models
from qdqtool.graphs.model import InputInfo, ModelSource
from qdqtool.spec import FloatArray
from qdqtool.verification.running import Work, loaded, pinned, runner

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
class Variant:
    """A model with a setting of its own to measure it in.

    Attributes:
        source: the model.
        provider: execution provider, where it is another one than the others'.
        provider_options: of that provider, such as ``{"use_tf32": "0"}`` for CUDA.
    """

    source: ModelSource
    provider: str | None = None
    provider_options: Mapping[str, str] = field(default_factory=dict)


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
        work: what a model does in the graph that runs, by model.
        failed: models that do not load or run, with the reason; the first is never among them.
    """

    provider: str
    threads: int
    batch: int
    rounds: int
    latency: Mapping[str, Latency]
    ratios: Mapping[str, Ratio]
    work: Mapping[str, Work]
    failed: Mapping[str, str] = field(default_factory=dict)

    def broken(self, most: float | None) -> list[str]:
        """Every model that takes more than ``most`` times as long as the first, in words."""
        first = next(iter(self.latency))
        return [
            f"{name} takes {ratio.value:.2f} times as long as {first} ({ratio.lo:.2f} to {ratio.hi:.2f}) at batch "
            f"{self.batch}, more than --max-latency-ratio {most:g}"
            for name, ratio in self.ratios.items()
            if most is not None and ratio.value > most
        ]


def bench(
    sources: Mapping[str, ModelSource | Variant],
    feeds: Feeds,
    *,
    provider: str = "cpu",
    threads: int = 0,
    seconds: float = 10.0,
    cuda_graph: bool = False,
    seed: int = 0,
    strict: bool = True,
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
        strict: a model that does not load or run is an error; else it is listed among those that failed, unless it is
            the first.

    Raises:
        DataError: no model was named, or fewer processors than threads are there.
        ModelError: a model does not load or does not run on the feeds.
    """
    if not sources:
        raise DataError("there is no model to measure; name at least one")
    replayed = {"enable_cuda_graph": "1"} if cuda_graph else {}
    work: dict[str, Work] = {}
    failed: dict[str, str] = {}
    runners: dict[str, Callable[[], None]] = {}
    with pinned(threads) as config:
        for name, given in sources.items():
            one = given if isinstance(given, Variant) else Variant(given)
            try:
                work[name], runners[name] = _started(
                    one, feeds, one.provider or provider, replayed, threads=threads, config=config
                )
            except ModelError as error:
                if strict or not runners:
                    raise
                failed[name] = str(error)
        times = measured(list(runners.values()), seconds=seconds, seed=seed)
    first, *others = zip(runners, times, strict=True)
    rows = next(iter(feeds.values())).shape
    return Bench(
        provider=provider,
        threads=threads,
        batch=rows[0] if rows else 1,
        rounds=times.shape[1],
        latency={name: latency_of(row) for name, row in (first, *others)},
        ratios={name: ratio_of(first[1], row, seed) for name, row in others},
        work=work,
        failed=failed,
    )


def _started(
    one: Variant, feeds: Feeds, provider: str, replayed: Mapping[str, str], **options: Any
) -> tuple[Work, Callable[[], None]]:
    """Load a model; what it does, and a function that runs it once."""
    settings = {**one.provider_options, **(replayed if provider == "cuda" else {})}
    work, active = loaded(models.load(one.source), provider=provider, provider_options=settings, **options)
    return work, runner(active, feeds, "cpu" if provider == "cpu" else "cuda")


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

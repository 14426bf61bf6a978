"""Models side by side at several batch sizes: latency, memory, other precisions, and what would be faster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from qdqtool.data.source import Data
from qdqtool.errors import ModelError
from qdqtool.graphs import model as models
from qdqtool.graphs.model import ModelSource
from qdqtool.verification import latency
from qdqtool.verification.latency import Bench, Variant
from qdqtool.verification.memory import Memory, peak
from qdqtool.verification.suggestion import Suggestion, suggest
from qdqtool.verification.variants import forms, without_tf32


@dataclass(frozen=True)
class Benchmark:
    """What :func:`benchmark` measured.

    Attributes:
        runs: latency, one for each batch size.
        memory: batch size -> model -> its peak memory; empty where it was not asked for.
        suggestions: model that was slower than the first one at some batch size -> what else to try, at that size.
        missing: models that could not be made or measured -> why.
    """

    runs: tuple[Bench, ...]
    memory: Mapping[int, Mapping[str, Memory]] = field(default_factory=dict)
    suggestions: Mapping[str, tuple[Suggestion, ...]] = field(default_factory=dict)
    missing: Mapping[str, str] = field(default_factory=dict)

    def broken(self, most: float | None) -> list[str]:
        """Every model and batch size that takes more than ``most`` times as long as the first model, in words."""
        return [line for run in self.runs for line in run.broken(most)]


def benchmark(
    sources: Mapping[str, ModelSource],
    data: Data,
    *,
    batches: Sequence[int] = (1,),
    beside: Sequence[str] = (),
    provider: str = "cpu",
    memory: bool = False,
    suggestions: bool = False,
    **options: Any,
) -> Benchmark:
    """Measure models side by side.

    Args:
        sources: by name, the first being the float model that the others are compared with; same inputs.
        data: where the inputs come from, more than once readable.
        batches: samples a run, one measurement each.
        beside: precisions of :data:`qdqtool.verification.variants.FORMS` that the first model is brought to as well.
        provider: execution provider, already known to load; on CUDA the first model is measured without TF32 too.
        memory: also measure peak memory, each model in a process of its own.
        suggestions: where a model is slower than the first, measure what else that one could become.
        options: threads, seconds, cuda_graph and seed of :func:`qdqtool.verification.latency.bench`.

    Raises:
        QdqError: a model of ``sources`` does not load or run, or the data do not fit.
    """
    first = next(iter(sources))
    inputs = models.inputs(models.load(sources[first]))
    made, missing = forms(sources[first], beside, provider)
    others: dict[str, ModelSource | Variant] = {f"{name} of {first}": proto for name, proto in made.items()}
    alike: dict[str, ModelSource | Variant] = {**sources, **without_tf32(sources[first], provider), **others}
    runs, taken, slower = [], {}, {}
    for size in batches:
        feeds = latency.batch_of(inputs, data, size)
        found = latency.bench(alike, feeds, provider=provider, **options)
        runs.append(found)
        if memory:
            taken[size], failed = _memory(alike, feeds, provider)
            missing |= failed
        slow = [name for name, ratio in found.ratios.items() if name in sources and ratio.lo > 1]
        for name in slow if suggestions else ():
            slower[name] = tuple(suggest(sources[first], sources[name], feeds, provider=provider, **options))
    return Benchmark(tuple(runs), taken, slower, missing)


def _memory(
    sources: Mapping[str, ModelSource | Variant], feeds: Any, provider: str
) -> tuple[dict[str, Memory], dict[str, str]]:
    found, failed = {}, {}
    for name, given in sources.items():
        one = given if isinstance(given, Variant) else Variant(given)
        try:
            found[name] = peak(one.source, feeds, provider=provider, provider_options=one.provider_options)
        except ModelError as error:
            failed[f"memory of {name}"] = str(error)
    return found, failed

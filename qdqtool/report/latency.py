"""What ``bench`` measured, as text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Group, RenderableType
from rich.text import Text

from qdqtool.report.layout import grid, head
from qdqtool.units import count, size
from qdqtool.verification.benchmark import Benchmark
from qdqtool.verification.latency import Bench, Ratio
from qdqtool.verification.memory import Memory
from qdqtool.verification.placement import is_integer_kernel
from qdqtool.verification.suggestion import Suggestion, causes

_TITLES = ("model", "batch", "p50", "p90", "p99", "ratio", "95 % interval")


def table(found: Benchmark) -> RenderableType:
    """Times, ratios and memory of all models at all batch sizes; why one is slower, and what would be faster."""
    parts: list[RenderableType] = [*latencies(found.runs, found.memory)]
    for run in found.runs:
        for name, ratio in run.ratios.items():
            if ratio.lo > 1:
                parts += [Text(line, style="yellow") for line in why_slower(run, name, ratio)]
    for name, suggestions in found.suggestions.items():
        parts += [head("Instead of", name), *map(_suggested, suggestions)]
    parts += [Text(f"not measured: {name}: {reason}", style="yellow") for name, reason in found.missing.items()]
    return Group(*parts)


def latencies(runs: Sequence[Bench], memory: Mapping[int, Mapping[str, Memory]] | None = None) -> list[RenderableType]:
    """A table of times with one row for each model and batch size."""
    first, taken = runs[0], memory or {}
    rows = grid(len(_TITLES) + bool(taken))
    rows.add_row(*(Text(title, style="dim") for title in (*_TITLES, *(("peak memory",) if taken else ()))))
    for run in runs:
        for name, one in run.latency.items():
            ratio = run.ratios.get(name)
            compared = ("", "") if ratio is None else (f"{ratio.value:.2f}", interval(ratio))
            times = (milliseconds_of(ms) for ms in (one.p50, one.p90, one.p99))
            peak = taken.get(run.batch, {}).get(name)
            more = () if not taken else ("" if peak is None else size(peak.peak),)
            rows.add_row(Text(name), str(run.batch), *times, *compared, *more)
    threads = f"{count(first.threads, 'pinned thread')}" if first.threads else "the runtime's own choice of threads"
    rounds = ", ".join(dict.fromkeys(str(run.rounds) for run in runs))
    where = f"{first.provider.upper()} provider, {threads}, {rounds} runs each"
    parts: list[RenderableType] = [head("Latency", where), rows]
    hows = dict.fromkeys(one.how for by_model in taken.values() for one in by_model.values())
    return parts + [Text(f"  peak memory: {how}", style="dim") for how in hows]


def interval(ratio: Ratio) -> str:
    """Both ends of a ratio's interval."""
    return f"{ratio.lo:.2f} to {ratio.hi:.2f}"


def milliseconds_of(milliseconds: float) -> str:
    """A time of a run: in microseconds where it is short."""
    if milliseconds < 0.9995:
        return f"{milliseconds * 1e3:.0f} us"
    return f"{milliseconds:.2f} ms" if milliseconds < 9.995 else f"{milliseconds:.1f} ms"


def why_slower(found: Bench, name: str, ratio: Ratio) -> list[str]:
    """What a model that takes longer than the first does besides, or instead of, integer arithmetic."""
    if ratio.lo <= 1:
        return []
    work = found.work[name]
    integer = sum(number for op, number in work.operators.items() if is_integer_kernel(op))
    line = f"{name} is slower at batch {found.batch}, with {count(integer, 'operator')} in integers"
    return [line, *(f"  {cause}" for cause in causes(work))]


def _suggested(one: Suggestion) -> RenderableType:
    if one.ratio is None:
        return Text(f"  {one.what}: not measured ({one.unmeasured})", style="dim")
    verdict = "faster" if one.is_faster else "not faster"
    text = f"  {one.what}: {one.ratio.value:.2f} times the float model's time ({interval(one.ratio)}), {verdict}"
    return Text(text, style="green" if one.is_faster else "dim")

"""What ``bench`` measured, as text."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.text import Text

from qdqtool.report.layout import grid, head
from qdqtool.units import count
from qdqtool.verification.latency import Bench, Ratio
from qdqtool.verification.placement import is_integer_kernel

_CONVERSIONS = ("QuantizeLinear", "DequantizeLinear")
_LAYERS = ("Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose")


def table(found: Bench) -> RenderableType:
    """Times and ratios of all models, and why one that is slower is."""
    rows = grid(6)
    rows.add_row(*(Text(title, style="dim") for title in ("model", "p50", "p90", "p99", "ratio", "95 % interval")))
    for name, one in found.latency.items():
        ratio = found.ratios.get(name)
        value, interval = ("", "") if ratio is None else (f"{ratio.value:.2f}", f"{ratio.lo:.2f} to {ratio.hi:.2f}")
        rows.add_row(Text(name), *(milliseconds_of(ms) for ms in (one.p50, one.p90, one.p99)), value, interval)
    threads = f"{count(found.threads, 'pinned thread')}" if found.threads else "the runtime's own choice of threads"
    where = f"{found.provider.upper()} provider, batch {found.batch}, {threads}, {count(found.rounds, 'run')} each"
    parts: list[RenderableType] = [head("Latency", where), rows]
    for name, ratio in found.ratios.items():
        parts += [Text(line, style="yellow") for line in why_slower(found, name, ratio)]
    return Group(*parts)


def milliseconds_of(milliseconds: float) -> str:
    """A time of a run: in microseconds where it is short."""
    if milliseconds < 0.9995:
        return f"{milliseconds * 1e3:.0f} us"
    return f"{milliseconds:.2f} ms" if milliseconds < 9.995 else f"{milliseconds:.1f} ms"


def why_slower(found: Bench, name: str, ratio: Ratio) -> list[str]:
    """What a model that takes longer than the first does besides, or instead of, integer arithmetic."""
    if ratio.lo <= 1:
        return []
    operators = found.operators[name]
    integer = sum(number for op, number in operators.items() if is_integer_kernel(op))
    conversions = sum(operators.get(op, 0) for op in _CONVERSIONS)
    layers = sum(operators.get(op, 0) for op in _LAYERS)
    return [
        f"{name} is slower: {count(conversions, 'Q or DQ node')} left in the graph that runs, "
        f"{count(layers, 'convolution or matrix product')} in float, {count(integer, 'operator')} in integers"
    ]

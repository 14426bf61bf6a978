"""What ``validate`` found out: the comparison, where everything runs, and latency, as a value, JSON and text."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
from rich.console import Group, RenderableType
from rich.text import Text

from qdqtool.data.source import Data
from qdqtool.graphs import model as models
from qdqtool.graphs.model import ModelSource
from qdqtool.report.latency import latencies, why_slower
from qdqtool.report.layout import grid, head, more
from qdqtool.report.placed import listed_rows
from qdqtool.report.terminal import OUTPUTS, comparison
from qdqtool.report.values import plain
from qdqtool.units import db, percent
from qdqtool.verification import latency, partition, placement
from qdqtool.verification.comparison import Comparison
from qdqtool.verification.kernel_error import KernelError
from qdqtool.verification.latency import Bench
from qdqtool.verification.listing import Placed, listing
from qdqtool.verification.partition import Partition

SECONDS = 5.0
"""Time to measure latency for, at least 100 runs of each model."""


@dataclass(frozen=True)
class Placing:
    """Where a quantized model runs.

    Attributes:
        provider: execution provider.
        placement_only: nothing ran there: the provider was loaded with CUDA libraries that do nothing.
        rows: every node and every Q/DQ pair.
        partition: which provider runs which node; None where all is on the CPU.
    """

    provider: str
    placement_only: bool
    rows: tuple[Placed, ...]
    partition: Partition | None = None


@dataclass(frozen=True)
class Validation:
    """A comparison, where the quantized model runs, and both models' latency where it was measured."""

    comparison: Comparison
    placing: tuple[Placing, ...]
    latency: Bench | None = None

    def to_json(self) -> str:
        """The fields of the comparison, with ``placing`` and ``latency`` beside them, as indented JSON."""
        values = dataclasses.asdict(self)
        return json.dumps(plain({**values.pop("comparison"), **values}), indent=2, allow_nan=False)


def placed(proto: onnx.ModelProto, path: str, provider: str, stubs: Path | None = None) -> tuple[Placing, ...]:
    """Where a quantized model runs on a provider; with CUDA libraries that do nothing, on CUDA too.

    Args:
        proto: the quantized model.
        path: its file.
        provider: execution provider, already known to load.
        stubs: a folder of CUDA libraries, for another process.

    Raises:
        QdqError: the model does not load, or CUDA does not with these libraries.
    """
    config = {} if provider == "cpu" else partition.RECORD
    optimized, active = placement.load(proto, provider=provider, config=config)
    parted = None if provider == "cpu" else partition.read(active, optimized, provider)
    found = [Placing(provider, False, listing(proto, optimized, provider=provider, partition=parted), parted)]
    if stubs is not None:
        with tempfile.TemporaryDirectory(prefix="qdqtool-") as folder:
            saved = Path(folder) / "optimized.onnx"
            parted = partition.partition_apart(path, stubs, optimized=saved)
            rows = listing(proto, onnx.load(saved), provider="cuda", partition=parted)
        found.append(Placing("cuda", not parted.gpu, rows, parted))
    return tuple(found)


def timed(reference: ModelSource, quantized: ModelSource, data: Data, provider: str) -> Bench:
    """Latency of both models on one sample of the data."""
    feeds = latency.batch_of(models.inputs(models.load(reference)), data, 1)
    sources = {"float": reference, "quantized": quantized}
    return latency.bench(sources, feeds, provider=provider, seconds=SECONDS)


def page(found: Validation, *, reference: str, quantized: str, verbose: bool = False) -> RenderableType:
    """What ``validate`` shows."""
    parts: list[RenderableType] = [comparison(found.comparison, reference=reference, quantized=quantized)]
    parts += _kernels(found.comparison)
    if found.latency is not None:
        parts += latencies([found.latency])
        for name, ratio in found.latency.ratios.items():
            parts += [Text(line, style="yellow") for line in why_slower(found.latency, name, ratio)]
    for one in found.placing:
        if verbose or one.placement_only:
            parts += _placing(one, verbose=verbose)
    return Group(*parts)


def _placing(one: Placing, *, verbose: bool) -> list[RenderableType]:
    note = "placement only: no GPU, nothing ran there" if one.placement_only else ""
    parts: list[RenderableType] = [head(f"On the {one.provider.upper()} provider", note)]
    parts += [] if one.partition is None else [Text(f"  {one.partition}")]
    return [*parts, *(listed_rows(one.rows) if verbose else ())]


def _kernels(found: Comparison) -> list[RenderableType]:
    """Which fused kernels are behind the difference between the two forms of the model."""
    if found.kernels is None or not found.apart:
        return []
    differing = [kernel for kernel in found.kernels if kernel.differing or kernel.total_db < float("inf")]
    worst = db(min(found.apart.values()))
    parts: list[RenderableType] = [head("Fused against emulated", f"the worst output: {worst}")]
    if not found.kernels:
        return [
            *parts,
            Text("  no kernel could be compared: nothing fused, or all is in control-flow bodies", style="dim"),
        ]
    if not differing:
        return [*parts, Text(f"  all {len(found.kernels)} fused kernels give what their Q/DQ nodes give", style="dim")]
    return [*parts, _table(differing[:OUTPUTS]), *more(len(differing) - OUTPUTS, "kernel", "--json lists all")]


def _table(kernels: Sequence[KernelError]) -> RenderableType:
    table = grid(5)
    titles = ("fused kernel", "operator", "on equal inputs", "entries that differ", "with all before")
    table.add_row(*(Text(title, style="dim") for title in titles))
    for one in kernels:
        own, total = db(one.own_db), db(one.total_db)
        table.add_row(Text(one.kernel), one.operator, own, percent(100 * one.differing), total)
    return table

"""The command that measures latency."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import click

from qdqtool.cli.options import PROVIDER, Command, option, say

_SECONDS: Final = 10.0


class Sizes(click.ParamType[tuple[int, ...]]):
    """Batch sizes, as in ``1,8,64``."""

    name = "N,..."

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, ...]:
        """Read whole numbers from 1 on, each once."""
        if isinstance(value, tuple):
            return value
        try:
            sizes = tuple(dict.fromkeys(int(part) for part in str(value).split(",")))
        except ValueError:
            sizes = (0,)
        if min(sizes) < 1:
            self.fail(f"{value!r} is no list of batch sizes, as in 1,8,64", param, ctx)
        return sizes


@click.command(
    cls=Command,
    examples=(
        "qdqtool bench model.onnx model.qdq.onnx --data eval.npz",
        "qdqtool bench model.onnx model.qdq.onnx --data synthetic:8 --batch 1,8 --threads 4",
        "qdqtool bench model.onnx model.qdq.onnx --data eval.npz --beside fp16,w8a16,w4a16 --suggest",
        "qdqtool bench model.onnx model.qdq.onnx --data eval.npz --max-latency-ratio 0.8",
    ),
)
@click.argument("files", nargs=-1, required=True, metavar="MODEL...")
@option("--data", required=True, metavar="PATH", help="Where the inputs come from: .npz, .npy, a folder, synthetic:N.")
@option("--batch", type=Sizes(), default=(1,), metavar="N,...", help="Samples a run, one or more sizes. [default: 1]")
@option("--beside", metavar="NAME,...", help="Also bring the first MODEL to fp16, w8a16 or w4a16.")
@PROVIDER
@option("--threads", type=click.IntRange(min=1), metavar="N", help="Pin a model's N threads, each to a processor.")
@option("--seconds", type=float, default=_SECONDS, metavar="S", help=f"Time for each size. [default: {_SECONDS:g}]")
@option("--cuda-graph", is_flag=True, help="Let CUDA replay one captured graph of the whole model.")
@option("--memory", is_flag=True, help="Also measure peak memory, each model in a process of its own.")
@option("--suggest", is_flag=True, help="Where a MODEL is slower, say why and measure what would be faster.")
@option("--max-latency-ratio", type=float, metavar="R", help="Gate: exit status 1 where a MODEL takes longer.")
@option("--json", "as_json", is_flag=True, help="Print the figures as JSON.")
@option("-q", "--quiet", is_flag=True, help="Print warnings and errors only.")
def bench(files: tuple[str, ...], data: str, **given: Any) -> None:
    """Measure how long each MODEL takes, side by side; the first is what the others are compared with.

    Every round runs each model once, in random order. The ratio's interval is for 95 %.
    """
    from qdqtool import runtime
    from qdqtool.data.source import open_data
    from qdqtool.errors import GateError
    from qdqtool.graphs import model as models
    from qdqtool.report import machine, terminal
    from qdqtool.report.latency import table
    from qdqtool.verification.benchmark import benchmark
    from qdqtool.verification.variants import parse_forms

    if len(set(files)) < len(files):
        raise click.UsageError("the same model is given twice")
    beside = parse_forms(given["beside"])
    provider, note = runtime.resolve_provider(given["provider"])
    if note is not None:
        say(note)
    waiting = terminal.console(stderr=True).status(f"Measuring for {given['seconds']:g} s and more")
    with (
        open_data(data, models.inputs(models.load(files[0]))) as opened,
        contextlib.nullcontext() if given["quiet"] else waiting,
    ):
        found = benchmark(
            dict(zip(files, files, strict=True)),
            opened,
            batches=given["batch"],
            beside=beside,
            provider=provider,
            memory=given["memory"],
            suggestions=given["suggest"],
            threads=given["threads"] or 0,
            seconds=given["seconds"],
            cuda_graph=given["cuda_graph"],
        )
    if given["as_json"]:
        click.echo(machine.to_json(found))
    if not given["quiet"]:
        terminal.console(stderr=given["as_json"]).print(table(found))
    broken = found.broken(given["max_latency_ratio"])
    if broken:
        raise GateError("; ".join(broken))

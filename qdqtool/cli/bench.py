"""The command that measures latency."""

from __future__ import annotations

import contextlib
from typing import Any, Final

import click

from qdqtool.cli.options import PROVIDER, Command, option, say

_SECONDS: Final = 10.0


@click.command(
    cls=Command,
    examples=(
        "qdqtool bench model.onnx model.qdq.onnx --data eval.npz",
        "qdqtool bench model.onnx model.qdq.onnx --data synthetic:8 --batch 8 --threads 4",
        "qdqtool bench model.onnx model.qdq.onnx --data eval.npz --max-latency-ratio 0.8",
    ),
)
@click.argument("files", nargs=-1, required=True, metavar="MODEL...")
@option("--data", required=True, metavar="PATH", help="Where the inputs come from: .npz, .npy, a folder, synthetic:N.")
@option("--batch", type=click.IntRange(min=1), default=1, metavar="N", help="Samples a run. [default: 1]")
@PROVIDER
@option("--threads", type=click.IntRange(min=1), metavar="N", help="Pin a model's N threads, each to a processor.")
@option("--seconds", type=float, default=_SECONDS, metavar="S", help=f"Time to spend. [default: {_SECONDS:g}]")
@option("--cuda-graph", is_flag=True, help="Let CUDA replay one captured graph of the whole model.")
@option("--max-latency-ratio", type=float, metavar="R", help="Gate: exit status 1 where a model takes longer.")
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
    from qdqtool.verification import latency

    if len(set(files)) < len(files):
        raise click.UsageError("the same model is given twice")
    provider, note = runtime.resolve_provider(given["provider"])
    if note is not None:
        say(note)
    inputs = models.inputs(models.load(files[0]))
    with open_data(data, inputs) as opened:
        feeds = latency.batch_of(inputs, opened, given["batch"])
    waiting = terminal.console(stderr=True).status(f"Measuring for about {given['seconds']:g} s")
    with contextlib.nullcontext() if given["quiet"] else waiting:
        found = latency.bench(
            dict(zip(files, files, strict=True)),
            feeds,
            provider=provider,
            threads=given["threads"] or 0,
            seconds=given["seconds"],
            cuda_graph=given["cuda_graph"],
        )
    if given["as_json"]:
        click.echo(machine.to_json(found))
    if not given["quiet"]:
        terminal.console(stderr=given["as_json"]).print(table(found))
    most = given["max_latency_ratio"]
    for name, ratio in found.ratios.items():
        if most is not None and ratio.value > most:
            raise GateError(
                f"{name} takes {ratio.value:.2f} times as long as {files[0]} ({ratio.lo:.2f} to {ratio.hi:.2f}), "
                f"more than --max-latency-ratio {most:g}"
            )

"""The command that compares a quantized model with its float one, and what ``quantize --eval`` shares with it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from qdqtool.cli.options import REPORT, RUN_OPTIONS, Command, option, wrote

if TYPE_CHECKING:
    import onnx
    from rich.console import RenderableType

    from qdqtool.data.source import Data
    from qdqtool.recipe import Recipe
    from qdqtool.verification.comparison import Comparison

_FOLDER: Final = click.Path(path_type=Path, exists=True, file_okay=False)


@click.command(
    cls=Command,
    examples=(
        "qdqtool validate model.onnx model.qdq.onnx --data eval.npz",
        "qdqtool validate model.onnx model.qdq.onnx --data eval.npz --metric top1 --max-drop 0.5",
        "qdqtool validate model.onnx model.qdq.onnx --data eval.npz --json > validation.json",
    ),
)
@click.argument("model")
@click.argument("quantized")
@option(
    "--data", "evaluation", required=True, metavar="PATH", help="Samples to run both on, with 'labels' for --metric."
)
@option("--metric", metavar="NAME", help="top1, top5 or package.module:function (f(outputs, labels) -> score).")
@option("--tensors/--no-tensors", default=True, help="Also compare tensors in between. [default: yes]")
@option(
    "--draws", type=click.IntRange(min=0), metavar="N", help="Of samples, where a metric is one number. [default: 200]"
)
@option("--latency", is_flag=True, help="Also measure how long both models take on one sample, side by side.")
@option(
    "--stubs", type=_FOLDER, metavar="DIR", help="Also place it on CUDA by the CUDA libraries in DIR; needs no GPU."
)
@option("--min-sqnr", type=float, metavar="DB", help="Gate: exit status 1 where an output is below it.")
@option("--max-drop", type=float, metavar="X", help="Gate: ... where the metric loses more, in its own units.")
@option("--min-agreement", type=float, metavar="SHARE", help="Gate: ... where both agree on fewer samples, 0 to 1.")
@option("--max-latency-ratio", type=float, metavar="R", help="Gate: ... where QUANTIZED takes longer than MODEL.")
@REPORT
@RUN_OPTIONS
@option("-v", "--verbose", is_flag=True, help="Also list where nodes and Q/DQ pairs run, and why.")
def validate(
    *,
    model: str,
    quantized: str,
    evaluation: str,
    metric: str | None,
    tensors: bool,
    draws: int | None,
    latency: bool,
    stubs: Path | None,
    max_latency_ratio: float | None,
    report: Path | None,
    provider: str,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **limits: float | None,
) -> None:
    """Compare QUANTIZED with the float MODEL on evaluation data.

    Shows the SQNR of outputs, fused and emulated, how often both agree, the task's score with the interval of its
    difference, which tensor loses how much (alone, and with all that comes before it), and which fused kernels differ
    from the Q/DQ nodes that they stand for.
    """
    from qdqtool.errors import GateError
    from qdqtool.graphs import model as models
    from qdqtool.report import files, folder, validation
    from qdqtool.report.progress import progress_bar

    if report is not None:
        files.check_folder(report)
    if limits["max_drop"] is not None and metric is None:
        raise click.UsageError("--max-drop is a loss of a metric; name one with --metric")
    proto = models.load(quantized)
    options = {"tensors": tensors, **({} if draws is None else {"draws": draws})}
    with opened(model, evaluation, metric, embedded(proto)) as data, progress_bar(quiet=quiet) as bar:
        assert data is not None
        found = compared(model, proto, data, path=evaluation, metric=metric, provider=provider, progress=bar, **options)
        wanted = latency or max_latency_ratio is not None
        timed = validation.timed(model, proto, data, found.provider) if wanted else None
    whole = validation.Validation(found, validation.placed(proto, quantized, found.provider, stubs), timed)
    show(
        whole.to_json,
        lambda: validation.page(whole, reference=model, quantized=quantized, verbose=verbose),
        as_json=as_json,
        quiet=quiet,
    )
    broken = found.broken(**limits) + ([] if timed is None else timed.broken(max_latency_ratio))
    if report is not None:
        wrote(folder.compared(report, whole, reference=model, quantized=quantized, broken=broken), quiet=quiet)
    if broken:
        raise GateError("; ".join(broken))


@contextlib.contextmanager
def opened(model: str, path: str | None, metric: str | None, recipe: Recipe | None) -> Iterator[Data | None]:
    """The open evaluation data, None without a path; metric and labels are checked now, before anything is run."""
    if path is None:
        yield None
        return
    from qdqtool.data.source import load_labels, open_data
    from qdqtool.errors import DataError
    from qdqtool.graphs import model as models
    from qdqtool.verification.metric import find_metric

    if metric is not None:
        find_metric(metric)
        if load_labels(path) is None:
            raise DataError(
                f"metric {metric!r} needs labels: {path} must be an .npz with the inputs by name "
                f"and the key 'labels', one a sample"
            )
    inputs = models.inputs(models.load(model))
    with open_data(path, inputs, images=None if recipe is None else recipe.images) as data:
        yield data


def compared(
    model: str,
    quantized: onnx.ModelProto,
    data: Data,
    *,
    path: str,
    metric: str | None,
    provider: str,
    **options: Any,
) -> Comparison:
    """Compare a quantized model with its float file on data that were opened from ``path``."""
    from qdqtool import runtime
    from qdqtool.data.source import load_labels
    from qdqtool.graphs import model as models
    from qdqtool.verification.comparison import compare

    chosen, _ = runtime.resolve_provider(provider)  # the figures are shown with their provider anyway
    labels = None if metric is None else load_labels(path)
    return compare(models.load(model), quantized, data, labels=labels, metric=metric, provider=chosen, **options)


def embedded(proto: onnx.ModelProto) -> Recipe | None:
    """The recipe in a model's metadata; None where there is none."""
    from qdqtool.graphs import model as models
    from qdqtool.pipeline import RECIPE_KEY
    from qdqtool.recipe import Recipe

    text = models.metadata(proto).get(RECIPE_KEY)
    return None if text is None else Recipe.of(json.loads(text))


def show(text: Callable[[], str], page: Callable[[], RenderableType], *, as_json: bool, quiet: bool) -> None:
    """JSON alone on stdout where it is asked for, and the page for people, on stderr then."""
    if as_json:
        click.echo(text())
    if not quiet:
        from qdqtool.report import terminal

        terminal.console(stderr=as_json).print(page())

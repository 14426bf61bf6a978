"""The command line: parse, call the API, print. Exit status 0: done, 1: a gate failed, 2: wrong usage or input, 130: interrupted."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

import qdqtool
from qdqtool.cli_options import PROVIDERS, RECIPE_OPTIONS, Command, make_recipe, option

if TYPE_CHECKING:
    import onnx
    from rich.console import RenderableType

    from qdqtool.data import Data
    from qdqtool.recipe import Recipe

_CUDA_HINT: Final = (
    "No --target was given: the file is made for CUDA and TensorRT, and is slower than float on a CPU. "
    "--target cpu makes a CPU file."
)
_PROVIDER: Final = option(
    "--provider", type=click.Choice(PROVIDERS), default="auto", help="Where models run meanwhile. [default: auto]"
)
_JSON: Final = option("--json", "as_json", is_flag=True, help="Print JSON alone on stdout, all else on stderr.")
_QUIET: Final = option("-q", "--quiet", is_flag=True, help="Print warnings and errors only.")


class _Main(click.Group):
    """Turns the tool's own errors and Ctrl-C into one message and an exit status."""

    command_class = Command

    def invoke(self, ctx: click.Context) -> Any:
        from qdqtool.errors import GateError, QdqError

        try:
            return super().invoke(ctx)
        except QdqError as error:
            click.secho("error: ", fg="red", bold=True, nl=False, err=True)
            click.echo(str(error), err=True)
            ctx.exit(1 if isinstance(error, GateError) else 2)
        except KeyboardInterrupt:
            click.echo("\ninterrupted", err=True)
            ctx.exit(130)


@click.group(cls=_Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(qdqtool.__version__, prog_name="qdqtool")
def main() -> None:
    """Float ONNX model in, verified QDQ model out."""


@main.command(
    examples=(
        "qdqtool quantize model.onnx --data calibration.npz -o model.qdq.onnx --report out/",
        "qdqtool quantize model.onnx --data calib/ --eval eval.npz --metric top1 --target cpu",
        "qdqtool quantize model.onnx --data calib.npz --calibrator percentile --set percentile=99.99",
        "qdqtool quantize model.onnx --dry-run --target tensorrt",
    )
)
@click.argument("model")
@option("--data", metavar="PATH", help="Calibration data: .npz, .npy, a folder, or synthetic:N for a trial.")
@option("-o", "--output", metavar="FILE", help="[default: <model>.qdq.onnx in the current folder]")
@option("--eval", "evaluation", metavar="PATH", help="Compare both models on these data too.")
@option("--metric", metavar="NAME", help="top1, top5 or package.module:function, on --eval data with 'labels'.")
@option("--dry-run", is_flag=True, help="Show the plan, and what is left out and why; needs no data.")
@option("--report", "report_folder", metavar="DIR", help="Write the result there as report.json.")
@option("--save-each", metavar="DIR", help="Save the model after each pass as NN-pass-name.onnx.")
@_PROVIDER
@_JSON
@_QUIET
@option("-v", "--verbose", is_flag=True, help="Also list ranges, parts of the file and passes.")
@RECIPE_OPTIONS
def quantize(model: str, recipe_file: str | None, dry_run: bool, data: str | None, **given: Any) -> None:
    """Quantize the float MODEL, verify the result and write it."""
    call = {name: given.pop(name) for name in _CALL}
    recipe = make_recipe(recipe_file, given)
    if call["metric"] is not None and call["evaluation"] is None:
        raise click.UsageError("--metric needs --eval, the data to measure it on.")
    _advise(recipe, quiet=call["quiet"])
    if dry_run:
        _show_plan(model, recipe, call)
        return
    if data is None:
        raise click.UsageError("Missing option '--data': calibration data, or 'synthetic:N' for a trial. --dry-run needs none.")
    sources = [path for path in (model, data, call["evaluation"], recipe_file) if path is not None]
    _quantize(model, data, recipe, sources, call)


_CALL: Final = (
    "output", "evaluation", "metric", "provider", "report_folder", "save_each", "as_json", "quiet", "verbose",
)  # fmt: skip
"""Options of ``quantize`` that are no part of the recipe."""


def _quantize(model: str, data: str, recipe: Recipe, sources: list[str], call: dict[str, Any]) -> None:
    from dataclasses import replace

    from qdqtool import pipeline
    from qdqtool.report import files, progress

    output = Path(call["output"] or f"{Path(model).stem}.qdq.onnx")
    folder = None if call["report_folder"] is None else Path(call["report_folder"])
    each = None if call["save_each"] is None else Path(call["save_each"])
    files.check_output(output, sources)
    for wanted in (folder, each):
        if wanted is not None:
            files.check_folder(wanted)
    with _evaluation(model, recipe, call) as evaluation, progress.progress_bar(quiet=call["quiet"]) as bar:
        callback = None if each is None else files.save_each(each)
        result = pipeline.quantize(
            model, data, recipe=recipe, provider=call["provider"], progress=bar, callback=callback
        )
        result.save(output)
        report = result.report
        if evaluation is not None:
            report = replace(report, evaluation=_compare(model, result.model, evaluation, call, progress=bar))
    written = [str(output)]
    if folder is not None:
        written.append(str(files.write_text(f"{report.to_json()}\n", folder / "report.json")))
    if call["as_json"]:
        click.echo(report.to_json())
    if not call["quiet"]:
        from qdqtool.report import terminal

        page = terminal.quantization(
            report, source=model, output=str(output), written=written, verbose=call["verbose"]
        )
        _print(page, stderr=call["as_json"])


def _show_plan(model: str, recipe: Recipe, call: dict[str, Any]) -> None:
    from qdqtool import pipeline
    from qdqtool.report import files

    each = None if call["save_each"] is None else files.save_each(Path(call["save_each"]))
    state, timings = pipeline.plan(model, recipe=recipe, callback=each)
    from qdqtool.report import terminal
    from qdqtool.report.plans import plan_json

    if call["as_json"] or call["report_folder"] is not None:
        text = plan_json(state, timings)
        if call["report_folder"] is not None:
            files.write_text(f"{text}\n", Path(call["report_folder"]) / "plan.json")
        if call["as_json"]:
            click.echo(text)
    if not call["quiet"]:
        _print(terminal.plan(state, source=model, verbose=call["verbose"]), stderr=call["as_json"])


@main.command(
    examples=(
        "qdqtool compare model.onnx model.qdq.onnx --data eval.npz",
        "qdqtool compare model.onnx model.qdq.onnx --data eval.npz --metric top1 --min-sqnr 30",
        "qdqtool compare model.onnx model.qdq.onnx --data eval.npz --json > comparison.json",
    )
)
@click.argument("model")
@click.argument("quantized")
@option("--data", "evaluation", required=True, metavar="PATH", help="Samples both models run on, with 'labels' for --metric.")
@option("--metric", metavar="NAME", help="top1, top5 or package.module:function (f(outputs, labels) -> score).")
@option("--tensors/--no-tensors", default=True, help="Also compare tensors in between. [default: yes]")
@option("--min-sqnr", type=float, metavar="DB", help="Gate: exit status 1 where an output is below it.")
@_PROVIDER
@_JSON
@_QUIET
def compare(model: str, quantized: str, tensors: bool, min_sqnr: float | None, **call: Any) -> None:
    """Compare QUANTIZED with the float MODEL: SQNR of outputs and tensors, agreement, the task's score."""
    from qdqtool import model as models
    from qdqtool.errors import GateError
    from qdqtool.report import progress, values

    proto = models.load(quantized)
    with _evaluation(model, _embedded(proto), call) as data, progress.progress_bar(quiet=call["quiet"]) as bar:
        assert data is not None
        found = _compare(model, proto, data, call, progress=bar, tensors=tensors)
    if call["as_json"]:
        click.echo(values.to_json(found))
    if not call["quiet"]:
        from qdqtool.report import terminal

        _print(terminal.comparison(found, reference=model, quantized=quantized), stderr=call["as_json"])
    if min_sqnr is not None and found.worst_db < min_sqnr:
        raise GateError(f"SQNR of {found.worst_db:.1f} dB is below --min-sqnr {min_sqnr:g} dB")


@contextlib.contextmanager
def _evaluation(model: str, recipe: Recipe | None, call: dict[str, Any]) -> Iterator[Data | None]:
    """The open evaluation data; metric and labels are checked at once, so that a mistake costs no calibration."""
    if call["evaluation"] is None:
        yield None
        return
    from qdqtool import model as models
    from qdqtool.compare import find_metric
    from qdqtool.data import load_labels, open_data
    from qdqtool.errors import DataError

    if call["metric"] is not None:
        find_metric(call["metric"])
        if load_labels(call["evaluation"]) is None:
            raise DataError(
                f"metric {call['metric']!r} needs labels: {call['evaluation']} must be an .npz with the inputs by name "
                f"and the key 'labels', one a sample"
            )
    inputs = models.inputs(models.load(model))
    with open_data(call["evaluation"], inputs, images=None if recipe is None else recipe.images) as data:
        yield data


def _compare(model: str, quantized: onnx.ModelProto, data: Data, call: dict[str, Any], **options: Any) -> qdqtool.Comparison:
    from qdqtool import model as models
    from qdqtool import runtime
    from qdqtool.compare import compare as run
    from qdqtool.data import load_labels

    provider, note = runtime.resolve_provider(call["provider"])
    del note  # the figures are shown with the provider they were measured on
    labels = None if call["metric"] is None else load_labels(call["evaluation"])
    return run(models.load(model), quantized, data, labels=labels, metric=call["metric"], provider=provider, **options)


@main.command(examples=("qdqtool passes",))
def passes() -> None:
    """List the graph passes, built in or by plugin."""
    _list("passes", "Graph passes, in the order of the pipeline")


@main.command(examples=("qdqtool calibrators", "qdqtool quantize model.onnx --data calib.npz --calibrator entropy"))
def calibrators() -> None:
    """List the calibrators, built in or by plugin, with the options that --set takes."""
    _list("calibrators", "Choosers of activation ranges, with the options that --set takes")


@main.command(examples=("qdqtool targets", "qdqtool quantize model.onnx --dry-run --target tensorrt"))
def targets() -> None:
    """List the targets that a file can be made for."""
    from qdqtool.report import terminal
    from qdqtool.target import TARGETS

    _print(terminal.listing("Targets", [(name, entry.summary, "") for name, entry in TARGETS.items()]))


@main.command(
    examples=("qdqtool recipe model.qdq.onnx > recipe.toml", "qdqtool quantize other.onnx --data calib.npz --recipe recipe.toml")
)
@click.argument("model")
def recipe(model: str) -> None:
    """Print the recipe that a quantized MODEL was made by, as a recipe file in TOML."""
    from qdqtool import model as models
    from qdqtool.errors import ModelError

    found = _embedded(models.load(model))
    if found is None:
        raise ModelError(f"{model} holds no recipe: it was not made by qdqtool, or its metadata were removed since")
    click.echo(found.to_toml(), nl=False)


def _embedded(proto: onnx.ModelProto) -> Recipe | None:
    """The recipe in a model's metadata; None where there is none."""
    from qdqtool import model as models
    from qdqtool.pipeline import RECIPE_KEY
    from qdqtool.recipe import Recipe

    text = models.metadata(proto).get(RECIPE_KEY)
    return None if text is None else Recipe.of_json(text)


def _list(kind: str, title: str) -> None:
    from importlib.metadata import entry_points

    from qdqtool import registry
    from qdqtool.passes_api import describe
    from qdqtool.report import terminal

    found = registry.catalogue(kind)
    plugins = {p.name: p.dist.name if p.dist else p.value for p in entry_points(group=f"qdqtool.{kind}")}
    rows = []
    for name, summary in describe(found).items():
        options = ", ".join(f"{option}={value!r}" for option, value in registry.options(found[name]).items())
        rows.append((name, f"{summary} [{options}]" if options else summary, plugins.get(name, "")))
    _print(terminal.listing(title, rows))


def _advise(recipe: Recipe, *, quiet: bool) -> None:
    """Warn of what would spoil the result or surprise the user, before the work."""
    from qdqtool import runtime

    conflict = runtime.conflicting_packages()
    if conflict is not None:
        click.secho(f"warning: {conflict}", fg="yellow", err=True)
    if not quiet and "target" not in recipe.model_fields_set and runtime.resolve_provider("auto")[1] is not None:
        click.secho(_CUDA_HINT, fg="yellow", err=True)


def _print(page: RenderableType, *, stderr: bool = False) -> None:
    from qdqtool.report import terminal

    terminal.console(stderr=stderr).print(page)

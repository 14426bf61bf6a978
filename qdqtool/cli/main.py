"""The command line: parse, call the API, print.

Exit status 0: done, 1: a gate failed, 2: wrong usage or input, 130: interrupted.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

import qdqtool
from qdqtool.cli.bench import bench
from qdqtool.cli.check import check
from qdqtool.cli.lists import calibrators, passes, targets
from qdqtool.cli.observe import cache, merge, observe
from qdqtool.cli.options import (
    OBSERVE_OPTIONS,
    RECIPE_OPTIONS,
    RUN_OPTIONS,
    Main,
    make_recipe,
    observing,
    option,
    say,
    warn_of_synthetic_data,
)

if TYPE_CHECKING:
    import onnx
    from rich.console import RenderableType

    from qdqtool.data.source import Data
    from qdqtool.recipe import Recipe
    from qdqtool.verification.comparison import Comparison

_CUDA_HINT: Final = (
    "No --target was given: the file is made for CUDA and TensorRT, and is slower than float on a CPU. "
    "--target cpu makes a CPU file."
)

_PATH: Final = click.Path(path_type=Path)


@dataclass(frozen=True)
class _Call:
    """What ``quantize`` and ``validate`` are told beside the recipe."""

    model: str
    provider: str
    as_json: bool
    quiet: bool
    evaluation: str | None
    metric: str | None
    data: str | None = None
    statistics: str | None = None
    output: Path | None = None
    report: Path | None = None
    save_each: Path | None = None
    verbose: bool = False

    @property
    def target_file(self) -> Path:
        """Where the quantized model goes."""
        return self.output or Path(f"{Path(self.model).stem}.qdq.onnx")


@click.group(cls=Main, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(qdqtool.__version__, prog_name="qdqtool")
def main() -> None:
    """Float ONNX model in, verified QDQ model out.

    Exit status: 0 done, 1 a gate failed (--min-sqnr), 2 wrong usage or input, 130 interrupted.
    """


@main.command(
    examples=(
        "qdqtool quantize model.onnx --data calibration.npz -o model.qdq.onnx --report out/",
        "qdqtool quantize model.onnx --data calib/ --eval eval.npz --metric top1 --target cpu",
        "qdqtool quantize model.onnx --data calib.npz --calibrator percentile --set percentile=99.99",
        "qdqtool quantize model.onnx --statistics all.stats --target cpu",
        "qdqtool quantize model.onnx --dry-run --target tensorrt",
    )
)
@click.argument("model")
@option("--data", metavar="PATH", help="Calibration data: .npz, .npy, a folder, or synthetic:N for a trial.")
@option("--statistics", metavar="FILE", help="Take ranges from what 'qdqtool observe' saved; --data is optional then.")
@option("-o", "--output", type=_PATH, metavar="FILE", help="[default: <model>.qdq.onnx in the current folder]")
@option("--eval", "evaluation", metavar="PATH", help="Compare both models on these data too.")
@option("--metric", metavar="NAME", help="top1, top5 or package.module:function, on --eval data with 'labels'.")
@option("--dry-run", is_flag=True, help="Show the plan, and what is left out and why; needs no data.")
@option("--report", "report", type=_PATH, metavar="DIR", help="Write the result there as report.json.")
@option("--save-each", type=_PATH, metavar="DIR", help="Save the model after each pass as NN-pass-name.onnx.")
@RUN_OPTIONS
@option("-v", "--verbose", is_flag=True, help="Also list ranges, parts of the file and passes.")
@RECIPE_OPTIONS
@OBSERVE_OPTIONS
def quantize(recipe_file: str | None, dry_run: bool, **given: Any) -> None:
    """Quantize and verify the float MODEL.

    Nothing is written unless the quantized model passes the ONNX checker, loads, and gives finite outputs.
    """
    from qdqtool.report import files

    call = _Call(**{field.name: given.pop(field.name) for field in fields(_Call) if field.name in given})
    if call.metric is not None and call.evaluation is None:
        raise click.UsageError("--metric needs --eval, the data to measure it on.")
    how = observing({name: given.pop(name) for name in ("memory", "engine", "address", "cache")})
    recipe = make_recipe(recipe_file, given)
    if call.data is None and call.statistics is None and not dry_run and recipe.needs_data:
        raise click.UsageError(
            "Missing option '--data': calibration data (--dry-run, --statistics and weights alone, as in --precision "
            "w4a16, need none)."
        )
    for folder in (call.report, call.save_each):
        if folder is not None:
            files.check_folder(folder)
    if dry_run:
        _show_plan(call, recipe)
    else:
        sources = (call.model, call.data, call.statistics, call.evaluation, recipe_file, given["target"])
        files.check_output(call.target_file, filter(None, sources))
        _quantize(call, recipe, how)


def _quantize(call: _Call, recipe: Recipe, how: dict[str, Any]) -> None:
    from qdqtool import pipeline
    from qdqtool.errors import QdqError
    from qdqtool.report import files, terminal
    from qdqtool.report.progress import progress_bar

    _advise(call, recipe)
    output, callback = call.target_file, None if call.save_each is None else files.save_each(call.save_each)
    with _evaluation(call, recipe) as data, progress_bar(quiet=call.quiet) as bar:
        result = pipeline.quantize(
            call.model,
            call.data,
            statistics=call.statistics,
            recipe=recipe,
            provider=call.provider,
            progress=bar,
            told=None if call.quiet else say,
            callback=callback,
            **how,
        )
        result.save(output)
        report = result.report
        if call.quiet and report.synthetic:  # else the report says so
            warn_of_synthetic_data()
        if data is not None:
            try:
                report = replace(report, evaluation=_compare(call, result.model, data, progress=bar))
            except QdqError as error:
                raise QdqError(f"{output} was written, but its evaluation failed: {error}") from error
    written = [str(output)]
    if call.report is not None:
        written.append(str(files.write_text(f"{report.to_json()}\n", call.report / "report.json")))
    _show(
        call,
        report.to_json,
        lambda: terminal.quantization(
            report, source=call.model, output=str(output), written=written, verbose=call.verbose
        ),
    )


def _show_plan(call: _Call, recipe: Recipe) -> None:
    from qdqtool import pipeline
    from qdqtool.report import files, machine, terminal

    _advise(call, recipe)
    callback = None if call.save_each is None else files.save_each(call.save_each)
    state, timings = pipeline.dry_run(call.model, recipe=recipe, callback=callback)
    if call.report is not None:
        files.write_text(f"{machine.plan_json(state, timings)}\n", call.report / "plan.json")
    _show(
        call,
        lambda: machine.plan_json(state, timings),
        lambda: terminal.plan(state, source=call.model, verbose=call.verbose),
    )


@main.command(
    examples=(
        "qdqtool validate model.onnx model.qdq.onnx --data eval.npz",
        "qdqtool validate model.onnx model.qdq.onnx --data eval.npz --metric top1 --max-drop 0.5",
        "qdqtool validate model.onnx model.qdq.onnx --data eval.npz --json > validation.json",
    )
)
@click.argument("model")
@click.argument("quantized")
@option(
    "--data", "evaluation", required=True, metavar="PATH", help="Samples to run both on, with 'labels' for --metric."
)
@option("--metric", metavar="NAME", help="top1, top5 or package.module:function (f(outputs, labels) -> score).")
@option("--tensors/--no-tensors", default=True, help="Also compare tensors in between. [default: yes]")
@option("--min-sqnr", type=float, metavar="DB", help="Gate: exit status 1 where an output is below it.")
@option("--max-drop", type=float, metavar="X", help="Gate: ... where the metric loses more, in its own units.")
@option("--min-agreement", type=float, metavar="SHARE", help="Gate: ... where both agree on fewer samples, 0 to 1.")
@RUN_OPTIONS
def validate(
    quantized: str,
    tensors: bool,
    min_sqnr: float | None,
    max_drop: float | None,
    min_agreement: float | None,
    **given: Any,
) -> None:
    """Compare QUANTIZED with the float MODEL on evaluation data.

    Shows the SQNR of outputs, fused and emulated, how often both agree, the task's score with the interval of its
    difference, and which tensor loses how much: alone, and with all that comes before it.
    """
    from qdqtool.graphs import model as models
    from qdqtool.report import machine, terminal
    from qdqtool.report.progress import progress_bar

    call = _Call(**given)
    if max_drop is not None and call.metric is None:
        raise click.UsageError("--max-drop is a loss of a metric; name one with --metric")
    proto = models.load(quantized)
    with _evaluation(call, _embedded(proto)) as data, progress_bar(quiet=call.quiet) as bar:
        assert data is not None
        found = _compare(call, proto, data, progress=bar, tensors=tensors)
    _show(
        call,
        lambda: machine.to_json(found),
        lambda: terminal.comparison(found, reference=call.model, quantized=quantized),
    )
    found.gate(min_sqnr=min_sqnr, max_drop=max_drop, min_agreement=min_agreement)


@contextlib.contextmanager
def _evaluation(call: _Call, recipe: Recipe | None) -> Iterator[Data | None]:
    """The open evaluation data; metric and labels are checked at once, so that a mistake costs no calibration."""
    if call.evaluation is None:
        yield None
        return
    from qdqtool.data.source import load_labels, open_data
    from qdqtool.errors import DataError
    from qdqtool.graphs import model as models
    from qdqtool.verification.comparison import find_metric

    if call.metric is not None:
        find_metric(call.metric)
        if load_labels(call.evaluation) is None:
            raise DataError(
                f"metric {call.metric!r} needs labels: {call.evaluation} must be an .npz with the inputs by name "
                f"and the key 'labels', one a sample"
            )
    inputs = models.inputs(models.load(call.model))
    with open_data(call.evaluation, inputs, images=None if recipe is None else recipe.images) as data:
        yield data


def _compare(call: _Call, quantized: onnx.ModelProto, data: Data, **options: Any) -> Comparison:
    from qdqtool import runtime
    from qdqtool.data.source import load_labels
    from qdqtool.graphs import model as models
    from qdqtool.verification.comparison import compare as run

    provider, _ = runtime.resolve_provider(call.provider)  # the figures are shown with their provider anyway
    labels = None if call.metric is None else load_labels(call.evaluation)
    return run(
        models.load(call.model), quantized, data, labels=labels, metric=call.metric, provider=provider, **options
    )


@main.command(
    examples=(
        "qdqtool recipe model.qdq.onnx > recipe.toml",
        "qdqtool quantize other.onnx --data calib.npz --recipe recipe.toml",
    )
)
@click.argument("model")
def recipe(model: str) -> None:
    """Print the recipe that made a quantized MODEL.

    It is TOML, and works as a recipe file.
    """
    from qdqtool.errors import ModelError
    from qdqtool.graphs import model as models

    found = _embedded(models.load(model))
    if found is None:
        raise ModelError(f"{model} holds no recipe: it was not made by qdqtool, or its metadata were removed since")
    click.echo(found.to_toml(), nl=False)


def _embedded(proto: onnx.ModelProto) -> Recipe | None:
    """The recipe in a model's metadata; None where there is none."""
    from qdqtool.graphs import model as models
    from qdqtool.pipeline import RECIPE_KEY
    from qdqtool.recipe import Recipe

    text = models.metadata(proto).get(RECIPE_KEY)
    return None if text is None else Recipe.of(json.loads(text))


def _advise(call: _Call, recipe: Recipe) -> None:
    """Warn of what would spoil the result or surprise the user, before the work."""
    from qdqtool import runtime

    conflict = runtime.conflicting_packages()
    if conflict is not None:
        click.secho(f"warning: {conflict}", fg="yellow", err=True)
    if not call.quiet and "target" not in recipe.model_fields_set and runtime.resolve_provider("auto")[1] is not None:
        click.secho(_CUDA_HINT, fg="yellow", err=True)


def _show(call: _Call, as_json: Callable[[], str], page: Callable[[], RenderableType]) -> None:
    """JSON alone on stdout where it is asked for, and the page for people, on stderr then."""
    if call.as_json:
        click.echo(as_json())
    if not call.quiet:
        from qdqtool.report import terminal

        terminal.console(stderr=call.as_json).print(page())


for command in (check, bench, observe, merge, cache, passes, calibrators, targets):
    main.add_command(command)

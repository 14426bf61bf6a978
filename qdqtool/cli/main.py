"""The command line: parse, call the API, print.

Exit status 0: done, 1: a gate failed, 2: wrong usage or input, 130: interrupted.
"""

from __future__ import annotations

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
    REPORT,
    RUN_OPTIONS,
    Command,
    Main,
    make_recipe,
    observing,
    option,
    say,
    warn_of_synthetic_data,
)
from qdqtool.cli.repair import repair
from qdqtool.cli.search import search
from qdqtool.cli.validate import compared, embedded, opened, show, validate

if TYPE_CHECKING:
    from qdqtool.recipe import Recipe

_CUDA_HINT: Final = (
    "No --target was given: the file is made for CUDA and TensorRT, and is slower than float on a CPU. "
    "--target cpu makes a CPU file."
)

_PATH: Final = click.Path(path_type=Path)


@dataclass(frozen=True)
class _Call:
    """What ``quantize`` is told beside the recipe."""

    model: str
    provider: str
    as_json: bool
    quiet: bool
    evaluation: str | None
    metric: str | None
    data: str | None
    statistics: str | None
    output: Path | None
    report: Path | None
    save_each: Path | None
    verbose: bool

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
@REPORT
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

    call = _Call(**{field.name: given.pop(field.name) for field in fields(_Call)})
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
    from qdqtool.report import files, folder, terminal
    from qdqtool.report.page_data import Keeper, with_tensors
    from qdqtool.report.progress import progress_bar

    _advise(call, recipe)
    output, callback = call.target_file, None if call.save_each is None else files.save_each(call.save_each)
    keeper = None if call.report is None else Keeper(callback)
    with (
        opened(call.model, call.evaluation, call.metric, recipe) as data,
        progress_bar(quiet=call.quiet) as bar,
    ):
        result = pipeline.quantize(
            call.model,
            call.data,
            statistics=call.statistics,
            recipe=recipe,
            provider=call.provider,
            progress=bar,
            told=None if call.quiet else say,
            callback=keeper or callback,
            **how,
        )
        result.save(output)
        report = result.report
        if call.quiet and report.synthetic:  # else the report says so
            warn_of_synthetic_data()
        if data is not None and call.evaluation is not None:
            try:
                by: dict[str, Any] = {"path": call.evaluation, "metric": call.metric, "provider": call.provider}
                report = replace(report, evaluation=compared(call.model, result.model, data, progress=bar, **by))
            except QdqError as error:
                raise QdqError(f"{output} was written, but its evaluation failed: {error}") from error
    written = [str(output)]
    if call.report is not None and keeper is not None and keeper.state is not None:
        report = with_tensors(keeper.state, report, result.model)
        names = {"source": call.model, "output": str(output)}
        written += map(str, folder.quantized(call.report, keeper.state, report, result.model, **names))
    show(
        report.to_json,
        lambda: terminal.quantization(
            report, source=call.model, output=str(output), written=written, verbose=call.verbose
        ),
        as_json=call.as_json,
        quiet=call.quiet,
    )


def _show_plan(call: _Call, recipe: Recipe) -> None:
    from qdqtool import pipeline
    from qdqtool.report import files, machine, terminal

    _advise(call, recipe)
    callback = None if call.save_each is None else files.save_each(call.save_each)
    state, timings = pipeline.dry_run(call.model, recipe=recipe, callback=callback)
    if call.report is not None:
        files.write_text(f"{machine.plan_json(state, timings)}\n", call.report / "plan.json")
    show(
        lambda: machine.plan_json(state, timings),
        lambda: terminal.plan(state, source=call.model, verbose=call.verbose),
        as_json=call.as_json,
        quiet=call.quiet,
    )


@click.command(
    cls=Command,
    examples=(
        "qdqtool recipe model.qdq.onnx > recipe.toml",
        "qdqtool quantize other.onnx --data calib.npz --recipe recipe.toml",
    ),
)
@click.argument("model")
def recipe(model: str) -> None:
    """Print the recipe that made a quantized MODEL.

    It is TOML, and works as a recipe file.
    """
    from qdqtool.errors import ModelError
    from qdqtool.graphs import model as models

    found = embedded(models.load(model))
    if found is None:
        raise ModelError(f"{model} holds no recipe: it was not made by qdqtool, or its metadata were removed since")
    click.echo(found.to_toml(), nl=False)


def _advise(call: _Call, recipe: Recipe) -> None:
    """Warn of what would spoil the result or surprise the user, before the work."""
    from qdqtool import runtime

    conflict = runtime.conflicting_packages()
    if conflict is not None:
        click.secho(f"warning: {conflict}", fg="yellow", err=True)
    if not call.quiet and "target" not in recipe.model_fields_set and runtime.resolve_provider("auto")[1] is not None:
        click.secho(_CUDA_HINT, fg="yellow", err=True)


for command in (search, validate, repair, recipe, check, bench, observe, merge, cache, passes, calibrators, targets):
    main.add_command(command)

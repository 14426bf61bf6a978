"""The command that searches for the precision of every layer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from qdqtool.cli.options import RECIPE_OPTIONS, RUN_OPTIONS, Command, make_recipe, option


@click.command(
    cls=Command,
    examples=(
        "qdqtool search model.onnx --data calib.npz --eval eval.npz --budget bits=4 -o model.qdq.onnx",
        "qdqtool search model.onnx --data calib.npz --budget size=0.2 --target cpu --time 10m",
        "qdqtool search model.onnx --data calib.npz --eval eval.npz --metric top1 --max-drop 0.5",
    ),
)
@click.argument("model")
@option("--data", required=True, metavar="PATH", help="Calibration data: .npz, .npy or a folder.")
@option("--eval", "evaluation", metavar="PATH", help="Data to measure on; half are held out. [default: --data]")
@option("--metric", metavar="NAME", help="top1, top5 or package.module:function, on --eval data with 'labels'.")
@option("--budget", metavar="WHAT=N", help="bits=4 (mean of weights), size=0.3 (of float) or 120kB, latency=0.8.")
@option("--max-drop", type=float, metavar="X", help="Instead: the smallest model whose metric loses no more.")
@option("--widths", metavar="N,...", help="Bits of weights: 2, 3, 4, 5, 6, 8, 16, float. [default: by the budget]")
@option("--time", "seconds", metavar="TIME", help="End after 90s, 10m or 1h with the best so far.")
@option("--cache/--no-cache", default=True, help="Keep statistics between runs. [default: yes]")
@option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="[default: <model>.qdq.onnx in the current folder]",
)
@option("--report", type=click.Path(path_type=Path), metavar="DIR", help="Write the result: search.json, search.html.")
@RUN_OPTIONS
@RECIPE_OPTIONS
def search(model: str, data: str, output: Path | None, report: Path | None, **given: Any) -> None:
    """Search for the precision of every layer of MODEL.

    The best model so far is always on disk, with the recipe that makes it (.toml) and what was measured
    (.search.json) beside it: an interrupted search goes on where it was. With --min-sqnr the smallest model is wanted
    that keeps it.
    """
    from qdqtool.mixed_precision import goals
    from qdqtool.mixed_precision.search import search as run
    from qdqtool.mixed_precision.workbench import Outputs
    from qdqtool.report import files, folder, searched, terminal

    target = output or Path(f"{Path(model).stem}.qdq.onnx")
    options = {name: given.pop(name) for name in _OPTIONS}
    as_json, quiet = given.pop("as_json"), given.pop("quiet")
    file, loss = given.pop("recipe_file"), given.pop("min_sqnr")
    widths, limit = options.pop("widths"), options.pop("seconds")
    recipe = make_recipe(file, given)
    files.check_output(target, filter(None, (model, data, options["evaluation"], file)))
    if report is not None:
        files.check_folder(report)
    outputs = Outputs(target)
    try:
        with searched.live(quiet=quiet) as progress:
            result = run(
                model,
                data,
                **options,
                min_sqnr=loss,
                widths=None if widths is None else [width.strip() for width in widths.split(",")],
                seconds=None if limit is None else goals.seconds(limit),
                output=target,
                recipe=recipe,
                progress=progress,
            )
    except KeyboardInterrupt:
        _say_what_is_kept(outputs)
        raise
    written = [str(outputs.model), str(outputs.recipe), str(outputs.state)]
    if report is not None:
        written += map(str, folder.searched(report, result, source=model))
    if as_json:
        click.echo(result.to_json())
    if not quiet:
        terminal.console(stderr=as_json).print(searched.searched(result, written=written))


_OPTIONS = ("evaluation", "metric", "budget", "max_drop", "widths", "seconds", "cache", "provider")


def _say_what_is_kept(outputs: Any) -> None:
    if outputs.model.exists():
        click.echo(f"\n{outputs.model} is the best model so far; run the same again to go on", err=True)
    elif outputs.state.exists():
        click.echo("\nno model was found so far; run the same again to go on", err=True)

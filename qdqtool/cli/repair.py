"""The command that finds the layers at which a quantized model errs, and mends them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from qdqtool.cli.options import OBSERVE_OPTIONS, RUN_OPTIONS, Command, observing, option, say, warn_of_synthetic_data

if TYPE_CHECKING:
    from qdqtool.observation.observe import Progress
    from qdqtool.repairs.values import Repair

_PATH: Final = click.Path(path_type=Path)


@click.command(
    cls=Command,
    examples=(
        "qdqtool repair model.onnx model.qdq.onnx --data calib.npz -o repaired.onnx --recipe-out repaired.toml",
        "qdqtool repair model.onnx model.qdq.onnx --data calib.npz --eval eval.npz --min-sqnr 30",
        "qdqtool repair model.onnx model.qdq.onnx --data calib.npz --eval eval.npz --metric top1 --max-drop 0.5",
        "qdqtool repair model.onnx other_tool.onnx --data calib.npz --allow calibrator,bias,rounding",
    ),
)
@click.argument("model")
@click.argument("quantized")
@option("--data", required=True, metavar="PATH", help="Calibration data: .npz, .npy or a folder.")
@option("--eval", "evaluation", metavar="PATH", help="Measure on these, half to choose by. [default: part of --data]")
@option("--metric", metavar="NAME", help="top1, top5 or package.module:function, on --eval data with 'labels'.")
@option("--min-sqnr", type=float, metavar="DB", help="Goal: every output; exit status 1 where it is not reached.")
@option("--max-drop", type=float, metavar="X", help="Goal: ... where the metric loses more, in its own units.")
@option("--allow", metavar="NAME,...", help="Only these remedies (see above). [default: all]")
@option("--min-gain", type=float, metavar="DB", help="That a step must gain. [default: 0.5; towards a goal 0.1]")
@option("--max-float", type=float, metavar="SHARE", help="Of the arithmetic, out of integers. [default: 0.1; goal: 1]")
@option("--target", metavar="NAME", help="What a model is for that holds no recipe. [default: by its types]")
@option("-o", "--output", type=_PATH, metavar="FILE", help="[default: <quantized>.repaired.onnx in this folder]")
@option("--recipe-out", type=_PATH, metavar="FILE", help="Write the repaired recipe there, as TOML.")
@option("--report", type=_PATH, metavar="DIR", help="Write the result there as repair.json and repair.html.")
@RUN_OPTIONS
@OBSERVE_OPTIONS
def repair(
    *,
    model: str,
    quantized: str,
    data: str,
    output: Path | None,
    recipe_out: Path | None,
    report: Path | None,
    allow: str | None,
    as_json: bool,
    quiet: bool,
    **given: Any,
) -> None:
    """Find the layers at which QUANTIZED errs beside the float MODEL, and mend them.

    The layers with the most error of their own come first. Remedies, from cheapest to dearest: calibrator, bias,
    equalization, smoothing, granularity (a weight scale a channel), rounding (of weights), bits (8, then 16), float.
    The first is kept that wins half of what float would; the goal ends it, or else a gain below --min-gain. Steps are
    chosen on other samples than their gains are shown on. A model with nothing to repair is left as it is.
    """
    from qdqtool.repairs import text
    from qdqtool.repairs.repairing import repair as run
    from qdqtool.report import files, folder, terminal

    if report is not None:
        files.check_folder(report)
    how = observing({name: given.pop(name) for name in ("memory", "engine", "address", "cache")})
    if given["max_drop"] is not None and given["metric"] is None:
        raise click.UsageError("--max-drop is a loss of a metric; name one with --metric.")
    place = output or Path(f"{Path(quantized).stem}.repaired.onnx")
    sources = [model, quantized, data, *filter(None, [given["evaluation"]])]
    for path in filter(None, (place, recipe_out)):
        files.check_output(path, sources)
    allowed = None if allow is None else [name.strip() for name in allow.split(",") if name.strip()]
    with _status(quiet=quiet) as (watch, progress):
        found = run(model, quantized, data, allow=allowed, watch=watch, progress=progress, **given, **how)
    for note in () if quiet else found.notes:
        say(note)
    if found.result is not None and found.result.report.synthetic:
        warn_of_synthetic_data()
    written = _write(found, place, recipe_out)
    if report is not None:
        written += map(str, folder.repaired(report, found, reference=model, quantized=quantized))
    if as_json:
        click.echo(found.to_json())
    if not quiet:
        terminal.console(stderr=as_json).print(text.page(found, model, quantized, written))
    found.gate()


def _write(found: Repair, output: Path, recipe: Path | None) -> list[str]:
    """Write the repaired model and its recipe; gives the names of the files."""
    from qdqtool.report import files

    written = [str(found.save(output))] if found.changed else []
    if recipe is not None:
        written.append(str(files.write_text(found.recipe.to_toml(), recipe)))
    return written


@contextlib.contextmanager
def _status(*, quiet: bool) -> Iterator[tuple[Callable[[str], None] | None, Progress | None]]:
    """Who is told what is being tried and how far observing is; nobody where nobody would see it."""
    from qdqtool.report import terminal

    console = terminal.console(stderr=True)
    if quiet or not console.is_terminal:
        yield None, None
        return
    with console.status("Loading") as status:

        def progress(step: str, done: int, total: int | None) -> None:
            status.update(f"{step} {done}{'' if total is None else f' of {total}'} samples")

        yield status.update, progress

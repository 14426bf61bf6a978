"""Commands around statistics: observe a model, merge what several machines observed, look at the cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import click

from qdqtool.cli.options import (
    OBSERVE_OPTIONS,
    PROVIDER,
    Command,
    make_recipe,
    observing,
    option,
    say,
    warn_of_synthetic_data,
)

_PATH: Final = click.Path(path_type=Path)


@click.command(
    cls=Command,
    examples=(
        "qdqtool observe model.onnx --data calib.npz -o model.stats",
        "qdqtool observe model.onnx --data shard1/ --target cpu -o shard1.stats",
        "qdqtool observe model.onnx --data calib/ --memory 4GB --engine ray --address auto -o model.stats",
    ),
)
@click.argument("model")
@option("--data", required=True, metavar="PATH", help="Calibration data: .npz, .npy, a folder, or synthetic:N.")
@option("-o", "--output", type=_PATH, metavar="FILE", help="[default: <model>.stats in the current folder]")
@option("--target", "targets", multiple=True, metavar="NAME", help="Name or .toml file (repeatable). [default: all]")
@PROVIDER
@OBSERVE_OPTIONS
@option("-q", "--quiet", is_flag=True, help="Print warnings and errors only.")
@option("--recipe", "recipe_file", metavar="FILE", help="Observe what this recipe quantizes too.")
@option("--samples", type=click.IntRange(min=1), metavar="N", help="Only N samples, chosen by content. [default: all]")
def observe(model: str, data: str, output: Path | None, targets: tuple[str, ...], **given: Any) -> None:
    """Observe the activations of the float MODEL and save their statistics.

    The file serves every calibrator, bit width and target: qdqtool quantize --statistics FILE.
    """
    from qdqtool import pipeline
    from qdqtool.observation import statistics_file
    from qdqtool.report import files
    from qdqtool.report.progress import progress_bar
    from qdqtool.units import count

    target = output or Path(f"{Path(model).stem}.stats")
    files.check_output(target, filter(None, (model, data, given["recipe_file"], *targets)))
    recipe = make_recipe(given["recipe_file"], {"samples": given["samples"]})
    quiet = given["quiet"]
    with progress_bar(quiet=quiet) as bar:
        found = pipeline.calibrate(
            model,
            data,
            targets=targets or None,
            recipe=recipe,
            provider=given["provider"],
            progress=bar,
            told=None if quiet else say,
            **observing(given),
        )
    statistics_file.write(found, target)
    if found.synthetic:
        warn_of_synthetic_data()
    if not quiet:
        what = f"{count(len(found.statistics.tensors), 'tensor')} over {count(found.statistics.samples, 'sample')}"
        click.echo(f"wrote {target}: statistics of {what} of {found.description}")


@click.command(
    cls=Command,
    examples=("qdqtool merge shard1.stats shard2.stats -o all.stats",),
)
@click.argument("files", nargs=-1, required=True, metavar="FILE...")
@option("-o", "--output", type=_PATH, metavar="FILE", required=True, help="Where the merged statistics go.")
@option("-q", "--quiet", is_flag=True, help="Print warnings and errors only.")
def merge(files: tuple[str, ...], output: Path, quiet: bool) -> None:
    """Merge statistics files of parts of the data, given in the order of the data.

    The result is, bit for bit, what one run over all the data would have given.
    """
    from qdqtool.observation import calibration, statistics_file
    from qdqtool.report.files import check_output
    from qdqtool.units import count

    check_output(output, files)
    if len(set(files)) < len(files):
        raise click.UsageError("the same file is given twice; its samples would count twice")
    found = calibration.merged({name: statistics_file.read(name) for name in files})
    statistics_file.write(found, output)
    if not quiet:
        what = f"{count(found.statistics.samples, 'sample')} of {count(len(files), 'file')}"
        click.echo(f"wrote {output}: statistics over {what}")


@click.command(cls=Command, examples=("qdqtool cache", "qdqtool cache --clear"))
@option("--clear", is_flag=True, help="Remove everything that is kept.")
def cache(clear: bool) -> None:
    """Show where statistics are kept between runs, and how much room they take."""
    from qdqtool.observation.cache import FOLDER_VARIABLE, Cache, default_folder
    from qdqtool.units import count, size

    folder = default_folder()
    if folder is None:
        click.echo(f"nothing is kept: you have no home folder; {FOLDER_VARIABLE} names another")
        return
    kept = Cache(folder)
    if clear:
        click.echo(f"removed {count(kept.clear(), 'file')} from {folder}")
        return
    sizes = kept.sizes().values()
    click.echo(f"{folder}: {count(len(sizes), 'file')}, {size(sum(sizes))} (at most {size(kept.most_bytes)})")

"""The commands that list what exists, built in or by plugin."""

from __future__ import annotations

import click

from qdqtool.cli.options import Command, option


@click.command(cls=Command, examples=("qdqtool passes",))
def passes() -> None:
    """List graph passes, built in or by plugin."""
    _list("passes", "Graph passes, in the order of the pipeline")


@click.command(
    cls=Command, examples=("qdqtool calibrators", "qdqtool quantize model.onnx --data calib.npz --calibrator entropy")
)
def calibrators() -> None:
    """List calibrators, built in or by plugin."""
    _list("calibrators", "Choosers of activation ranges, with the options that --set takes")


@click.command(
    cls=Command,
    examples=(
        "qdqtool targets",
        "qdqtool targets --show cpu > my_accelerator.toml",
        "qdqtool quantize model.onnx --dry-run --target my_accelerator.toml",
    ),
)
@option("--show", "wanted", metavar="NAME", help="Print this target as TOML, a start for one of your own.")
def targets(wanted: str | None) -> None:
    """List targets that a file can be made for."""
    if wanted is not None:
        from qdqtool.planning import target_file

        click.echo(target_file.to_toml(target_file.resolve(wanted)), nl=False)
        return
    from qdqtool.planning.target import TARGETS
    from qdqtool.report import terminal

    rows = [(name, entry.summary, "") for name, entry in TARGETS.items()]
    terminal.console().print(terminal.listing("What a file can be made for", rows))


def _list(kind: str, title: str) -> None:
    from dataclasses import MISSING, fields
    from importlib.metadata import entry_points

    from qdqtool import registry
    from qdqtool.passes_api import describe
    from qdqtool.report import terminal

    found = registry.catalogue(kind)
    plugins = {p.name: p.dist.name if p.dist else p.value for p in entry_points(group=f"qdqtool.{kind}")}
    rows = []
    for name, summary in describe(found).items():
        options = ", ".join(f.name if f.default is MISSING else f"{f.name}={f.default!r}" for f in fields(found[name]))
        rows.append((name, f"{summary} [{options}]" if options else summary, plugins.get(name, "")))
    terminal.console().print(terminal.listing(title, rows))

"""A search on the terminal: the models found so far while it goes on, and what it came to."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from qdqtool.mixed_precision.results import SearchResult, Trial, front
from qdqtool.mixed_precision.workbench import Progress, Step
from qdqtool.report.layout import grid, head
from qdqtool.units import count, db, duration, size

_ROWS = 12
_SECONDS = 0.2  # between two pictures


@contextlib.contextmanager
def live(*, quiet: bool = False) -> Iterator[Progress | None]:
    """Give a callback that shows what a search does, gone once the block ends; None where nobody would see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    with Live(console=Console(stderr=True), transient=True, auto_refresh=False) as screen:
        shown = -_SECONDS
        began: tuple[str, float] = ("", 0.0)

        def show(step: Step) -> None:
            nonlocal shown, began
            now = time.monotonic()
            if step.stage != began[0]:
                began = (step.stage, now)
            if now - shown >= _SECONDS:
                shown = now
                screen.update(_picture(step, now - began[1]), refresh=True)

        yield show


def _picture(step: Step, seconds: float) -> RenderableType:
    bar = Table.grid(padding=(0, 2))
    left = "" if not step.done else f"{duration(seconds / step.done * (step.total - step.done))} left"
    whole = "" if step.left is None else f"at most {duration(step.left)}"
    bar.add_row(
        step.stage,
        ProgressBar(total=max(step.total, 1), completed=step.done, width=30),
        f"{step.done}/{step.total}",
        left,
        whole,
    )
    return Group(bar, *([_models(front(step.trials), step.best)] if step.trials else []))


def searched(result: SearchResult, *, written: Sequence[str] = ()) -> RenderableType:
    """What ``search`` shows: the models found, the one that was chosen, and the widths of its layers."""
    best, base = result.best, result.baseline
    parts: list[RenderableType] = [
        Text.assemble((f"{result.goal}", "bold"), f"   {size(result.float_bytes)} -> {size(best.bytes)}"),
        Text(result.split, style="dim"),
        head("Models", "SQNR and loss on the samples that choose, and on those held out"),
        _models(_listed(result), best),
    ]
    if base is not None and base != best:
        gain = best.holdout.sqnr_db - base.holdout.sqnr_db
        parts.append(Text(f"  {gain:+.1f} dB beside {base.uniform} bits everywhere, on samples held out"))
    parts += [head("Layers", count(len(result.layers), "layer")), _layers(result)]
    parts += [Text(f"note: {note}", style="yellow") for note in result.notes]
    if not result.complete:
        parts.append(Text("the time was up before the search was done; run it again to go on", style="yellow"))
    if written:
        parts.append(Text(f"\nWrote {', '.join(written)}", style="bold green"))
    return Group(*parts)


def _listed(result: SearchResult) -> list[Trial]:
    extra = [trial for trial in (result.best, result.baseline) if trial is not None]
    return sorted({id(t): t for t in (*result.front, *extra)}.values(), key=lambda trial: trial.bytes)


def _models(trials: Sequence[Trial], best: Trial | None) -> Table:
    table = grid(6)
    table.add_row("", "bytes", "mean bits", "SQNR", "held out", "loss, held out", style="dim")
    for trial in trials[-_ROWS:]:
        drop = "" if trial.holdout.drop is None else f"{trial.selection.drop:.3g}, {trial.holdout.drop:.3g}"
        name = f"all {trial.uniform}" if trial.uniform else "mixed"
        cells = (size(trial.bytes), f"{trial.bits:.3g}", db(trial.selection.sqnr_db), db(trial.holdout.sqnr_db), drop)
        table.add_row(f"{'> ' if trial == best else '  '}{name}", *cells)
    return table


def _layers(result: SearchResult) -> Table:
    """How many layers have each width, and which ones suffer most from it alone."""
    table = grid(3, justify="left")
    for width in result.widths:
        names = [name for name in result.layers if result.chosen[name] == width]
        if names:
            worst = sorted(names, key=lambda name: result.local_db.get(name, {}).get(width, 0.0))[:3]
            shown = ", ".join(
                f"{name} ({db(result.local_db[name][width])} alone)" if width in result.local_db.get(name, {}) else name
                for name in worst
            )
            more = f" and {len(names) - len(worst)} more" if len(names) > len(worst) else ""
            table.add_row(width if width == "float" else f"{width} bits", str(len(names)), f"{shown}{more}")
    return table

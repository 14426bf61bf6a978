"""A progress bar on standard error with rate and time left, where that is a terminal."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

from rich import progress as bars
from rich.console import Console
from rich.text import Text

from qdqtool.observation.observe import Progress

_TITLES = {"observe": "Observing", "compare": "Comparing"}


class _Rate(bars.ProgressColumn):
    """Samples a second."""

    def render(self, task: bars.Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("" if speed is None else f"{speed:.3g} samples/s", style="dim")


@contextlib.contextmanager
def progress_bar(*, quiet: bool = False) -> Iterator[Progress | None]:
    """Give a callback that shows progress, gone once the block ends; None where nobody would see it."""
    if quiet or not sys.stderr.isatty():
        yield None
        return
    columns = (
        bars.TextColumn("{task.description}"),
        bars.BarColumn(bar_width=30),
        bars.MofNCompleteColumn(),
        _Rate(),
        bars.TimeRemainingColumn(),
    )
    with bars.Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, bars.TaskID] = {}

        def show(step: str, done: int, total: int | None) -> None:
            if step not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[step] = bar.add_task(_TITLES.get(step, step), total=total)
            bar.update(tasks[step], completed=done, total=total)

        yield show

"""How a page for a terminal is laid out: headings, tables without lines, and the word for what is left out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from qdqtool.units import count, listed

Side = Literal["left", "right"]


def head(title: str, rest: str) -> Text:
    """A heading, and behind it what it sums up."""
    return Text.assemble("\n", (title, "bold cyan"), f"  {rest}" if rest else "")


def more(number: int, what: str, where: str) -> list[RenderableType]:
    """A line about what a list leaves out, and where it is whole; none where it leaves out nothing."""
    return [Text(f"  and {count(number, what)} more; {where}", style="dim")] if number > 0 else []


def grid(columns: int, *, justify: Side = "right", first: Side = "left") -> Table:
    """A table without lines; columns behind the first are ``justify``, or left where the first is not."""
    table = Table.grid(padding=(0, 2), pad_edge=True)
    for index in range(columns):
        last = justify if first == "left" else "left"
        table.add_column(justify=first if index == 0 else last, overflow="fold")
    return table


def operators(counts: Mapping[str, int]) -> str:
    """Operators with their counts, the most frequent first."""
    ordered = sorted(counts.items(), key=lambda item: -item[1])
    return ", ".join(f"{op} {number}" for op, number in ordered) or "none"


def by_reason(groups: Mapping[str, list[str]]) -> Table:
    """A table of reason -> nodes: how many, why and which, the most frequent reason first."""
    table = grid(2, first="right")
    for reason, nodes in sorted(groups.items(), key=lambda item: -len(item[1])):
        table.add_row(str(len(nodes)), Text.assemble(reason, (f"\n{listed(nodes)}", "dim")))
    return table

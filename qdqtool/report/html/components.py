"""What a page is made of, as values: texts, facts, tables, plots, maps. The template knows how each one looks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

State = Literal[
    "", "integer", "planned", "compiled", "float", "moved", "conversion", "gone", "good", "warning", "error", "note"
]
"""What a colour and a pattern stand for, wherever they are used on the page."""


@dataclass(frozen=True)
class Cell:
    """One cell of a table.

    Attributes:
        text: what is shown.
        sort: what the column is sorted by; None: the text, and where that is empty always last.
        state: a coloured mark before the text.
        share: length of a bar behind the text, 0 to 1; None: no bar.
        hint: more words, shown small below.
    """

    text: str
    sort: float | None = None
    state: State = ""
    share: float | None = None
    hint: str = ""


@dataclass(frozen=True)
class Column:
    """A column of a table: its title, the unit of its numbers, and whether they are numbers."""

    title: str
    unit: str = ""
    number: bool = False


def numbers(title: str, unit: str = "") -> Column:
    """A column of numbers."""
    return Column(title, unit, number=True)


@dataclass(frozen=True)
class Table:
    """A table whose columns can be sorted by.

    Attributes:
        name: unique on the page.
        caption: what the rows are, for those who do not see the heading.
        filters: titles of columns whose values can be chosen from; a table with any has a search field too.
        fold: rows that are shown before the rest is unfolded; 0: all.
    """

    name: str
    caption: str
    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    filters: Sequence[str] = ()
    fold: int = 0
    kind: ClassVar[str] = "table"

    def choices(self, title: str) -> list[str]:
        """The values of a column, once each, in the order of their first row."""
        index = [column.title for column in self.columns].index(title)
        return [text for text in dict.fromkeys(row[index].text for row in self.rows) if text]


@dataclass(frozen=True)
class Text:
    """A paragraph."""

    text: str
    quiet: bool = False
    kind: ClassVar[str] = "text"


@dataclass(frozen=True)
class Notice:
    """A sentence that must not be missed."""

    text: str
    state: State = "warning"
    kind: ClassVar[str] = "notice"


@dataclass(frozen=True)
class Fact:
    """One figure of the summary: what it is, the figure, and what it is compared with or measured on."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Facts:
    """The figures of the summary."""

    facts: Sequence[Fact]
    kind: ClassVar[str] = "facts"


@dataclass(frozen=True)
class Plot:
    """A plot drawn by Bokeh.

    Attributes:
        name: unique on the page.
        item: what Bokeh embeds (its ``json_item``).
        alt: what there is to see, in a sentence.
        choose: label of a field that chooses what is shown, its options coming from the page's data; "" for none.
        log: whether counts can be shown on a logarithmic scale.
    """

    name: str
    item: Mapping[str, Any]
    alt: str
    choose: str = ""
    options: Sequence[str] = ()
    log: bool = False
    kind: ClassVar[str] = "plot"


@dataclass(frozen=True)
class Tile:
    """One place of a map: its state, and the words that tell more about it."""

    state: State
    title: str


@dataclass(frozen=True)
class Map:
    """Tiles in the order of the graph, with a legend that counts them."""

    alt: str
    tiles: Sequence[Tile]
    legend: Sequence[tuple[State, str, int]]
    kind: ClassVar[str] = "map"


@dataclass(frozen=True)
class Strip:
    """One row of a heat map: a name, a figure, and levels 0 to 1 with their words."""

    name: str
    figure: str
    levels: Sequence[tuple[float, str]]


@dataclass(frozen=True)
class Strips:
    """Rows of a heat map, and what the ends of its scale stand for."""

    alt: str
    rows: Sequence[Strip]
    ends: tuple[str, str]
    kind: ClassVar[str] = "strips"


@dataclass(frozen=True)
class Reasons:
    """Names grouped by what they have in common."""

    groups: Sequence[tuple[str, Sequence[str]]]
    kind: ClassVar[str] = "reasons"


@dataclass(frozen=True)
class Code:
    """Text to copy, in a language that is named."""

    text: str
    language: str
    kind: ClassVar[str] = "code"


Part = Table | Text | Notice | Facts | Plot | Map | Strips | Reasons | Code


@dataclass(frozen=True)
class Section:
    """A part of the page with a heading, and a line about what it tells."""

    id: str
    title: str
    parts: Sequence[Part]
    lead: str = ""


@dataclass(frozen=True)
class Page:
    """A whole page.

    Attributes:
        title: of the window and the first heading.
        subtitle: what was done, in a line.
        sections: in order; the first one is the summary.
        data: what the page's script wants beside them, by name, as JSON has it.
    """

    title: str
    subtitle: str
    sections: Sequence[Section]
    data: Mapping[str, Any] = field(default_factory=dict)
    footer: str = ""

    @property
    def has_plots(self) -> bool:
        """Whether the plotting library is needed."""
        return any(part.kind == "plot" for section in self.sections for part in section.parts)

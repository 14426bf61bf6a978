"""A page taken apart without a browser: what it loads, its elements by tag, its tables, whether its tags fit."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any

_VOID = frozenset({"meta", "link", "input", "br", "img", "hr"})


@dataclass
class Parsed(HTMLParser):
    """What stands in a page."""

    html: str
    tags: Counter[str] = field(default_factory=Counter)
    attributes: list[tuple[str, dict[str, str]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    scripts: dict[str, str] = field(default_factory=dict)
    cells: dict[str, list[list[str]]] = field(default_factory=dict)
    """Table -> rows -> text of their cells."""
    problems: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[tuple[str, dict[str, str]]] = []
        self.feed(self.html)
        self.close()
        self.problems += [f"<{tag}> stays open" for tag, _ in self.open]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        if len(given) < len(attrs):
            self.problems.append(f"an attribute of <{tag}> is there twice")
        self.tags[tag] += 1
        self.attributes.append((tag, given))
        table = self._table()
        if table and tag == "tr":
            self.cells.setdefault(table, []).append([])
        elif table and tag in ("td", "th"):
            self.cells[table][-1].append("")
        if tag not in _VOID:
            self.open.append((tag, given))

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open[-1][0] != tag:
            self.problems.append(f"</{tag}> closes {self.open[-1:]}")
        else:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        tag, given = self.open[-1] if self.open else ("", {})
        if tag == "script":
            self.scripts[given.get("id", given.get("data-item", f"script {len(self.scripts)}"))] = data
        elif tag != "style":
            self.texts.append(data)
            table = self._table()
            if table and any(name in ("td", "th") for name, _ in self.open):
                self.cells[table][-1][-1] += data

    def _table(self) -> str:
        ids = (given["id"] for _, given in reversed(self.open) if "data-table" in given)
        return next(ids, "").removeprefix("table-")

    @property
    def text(self) -> str:
        """All that a reader sees, with single spaces."""
        return " ".join(" ".join(self.texts).split())

    @property
    def ids(self) -> list[str]:
        return [given["id"] for _, given in self.attributes if "id" in given]

    def data(self, name: str) -> Any:
        """The JSON in a script element."""
        return json.loads(self.scripts[name])

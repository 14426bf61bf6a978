"""A catalogue by name: the built-in table and what installed distributions add by entry point."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from qdqtool.errors import PipelineError, RecipeError, nearest


def catalogue(kind: str) -> dict[str, type]:
    """All entries of ``"passes"`` or ``"calibrators"``: built-in ones in their order, then plugins by name.

    Raises:
        PipelineError: a plugin uses a name that is taken, or cannot be imported; names the distribution.
    """
    found: dict[str, type] = {entry.name: entry for entry in _builtin(kind)}
    owners = dict.fromkeys(found, "qdqtool itself")
    for point in sorted(entry_points(group=f"qdqtool.{kind}"), key=lambda p: (p.name, p.value)):
        owner = point.dist.name if point.dist else point.value
        if point.name in found:
            raise PipelineError(
                f"{owner} offers {point.name!r} in qdqtool.{kind}, but {owners[point.name]} has that name already; "
                f"uninstall one of the two, or rename the entry point"
            )
        found[point.name], owners[point.name] = _load(point, owner), owner
    return found


def _builtin(kind: str) -> tuple[Any, ...]:
    table: tuple[Any, ...] = import_module(f"qdqtool.{kind}").BUILTIN
    return table


def _load(point: EntryPoint, owner: str) -> type:
    try:
        entry: type = point.load()
    except Exception as error:
        raise PipelineError(f"plugin {point.name!r} of {owner} cannot be imported: {error}") from error
    if getattr(entry, "name", None) != point.name:
        raise PipelineError(
            f"plugin {point.name!r} of {owner} calls itself {getattr(entry, 'name', None)!r}; use one name"
        )
    return entry


def make(kind: str, name: str, options: Mapping[str, object]) -> Any:
    """Build the entry ``name`` with ``options`` as its dataclass fields.

    Raises:
        RecipeError: unknown name or option, or a value of the wrong kind; names the nearest known one.
    """
    from pydantic import TypeAdapter, ValidationError

    known = catalogue(kind)
    singular = kind.removesuffix("s") if kind != "passes" else "pass"
    if name not in known:
        raise RecipeError(f"unknown {singular} {name!r}; known: {', '.join(known)}.{nearest(name, known)}")
    fields = [field.name for field in dataclasses.fields(known[name])]
    for option in options:
        if option not in fields:
            takes = f"it takes {', '.join(fields)}" if fields else "it takes no options"
            raise RecipeError(f"{singular} {name!r} has no option {option!r}; {takes}.{nearest(option, fields)}")
    try:
        return TypeAdapter(known[name]).validate_python(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        raise RecipeError(f"{singular} {name!r}, option {'.'.join(map(str, first['loc']))}: {first['msg']}") from error

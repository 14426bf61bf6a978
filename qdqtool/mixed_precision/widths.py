"""The widths that a layer may have, and the recipe that an assignment of widths to layers is.

An assignment is written as overrides of single nodes, one line a layer, so that a person can read and change it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

from qdqtool.errors import RecipeError, nearest
from qdqtool.planning.precision import FEW_BITS, Storage
from qdqtool.recipe import Recipe

FLOAT: Final = "float"
_PACKED_BITS: Final = 4

Assignment = Mapping[str, str]
"""Layer -> name of its width."""


@dataclass(frozen=True)
class Width:
    """What a layer may be: the name that users give it, bits of its weight, and its precision in a recipe.

    A layer of 16 bits has 16-bit codes for weight and inputs; any other has inputs of 8 bits. Float has no precision:
    the layer is excluded.
    """

    name: str
    bits: int
    precision: str | None

    def stored_bits(self, storage: Storage) -> int:
        """Bits that an element of the weight takes in the file."""
        if self.bits > 8:
            return self.bits
        return 8 if storage == "int8" or self.bits > _PACKED_BITS else _PACKED_BITS


WIDTHS: Final = {
    width.name: width
    for width in (
        Width("2", 2, "w2a8"),
        Width("3", 3, "w3a8"),
        Width("4", 4, "w4a8"),
        Width("5", 5, "w5a8"),
        Width("6", 6, "w6a8"),
        Width("8", 8, "w8a8"),
        Width("16", 16, "w16a16"),
        Width(FLOAT, 32, None),
    )
}
"""By name, in ascending order."""


def widths(names: Iterable[str], *, wide: bool) -> tuple[Width, ...]:
    """Widths by name, in ascending order.

    Args:
        names: keys of :data:`WIDTHS`.
        wide: the target takes codes of 16 bits.

    Raises:
        RecipeError: an unknown one, none, or 16 bits where the target has none.
    """
    wanted = set(names)
    unknown = sorted(wanted - WIDTHS.keys())
    if unknown or not wanted:
        raise RecipeError(
            f"widths must be some of {', '.join(WIDTHS)}, not {', '.join(unknown) or 'none'}."
            f"{nearest(unknown[0], WIDTHS) if unknown else ''}"
        )
    if "16" in wanted and not wide:
        raise RecipeError("this target has no kernel for codes of 16 bits: leave 16 out of the widths")
    return tuple(width for name, width in WIDTHS.items() if name in wanted)


def recipe_of(base: Recipe, assignment: Assignment) -> Recipe:
    """The recipe that gives every layer its width; what ``base`` says of other nodes stays.

    Layers whose precision is the recipe's own need no line. Beside weights of few bits, those of more are rounded by
    GPTQ too: so they make up for the errors of the layers before them.
    """
    nodes: dict[str, object] = {}
    excluded = list(base.nodes_to_exclude)
    for layer, name in assignment.items():
        precision = WIDTHS[name].precision
        if precision is None:
            excluded.append(re.escape(layer))
        elif precision != base.precision or base.ends_in_8_bits:
            nodes[re.escape(layer)] = {"precision": precision}
    values = base.values()
    # Of several overrides that match a node the first one counts.
    values["nodes"] = {**nodes, **values.get("nodes", {})}
    if base.weight_rounding == "auto" and any(WIDTHS[name].bits <= FEW_BITS for name in assignment.values()):
        values["weight_rounding"] = "gptq"
    return Recipe.of({**values, "nodes_to_exclude": excluded})


def to_toml(recipe: Recipe, remarks: Sequence[str] = ()) -> str:
    """The recipe as TOML with one line a layer, behind ``remarks`` as comments."""
    import tomli_w

    values = recipe.values()
    nodes = values.pop("nodes", {})
    text = Recipe.of(values).to_toml()
    # A key without a table of its own must come before the first table.
    head, table, rest = text.partition("\n[")
    lines = [*(f"# {remark}" for remark in remarks), head.rstrip("\n"), ""]
    if nodes:
        lines += ["[nodes]", *(_line(tomli_w.dumps({name: ""}), override) for name, override in nodes.items()), "", ""]
    return "\n".join(lines) + (f"{table.lstrip()}{rest}" if table else "")


def _line(key: str, override: Mapping[str, object]) -> str:
    import tomli_w

    fields = ", ".join(tomli_w.dumps({name: value}).strip() for name, value in override.items())
    return f"{key.partition(' = ')[0]} = {{ {fields} }}"

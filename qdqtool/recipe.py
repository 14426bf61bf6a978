"""Recipe: everything a user can choose, spelt as a TOML, YAML or JSON file, as Python keywords or as CLI options."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from qdqtool.data.images import ImagePreprocessing
from qdqtool.errors import RecipeError, nearest
from qdqtool.planning import combination, target_file
from qdqtool.recipe_fields import BASE_OPSET, Fields, Override

__all__ = ["BASE_OPSET", "Override", "Recipe", "match_names"]


class Recipe(Fields):
    """Fields that go together; :class:`qdqtool.recipe_fields.Fields` documents each."""

    @model_validator(mode="after")
    def _fits_precision(self) -> Self:
        reason = combination.obstacle(self)
        if reason is not None:
            raise ValueError(reason)
        return self

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Recipe:
        """Build a recipe from plain values; RecipeError names the field, and for an unknown one the nearest known."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise RecipeError("; ".join(_explain(item) for item in error.errors())) from error

    @classmethod
    def read(cls, path: str | Path) -> dict[str, object]:
        """Fields in a .toml, .yaml, .yml or .json file, not yet checked; RecipeError where it cannot be read.

        A target's file is looked for beside the recipe.
        """
        file = Path(path)
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"recipe {file} cannot be read: {error}") from error
        try:
            values = _parse(text, file.suffix.lower())
        except ValueError as error:
            raise RecipeError(f"recipe {file} is no valid {file.suffix.lstrip('.').upper()}: {error}") from error
        if not isinstance(values, dict):
            raise RecipeError(f"recipe {file} must be a table of fields, not {type(values).__name__}")
        if target_file.is_file(values.get("target")):
            values["target"] = str(file.parent / values["target"])
        return values

    def to_toml(self) -> str:
        """The recipe as TOML; the fields that describe every file (target, precision, calibrator) are always there."""
        import tomli_w

        head = self.model_dump(mode="json", include={"target", "precision", "calibrator"})
        return tomli_w.dumps({**head, **self.values()})

    def to_json(self) -> str:
        """All fields that differ from their defaults and the three that describe every file, as one line of JSON."""
        head = self.model_dump(mode="json", include={"target", "precision", "calibrator"})
        return json.dumps({**head, **self.values()})


def _parse(text: str, suffix: str) -> object:
    if suffix == ".toml":
        return tomllib.loads(text)
    if suffix == ".json":
        return json.loads(text)
    if suffix in (".yaml", ".yml"):
        import yaml

        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from error
    raise ValueError("name the file .toml, .yaml, .yml or .json")


def _explain(item: Any) -> str:
    """One validation error in the user's words."""
    path = ".".join(str(part) for part in item["loc"])
    if item["type"] == "extra_forbidden":
        known = _fields_at(item["loc"][:-1])
        return f"unknown recipe field {path!r}.{nearest(str(item['loc'][-1]), known)} Known: {', '.join(known)}"
    message = item["msg"].removeprefix("Value error, ")
    given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
    return f"recipe field {path!r}: {message}{given}" if path else message


def _fields_at(path: Iterable[object]) -> list[str]:
    first = next(iter(path), None)
    if first in ("tensors", "nodes"):
        return list(Override.model_fields)
    return list(ImagePreprocessing.model_fields if first == "images" else Recipe.model_fields)


def match_names(patterns: Iterable[str], names: Iterable[str], what: str) -> set[str]:
    """Names that one of the regular expressions matches whole.

    Raises:
        RecipeError: a pattern matches nothing; names the nearest name.
    """
    known, found = list(names), set()
    for pattern in patterns:
        hits = {name for name in known if re.fullmatch(pattern, name)}
        if not hits:
            raise RecipeError(f"{what} {pattern!r} matches no name.{nearest(pattern, known)}")
        found |= hits
    return found

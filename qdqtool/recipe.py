"""Recipe: everything a user can choose, spelt as a TOML, YAML or JSON file, as Python keywords or as CLI options."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator, model_validator

from qdqtool.errors import RecipeError, nearest
from qdqtool.images import ImagePreprocessing
from qdqtool.spec import FORMATS, Format

BASE_OPSET = 13
"""Opset that every model is raised to: the first with a scale for each channel."""
_STRICT = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)
Names = Annotated[tuple[str, ...], BeforeValidator(lambda v: (v,) if isinstance(v, str) else v), Field(strict=False)]
Interval = Annotated[tuple[float, float], Field(strict=False)]


class Choice(BaseModel):
    """A calibrator by name with its options beside it: ``name = "percentile"``, ``percentile = 99.99``."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    name: str

    @property
    def options(self) -> dict[str, object]:
        """The options, without the name."""
        return dict(self.model_extra or {})


class Override(BaseModel):
    """What one tensor or node gets instead of the target's own choice.

    dtype:       number format of the codes, e.g. "int16".
    symmetric:   zero point 0.
    granularity: "per_tensor" or "per_channel" (weights).
    range:       [lo, hi], set instead of calibrated.
    """

    model_config = _STRICT

    dtype: str | None = None
    symmetric: bool | None = None
    granularity: Literal["per_tensor", "per_channel"] | None = None
    range: Interval | None = None

    @field_validator("dtype")
    @classmethod
    def _known(cls, value: str | None) -> str | None:
        if value is not None and (value not in FORMATS or value == "int32"):
            known = [name for name in FORMATS if name != "int32"]
            raise ValueError(f"unknown number format {value!r}; known: {', '.join(known)}.{nearest(value, known)}")
        return value

    @field_validator("range")
    @classmethod
    def _ordered(cls, value: tuple[float, float] | None) -> tuple[float, float] | None:
        if value is not None and not value[0] < value[1]:
            raise ValueError(f"the range must ascend, not {list(value)}")
        return value


def _as_choice(value: object) -> object:
    return {"name": value} if isinstance(value, str) else value


class Recipe(BaseModel):
    """Everything a user can choose; unknown keys are errors.

    target:               "cpu", "cuda" or "tensorrt".
    precision:            weights and activations, e.g. "w8a8".
    calibrator:           name, or a table with name and options.
    weight_calibrator:    "minmax": weights cover all their values.
    per_channel:          weights get a scale for each output channel.
    op_types_to_quantize: operators that may be quantized; default: all that the target runs in integers.
    nodes_to_quantize:    regular expressions on whole node names; only these are quantized.
    nodes_to_exclude:     regular expressions on whole node names; these stay float.
    tensors, nodes:       overrides by whole tensor name, or by regular expression on whole node names (their inputs).
    samples:              number of calibration samples, chosen by content; default: all.
    bias_correction:      shift biases so that every layer keeps its mean on calibration data.
    reduce_range:         7-bit weights, for x86 processors without VNNI, whose 16-bit sums of u8 x s8 saturate.
    seed:                 of everything that is random.
    min_sqnr:             dB; a model below it on calibration samples is not written.
    external_data:        store tensors beside the model; default: where it is over 2 GB.
    images:               preprocessing of a folder of images.
    """

    model_config = _STRICT

    target: str = "cuda"
    precision: Literal["w8a8"] = "w8a8"
    calibrator: Annotated[Choice, BeforeValidator(_as_choice)] = Choice(name="mse")
    weight_calibrator: Literal["minmax"] = "minmax"
    per_channel: bool = True
    op_types_to_quantize: Names | None = None
    nodes_to_quantize: Names | None = None
    nodes_to_exclude: Names = ()
    tensors: dict[str, Override] = Field(default_factory=dict)
    nodes: dict[str, Override] = Field(default_factory=dict)
    samples: Annotated[int, Field(ge=1)] | None = None
    bias_correction: bool = True
    reduce_range: bool = False
    seed: int = 0
    min_sqnr: float | None = None
    external_data: bool | None = None
    images: ImagePreprocessing | None = None

    @model_validator(mode="after")
    def _patterns_compile(self) -> Self:
        for pattern in (*(self.nodes_to_quantize or ()), *self.nodes_to_exclude, *self.nodes):
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"{pattern!r} is no regular expression: {error}") from error
        return self

    @property
    def weight_format(self) -> Format:
        """Number format of weights that the precision names."""
        return FORMATS["int8"]

    @property
    def min_opset(self) -> int:
        """Least opset of the default domain that has per-channel Q/DQ and every number format asked for."""
        wanted = [o.dtype for o in (*self.tensors.values(), *self.nodes.values()) if o.dtype is not None]
        return max([BASE_OPSET, *(FORMATS[name].min_opset for name in wanted)])

    @classmethod
    def of(cls, values: Mapping[str, object]) -> Recipe:
        """Build a recipe from plain values; RecipeError names the field, and for an unknown one the nearest known."""
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise RecipeError("; ".join(_explain(item) for item in error.errors())) from error

    @classmethod
    def read(cls, path: str | Path) -> dict[str, object]:
        """Fields in a .toml, .yaml, .yml or .json file, not yet checked; RecipeError where it cannot be read."""
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
        return values

    def values(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain values for TOML, YAML or JSON."""
        return self.model_dump(mode="json", exclude_defaults=True, exclude_none=True)

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

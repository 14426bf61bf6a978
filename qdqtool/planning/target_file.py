"""Targets as TOML tables: how a user adds an accelerator without programming.

A table spells the fields of :class:`qdqtool.planning.target.Target`, and ``[rules.Conv]`` those of an :class:`OpRule`
for Conv; what is left out has its default. ``output`` is one of always, wanted, same and never, and ``activations =
"all"`` means every input. ``qdqtool targets --show cpu`` prints the table of a target that is built in, every field
explained.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import inspect
import json
import os
import re
import textwrap
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

from pydantic import TypeAdapter, ValidationError

from qdqtool.errors import RecipeError, nearest
from qdqtool.planning.target import TARGETS, Emit, OpRule, Target, target
from qdqtool.spec import FORMATS

TargetSource = str | os.PathLike[str] | Mapping[str, object] | Target
"""What a user may give for a target: a name, the path of a .toml file, a table, or the value itself."""
SUFFIX: Final = ".toml"
_EVERY: Final = "all"
_ABSORBED: Final = ("Relu", "Clip")
_WORDS: Final = {emit.name.lower(): emit for emit in Emit}
_WIDTH: Final = 110
_HEAD: Final = "A target of qdqtool. Give it a name of its own, and use the file as --target my_accelerator.toml."


def resolve(given: object) -> Target:
    """The target that a user means by a :data:`TargetSource`.

    Raises:
        RecipeError: unknown name, or a table that is not valid; names the nearest known field or value.
    """
    if isinstance(given, Target):
        return _checked(given)
    if isinstance(given, Mapping):
        return of(given)
    if isinstance(given, os.PathLike) or (isinstance(given, str) and is_file(given)):
        return read(given)
    if isinstance(given, str):
        return target(given)
    raise RecipeError(f"a target is a name, a {SUFFIX} file or a table, not {type(given).__name__}")


def is_file(given: object) -> bool:
    """Whether what a user gave for a target is the name of a file."""
    return isinstance(given, str) and given.lower().endswith(SUFFIX)


def read(path: str | os.PathLike[str]) -> Target:
    """Read a target from a TOML file; RecipeError names the file and what is wrong in it."""
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"target {os.fspath(path)} cannot be read: {error}") from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"target {os.fspath(path)} is no valid TOML: {error}") from error
    try:
        return of(values)
    except RecipeError as error:
        raise RecipeError(f"{os.fspath(path)}: {error}") from error


def of(values: Mapping[str, object]) -> Target:
    """Build a target from a table; RecipeError names every field that is wrong."""
    rules = values.get("rules", {})
    if not isinstance(rules, Mapping) or not all(isinstance(rule, Mapping) for rule in rules.values()):
        raise RecipeError("target field 'rules' must hold a table for each operator, as in [rules.Conv]")
    unknown = [
        *_unknown(values, Target),
        *(line for op in rules for line in _unknown(rules[op], OpRule, f"rules.{op}.")),
    ]
    for name, kind in _nested().items():
        inner = values.get(name)
        unknown += _unknown(inner, kind, f"{name}.") if isinstance(inner, Mapping) else ()
    if unknown:
        raise RecipeError("; ".join(unknown))
    listed = [{**_from_words(op, rule), "op": op} for op, rule in rules.items()]
    try:
        text = json.dumps({**values, "rules": listed})  # as JSON, because lists become tuples and sets there
        found = _adapter().validate_json(text, strict=True)
    except ValidationError as error:
        raise RecipeError("; ".join(_explain(item, list(rules)) for item in error.errors())) from error
    except TypeError as error:
        raise RecipeError(f"a target holds text, numbers, booleans, lists and tables alone: {error}") from error
    return _checked(found)


def values(given: Target) -> dict[str, Any]:
    """The table of a target: all of its fields, and of a rule those that differ from their defaults."""
    table = {field.name: _plain(getattr(given, field.name)) for field in dataclasses.fields(given) if field.init}
    table["rules"] = {rule.op: _rule(rule) for rule in given.rules}
    return table


def to_toml(given: Target) -> str:
    """The table of a target as a TOML file to start from; every field is explained."""
    table, told, kinds = values(given), _explained(Target), {**_nested(), "rules": OpRule}
    lines = [_comment(_HEAD)]
    for name in sorted(table, key=lambda name: name in kinds):  # TOML has tables last
        if name not in kinds:
            lines += [_comment(f"{name}: {told[name]}"), f"{name} = {_literal(table[name])}\n"]
            continue
        lines += ["\n", _comment(f"{name}: {told[name]}")]
        lines += [_comment(f"  {field}: {words}") for field, words in _explained(kinds[name]).items()]
        if name == "rules":
            lines.append(_comment(f"  output is {'; '.join(f'{word} ({emit})' for word, emit in _WORDS.items())}"))
            lines += [line for op, rule in table[name].items() for line in _table(f"rules.{op}", rule)]
        else:
            lines += _table(name, table[name])
    return "".join(lines)


def _table(name: str, table: Mapping[str, Any]) -> list[str]:
    inner = {key: value for key, value in table.items() if isinstance(value, Mapping)}
    own = [f"{key} = {_literal(value)}\n" for key, value in table.items() if key not in inner]
    return [f"[{name}]\n", *own, *(line for key in inner for line in _table(f"{name}.{key}", inner[key]))]


def _literal(value: object) -> str:
    """A value as TOML has it on one line."""
    if isinstance(value, list):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, str):  # TOML quotes as JSON does, but for one control character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value).lower()


# Both ways


def _rule(rule: OpRule) -> dict[str, Any]:
    differing = {
        field.name: getattr(rule, field.name)
        for field in dataclasses.fields(rule)
        if field.name != "op" and getattr(rule, field.name) != field.default
    }
    return {name: _EVERY if value is None else _plain(value) for name, value in differing.items()}


def _plain(value: Any) -> Any:
    if isinstance(value, enum.Enum):
        return value.name.lower()
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, frozenset):
        return sorted(value)
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value


def _from_words(op: str, rule: Mapping[str, object]) -> dict[str, object]:
    found = dict(rule)
    if found.get("activations") == _EVERY:
        found["activations"] = None
    if "output" in found:
        word = found["output"]
        if not isinstance(word, str) or word not in _WORDS:
            hint = nearest(str(word), _WORDS)
            raise RecipeError(f"target field 'rules.{op}.output' is {word!r}; known: {', '.join(_WORDS)}.{hint}")
        found["output"] = _WORDS[word].value
    return found


@functools.cache
def _adapter() -> TypeAdapter[Target]:
    return TypeAdapter(Target)


def _fields(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind) if field.init and field.name != "op"]


def _nested() -> dict[str, type]:
    """Fields of a target that are tables of a fixed form."""
    hints = typing.get_type_hints(Target)
    return {name: hints[name] for name in _fields(Target) if dataclasses.is_dataclass(hints[name])}


def _unknown(table: Mapping[str, object], kind: type, path: str = "") -> list[str]:
    known = _fields(kind)
    return [
        f"unknown target field {f'{path}{name}'!r}.{nearest(name, known)} Known: {', '.join(known)}"
        for name in table
        if name not in known
    ]


def _explain(item: Any, ops: list[str]) -> str:
    """One validation error in the user's words."""
    place = [ops[part] if index == 1 and item["loc"][0] == "rules" else part for index, part in enumerate(item["loc"])]
    path = ".".join(map(str, place))
    given = "" if isinstance(item["input"], dict) else f" (given: {item['input']!r})"
    return f"target field {path!r}: {item['msg']}{given}"


# What no type tells


def _checked(found: Target) -> Target:
    """The target itself; RecipeError says what in it contradicts what."""
    wrong = next(_contradictions(found), None)
    if wrong is not None:
        raise RecipeError(f"target {found.name!r}: {wrong}")
    return found


def _contradictions(found: Target) -> Iterator[str]:
    if re.fullmatch(r"[A-Za-z0-9][\w.+-]*", found.name) is None or found.name.lower().endswith(SUFFIX):
        yield "its name must be made of letters, digits, '_', '-', '+' and '.', as in 'my_accelerator'"
    if TARGETS.get(found.name, found) != found:
        yield "this name is built in with other rules; give your target a name of its own"
    formats = {
        "activation": [name for name in FORMATS if name != "int32"],
        "weight": ["int8", "uint8"],  # other widths are the recipe's precision
    }
    for field, known in formats.items():
        name = getattr(found, field)
        if name not in known:
            yield f"{field} is {name!r}; known number formats: {', '.join(known)}.{nearest(name, known)}"
    for op in sorted(found.absorbed - {*_ABSORBED}):
        yield f"absorbed names {op!r}, but only {' and '.join(_ABSORBED)} can vanish into the codes behind a kernel"
    if len(found.by_op) < len(found.rules):
        yield "an operator has two rules"
    if found.residual and "Add" in found.by_op:
        yield "residual decides about Add, which has a rule besides; leave one of the two out"
    for rule in found.rules:
        yield from (f"rules.{rule.op}: {wrong}" for wrong in _wrong_rule(rule))


def _wrong_rule(rule: OpRule) -> Iterator[str]:
    import onnx

    from qdqtool.graphs.linear import LINEAR_OPS, RECURRENT_OPS

    if not onnx.defs.has(rule.op):
        ops = {schema.name for schema in onnx.defs.get_all_schemas() if not schema.domain}
        yield f"ONNX has no operator of this name.{nearest(rule.op, ops)}"
    if rule.weight and rule.op not in LINEAR_OPS | RECURRENT_OPS:
        yield f"weight goes with {', '.join(sorted(LINEAR_OPS | RECURRENT_OPS))} alone"
    if rule.weight and rule.op in RECURRENT_OPS and (not rule.weight_only or rule.activations != ()):
        yield "of recurrent layers only the weights can be stored in integers: weight_only = true, activations = []"
    if rule.weight_only and not (rule.weight and rule.output is Emit.NEVER):
        yield 'weight_only goes with weight = true and output = "never"'
    if not rule.kernel and rule.output is not Emit.SAME:
        yield 'kernel = false goes with output = "same", where Q/DQ around a float operator lose nothing'
    if rule.bound is not None and not (rule.bound[0] <= 0 <= rule.bound[1] and rule.bound[0] < rule.bound[1]):
        yield f"bound must ascend and hold 0, not {list(rule.bound)}"
    if rule.activations is not None and (min(rule.activations, default=0) < 0):
        yield f"activations counts inputs from 0 on, not {list(rule.activations)}"


# Documentation


def _explained(kind: type) -> dict[str, str]:
    """Field -> what the class says about it."""
    _, _, text = (inspect.getdoc(kind) or "").partition("Attributes:\n")
    items = re.split(r"\n(?=    \w+: )", "\n" + text)[1:]
    told = dict(item.strip().split(": ", 1) for item in items)
    return {
        name: " ".join(words.replace("``", "").replace("None:", '"all":').split())
        for name, words in told.items()
        if name != "op"
    }


def _comment(text: str) -> str:
    start = "# " + " " * (len(text) - len(text.lstrip()))
    lines = textwrap.wrap(text.strip(), _WIDTH, initial_indent=start, subsequent_indent=f"{start}  ")
    return "".join(f"{line}\n" for line in lines)

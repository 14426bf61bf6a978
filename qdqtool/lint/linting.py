"""Run rules over a model, and mend what can be mended without changing its outputs."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from typing import Final

import onnx

from qdqtool.errors import RecipeError
from qdqtool.graphs import model as models
from qdqtool.lint.findings import Checked, Finding, Rule, Severity
from qdqtool.lint.rules import RULES
from qdqtool.lint.subject import Subject
from qdqtool.pipeline import RECIPE_KEY
from qdqtool.planning.target import Target
from qdqtool.planning.target_file import resolve
from qdqtool.recipe import Recipe

_ORDER: Final = list(Severity)
_PASSES: Final = 8
"""How often fixes are applied at most; one makes others possible: removing a pair leaves its constants unread."""


def target_of(proto: onnx.ModelProto) -> Target | None:
    """What a model was made for, from the recipe in its metadata; None where there is none.

    Raises:
        RecipeError: the recipe is broken, or names a target that is not known here.
    """
    text = models.metadata(proto).get(RECIPE_KEY)
    if text is None:
        return None
    try:
        values = json.loads(text)
    except json.JSONDecodeError as error:
        raise RecipeError(f"the recipe in the model's metadata is broken ({error}); name its --target") from error
    return resolve(Recipe.of(values).target)


def check(
    proto: onnx.ModelProto, target: Target | None, rules: Sequence[Rule] = RULES, *, path: str = "the model"
) -> Checked:
    """Look at a model with every rule.

    Args:
        proto: what :func:`qdqtool.lint.subject.load` gave.
        target: what the file is for; None leaves out the rules that ask for it, and says so.
        rules: those to apply.
        path: what findings name as the file.
    """
    subject = Subject(proto, target)
    left_out = [rule for rule in rules if rule.of_target and target is None]
    found, notes = [], []
    for rule in rules:
        if rule.check is None or rule in left_out:
            continue
        try:
            found += [Finding.of(rule, hit) for hit in rule.check(subject)]
        except Exception as error:  # rules rely on what the checker ensures
            if subject.invalid is None:
                raise
            notes.append(f"{rule.id} could not look at this invalid model: {error}")
    if left_out and subject.conversions:
        ids = ", ".join(rule.id for rule in left_out)
        notes.append(f"its metadata name no target, so {ids} were left out; --target names one")
    name = None if target is None else target.name
    return Checked(path, name, len(subject.conversions), in_order(found), tuple(notes))


def has_external_data(path: str) -> bool:
    """Whether a model's file keeps tensors beside it."""
    proto = onnx.load(path, load_external_data=False)
    return any(tensor.data_location == onnx.TensorProto.EXTERNAL for tensor in proto.graph.initializer)


def in_order(findings: Iterable[Finding]) -> tuple[Finding, ...]:
    """Errors first, then by rule; of one rule as found."""
    return tuple(sorted(findings, key=lambda one: (_ORDER.index(one.severity), one.rule)))


def fix(proto: onnx.ModelProto, target: Target | None, rules: Sequence[Rule] = RULES) -> dict[str, int]:
    """Mend a model in place; returns rule id -> how many places.

    Raises:
        ModelError: the model is invalid.
    """
    models.check(proto)
    done: dict[str, int] = {}
    for _ in range(_PASSES):
        before = sum(done.values())
        for rule in rules:
            if rule.fix is not None:
                count = rule.fix(Subject(proto, target))
                if count:
                    done[rule.id] = done.get(rule.id, 0) + count
        if sum(done.values()) == before:
            break
    return done

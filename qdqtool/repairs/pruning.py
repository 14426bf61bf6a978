"""Take back steps that later ones made needless: the least that puts a model right."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from qdqtool.errors import QdqError
from qdqtool.recipe import Recipe
from qdqtool.repairs.jury import Jury, Tried
from qdqtool.repairs.values import Step


@dataclass(frozen=True)
class Change:
    """A step with the recipes before and after it."""

    step: Step
    before: Recipe
    after: Recipe

    def on(self, recipe: Recipe) -> Recipe:
        """The recipe with what this step changed: fields, overrides by name, and nodes left in float."""
        old, new, values = self.before.values(), self.after.values(), recipe.values()
        for name in dict.fromkeys([*old, *new]):
            was, is_now = old.get(name), new.get(name)
            if was == is_now:
                continue
            if name == "nodes_to_exclude":
                added = [one for one in is_now or () if one not in (was or ())]
                values[name] = [*dict.fromkeys([*values.get(name, ()), *added])]
            elif name in ("tensors", "nodes"):
                values[name] = _overrides(was or {}, is_now or {}, values.get(name, {}))
            elif is_now is None:
                values.pop(name, None)
            else:
                values[name] = is_now
        return Recipe.of(values)


def _overrides(was: dict[str, Any], is_now: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Overrides with those that a step changed, its own first; without those that it took out."""
    changed = {name: one for name, one in is_now.items() if was.get(name) != one}
    gone = was.keys() - is_now.keys()
    return {**changed, **{name: one for name, one in given.items() if name not in changed and name not in gone}}


def pruned(jury: Jury, start: Tried, end: Tried, changes: Sequence[Change]) -> tuple[Tried, list[Step]]:
    """Leave out each step without which the outputs lose less than half of what a step must gain.

    Args:
        jury: judges.
        start: before all steps.
        end: behind them.
        changes: the steps.

    Returns:
        The model behind the steps that stay, and these with their figures in the new order.
    """
    kept, index = list(changes), 0
    while index < len(kept) - 1:
        others = [*kept[:index], *kept[index + 1 :]]
        less = _behind(jury, start, others)
        if less is not None and _as_good(jury, less, end):
            kept, end = others, less
        else:
            index += 1
    if len(kept) == len(changes):
        return end, [one.step for one in changes]
    return _told(jury, start, end, kept)


def _behind(jury: Jury, start: Tried, changes: Sequence[Change]) -> Tried | None:
    """The model behind some changes; None where they do not work without others."""
    recipe = start.trial.recipe
    try:
        for change in changes:
            recipe = change.on(recipe)
        return jury.judged(jury.bench.exact(jury.bench.quantize(recipe)))
    except QdqError:
        return None


def _as_good(jury: Jury, less: Tried, end: Tried) -> bool:
    near = less.score >= end.score - jury.rules.min_gain / 2 and less.macs >= end.macs
    return near and (jury.reached(less) or not jury.reached(end))


def _told(jury: Jury, start: Tried, end: Tried, changes: Sequence[Change]) -> tuple[Tried, list[Step]]:
    """Steps with the figures that they have without those left out."""
    steps, before = [], start
    for count, change in enumerate(changes, start=1):
        after = end if count == len(changes) else _behind(jury, start, changes[:count])
        if after is None:  # it works only with those behind it, which then count as one with it
            continue
        figures = [jury.reported(one.trial) for one in (before, after)]
        step = replace(change.step, before_db=figures[0], after_db=figures[1], macs=before.macs - after.macs)
        steps.append(replace(step, bytes=after.trial.size - before.trial.size))
        before = after
    return end, steps

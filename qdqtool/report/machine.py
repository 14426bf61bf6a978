"""Results as JSON for programs; infinite figures become the strings "inf" and "-inf"."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from qdqtool.passes_api import State, Timing
from qdqtool.planning.plan import DerivedFrom, Entry, SharedWith
from qdqtool.report.values import plain

if TYPE_CHECKING:
    from _typeshed import DataclassInstance


def to_json(value: DataclassInstance) -> str:
    """A result value as indented JSON."""
    return _dumps(dataclasses.asdict(value))


def plan_json(state: State, timings: tuple[Timing, ...]) -> str:
    """What :func:`qdqtool.dry_run` found: the entries, and what was left out and why."""
    assert state.plan is not None
    plan = state.plan
    return _dumps(
        {
            "recipe": json.loads(state.recipe.to_json()),
            "entries": [
                {"key": str(key), "tensor": plan.tensors[key], "constant": key in plan.constants, **_entry(entry)}
                for key, entry in plan.entries.items()
            ],
            "layers": plan.kernels,
            "weight_only": sorted(plan.weight_only),
            "skipped": [dataclasses.asdict(skip) for skip in dict.fromkeys(state.skipped)],
            "notes": state.notes,
            "timings": [dataclasses.asdict(timing) for timing in timings],
        }
    )


def _entry(entry: Entry) -> dict[str, Any]:
    if isinstance(entry, SharedWith):
        return {"shared_with": str(entry.key)}
    if isinstance(entry, DerivedFrom):
        return {"derived_from": [str(entry.activation), str(entry.weight)]}
    return {"spec": str(entry), "range": entry.fixed}


def _dumps(values: Any) -> str:
    return json.dumps(plain(values), indent=2, allow_nan=False)

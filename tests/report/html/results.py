"""A search and a repair made by hand, for the tests of their pages."""

from __future__ import annotations

import math

from qdqtool.mixed_precision.results import Quality, SearchResult, Trial
from qdqtool.passes_api import Skip
from qdqtool.recipe import Recipe
from qdqtool.repairs.analysis import Analysis, LayerError
from qdqtool.repairs.values import Figures, Goal, Left, Repair, Samples, Step

LAYERS = ("stem", "<b>body</b>", "head")


def trial(bits: float, db: float, *widths: str) -> Trial:
    quality = Quality(8, db, 90.0, 100 - db)
    return Trial(dict(zip(LAYERS, widths, strict=True)), round(1000 * bits), bits, quality, quality)


def search(**changes: object) -> SearchResult:
    tried = (trial(4, 20, "4", "4", "4"), trial(8, 40, "8", "8", "8"), trial(4, 25, "8", "4", "2"))
    decibels = {layer: {"2": 10.0 + i, "4": 22.0 + i, "8": math.inf} for i, layer in enumerate(LAYERS)}
    values: dict[str, object] = {
        "goal": "bits=4", "layers": LAYERS, "widths": ("2", "4", "8"), "operators": dict.fromkeys(LAYERS, "Conv"),
        "elements": dict.fromkeys(LAYERS, 100), "chosen": tried[2].assignment, "local_db": decibels,
        "cumulative_db": decibels, "local_drop": {}, "best": tried[2], "baseline": tried[0], "trials": tried,
        "recipe": Recipe(target="cpu"), "float_bytes": 32_000, "split": "half and half", "metric": "top1",
        "skipped": (Skip("search", "odd", "its weight is computed at run time"),), **changes,
    }  # fmt: skip
    return SearchResult(**values)  # type: ignore[arg-type]  # the fields above, as the class has them


def repair(*, steps: bool = True, goal: Goal | None = None) -> Repair:
    errors = (
        LayerError("stem", "Conv", "t0", 40.0, 40.0, math.inf, 0.1, 36.0, hurts=False),
        LayerError("body", "Conv", "t1", 12.0, 12.0, 40.0, 0.9, 36.0, hurts=True),
    )
    analysis = Analysis(errors, 8, {"y": 12.0}, 25.0)
    step = Step("body", "Conv", "calibrator", "calibrator mse for <t0>", 12.0, 30.0, 31.0, 0, 16)
    given, after = Figures({"y": 12.0}, 0.1), Figures({"y": 30.0 if steps else 12.0}, 0.1)
    return Repair(
        given, given, after, (step,) if steps else (), (Left("stem", "Conv", "it does not hurt"),), analysis, analysis,
        Recipe(target="cpu"), "[tensors.t0]\n", goal or Goal(), Samples(8, 8, "--data"), 5, ("a note",),
    )  # fmt: skip

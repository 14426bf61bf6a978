"""The task's score: metrics by name, and the scores of both models with the interval of their difference."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qdqtool.errors import DataError, RecipeError, nearest
from qdqtool.verification.significance import Difference, paired, resampled

Array = npt.NDArray[Any]
Metric = Callable[[Mapping[str, Array], Array], Any]
DRAWS: Final = 200
"""How often a metric that is one number is computed anew, for an interval."""


@dataclass(frozen=True)
class Scores:
    """The score of the float model and of both forms of the quantized one; None without a metric."""

    reference: float | None = None
    fused: float | None = None
    emulated: float | None = None
    difference: Difference | None = None


def scored(
    name: str | None, metric: Metric, outputs: Sequence[Mapping[str, Array]], labels: Array, *, draws: int
) -> Scores:
    """Scores by a metric that gives one for each sample, or one number over all of them; labels fit the samples."""
    samples = len(labels)

    def score(given: Mapping[str, Array], labels: Array) -> npt.NDArray[np.float64]:
        found = np.asarray(metric(given, labels), np.float64)
        if found.shape not in ((), (len(labels),)):
            raise DataError(
                f"metric {name!r} gave an array of shape {list(found.shape)} for {len(labels)} samples; it must give "
                f"one number, or a score for each sample"
            )
        return found

    scores = [score(given, labels) for given in outputs]
    difference = paired(scores[0], scores[1]) if scores[0].ndim else None
    by_sample = all(len(values) == samples for given in outputs[:2] for values in given.values())
    if difference is None and draws and by_sample:

        def both(index: npt.NDArray[np.intp]) -> tuple[float, float]:
            drawn = ({key: values[index] for key, values in given.items()} for given in outputs[:2])
            first, second = (float(score(given, labels[index])) for given in drawn)
            return first, second

        difference = resampled(both, samples, draws)
    reference, fused, emulated = (float(one.mean()) for one in scores)
    return Scores(reference, fused, emulated, difference)


def find_metric(name: str) -> Metric:
    """A metric by name: ``f(outputs by name, labels)`` -> one score a sample or one number, higher is better.

    Raises:
        RecipeError: unknown name, or a function that cannot be imported.
    """
    if name in METRICS:
        return METRICS[name]
    module, _, function = name.partition(":")
    if not function:
        raise RecipeError(
            f"unknown metric {name!r}; known: {', '.join(METRICS)}, or package.module:function.{nearest(name, METRICS)}"
        )
    try:
        found: Metric = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"metric {name!r} cannot be imported: {error}") from error
    return found


def _top(k: int) -> Metric:
    def metric(outputs: Mapping[str, Array], labels: Array) -> Array:
        scores = next(iter(outputs.values()))
        scores = scores.reshape(len(scores), -1)
        best = (
            np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k] if k > 1 else scores.argmax(1)[:, None]
        )
        hits: Array = (best == labels.reshape(-1, 1)).any(axis=1) * 100.0
        return hits

    return metric


METRICS: Final[Mapping[str, Metric]] = {"top1": _top(1), "top5": _top(5)}

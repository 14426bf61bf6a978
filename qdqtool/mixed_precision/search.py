"""search(): the precision of every layer: the least noise under a budget, or the fewest bytes that keep the accuracy.

1. A model with one width for all layers is quantized, measured and written, so that there is a result at once.
2. Sensitivities are measured on the switchboard, a float run of a few samples for each layer and width.
3. An integer program finds the best assignment for them; sensitivities measured around it correct those of single
   layers, until that no longer helps.
4. What was found is quantized as its recipe says and measured on samples that took no part in the sensitivities; where
   it breaks its limit, the limit is tightened and the program solved again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import qdqtool
from qdqtool import pipeline, runtime
from qdqtool.data.source import Data, load_labels, open_data
from qdqtool.errors import DataError, RecipeError
from qdqtool.graphs import model as models
from qdqtool.graphs.model import ModelSource
from qdqtool.mixed_precision import candidates
from qdqtool.mixed_precision import widths as naming
from qdqtool.mixed_precision.emulation import decibels
from qdqtool.mixed_precision.goals import goal, usual_widths
from qdqtool.mixed_precision.judge import Judge
from qdqtool.mixed_precision.results import SearchResult
from qdqtool.mixed_precision.state_file import Found, search_key
from qdqtool.mixed_precision.strategies import LeastBytes, UnderBudget, strategy
from qdqtool.mixed_precision.workbench import OutOfTime, Outputs, Progress, Workbench
from qdqtool.observation.cache import Cache, default_folder
from qdqtool.observation.observe import Observing
from qdqtool.passes_api import State
from qdqtool.recipe import Recipe
from qdqtool.verification.metric import find_metric

_WITHOUT_EVALUATION: Final = "no evaluation data were given: models are judged on the calibration samples"


def search(
    model: ModelSource,
    data: object,
    *,
    budget: str | None = None,
    max_drop: float | None = None,
    min_sqnr: float | None = None,
    evaluation: object = None,
    labels: Any = None,
    metric: str | None = None,
    widths: Sequence[str] | None = None,
    output: str | os.PathLike[str] | None = None,
    seconds: float | None = None,
    recipe: Recipe | Mapping[str, object] | None = None,
    provider: str = "auto",
    cache: bool | str | os.PathLike[str] = True,
    progress: Progress | None = None,
    **fields: object,
) -> SearchResult:
    """Search for the precision of every linear layer.

    Args:
        model: path or ModelProto; never changed.
        data: calibration data, as for :func:`qdqtool.quantize`.
        budget: "bits=4" (mean of the weights), "size=0.3" (of the float file), "size=120kB" or "latency=0.8" (of the
            float model's time): the model with the least noise that keeps it is wanted.
        max_drop: instead of a budget: the smallest model is wanted whose metric loses no more, in its own units.
        min_sqnr: the same for the SQNR of the outputs, in dB.
        evaluation: data to measure on, of which half is held out; None: the calibration data.
        labels: one a sample of ``evaluation``; None: the array "labels" of it, if there is one.
        metric: "top1", "top5" or "package.module:function", as for :func:`qdqtool.compare`.
        widths: what a layer may have: "2", "3", "4", "5", "6", "8" or "16" bits, or "float"; None: 2 to 8 where the
            budget is of bits; else 4, 8 and float, or 8 and float for a latency, as there is no type between them.
        output: where the best model is written from the first one on, with its recipe beside it (.toml) and what the
            search found (.search.json), with which an interrupted search goes on; None: nowhere.
        seconds: after so many the search ends with the best so far; None: when it is done.
        recipe: a :class:`Recipe` or its fields; ``fields`` override it.
        provider: as for :func:`qdqtool.quantize`.
        cache: as for :func:`qdqtool.quantize`.
        progress: told after every figure.
        **fields: recipe fields.

    Raises:
        RecipeError: a budget that cannot be met names the least that can be reached.
        GateError: no model found keeps ``max_drop`` or ``min_sqnr``.
        QdqError: as :func:`qdqtool.quantize`.
    """
    start = time.monotonic()
    wanted = goal(budget, max_drop, min_sqnr, metric)
    base = pipeline.make_recipe(recipe, fields)
    if base.min_sqnr is not None:
        raise RecipeError("min_sqnr in the recipe would refuse models on the way: give it to the search instead")
    if base.precision != "w8a8":
        raise RecipeError(f"the search chooses the precision of every layer: leave precision {base.precision} out")
    with contextlib.ExitStack() as stack:
        state, facts = pipeline.load(model, base, provider)
        chosen = naming.widths(usual_widths(wanted) if widths is None else widths, wide=state.target.for_cpu)
        if chosen[0].name == naming.FLOAT:
            raise RecipeError("widths must hold one that is not float")
        kept = _cache(cache, stack)
        state.observing, state.cache = Observing(None), Cache(kept)
        state.data, judged = _opened(state, data, evaluation, stack)
        judge = _judge(
            state, judged, load_labels(data if evaluation is None else evaluation) if labels is None else labels, metric
        )
        layers = candidates.prepare(state, facts, base)
        outputs = None if output is None else Outputs(Path(output))
        found = Found(None if outputs is None else outputs.state, _key(state, judge, metric))
        assert state.original is not None
        bench = Workbench(
            model=state.original,
            data=state.data,
            base=base,
            state=state,
            layers=layers,
            widths=chosen,
            judge=judge,
            found=found,
            options={"provider": provider, "cache": kept},
            outputs=outputs,
            progress=progress,
            deadline=None if seconds is None else start + seconds,
            notes=(_WITHOUT_EVALUATION,) if evaluation is None else (),
        )
        return _searched(bench, strategy(bench, wanted), str(wanted), metric)


def _searched(bench: Workbench, way: UnderBudget | LeastBytes, wanted: str, metric: str | None) -> SearchResult:
    """Search until done, interrupted or out of time; what was found is kept in any case."""
    complete = False
    with contextlib.ExitStack() as stack:
        stack.callback(bench.found.save)
        with contextlib.suppress(OutOfTime):
            way.run()
            bench.cumulative()
            complete = True
        best = way.settle()
        bench.settle(best)
    return SearchResult(
        goal=wanted,
        layers=bench.names,
        widths=bench.width_names,
        operators={layer.name: layer.op for layer in bench.layers},
        elements={layer.name: layer.elements for layer in bench.layers},
        chosen=best.assignment,
        local_db=_known(bench, "local"),
        cumulative_db=_known(bench, "cumulative"),
        local_drop={} if metric is None else _known(bench, "drop"),
        best=best,
        baseline=way.baseline,
        trials=tuple(bench.trials),
        recipe=naming.recipe_of(bench.base, best.assignment),
        float_bytes=bench.state.float_bytes,
        split=bench.judge.split,
        notes=bench.notes,
        skipped=tuple(skip for skip in dict.fromkeys(bench.state.skipped) if skip.pass_name == candidates.PASS),
        complete=complete,
        metric=metric,
    )


def _known(bench: Workbench, kind: str) -> dict[str, dict[str, float]]:
    """Sensitivities that were measured, by layer and width; where the time was up some are missing."""
    found: dict[str, dict[str, float]] = {}
    for row, layer in enumerate(bench.names):
        for width in bench.integers:
            before = bench.names[: row + 1] if kind == "cumulative" else (layer,)
            value = bench.known(dict.fromkeys(before, width.name))
            if value is not None:
                noise, drop = value
                figure = drop if kind == "drop" else decibels(noise)
                if figure is not None:
                    found.setdefault(layer, {})[width.name] = figure
    return found


def _cache(wanted: bool | str | os.PathLike[str], stack: contextlib.ExitStack) -> Path:
    """Where statistics are kept meanwhile, so that no trial observes again what another one did."""
    folder = default_folder() if wanted is True else None if wanted is False else Path(wanted)
    if folder is not None:
        return folder
    return Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="qdqtool-")))


def _opened(state: State, data: object, evaluation: object, stack: contextlib.ExitStack) -> tuple[Data, Data]:
    """The calibration data and those to measure on."""
    assert state.original is not None
    if data is None:
        raise DataError("a search needs calibration data: an .npz, a folder, arrays or an iterable of feeds")
    inputs = models.inputs(state.original)

    def opened(source: object) -> Data:
        if isinstance(source, Data):
            return source
        return stack.enter_context(open_data(source, inputs, images=state.recipe.images, seed=state.recipe.seed))

    calibration = opened(data)
    if evaluation is not None:
        return calibration, opened(evaluation)
    return calibration, calibration


def _judge(state: State, data: Data, labels: Any, metric: str | None) -> Judge:
    assert state.original is not None
    score = None if metric is None else find_metric(metric)
    return Judge(state.original, data, labels=labels, metric=score, provider=state.provider)


def _key(state: State, judge: Judge, metric: str | None) -> str:
    """Hash of all that a figure depends on beside the assignment; not the goal, which another run may change."""
    assert state.calibration is not None
    return search_key(
        {
            "model": state.float_sha256,
            "calibration": [source.digest for source in state.calibration.sources],
            "evaluation": [digest.hex() for digest in judge.digests],
            "labels": judge.labels_digest,
            "recipe": state.recipe.to_json(),
            "metric": metric,
            "versions": [qdqtool.__version__, runtime.describe(state.provider)],
        }
    )

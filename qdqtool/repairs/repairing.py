"""repair(): where the error of a quantized model is made, and the least that puts it right."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy.typing as npt
import onnx

from qdqtool import pipeline
from qdqtool.data.source import Data, load_labels, open_data
from qdqtool.errors import DataError, RecipeError, nearest
from qdqtool.graphs import model as models
from qdqtool.observation.cache import Cache, default_folder
from qdqtool.observation.observe import Observing
from qdqtool.observation.sweeps import parse_bytes
from qdqtool.repairs.analysis import Analysis
from qdqtool.repairs.difference import difference
from qdqtool.repairs.given import recipe_of
from qdqtool.repairs.jury import Jury, Rules, Tried
from qdqtool.repairs.mending import Mender, Watch, look
from qdqtool.repairs.probes import Judge, Probes, divide, worst
from qdqtool.repairs.remedies import REMEDIES, changed
from qdqtool.repairs.task import Task
from qdqtool.repairs.values import Figures, Goal, Repair, Samples, Step
from qdqtool.repairs.workbench import Trial, Workbench

if TYPE_CHECKING:
    from qdqtool.graphs.model import ModelSource
    from qdqtool.observation.engine import Engine
    from qdqtool.observation.observe import Progress
    from qdqtool.planning.target_file import TargetSource

_MIN_GAIN: Final = 0.5
_MIN_GAIN_TO_GOAL: Final = 0.1
_MAX_FLOAT: Final = 0.1
"""Without a goal: dB that a step must gain, and the share of the arithmetic that may leave integers; dB with one."""


def repair(
    model: ModelSource,
    quantized: ModelSource,
    data: object,
    *,
    evaluation: object = None,
    metric: str | None = None,
    min_sqnr: float | None = None,
    max_drop: float | None = None,
    allow: Sequence[str] | None = None,
    min_gain: float | None = None,
    max_float: float | None = None,
    target: TargetSource | None = None,
    provider: str = "auto",
    memory: int | str | None = None,
    engine: Engine | None = None,
    cache: bool | str | os.PathLike[str] = True,
    progress: Progress | None = None,
    watch: Watch | None = None,
) -> Repair:
    """Find the layers that make a quantized model's error, and mend them by the cheapest means that work.

    Ranges, biases and rounding come from ``data``. Steps are chosen on one half of the samples that are measured on,
    and reported on the other: half of ``evaluation``, or of the calibration samples that biases are not corrected on
    where there are enough of these.

    Args:
        model: the float model, path or ModelProto; never changed.
        quantized: its quantized form, of this tool or another; never changed.
        data: calibration data, as for :func:`qdqtool.quantize`.
        evaluation: samples to choose and report on, with ``labels`` for a metric; None: part of ``data``.
        metric: "top1", "top5" or "package.module:function", for ``max_drop``.
        min_sqnr: goal: dB, of every output. None: that of the model's recipe, if it has one.
        max_drop: goal: what the metric may lose, in its own units.
        allow: remedies that may be used, of :data:`qdqtool.repairs.remedies.REMEDIES`; None: all.
        min_gain: dB that each step must gain; None: 0.5, or 0.1 towards a goal.
        max_float: share of the multiply-accumulates that may leave integers; None: 0.1, or all of them towards a goal.
        target: what a model is for that holds no recipe.
        provider: as for :func:`qdqtool.quantize`.
        memory: as for :func:`qdqtool.quantize`.
        engine: as for :func:`qdqtool.quantize`.
        cache: as for :func:`qdqtool.quantize`.
        progress: told after every batch that is observed.
        watch: told in words what is being tried.

    Raises:
        QdqError: one of its kinds says what is wrong and what to do.
    """
    original, given = models.load(model), models.load(quantized)
    recipe, note = recipe_of(given, original, target)
    goal = _goal(min_sqnr if min_sqnr is not None else recipe.min_sqnr, max_drop, metric, evaluation)
    rules = _rules(goal, allow, min_gain, max_float)
    notes = [] if note is None else [note]
    if recipe.min_sqnr is not None:
        notes.append(f"min_sqnr = {recipe.min_sqnr:g} of the model's recipe is no part of the repaired recipe")
        recipe = changed(recipe, min_sqnr=None)
    options = Observing(None if memory is None else parse_bytes(memory))
    if engine is not None:
        options = dataclasses.replace(options, engine=engine)
    with contextlib.ExitStack() as stack:
        inputs = models.inputs(original)
        opened = stack.enter_context(open_data(data, inputs, images=recipe.images, seed=recipe.seed))
        others = None
        if evaluation is not None:
            others = stack.enter_context(open_data(evaluation, inputs, images=recipe.images, seed=recipe.seed))
        bench = Workbench(
            original, opened, provider=provider, observing=options, cache=_cache(cache), progress=progress
        )
        (watch or _nobody)("quantizing by the model's recipe")
        start = bench.quantize(recipe)
        labels = None if metric is None else load_labels(evaluation)
        job = _Job(bench, start, goal, rules, watch=watch or _nobody, data=opened, evaluation=others, labels=labels)
        return job.run(given, notes)


def _nobody(_: str) -> None:
    pass


def _goal(min_sqnr: float | None, max_drop: float | None, metric: str | None, evaluation: object) -> Goal:
    """What is wanted, checked before any work."""
    if max_drop is not None and metric is None:
        raise RecipeError("max_drop is a loss of a metric; name one with metric")
    if metric is not None:
        from qdqtool.verification.metric import find_metric

        find_metric(metric)
        if evaluation is None:
            raise DataError(f"metric {metric!r} needs evaluation data with labels; give them with --eval")
        if load_labels(evaluation) is None:
            raise DataError(f"metric {metric!r} needs labels: --eval must be an .npz with the inputs and 'labels'")
    return Goal(min_sqnr, max_drop, metric)


def _rules(goal: Goal, allow: Sequence[str] | None, min_gain: float | None, max_float: float | None) -> Rules:
    for name in allow or ():
        if name not in REMEDIES:
            raise RecipeError(f"unknown remedy {name!r}; known: {', '.join(REMEDIES)}.{nearest(name, REMEDIES)}")
    if min_gain is not None and min_gain <= 0:
        raise RecipeError(f"the least gain of a step must be above 0 dB, not {min_gain:g}")
    if max_float is not None and not 0 <= max_float <= 1:
        raise RecipeError(f"the share that may leave integers must be from 0 to 1, not {max_float:g}")
    return Rules(
        allow=tuple(name for name in REMEDIES if allow is None or name in allow),
        min_gain=min_gain if min_gain is not None else _MIN_GAIN_TO_GOAL if goal.given else _MIN_GAIN,
        max_float=max_float if max_float is not None else 1.0 if goal.given else _MAX_FLOAT,
        enough=goal.min_sqnr if goal.max_drop is None else None,
        every_layer=goal.given,
    )


def _cache(wanted: bool | str | os.PathLike[str]) -> Cache | None:
    folder = default_folder() if wanted is True else None if wanted is False else Path(wanted)
    return None if folder is None else Cache(folder)


class _Job:
    """One repair: who judges, what was there, what becomes of it."""

    def __init__(
        self,
        bench: Workbench,
        start: Trial,
        goal: Goal,
        rules: Rules,
        *,
        watch: Watch,
        data: Data,
        evaluation: Data | None,
        labels: npt.NDArray[Any] | None,
    ) -> None:
        self.bench, self.start, self.goal, self.rules, self.watch = bench, start, goal, rules, watch
        self.data, self.evaluation = data, evaluation
        self.provider = start.state.provider
        self.batching = bench.batching(start.recipe)
        self.probes = self._probes()
        self.choosing, self.reporting = (
            Judge(bench.original, side, self.batching, self.provider)
            for side in (self.probes.choosing, self.probes.reporting)
        )
        self.task: Task | None = None
        if goal.metric is not None and evaluation is not None:
            self.task = Task.of(
                bench.original,
                evaluation,
                self.batching,
                labels=labels,
                metric=goal.metric,
                provider=self.provider,
            )

    def _probes(self) -> Probes:
        if self.evaluation is not None:
            return divide(self.batching.samples(self.evaluation), calibration=False, source=self.evaluation.description)
        return divide(self.batching.samples(self.data), calibration=True, source=self.data.description)

    def run(self, given: onnx.ModelProto, notes: list[str]) -> Repair:
        """Mend what hurts, unless the model given is good enough."""
        came, before = self.figures(given), self.figures(self.start.proto)
        notes += _anew(came, before)
        jury = Jury(self.bench, self.choosing, self.reporting, self.rules, self.reached)
        mender = Mender(jury, self.watch)
        end = self.start
        if not self.goal.given or self.goal.missed(came) is not None:
            end = mender.run(self.start)
            if end is self.start and before.worst_db - came.worst_db >= self.rules.min_gain:
                mender.steps.append(_requantized(came, before, self.start, given))
        result = self._verified(end) if mender.steps else None
        first = self._look(self.start)
        if not first.alone:
            notes.append(
                "the model has control-flow bodies: layers cannot be measured alone, so their own errors follow from "
                "what enters and leaves them, and those inside of bodies are not looked at"
            )
        return Repair(
            given=came,
            before=before,
            after=came if result is None else self.figures(result.model),
            steps=tuple(mender.steps),
            left=tuple(mender.left.values()),
            analysis=first,
            analysis_after=first if end is self.start else self._look(end),
            recipe=end.recipe,
            difference=difference(self.start.recipe, end.recipe),
            goal=self.goal,
            samples=Samples(self.choosing.samples, self.reporting.samples, self.probes.source),
            tries=self.bench.tries,
            notes=tuple(notes),
            result=result,
        )

    def _look(self, trial: Trial) -> Analysis:
        return look(self.bench, self.reporting, trial, self.reporting.ratios(trial.proto))

    def figures(self, proto: onnx.ModelProto) -> Figures:
        """How near a model is to the float one on the reporting samples."""
        ratios = self.reporting.ratios(proto)
        outputs = {name: ratio.db for name, ratio in ratios.items()}
        if self.task is None:
            return Figures(outputs, worst(ratios).error)
        found = self.task.measure(proto, reporting=True)
        assert found.float_score is not None
        assert found.quantized_score is not None
        return Figures(outputs, worst(ratios).error, found.quantized_score, found.float_score - found.quantized_score)

    def reached(self, tried: Tried) -> bool:
        """Whether a trial reaches the goal on the choosing samples; an SQNR by one standard error."""
        if not self.goal.given:
            return False
        if self.goal.min_sqnr is not None and worst(tried.ratios).sure < self.goal.min_sqnr:
            return False
        if self.goal.max_drop is None:
            return True
        assert self.task is not None
        found = self.task.measure(tried.trial.proto, reporting=False)
        assert found.float_score is not None
        assert found.quantized_score is not None
        return found.float_score - found.quantized_score <= self.goal.max_drop

    def _verified(self, end: Trial) -> pipeline.Result:
        """The repaired model, made and verified as ``quantize`` makes it by the repaired recipe."""
        self.watch("verifying the repaired model")
        calibration = self.bench.memory(end.recipe).calibration
        return pipeline.quantize(
            self.bench.original, self.data, statistics=calibration, recipe=end.recipe, provider=self.provider
        )


def _anew(came: Figures, before: Figures) -> list[str]:
    """That quantizing by the recipe does not give the model that was given, where it does not."""
    if abs(came.worst_db - before.worst_db) < 0.05 or came.outputs == before.outputs:
        return []
    return [
        f"quantized anew by its recipe on these data, the model has {before.worst_db:.1f} dB instead of "
        f"{came.worst_db:.1f} dB; steps start from there"
    ]


def _requantized(came: Figures, before: Figures, start: Trial, given: onnx.ModelProto) -> Step:
    grown = start.size - models.size(given)
    return Step("", "", "quantize", "quantized anew", came.worst_db, before.worst_db, before.worst_db, 0, grown)

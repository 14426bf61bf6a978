"""Where a search measures: noise of assignments by emulation, trials by quantizing; it keeps the best and the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx

from qdqtool import pipeline
from qdqtool.data.fit import Feeds
from qdqtool.data.source import Data
from qdqtool.graphs import model as models
from qdqtool.mixed_precision import candidates as making
from qdqtool.mixed_precision import kernel_times, sensitivity
from qdqtool.mixed_precision.candidates import Layer
from qdqtool.mixed_precision.emulation import Emulator
from qdqtool.mixed_precision.judge import Judge
from qdqtool.mixed_precision.results import Trial
from qdqtool.mixed_precision.state_file import Found
from qdqtool.mixed_precision.widths import FLOAT, Assignment, Width, recipe_of, to_toml
from qdqtool.passes_api import State
from qdqtool.recipe import Recipe
from qdqtool.report import files
from qdqtool.spec import FloatArray
from qdqtool.verification import latency

_LEAST_BATCH: Final = 8
"""Samples over which the mean of a layer's output says something of its bias."""
_LATENCY_SECONDS: Final = 3.0

Rank = Callable[[Trial], tuple[float, ...] | None]
"""How much a trial is wanted, more is better; None where it does not do."""


class OutOfTime(Exception):
    """The time is up, and there is a model to keep."""


@dataclass(frozen=True)
class Step:
    """What a search is doing, told to the user meanwhile.

    Attributes:
        stage: in words.
        done, total: figures measured of this stage, and how many there will be.
        trials: all models measured so far.
        best: the one that is written.
        left: seconds left of the time given; None: no limit.
    """

    stage: str
    done: int
    total: int
    trials: tuple[Trial, ...]
    best: Trial | None
    left: float | None


Progress = Callable[[Step], None]


@dataclass(frozen=True)
class Outputs:
    """Where the best model goes: the file, and beside it the recipe that makes it again."""

    model: Path

    @property
    def recipe(self) -> Path:
        """``model.qdq.onnx`` -> ``model.qdq.toml``."""
        return self.model.with_suffix(".toml")

    @property
    def state(self) -> Path:
        """What goes on after an interruption."""
        return self.model.with_suffix(".search.json")


@dataclass
class Workbench:
    """Measures assignments of one model.

    Attributes:
        model: the float model as it was given.
        data: calibration data.
        base: the recipe that assignments are added to.
        state: the prepared and observed model.
        layers: that are searched.
        widths: that they may have.
        judge: measures trials on the evaluation samples.
        found: figures so far.
        options: of quantize(): provider, cache.
        outputs: where the best model goes; None: nowhere.
        progress: told after every figure.
        deadline: of time.monotonic(); None: no limit.
        timed: trials are also measured for their latency.
        notes: what the user should know.
    """

    model: onnx.ModelProto
    data: Data
    base: Recipe
    state: State
    layers: tuple[Layer, ...]
    widths: tuple[Width, ...]
    judge: Judge
    found: Found
    options: Mapping[str, Any]
    outputs: Outputs | None = None
    progress: Progress | None = None
    deadline: float | None = None
    timed: bool = False
    notes: tuple[str, ...] = ()
    rank: Rank = field(default=lambda trial: (trial.selection.sqnr_db,))
    trials: list[Trial] = field(default_factory=list)
    best: Trial | None = None
    _stage: tuple[str, int, int] = ("", 0, 0)
    _emulator: Emulator | None = None
    _written: Trial | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the layers."""
        return tuple(layer.name for layer in self.layers)

    @property
    def width_names(self) -> tuple[str, ...]:
        """Names of the widths."""
        return tuple(width.name for width in self.widths)

    @property
    def integers(self) -> tuple[Width, ...]:
        """Widths that are not float, ascending."""
        return tuple(width for width in self.widths if width.name != FLOAT)

    def uniform(self, width: str) -> dict[str, str]:
        """The assignment of one width to all layers."""
        return dict.fromkeys(self.names, width)

    def stage(self, name: str, total: int) -> None:
        """Begin a stage of so many figures."""
        self._stage = (name, 0, total)
        self._tell()

    def noise(self, assignment: Assignment) -> float:
        """Noise of the outputs relative to their signals, by emulation; layers not named are float."""
        return float(self._emulated(assignment)[0])

    def drop(self, assignment: Assignment) -> float | None:
        """Loss of the metric by emulation on the same few samples; None without a metric."""
        found = self._emulated(assignment)[1]
        return None if found is None else float(found)

    def known(self, assignment: Assignment) -> tuple[float, float | None] | None:
        """Noise and loss of the metric where they were measured."""
        if not self.found.known("emulated", assignment):
            return None
        noise, drop = self.found.value("emulated", assignment, list)
        return noise, drop

    def _emulated(self, assignment: Assignment) -> tuple[float, float | None]:
        if not self.found.known("emulated", assignment):
            self._check_time()
        found = self.found.value("emulated", assignment, lambda: list(self._emulation().measure(assignment)))
        self._advance()
        return found[0], found[1]

    def _emulation(self) -> Emulator:
        """The emulator, made where a figure is missing for the first time."""
        if self._emulator is None:
            coded = making.code(self.state, self.layers, self.widths)
            batches = self.judge.batches(self.judge.few)
            full = self.judge.plan.rows and all(batch.rows >= _LEAST_BATCH for batch in batches)
            correct = self.base.bias_correction and full
            self._emulator = Emulator(coded, batches, self.judge, correct=correct, provider=self.state.provider)
        return self._emulator

    def local(self) -> FloatArray:
        """Noise with one layer quantized alone, float64 (layers, widths)."""
        self.stage("sensitivity of single layers", len(self.layers) * len(self.integers))
        return sensitivity.local(self.names, self.width_names, self.noise)

    def cumulative(self) -> FloatArray:
        """Noise with a layer and all before it at one width, float64 (layers, widths)."""
        self.stage("sensitivity with all layers before", len(self.layers) * len(self.integers))
        return sensitivity.cumulative(self.names, self.width_names, self.noise)

    def around(self, assignment: Mapping[str, str]) -> FloatArray:
        """What each layer adds at the widths next to its own while all others stay, float64 (layers, widths)."""
        last = len(self.widths) - 1
        columns = [self.width_names.index(width) for width in assignment.values()]
        self.stage("sensitivity around the best assignment", 1 + sum((c > 0) + (c < last) for c in columns))
        return sensitivity.around(assignment, self.width_names, self.noise)

    def trial(self, assignment: Assignment) -> Trial:
        """Quantize as the assignment says and measure; the best model so far is written.

        Raises:
            OutOfTime: the time is up.
        """
        trial, result = self.found.trial(assignment), None
        if trial is None or (self.timed and trial.latency is None):
            self._check_time()
            trial, result = self._made(assignment)
            self.found.keep(trial)
        if trial not in self.trials:
            self.trials.append(trial)
        rank = self.rank(trial)
        held = None if self.best is None else self.rank(self.best)
        if rank is not None and (held is None or rank > held):
            self.best = trial
            if result is not None:
                self._write(trial, result)
        self._tell()
        return trial

    def _made(self, assignment: Assignment) -> tuple[Trial, pipeline.Result]:
        result = self.quantized(assignment)
        selection, holdout = self.judge.judge(result.model)
        elements = sum(layer.elements for layer in self.layers)
        bits = {width.name: width.bits for width in self.widths}
        total = sum(layer.elements * bits[assignment[layer.name]] for layer in self.layers)
        size = result.report.sizes.quantized_bytes
        ratio = self._latency(result.model) if self.timed else None
        return Trial(dict(assignment), size, total / elements, selection, holdout, ratio), result

    def _latency(self, model: onnx.ModelProto) -> float:
        """Time of a run relative to the float model's."""
        measured = latency.bench(
            {"float": self.model, "quantized": model},
            self._feeds(),
            provider=self.state.provider,
            seconds=_LATENCY_SECONDS,
        )
        return measured.ratios["quantized"].value

    def _feeds(self) -> Feeds:
        return latency.batch_of(models.inputs(self.model), self.data, 1)

    def layer_times(self) -> dict[str, list[float]]:
        """Share of the float model's time that each layer takes in float, and in integers of 8 bits."""

        def measure() -> dict[str, list[float]]:
            chains = kernel_times.chains(self.state.graph, self.names)
            quantized = self.quantized(self.uniform("8")).model
            found = [
                kernel_times.kernel_times(model, self._feeds(), self.state.provider)
                for model in (self.model, quantized)
            ]
            whole = sum(found[0].values())
            plain, integer = (kernel_times.layer_times(times, chains) for times in found)
            return {layer: [plain[layer] / whole, integer[layer] / whole] for layer in self.names}

        shares: dict[str, list[float]] = self.found.value("times", {}, measure)
        return shares

    def quantized(self, assignment: Assignment) -> pipeline.Result:
        """The model that the assignment's recipe makes."""
        return pipeline.quantize(self.model, self.data, recipe=recipe_of(self.base, assignment), **self.options)

    def settle(self, trial: Trial) -> None:
        """Make a trial the result, and write it if it is not written."""
        self.best = trial
        if self._written != trial and self.outputs is not None:
            self._write(trial, self.quantized(trial.assignment))

    def _write(self, trial: Trial, result: pipeline.Result) -> None:
        if self.outputs is None:
            return
        self._written = trial
        quality = trial.selection
        score = "" if quality.score is None else f", score {quality.score:.2f}"
        remarks = [f"{trial.bytes} bytes, {trial.bits:.3g} bits in the mean, SQNR {quality.sqnr_db:.1f} dB{score}"]
        result.save(self.outputs.model)
        files.write_text(to_toml(result.recipe, remarks), self.outputs.recipe)

    def _check_time(self) -> None:
        if self.best is not None and self.deadline is not None and time.monotonic() > self.deadline:
            raise OutOfTime

    def _advance(self) -> None:
        name, done, total = self._stage
        self._stage = (name, min(done + 1, total), total)
        self._tell()

    def _tell(self) -> None:
        if self.progress is not None:
            left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
            self.progress(Step(*self._stage, tuple(self.trials), self.best, left))

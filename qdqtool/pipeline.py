"""quantize() and calibrate(): the model and its data opened, the passes of a recipe run, the result gathered."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

import qdqtool
from qdqtool import chains, registry, runtime
from qdqtool.data.source import Data, open_data
from qdqtool.errors import DataError, RecipeError
from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.model import ModelSource
from qdqtool.observation import statistics_file
from qdqtool.observation.cache import Cache, default_folder
from qdqtool.observation.calibration import Calibration
from qdqtool.observation.collect import collect
from qdqtool.observation.engine import Engine
from qdqtool.observation.observe import Observing, Progress, Told
from qdqtool.observation.sweeps import parse_bytes
from qdqtool.passes_api import Callback, Fact, PassManager, State, Timing
from qdqtool.planning.plan import Plan
from qdqtool.planning.target import TARGETS, Target, target
from qdqtool.planning.target_file import TargetSource, resolve
from qdqtool.recipe import Recipe
from qdqtool.report.values import Report, make_report

RECIPE_KEY = "qdqtool.recipe"
VERSION_KEY = "qdqtool.version"
FLOAT_KEY = "qdqtool.float_sha256"
SYNTHETIC_KEY = "qdqtool.synthetic_data"


@dataclass(frozen=True)
class Result:
    """What :func:`quantize` gives.

    Attributes:
        model: the quantized model with recipe, version and the float model's hash in its metadata.
        report: ranges, methods, SQNR, what was skipped and why, sizes and times, as values.
        plan: what was quantized and how.
    """

    model: onnx.ModelProto
    report: Report
    plan: Plan
    recipe: Recipe

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the model atomically; ModelError where that is not possible."""
        return models.save(self.model, path, external_data=self.recipe.external_data)


def quantize(
    model: ModelSource,
    data: object = None,
    *,
    statistics: str | os.PathLike[str] | Calibration | None = None,
    recipe: Recipe | Mapping[str, object] | None = None,
    provider: str = "auto",
    memory: int | str | None = None,
    engine: Engine | None = None,
    cache: bool | str | os.PathLike[str] = True,
    progress: Progress | None = None,
    told: Told | None = None,
    callback: Callback | None = None,
    **fields: object,
) -> Result:
    """Quantize a float ONNX model and verify the result.

    Args:
        model: path or ModelProto; never changed.
        data: calibration data: an .npz, .npy or folder of them, a dict of arrays, ``test_data_set_*`` folders, a folder
            of images, any iterable of dicts, an object with ``get_next()``, or "synthetic:N".
        statistics: a statistics file, or what :func:`calibrate` gave, instead of observing the data. Without data as
            well, biases are not corrected and the result is not compared with the float model; its report says so.
        recipe: a :class:`Recipe` or its fields; ``fields`` override it.
        provider: "auto" (CUDA where it loads, else the CPU), "cpu", "cuda" or "tensorrt": where models run meanwhile.
        memory: what observed activations may take, in bytes or as in "4GB"; where they take more, the data pass
            several times. None: half of the machine's memory.
        engine: where observation runs, such as :class:`qdqtool.observation.engine_ray.Ray`; None: here.
        cache: keep statistics between runs, in the user's cache folder or the one named here.
        progress: told after every batch.
        told: told before the work, in a line, where the data must pass several times; the report has it too.
        callback: called after every pass with the pass, the state and its timing.
        **fields: recipe fields, e.g. ``target="cpu"``, ``calibrator="percentile"``, ``nodes_to_exclude=["head/.*"]``.

    Raises:
        QdqError: one of its kinds says what is wrong and what to do; nothing is written.
    """
    chosen = make_recipe(recipe, fields)
    if statistics is not None:
        chains.watching(chosen)
    state, facts = load(model, chosen, provider)
    state.progress = progress
    state.observing, state.cache = _observing(memory, engine, told), _cache(cache)
    given = None
    if isinstance(statistics, Calibration):
        state.calibration, given = statistics, ""
    elif statistics is not None:
        state.calibration, given = statistics_file.read(statistics), os.fspath(statistics)
    with _opened(data, state) as opened:
        state.data = opened
        steps = chains.quantization(chosen, given=given, data=opened is not None)
        manager = PassManager([*chains.preparation(chosen), *steps], callback)
        timings = manager.run(state, facts if opened is None else facts | {Fact.DATA})
        return _result(state, timings)


def calibrate(
    model: ModelSource,
    data: object,
    *,
    targets: Sequence[TargetSource] | None = None,
    recipe: Recipe | Mapping[str, object] | None = None,
    provider: str = "auto",
    memory: int | str | None = None,
    engine: Engine | None = None,
    cache: bool | str | os.PathLike[str] = True,
    progress: Progress | None = None,
    told: Told | None = None,
    **fields: object,
) -> Calibration:
    """Observe a model's activations once, for :func:`quantize` to use with any calibrator, bit width and target.

    Args:
        model: path or ModelProto; never changed.
        data: as for :func:`quantize`.
        targets: whose activations to observe, by name, .toml file or table; None: those of every target that this
            program knows, and of the recipe's own.
        recipe: a :class:`Recipe` or its fields, which say what is quantized on these targets; ``fields`` override it.
        provider: as for :func:`quantize`; "auto" is the CPU where no other target is named.
        memory: as for :func:`quantize`.
        engine: as for :func:`quantize`.
        cache: as for :func:`quantize`.
        progress: as for :func:`quantize`.
        told: told in a line each what the user should know: before the work where the data must pass several times,
            afterwards what came from earlier runs.
        **fields: recipe fields.

    Raises:
        QdqError: one of its kinds says what is wrong and what to do.
    """
    base = make_recipe(recipe, fields)
    plan = chains.watching(base)
    own = [base.target] if targets is None and isinstance(base.target, Target) else []
    wanted = [resolve(one) for one in (*(TARGETS if targets is None else targets), *own)]
    if not wanted:
        raise RecipeError(f"no target was named; name some of {', '.join(TARGETS)}, or leave targets out for all")
    if data is None:
        raise DataError("observing needs calibration data: pass an .npz, a folder, arrays or an iterable of feeds")
    chosen = make_recipe(base, {"target": "cpu" if all(one.for_cpu for one in wanted) else "cuda"})
    state, facts = load(model, chosen, provider)
    prepare = PassManager(chains.preparation(chosen))
    prepare.run(state, facts)
    facts = prepare.check(facts)
    tensors: dict[str, None] = {}
    axes: dict[str, int] = {}
    said: set[str] = set()

    def tell(note: str) -> None:
        if told is not None and note not in said:
            said.add(note)
            told(note)

    for one in wanted:
        state.target = one
        PassManager(plan).run(state, facts)
        assert state.plan is not None
        tensors |= dict.fromkeys(state.plan.observed())
        axes |= state.plan.channel_axes()
    with _opened(data, state) as opened:
        assert opened is not None
        found = collect(
            models.to_proto(state.graph, state.header),
            list(tensors),
            opened,
            axes=axes,
            samples=chosen.samples,
            provider=state.provider,
            options=_observing(memory, engine, tell),
            cache=_cache(cache),
            progress=progress,
        )
    for note in found.notes:
        tell(note)
    return found.calibration


def _observing(memory: int | str | None, engine: Engine | None, told: Told | None) -> Observing:
    budget = None if memory is None else parse_bytes(memory)
    given: dict[str, Any] = {"engine": engine, "told": told}
    return Observing(budget, **{name: value for name, value in given.items() if value is not None})


def _cache(wanted: bool | str | os.PathLike[str]) -> Cache | None:
    folder = default_folder() if wanted is True else None if wanted is False else Path(wanted)
    return None if folder is None else Cache(folder)


def dry_run(
    model: ModelSource,
    *,
    recipe: Recipe | Mapping[str, object] | None = None,
    callback: Callback | None = None,
    **fields: object,
) -> tuple[State, tuple[Timing, ...]]:
    """Prepare the model and plan its quantization without data; the state holds plan, skipped candidates and notes."""
    chosen = make_recipe(recipe, fields)
    state, facts = load(model, chosen, "cpu")
    timings = PassManager([*chains.preparation(chosen), *chains.planning(chosen)], callback).run(state, facts)
    return state, timings


def make_recipe(recipe: Recipe | Mapping[str, object] | None, fields: Mapping[str, object]) -> Recipe:
    """One recipe out of a recipe (or its fields) and keywords that override it; RecipeError names what is wrong."""
    base = recipe.values() if isinstance(recipe, Recipe) else dict(recipe or {})
    return Recipe.of({**base, **fields})


def load(model: ModelSource, recipe: Recipe, provider: str) -> tuple[State, frozenset[Fact]]:
    """Load a model into a state; also returns the facts that hold (none)."""
    chosen = target(recipe.target)
    registry.make(
        "calibrators", recipe.calibrator.name, recipe.calibrator.options
    )  # a misspelt name must not cost a calibration
    original = models.load(model)
    resolved, note = runtime.resolve_provider("cpu" if provider == "auto" and chosen.for_cpu else provider)
    digest, size = models.fingerprint(original), models.size(original)
    graph, header = models.to_graph(original)
    state = State(graph, header, recipe, chosen, original=original, provider=resolved)
    state.float_sha256, state.float_bytes = digest, size
    state.user_nodes = frozenset(graphs.node_names(graph))
    state.user_tensors = frozenset(graphs.all_tensors(graph))
    if note is not None:
        state.notes.append(note)
    if chosen.for_cpu and not recipe.reduce_range and runtime.saturates_u8s8():
        state.notes.append(
            "this processor has no VNNI: 16-bit sums of u8 x s8 products can saturate; "
            "use reduce_range for 7-bit weights"
        )
    return state, frozenset()


@contextlib.contextmanager
def _opened(data: object, state: State) -> Iterator[Data | None]:
    """The user's data, open; None where there are none and statistics are given instead."""
    if data is None and (state.calibration is not None or not state.recipe.needs_data):
        if state.recipe.min_sqnr is not None:
            raise DataError("--min-sqnr compares on data; give calibration data beside the statistics, or leave it out")
        state.notes += _left_out(state.recipe)
        yield None
    elif isinstance(data, Data):
        yield data
    elif data is None:
        raise DataError(
            "quantization needs calibration data: pass an .npz, a folder, arrays or an iterable of feeds "
            "(or 'synthetic:N' for a trial whose ranges mean nothing), or statistics observed before"
        )
    else:
        assert state.original is not None
        inputs = models.inputs(state.original)
        with open_data(data, inputs, images=state.recipe.images, seed=state.recipe.seed) as opened:
            yield opened


def _left_out(recipe: Recipe) -> list[str]:
    """What cannot be done without data, in words."""
    need = "data beside the statistics" if recipe.needs_data else "data"
    found = [f"not compared with the float model: that needs {need}; it was checked and loaded"]
    if recipe.bias_correction and recipe.precision != "fp16" and recipe.bias_correction_method != "analytic":
        alone = chains.corrects_without_data(recipe)
        known = "corrected from BatchNormalization alone: more" if alone else "not corrected: that"
        found.append(f"biases were {known} needs {need}")
    if recipe.rounding in ("gptq", "adaround"):
        found.append(f"weights were rounded to nearest: {recipe.rounding} needs {need}")
    return found


def _result(state: State, timings: tuple[Timing, ...]) -> Result:
    assert state.quantized is not None
    assert state.original is not None
    assert state.plan is not None
    extra = {
        VERSION_KEY: qdqtool.__version__,
        RECIPE_KEY: state.recipe.to_json(),
        FLOAT_KEY: state.float_sha256,
    }
    ranges = state.calibration is not None and state.calibration.synthetic
    synthetic = ranges or (state.data is not None and state.data.synthetic)
    if synthetic:
        extra[SYNTHETIC_KEY] = f"{'ranges' if ranges else 'bias corrections'} come from random data"
    proto = models.to_proto(state.quantized, state.header, extra)
    return Result(proto, make_report(state, proto, timings, synthetic=synthetic), state.plan, state.recipe)

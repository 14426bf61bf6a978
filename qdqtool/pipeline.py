"""quantize(): the flow from float model to verified QDQ model as one list of passes."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import onnx

import qdqtool
from qdqtool import model as models
from qdqtool import registry, runtime
from qdqtool.data import Data, open_data
from qdqtool.errors import DataError
from qdqtool.model import ModelSource
from qdqtool.observe import Progress
from qdqtool.passes import (
    AddBias,
    ChooseRanges,
    CorrectBias,
    FoldBatchnorm,
    FoldConstants,
    FoldScaleShift,
    FuseLinearBias,
    InferShapes,
    InsertQdq,
    LiftConstants,
    Observe,
    PlanQuantization,
    PointwiseToGemm,
    RaiseOpset,
    RemoveIdentity,
    Verify,
)
from qdqtool.passes_api import Callback, Fact, Pass, PassManager, State, Timing
from qdqtool.plan import Plan
from qdqtool.recipe import Recipe
from qdqtool.report.values import Report, make_report
from qdqtool.target import target

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


def preparation(recipe: Recipe) -> list[Pass]:
    """Passes that simplify and fuse the float graph; its outputs stay the same."""
    passes: list[Pass] = [
        LiftConstants(),
        # Some shapes are known only after a first folding; and the opset converter must know the axes to convert well.
        InferShapes(),
        FoldConstants(),
        InferShapes(),
        FoldConstants(),
        RaiseOpset(recipe.min_opset),
        InferShapes(),
        RemoveIdentity(),
        FuseLinearBias(),
        FoldBatchnorm(),
        FoldScaleShift(),
        InferShapes(),
        PointwiseToGemm(),
    ]
    return [*passes, *([AddBias()] if recipe.bias_correction else [])]


def quantization(recipe: Recipe) -> list[Pass]:
    """Passes from the prepared float graph to the verified QDQ graph."""
    refine: list[Pass] = [CorrectBias()] if recipe.bias_correction else []
    return [PlanQuantization(), Observe(), ChooseRanges(), *refine, InsertQdq(), Verify()]


def quantize(
    model: ModelSource,
    data: object,
    *,
    recipe: Recipe | Mapping[str, object] | None = None,
    provider: str = "auto",
    progress: Progress | None = None,
    callback: Callback | None = None,
    **fields: object,
) -> Result:
    """Quantize a float ONNX model and verify the result.

    Args:
        model: path or ModelProto; never changed.
        data: calibration data: an .npz, .npy or folder of them, a dict of arrays, ``test_data_set_*`` folders, a folder
            of images, any iterable of dicts, an object with ``get_next()``, or "synthetic:N".
        recipe: a :class:`Recipe` or its fields; ``fields`` override it.
        provider: "auto" (CUDA where it loads, else the CPU), "cpu", "cuda" or "tensorrt": where models run meanwhile.
        progress: told after every batch.
        callback: called after every pass with the pass, the state and its timing.
        **fields: recipe fields, e.g. ``target="cpu"``, ``calibrator="percentile"``, ``nodes_to_exclude=["head/.*"]``.

    Raises:
        QdqError: one of its kinds says what is wrong and what to do; nothing is written.
    """
    chosen = make_recipe(recipe, fields)
    state, facts = load(model, chosen, provider)
    state.progress = progress
    opening = contextlib.nullcontext(data) if isinstance(data, Data) else _open(data, state)
    with opening as opened:
        state.data = opened
        manager = PassManager([*preparation(chosen), *quantization(chosen)], callback)
        timings = manager.run(state, facts | {Fact.DATA})
        return _result(state, timings, synthetic=opened.synthetic)


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
    timings = PassManager([*preparation(chosen), PlanQuantization()], callback).run(state, facts)
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
    resolved, note = runtime.resolve_provider("cpu" if provider == "auto" and chosen.name == "cpu" else provider)
    digest, size = models.fingerprint(original), models.size(original)
    graph, header = models.to_graph(original)
    state = State(graph, header, recipe, chosen, original=original, provider=resolved)
    state.float_sha256, state.float_bytes = digest, size
    state.user_nodes = frozenset(node.name for node in original.graph.node)
    state.user_tensors = frozenset(graph.tensors())
    if note is not None:
        state.notes.append(note)
    if chosen.name == "cpu" and not recipe.reduce_range and runtime.saturates_u8s8():
        state.notes.append(
            "this processor has no VNNI: 16-bit sums of u8 x s8 products can saturate; "
            "use reduce_range for 7-bit weights"
        )
    return state, frozenset()


def _open(data: object, state: State) -> Data:
    if data is None:
        raise DataError(
            "quantization needs calibration data: pass an .npz, a folder, arrays or an iterable of feeds "
            "(or 'synthetic:N' for a trial whose ranges mean nothing)"
        )
    assert state.original is not None
    return open_data(data, models.inputs(state.original), images=state.recipe.images, seed=state.recipe.seed)


def _result(state: State, timings: tuple[Timing, ...], *, synthetic: bool) -> Result:
    assert state.quantized is not None
    assert state.original is not None
    assert state.plan is not None
    extra = {
        VERSION_KEY: qdqtool.__version__,
        RECIPE_KEY: state.recipe.to_json(),
        FLOAT_KEY: state.float_sha256,
    }
    if synthetic:
        extra[SYNTHETIC_KEY] = "ranges come from random data"
    proto = models.to_proto(state.quantized, state.header, extra)
    return Result(proto, make_report(state, proto, timings, synthetic=synthetic), state.plan, state.recipe)

"""The chains of passes that a recipe asks for: from float model to verified QDQ model."""

from __future__ import annotations

from collections.abc import Sequence

from qdqtool.errors import RecipeError
from qdqtool.passes import (
    AddBias,
    ChooseRanges,
    ConvertFloat16,
    CorrectBias,
    CorrectBiasAnalytic,
    CorrectWeights,
    EqualizeLayers,
    ExpandSwish,
    FoldBatchnorm,
    FoldConstants,
    FoldInputScale,
    FoldPad,
    FoldScaleShift,
    FuseGelu,
    FuseHardSwish,
    FuseLinearBias,
    FuseNormalization,
    GemmToMatmul,
    InferShapes,
    InlineBranches,
    InsertQdq,
    LeaveUnrun,
    LiftConstants,
    MergeMoves,
    Observe,
    PlanFloat16,
    PlanQuantization,
    PlanSmoothing,
    PlanWeights,
    PointwiseToGemm,
    RaiseOpset,
    RemoveIdentity,
    RoundWeights,
    ScalarOperands,
    ScaleWeights,
    SmoothActivations,
    UseStatistics,
    Verify,
    WidenFloat16,
)
from qdqtool.passes_api import Pass
from qdqtool.recipe import BASE_OPSET, Recipe


def preparation(recipe: Recipe | None = None) -> list[Pass]:
    """Passes that simplify and fuse the float graph; its outputs stay the same.

    They do not depend on the recipe, so that statistics of the prepared graph serve every recipe and target; float16
    alone becomes float32 only where activations are quantized, and layers are equalized where the recipe has it so.
    """
    widen: list[Pass] = [WidenFloat16()] if recipe is None or recipe.needs_data else []
    equalize: list[Pass] = [EqualizeLayers()] if recipe is not None and recipe.equalized else []
    return [
        LiftConstants(),
        # Some shapes are known only after a first folding; and the opset converter must know the axes to convert well.
        InferShapes(),
        ScalarOperands(),
        FoldConstants(),
        InferShapes(),
        FoldConstants(),
        InlineBranches(),
        RaiseOpset(),
        InferShapes(),
        *widen,
        RemoveIdentity(),
        MergeMoves(),
        # While their parts are there as they were written.
        ExpandSwish(),
        FuseGelu(),
        FuseNormalization(),
        FuseLinearBias(),
        FoldBatchnorm(),
        FuseHardSwish(),
        FoldScaleShift(),
        FoldInputScale(),
        FoldPad(),
        InferShapes(),
        PointwiseToGemm(),
        AddBias(),
        *equalize,
    ]


def quantization(recipe: Recipe, *, given: str | None = None, data: bool = True) -> list[Pass]:
    """Passes from the prepared float graph to the verified QDQ graph.

    Args:
        recipe: the user's choices.
        given: name of the statistics that are given, or ""; None: activations are observed.
        data: there are calibration data; without any, steps that need them are left out.
    """
    formats: list[Pass] = [RaiseOpset(recipe.min_opset), InferShapes()] if recipe.min_opset > BASE_OPSET else []
    refine: list[Pass] = _correction(recipe, data=data) if recipe.bias_correction else []
    observe: list[Pass] = [Observe() if given is None else UseStatistics(given)] if data or given is not None else []
    if recipe.weight_bits is not None:
        ranges: list[Pass] = [*([] if recipe.to_float16 else observe), ScaleWeights()]
    else:
        smooth: list[Pass] = [] if recipe.smoothing == "off" else [SmoothActivations()]
        ranges = (
            []
            if recipe.to_float16
            else [*observe, LeaveUnrun(), *smooth, ChooseRanges(), *_rounding(recipe, data=data)]
        )
    return [*planning(recipe, observe), *ranges, *formats, *refine, InsertQdq(), Verify()]


def _correction(recipe: Recipe, *, data: bool) -> list[Pass]:
    """The pass that corrects biases, where one can."""
    if recipe.precision == "fp16":
        return []
    if recipe.bias_correction_method == "analytic" or (corrects_without_data(recipe) and not data):
        return [CorrectBiasAnalytic()]
    # Where weights alone are quantized, transformers are better off without the shifts that help others.
    return [CorrectBias(checked=recipe.weight_bits is not None)] if data else []


def corrects_without_data(recipe: Recipe) -> bool:
    """Whether biases are corrected without data as far as can be."""
    return recipe.weight_bits is None and recipe.bias_correction_method == "auto"


def _rounding(recipe: Recipe, *, data: bool) -> list[Pass]:
    """Passes that choose the codes of weights once their scales are there."""
    method, few = recipe.rounding, recipe.weight_rounding == "auto"
    asked: list[Pass] = []
    if method == "stochastic" or (method in ("gptq", "adaround") and data):
        asked = [RoundWeights(method, few, recipe.seed)]
    return [*asked, *([CorrectWeights()] if recipe.weight_correction and recipe.few_bits else [])]


def planning(recipe: Recipe, observe: Sequence[Pass] = ()) -> list[Pass]:
    """Passes from the prepared float graph to the plan; ``observe`` gets what tells which activations fit float16."""
    if recipe.needs_data:
        return _plan(recipe)
    half: list[Pass] = [*watching(recipe), *observe, ConvertFloat16()] if recipe.to_float16 else []
    weights: list[Pass] = [] if recipe.weight_bits is None else [GemmToMatmul(), PlanWeights()]
    return [*half, *weights]


def watching(recipe: Recipe) -> list[Pass]:
    """Passes from the prepared float graph to a plan that says which activations to observe.

    Raises:
        RecipeError: nothing is observed for the recipe's precision.
    """
    if recipe.to_float16:
        return [PlanFloat16()]
    if recipe.weight_bits is not None:
        raise RecipeError(f"precision {recipe.precision} needs no range of an activation: leave statistics out")
    return _plan(recipe)


def _plan(recipe: Recipe) -> list[Pass]:
    return [PlanQuantization(), *([] if recipe.smoothing == "off" else [PlanSmoothing()])]

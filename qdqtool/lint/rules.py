"""Every rule of the linter, in one table."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from qdqtool.errors import RecipeError, nearest
from qdqtool.lint import rules_graph, rules_numbers, rules_target
from qdqtool.lint.findings import Rule, Severity

_ERROR, _WARNING = Severity.ERROR, Severity.WARNING

RULES: Final = (
    Rule(
        "QDQ000", "invalid-model", _ERROR,
        "ONNX's checker accepts the model.",
        "Export or quantize the model again.",
        rules_graph.invalid_model,
    ),
    Rule(
        "QDQ001", "invalid-scale", _ERROR,
        "Every scale is finite, positive and no denormal number.",
        "Choose the range of this tensor from data that reach it, or leave it in float.",
        rules_numbers.invalid_scale,
    ),
    Rule(
        "QDQ002", "scale-shape", _ERROR,
        "Scales and zero points are as many as the tensor has channels, or blocks, along their axis.",
        "Set axis and block_size to those that the scales were computed for.",
        rules_numbers.scale_shape,
    ),
    Rule(
        "QDQ003", "weight-axis", _ERROR,
        "A weight's scales run along the output channels of its layer.",
        "Quantize the weight per output channel (Conv: axis 0, ConvTranspose: 1, MatMul: 1), or per tensor.",
        rules_numbers.weight_channels,
    ),
    Rule(
        "QDQ004", "zero-point-type", _ERROR,
        "A zero point has the type of the codes.",
        "Store the zero point in the type of the codes.",
        rules_numbers.zero_point_type,
    ),
    Rule(
        "QDQ005", "unequal-pair", _WARNING,
        "Codes are dequantized with the parameters that they were quantized with.",
        "Give QuantizeLinear and DequantizeLinear the same scale, zero point and axis.",
        rules_graph.unequal_pair,
    ),
    Rule(
        "QDQ006", "double-quantization", _WARNING,
        "Values are quantized once on their way.",
        "Leave one of the two pairs out.",
        rules_graph.double_quantization,
        rules_graph.mend_double_quantization,
    ),
    Rule(
        "QDQ007", "bias-scale", _ERROR,
        "An int32 bias has the scale S_x·S_w of its layer's sums, and zero point 0.",
        "Compute the bias's codes from its float values at S_x·S_w.",
        rules_numbers.bias_scale,
        rules_numbers.mend_bias_scale,
    ),
    Rule(
        "QDQ008", "bias-overflow", _ERROR,
        "An int32 bias fits, with room for the products that are added to it.",
        "Leave the bias in float, or widen the range of the weight, and with it S_w.",
        rules_numbers.bias_overflow,
    ),
    Rule(
        "QDQ009", "unused-initializer", _WARNING,
        "Something reads every constant in the file.",
        "Take the constant out of the file.",
        rules_graph.unused_initializer,
        rules_graph.remove_unused_initializers,
    ),
    Rule(
        "QDQ010", "opset-too-old", _ERROR,
        "The model's operator set knows the types and the granularity of its conversions.",
        "Quantize again from a model of that opset, or raise this one with onnx.version_converter.",
        rules_numbers.opset_of_types,
    ),
    Rule(
        "QDQ011", "missing-output", _WARNING,
        "The output of a kernel that puts out integers alone is quantized.",
        "Quantize the output too, or leave the inputs in float.",
        rules_target.missing_output,
        of_target=True,
    ),
    Rule(
        "QDQ012", "float-kernel", _WARNING,
        "A node between conversions runs in integers.",
        "Mend what the reason names, or leave the node in float: conversions around it only cost time.",
        rules_target.float_kernel,
        of_target=True,
    ),
    Rule(
        "QDQ013", "idle-conversion", _WARNING,
        "An integer kernel reads or puts out the codes of every conversion.",
        "Take the pair out: it costs time and accuracy, and gains nothing on this target.",
        rules_target.idle_conversion,
        of_target=True,
    ),
    Rule(
        "QDQ014", "unsupported", _ERROR,
        "The target's runtime has a kernel for every operator and type.",
        "Use a type that the target takes, or make the file for the target that it runs on.",
        rules_target.unsupported,
        of_target=True,
    ),
    Rule(
        "QDQ015", "asymmetric", _WARNING,
        "Zero points are 0 where the target's kernels take no others.",
        "Quantize symmetrically, in a signed type.",
        rules_target.asymmetric,
        of_target=True,
    ),
    Rule(
        "QDQ016", "unequal-scales", _WARNING,
        "The inputs of an operator share one scale where the target's kernel needs it.",
        "Give the inputs the scale of their common range.",
        rules_target.unequal_scales,
        of_target=True,
    ),
    Rule(
        "QDQ101", "range-drift", _ERROR,
        "The ranges of activations are those of the baseline.",
        "Find out why the ranges moved; if they should have, run again with --update-baseline.",
    ),
    Rule(
        "QDQ102", "placement-change", _ERROR,
        "What ran in integers in the baseline still does.",
        "Find out why the node runs in float now; if it should, run again with --update-baseline.",
    ),
    Rule(
        "QDQ103", "sqnr-drop", _ERROR,
        "The outputs are as near to the float model's as in the baseline.",
        "Find the layer that lost accuracy; if it should have, run again with --update-baseline.",
    ),
    Rule(
        "QDQ104", "score-drop", _ERROR,
        "The task's score is that of the baseline.",
        "Find out what cost the score; if it is right, run again with --update-baseline.",
    ),
    Rule(
        "QDQ105", "latency-increase", _ERROR,
        "The model is as fast beside the float one as in the baseline.",
        "Look for nodes that run in float now; if it should be slower, run again with --update-baseline.",
    ),
)  # fmt: skip
"""QDQ0xx look at one model, QDQ1xx compare it with a baseline."""

BY_ID: Final = {rule.id: rule for rule in RULES}


def chosen(select: Iterable[str] = (), ignore: Iterable[str] = ()) -> tuple[Rule, ...]:
    """The rules selected (all where none is named) less those ignored, by id or name.

    Raises:
        RecipeError: there is no such rule.
    """
    wanted, unwanted = ({_find(name) for name in names} for names in (select, ignore))
    return tuple(rule for rule in RULES if (not wanted or rule.id in wanted) and rule.id not in unwanted)


def _find(name: str) -> str:
    by_name = {rule.name: rule.id for rule in RULES}
    found = name.upper() if name.upper() in BY_ID else by_name.get(name.lower())
    if found is None:
        known = [*BY_ID, *by_name]
        raise RecipeError(f"there is no rule {name!r}; --rules lists them.{nearest(name, known)}")
    return found

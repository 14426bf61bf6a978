"""The recipe that describes a quantized model as it was given: its own, or for another tool's model, what can be read.

Of a model without a recipe the number formats, the weights' granularity and the layers left in float are read off its
Q/DQ nodes; ranges are taken to be minmax, and nothing to have been corrected or balanced.
"""

from __future__ import annotations

import json
import re
from typing import Final

import onnx

from qdqtool.errors import ModelError, RecipeError
from qdqtool.graphs import model as models
from qdqtool.pipeline import FLOAT_KEY, RECIPE_KEY
from qdqtool.planning.target_file import TargetSource, resolve
from qdqtool.recipe import Recipe
from qdqtool.units import count

_LAYERS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_FEW: Final = frozenset({onnx.TensorProto.INT4, onnx.TensorProto.UINT4})
_MOVES: Final = frozenset({"Transpose", "Reshape", "Squeeze", "Unsqueeze", "Flatten", "Max", "Min"})


def recipe_of(
    quantized: onnx.ModelProto, original: onnx.ModelProto, target: TargetSource | None
) -> tuple[Recipe, str | None]:
    """The recipe of a quantized model, and a line for the user where it had none and was described.

    Args:
        quantized: the model.
        original: the float model that it should be made from.
        target: what it is for, where its metadata do not say; "cpu" for unsigned activations, else "cuda".

    Raises:
        ModelError: it is not quantized, quantizes no activations, or was made from another float model.
        RecipeError: the recipe in its metadata is broken, or for another target.
    """
    metadata = models.metadata(quantized)
    text = metadata.get(RECIPE_KEY)
    if text is None:
        return _described(quantized, original, target)
    known, given = metadata.get(FLOAT_KEY), models.fingerprint(original)
    if known != given:
        raise ModelError(
            f"the quantized model was made from another float model: its metadata name SHA-256 {str(known)[:12]}..., "
            f"MODEL has {given[:12]}...; give the model that it was made from"
        )
    try:
        recipe = Recipe.of(json.loads(text))
    except json.JSONDecodeError as error:
        raise RecipeError(f"the recipe in the quantized model's metadata is broken: {error}") from error
    if target is not None and resolve(target).name != resolve(recipe.target).name:
        raise RecipeError(
            f"the quantized model is for target {resolve(recipe.target).name}; leave --target out, or quantize anew"
        )
    if not recipe.needs_data:
        raise ModelError(
            f"the model's precision is {recipe.precision}: its activations are float, and repair is for models whose "
            f"activations are quantized"
        )
    return recipe, None


def _described(
    quantized: onnx.ModelProto, original: onnx.ModelProto, wanted: TargetSource | None
) -> tuple[Recipe, str]:
    constants = {tensor.name: tensor for tensor in quantized.graph.initializer}
    pairs = [node for node in quantized.graph.node if node.op_type == "DequantizeLinear"]
    stored = [node for node in pairs if node.input[0] in constants and len(constants[node.input[0]].dims) > 1]
    codes = [node for node in quantized.graph.node if node.op_type == "QuantizeLinear"]
    if not pairs:
        raise ModelError("the model to repair is not quantized in Q/DQ form: it holds no DequantizeLinear")
    if not codes:
        raise ModelError("the model to repair quantizes no activations, only weights; repair is for those that do")
    unsigned = [_type(node, constants) == onnx.TensorProto.UINT8 for node in codes]
    target = resolve(wanted if wanted is not None else "cpu" if 2 * sum(unsigned) >= len(unsigned) else "cuda")
    few = [constants[node.input[0]].data_type in _FEW for node in stored]
    fields: dict[str, object] = {
        "target": target if wanted is not None else target.name,
        "precision": "w4a8" if few and 2 * sum(few) > len(few) else "w8a8",
        "calibrator": "minmax",
        "per_channel": any(_size(node.input[1], constants) > 1 for node in stored),
        "bias_correction": False,
        "equalization": False,
        "smoothing": "off",
        "nodes_to_exclude": [re.escape(name) for name in _left_float(quantized, original)],
    }
    recipe = Recipe.of(fields)
    channels = "per channel" if recipe.per_channel else "per tensor"
    excluded = f", {count(len(recipe.nodes_to_exclude), 'layer')} in float" if recipe.nodes_to_exclude else ""
    return recipe, (
        f"the quantized model holds no recipe; it is taken for target {target.name}, {recipe.precision}, minmax, "
        f"weights {channels}{excluded}, and quantized anew by that"
    )


def _type(node: onnx.NodeProto, constants: dict[str, onnx.TensorProto]) -> int:
    """Type of a QuantizeLinear's codes; without a zero point uint8."""
    zero = constants.get(node.input[2]) if len(node.input) > 2 else None
    return onnx.TensorProto.UINT8 if zero is None else zero.data_type


def _size(name: str, constants: dict[str, onnx.TensorProto]) -> int:
    tensor = constants.get(name)
    return 1 if tensor is None else int(onnx.numpy_helper.to_array(tensor).size)


def _left_float(quantized: onnx.ModelProto, original: onnx.ModelProto) -> list[str]:
    """Layers that both models have by name and that read no weight in integers, or nothing in integers at all."""
    names = {node.name for node in original.graph.node if node.name}
    constants = {tensor.name for tensor in quantized.graph.initializer}
    made = {name: node for node in quantized.graph.node for name in node.output}

    def dequantized(name: str) -> bool:
        node = made.get(name)
        while node is not None and node.op_type in _MOVES:
            node = made.get(node.input[0])
        return node is not None and node.op_type == "DequantizeLinear"

    def in_float(node: onnx.NodeProto) -> bool:
        weight = node.input[1]
        return weight in constants or not any(map(dequantized, node.input[:2]))

    layers = [node for node in quantized.graph.node if node.op_type in _LAYERS and node.name in names]
    return [node.name for node in layers if in_float(node)]

"""Which fields of a recipe go together: what a precision has no use for is refused rather than ignored."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

from qdqtool.planning.precision import Precision
from qdqtool.planning.target import known_target
from qdqtool.recipe_fields import Fields
from qdqtool.spec import FORMATS

_WIDTHS: Final = (2, 4, 8)
_LEAST_BITS: Final = 8
_WEIGHTS_ALONE: Final = "w8a16, w4a16 and w2a16"
_FOR_ACTIVATIONS: Final[Mapping[str, str]] = MappingProxyType(
    {
        "calibrator": "no range of an activation is chosen",
        "reduce_range": "no 8-bit sums are made",
        "equalization": "it balances layers for activations in integers",
        "smoothing": "it is for activations in integers",
        "per_channel": "weights get a scale for each block; a tensor's granularity can be overridden",
        "storage": "codes have the type of their width",
        "first_last_8bit": "every weight has the same bits; a tensor's type can be overridden",
        "weight_calibrator": "scales cover all values of their block",
        "weight_rounding": "weights are rounded to the nearest code",
        "weight_correction": "a block's scale covers all its values",
        "activation_per_channel": "activations stay float",
        "bits_per_channel": "every channel has the same bits",
        "bit_allocation": "every channel has the same bits",
    }
)
_FOR_INTEGERS: Final = (
    *_FOR_ACTIVATIONS,
    *("block_size", "weight_symmetric", "float16", "tensors", "nodes"),
)


def obstacle(recipe: Fields) -> str | None:
    """Why the fields of a recipe do not go together, and what to do; None where they do."""
    changed = {name for name in type(recipe).model_fields if name in recipe.values()}
    misplaced = next((name for name, override in recipe.tensors.items() if override.precision is not None), None)
    if misplaced is not None:
        return f"override of tensor {misplaced!r}: precision is of a node; give the tensor a dtype"
    reason = _calibrator_obstacle(recipe)
    if reason is not None:
        return reason
    if not recipe.keep_io_types and not recipe.to_float16:
        return "keep_io_types = false is about models in float16; give precision fp16, or float16 with weights alone"
    if recipe.precision == "fp16":
        extra = sorted(changed.intersection(_FOR_INTEGERS))
        return f"precision fp16 stores nothing in integers: {extra[0]} has no use there" if extra else None
    if recipe.weight_bits is None:
        extra = sorted(changed & {"block_size", "weight_symmetric", "float16"})
        if extra:
            return f"{extra[0]} goes with the precisions {_WEIGHTS_ALONE}, not with {recipe.precision}"
        return _activation_obstacle(recipe) or _allocation_obstacle(recipe)
    named = next((where for where, override in recipe.nodes.items() if override.precision is not None), None)
    if named is not None:
        return f"override of {named!r}: precision has no use with {recipe.precision}; give the node a dtype"
    for name, reason in _FOR_ACTIVATIONS.items():
        if name in changed:
            return f"{name} has no use with precision {recipe.precision}: {reason}"
    return _block_obstacle(recipe) or _format_obstacle(recipe)


def _calibrator_obstacle(recipe: Fields) -> str | None:
    """Overrides whose calibrator would choose nothing."""
    for where, override in recipe.nodes.items():
        if override.calibrator is not None:
            return f"override of {where!r}: a calibrator is of a tensor; name the tensors that the node reads"
    for where, override in recipe.tensors.items():
        if override.calibrator is None:
            continue
        if override.range is not None:
            return f"override of tensor {where!r}: it has a range, so no calibrator chooses one; leave one of them out"
        if not recipe.needs_data:
            return (
                f"override of tensor {where!r}: no range of an activation is chosen with precision {recipe.precision}"
            )
    return None


def _activation_obstacle(recipe: Fields) -> str | None:
    """What keeps the target from activations in so few bits."""
    target = known_target(recipe.target)
    if target is None or recipe.bits.activations >= _LEAST_BITS or "TensorrtExecutionProvider" not in target.providers:
        return None
    return f"TensorRT takes symmetric activations of 8 bits alone, so {recipe.precision} is for target cpu or cuda"


def _allocation_obstacle(recipe: Fields) -> str | None:
    """What leaves no bits to share out among channels, or no way to."""
    wanted = recipe.bits_per_channel
    if wanted == "off":
        if recipe.storage == "split":
            return 'storage "split" is for channels of unequal bits: give bits_per_channel, or storage "packed"'
        if recipe.bit_allocation != "mean_width":
            return "bit_allocation says how bits_per_channel shares bits out: give bits_per_channel too"
        return None
    few = [Precision.of(o.precision) for o in recipe.nodes.values() if o.precision is not None] + [recipe.bits]
    widths = {"weights": min(one.weights for one in few), "activations": min(one.activations for one in few)}
    named = [what for what in widths if wanted in (what, "both")]
    if all(widths[what] >= _LEAST_BITS for what in named):
        return f"bits_per_channel: {' and '.join(named)} have 8 bits with {recipe.precision}, as many as a channel may"
    if "weights" in named and not recipe.per_channel:
        return "bits_per_channel: weights have one scale without per_channel; leave one of them out"
    if recipe.storage == "split" and "weights" not in named:
        return 'storage "split" is for weights of unequal bits: give bits_per_channel "weights" or "both"'
    return None


def _block_obstacle(recipe: Fields) -> str | None:
    """What keeps the target from blocks as they are asked for."""
    size, bits, target = recipe.block_size, recipe.weight_bits, known_target(recipe.target)
    if size is not None and (size not in range(16, 257) or size & (size - 1)):
        return f"block_size must be a power of two from 16 to 256, not {size}"
    if target is None or bits is None:
        return None
    if bits not in target.weights.block_sizes:
        return f"target {target.name} has no {bits}-bit weights; give one of {_precisions(target.weights.block_sizes)}"
    sizes = target.weights.block_sizes[bits]
    if size is not None and not sizes:
        return f"block_size: {bits}-bit weights have one scale for each channel on target {target.name}; leave it out"
    if size is not None and size not in sizes:
        return f"block_size {size} has no kernel for {bits} bits; give one of {', '.join(map(str, sorted(sizes)))}"
    return None


def _precisions(widths: Mapping[int, object]) -> str:
    return ", ".join(f"w{bits}a16" for bits in sorted(widths, reverse=True))


def _format_obstacle(recipe: Fields) -> str | None:
    """Number formats that weights alone cannot have."""
    target = known_target(recipe.target)
    overrides = {**recipe.tensors, **recipe.nodes}
    names = {where: override.dtype for where, override in overrides.items() if override.dtype is not None}
    for where, name in names.items():
        if FORMATS[name].bits not in _WIDTHS:
            return f"override of {where!r}: weights alone are stored in 2, 4 or 8 bits, not as {name}"
        if target is not None and FORMATS[name].bits not in target.weights.block_sizes:
            return f"override of {where!r}: target {target.name} has no weights of {FORMATS[name].bits} bits"
    if target is None or target.weights.asymmetric:
        return None
    if recipe.weight_symmetric is False or any(o.symmetric is False for o in overrides.values()):
        return f"target {target.name} takes no zero points of weights: leave them symmetric"
    for where, name in names.items():
        if not FORMATS[name].signed:
            return f"override of {where!r}: target {target.name} takes signed codes of weights alone"
    return None

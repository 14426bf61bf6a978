"""How activations are placed where they have few bits, and which layers are the ends of a model.

Activations of 4 bits are 8-bit codes that are kept inside 4 bits before QuantizeLinear, which saturates at the ends of
its type alone: the runtime takes codes of 4-bit types for those of 8 where it fuses.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Final

import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.linear import LinearLayer
from qdqtool.planning.precision import Precision, widened
from qdqtool.planning.target import Emit, Target
from qdqtool.spec import FORMATS, QuantSpec

if TYPE_CHECKING:
    from qdqtool.recipe import Recipe

_USUAL: Final = 8
"""Bits of activations where a precision takes none away: they have the target's own format, which may be wider."""


def activation_spec(target: Target, bits: int) -> QuantSpec:
    """Codes of an activation on a target, per tensor."""
    base, symmetric = FORMATS[target.activation], target.activation_symmetric
    if bits > max(base.bits, _USUAL):
        return QuantSpec(widened(base, bits), symmetric, narrow=symmetric)
    return QuantSpec(base, symmetric, narrow=symmetric, bits=None if bits >= _USUAL else bits)


def shared_out(spec: QuantSpec, recipe: Recipe) -> QuantSpec:
    """An activation's spec with its bits allocated to the channels, where it has few and a scale for each channel."""
    if not recipe.allocates("activations") or spec.bits is None or spec.granularity.axis is None:
        return spec
    return replace(spec, allocation=recipe.bit_allocation)


def shared_out_weight(spec: QuantSpec, recipe: Recipe, bits: int) -> QuantSpec:
    """A weight's spec with ``bits`` on average allocated to its channels, in a type that holds all widths.

    Every channel is asymmetric, as published: codes of few bits then lie where its values are.
    """
    if not recipe.allocates("weights") or bits >= _USUAL or spec.granularity.axis is None:
        return spec
    return replace(
        spec,
        format=recipe.weight_format,
        bits=bits,
        symmetric=False,
        narrow=False,
        allocation=recipe.bit_allocation,
        split=recipe.storage == "split",
    )


def placed(target: Target, precision: Precision, *, channels: bool) -> Target:
    """The target as it is for a precision, ``channels``: with a scale for each channel of an activation.

    Such activations, and those of fewer than 8 bits, run in float between Q/DQ. What fuses with a kernel does not count
    then: the inputs of linear layers alone are quantized, those of few bits by unsigned codes.
    """
    few = precision.activations < _USUAL
    if not few and not channels:
        return target
    rules = tuple(replace(rule, output=Emit.NEVER, kernel=False) for rule in target.rules if rule.weight)
    return replace(
        target,
        activation="uint8" if few else target.activation,
        activation_symmetric=target.activation_symmetric and not few,
        bias_int32=False,
        absorbed=frozenset(),
        residual=False,
        share_concat=False,
        rules=rules,
    )


def ends(graph: gs.Graph) -> frozenset[str]:
    """Names of the layers that no layer stands before, and of those that none stands behind."""
    layers = {id(node): node for node in graph.nodes if _is_layer(node)}
    behind: set[int] = set()
    read: set[int] = set()
    first = set()
    for node in graph.nodes:
        after = any(id(tensor) in behind for tensor in graphs.reads(node))
        if id(node) in layers and not after:
            first.add(node.name)
        if after or id(node) in layers:
            behind.update(map(id, node.outputs))
    last = set()
    for node in reversed(graph.nodes):
        before = any(id(tensor) in read for tensor in node.outputs)
        if id(node) in layers and not before:
            last.add(node.name)
        if before or id(node) in layers:
            read.update(map(id, graphs.reads(node)))
    return frozenset(first | last)


def _is_layer(node: gs.Node) -> bool:
    layer = LinearLayer.of(node)
    return layer is not None and graphs.is_constant(layer.weight)

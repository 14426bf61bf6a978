"""Weights of fewer than 8 bits rounded layer by layer on their own: each reads what the float model computes.

In the pipeline a layer's rounding makes up for the layers before it (:mod:`qdqtool.passes.round_weights`), and so
depends on their widths. What a layer costs by itself is seen with codes that make up for nothing but the layer's own
error: GPTQ on second moments of the float model's tensors, which are counted once and serve every width.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, cast

from qdqtool.arithmetic import gptq, second_moments
from qdqtool.arithmetic.grid import Grid
from qdqtool.arithmetic.second_moments import SecondMoments
from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.graph import Array
from qdqtool.graphs.linear import LinearLayer
from qdqtool.observation.stepwise import Stepwise
from qdqtool.passes_api import State
from qdqtool.planning.precision import Precision, width
from qdqtool.spec import QuantParams, Scheme

_MOMENT_BYTES: Final = 1 << 28


def rounded(state: State, params: Mapping[str, Mapping[str, QuantParams]]) -> Iterator[tuple[str, str, Array]]:
    """Weights of fewer than 8 bits after rounding, as (layer, width, values).

    Layers are left out whose second moments cannot be counted, or would be too large: the nearest codes stay.

    Args:
        state: the prepared model with held samples.
        params: layer -> width -> scale and zero point of its weight.
    """
    assert state.batching is not None
    nodes = {node.name: node for node in state.graph.nodes}
    few = {name: {w: p for w, p in params[name].items() if width(p.spec) < Precision.weights} for name in params}
    found = [LinearLayer(nodes[name]) for name, by_width in few.items() if by_width]
    layers = [layer for layer in found if _counted(layer, [*few[layer.node.name].values()])]
    reads = {layer.node.name: layer.node.inputs[0].name for layer in layers}
    feeds = [batch.feeds for batch in state.batching.alone().batches(state.held)]
    walk = Stepwise(models.to_proto(state.graph, state.header), feeds, reads.values(), provider=state.provider)
    product = second_moments.product()
    for layer in sorted(layers, key=lambda layer: walk.position(reads[layer.node.name])):
        moments = SecondMoments(product)
        for values in walk.take(reads[layer.node.name]):
            columns = second_moments.columns(layer, values)
            moments.add(columns, columns)
        if moments.samples:
            h = moments.shrunk(centred=state.recipe.bias_correction).h
            weight = cast(Array, graphs.constant(layer.weight))
            rows = second_moments.rows(layer, weight)
            for name, own in few[layer.node.name].items():
                grid = Grid.of(own, *rows.shape[:2])
                values = grid.values(gptq.rounded(rows, h, grid))
                stored = second_moments.from_rows(layer, values, weight.shape).astype(weight.dtype)
                yield layer.node.name, name, stored


def _counted(layer: LinearLayer, params: Sequence[QuantParams]) -> bool:
    axes = {p.spec.granularity.axis for p in params}
    blocks = any(p.spec.granularity.scheme is Scheme.PER_BLOCK for p in params)
    if blocks or not axes <= {None, layer.weight_axis} or graphs.is_constant(layer.node.inputs[0]):
        return False
    return second_moments.obstacle(layer) is None and second_moments.size(layer) <= _MOMENT_BYTES

"""Round weights otherwise than to the nearest code, at the scales that were chosen.

stochastic: up or down by chance, q = floor(w / S + u) with u uniform in [0, 1), so that the mean error of each weight
is 0 (Gupta et al., Deep Learning with Limited Numerical Precision, 2015). The generator starts from the recipe's seed
and the weight's name, so the order of layers does not matter.

gptq: so that the layer's outputs err least on the held calibration samples, from the second moments of its inputs
(:mod:`qdqtool.arithmetic.gptq`); adaround: for the same, by gradients (:mod:`qdqtool.arithmetic.adaround`).

Layer after layer, these are its inputs in the model that is quantized up to there, and the outputs wanted are those of
the float model, so that a layer also makes good what those before it did. On samples kept apart, no layer may err more
than rounded to nearest, with the inputs of either model (:mod:`qdqtool.arithmetic.output_error`).
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, cast

import numpy as np

from qdqtool.arithmetic import adaround, affine, gptq, second_moments
from qdqtool.arithmetic.grid import Grid
from qdqtool.arithmetic.output_error import Rounding, chosen
from qdqtool.arithmetic.second_moments import SecondMoments
from qdqtool.graphs import graph as graphs
from qdqtool.graphs.graph import Array
from qdqtool.graphs.linear import LinearLayer, bias_place
from qdqtool.observation.layerwise import Layerwise
from qdqtool.passes_api import Fact, State
from qdqtool.planning.plan import Key, Use, params_of
from qdqtool.planning.precision import FEW_BITS, width
from qdqtool.spec import FloatArray, QuantizedWeight, QuantParams, Scheme

_MOMENT_BYTES: Final = 1 << 30
"""Largest second moments of a layer; several of them are held at once."""
_APART: Final = 4
"""One sample of so many is kept apart, to check on it."""
_METHODS: Final[dict[str, Rounding]] = {"gptq": gptq.rounded, "adaround": adaround.rounded}


@dataclass
class _Weight:
    """A constant with the keys and layers that read it by the same scales, and what is known of their inputs."""

    values: Array
    params: QuantParams
    keys: list[Key]
    layers: list[LinearLayer]


@dataclass(frozen=True)
class RoundWeights:
    """Choose the codes of weights so that they err less together than rounded one by one.

    Attributes:
        method: "gptq", "adaround" or "stochastic".
        few_bits: only weights of up to 4 bits.
        seed: of the stochastic choice.
    """

    method: Literal["gptq", "adaround", "stochastic"] = "gptq"
    few_bits: bool = True
    seed: int = 0

    name: ClassVar[str] = "round-weights"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAN, Fact.PARAMS})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})

    def run(self, state: State) -> int:
        """Change codes in ``state.params``; returns the number of weights rounded anew."""
        weights = self._weights(state)
        if self.method == "stochastic":
            codes = [(w, _stochastic(w, self.seed, _tensor(state, w))) for w in weights]
        else:
            codes = list(self._by_output(state, weights))
        assert state.params is not None
        changed = {key: QuantizedWeight(found, w.params) for w, found in codes for key in w.keys}
        state.params = {**state.params, **changed}
        return len(codes)

    def _weights(self, state: State) -> list[_Weight]:
        assert state.plan is not None
        assert state.params is not None
        nodes = {node.name: node for node in graphs.all_nodes(state.graph)}
        found: dict[tuple[str, bytes], _Weight] = {}
        for key in state.plan.entries:
            layer = LinearLayer.of(nodes[key.node]) if isinstance(key, Use) and key.index == 1 else None
            if layer is None or key not in state.plan.constants or key not in state.params:
                continue
            params = params_of(state.params[key])
            if self.few_bits and width(params.spec) > FEW_BITS:
                continue
            same = (state.plan.tensors[key], params.scale.tobytes())
            values = cast(Array, graphs.constant(layer.weight))
            weight = found.setdefault(same, _Weight(values, params, [], []))
            weight.keys.append(key)
            weight.layers.append(layer)
        order = {name: index for index, name in enumerate(nodes)}
        return sorted(found.values(), key=lambda weight: order[weight.layers[0].node.name])

    def _by_output(self, state: State, weights: Sequence[_Weight]) -> Iterator[tuple[_Weight, Array]]:
        """Weights with their codes, each at the last layer that reads it; until then it has the nearest ones."""
        usable = self._usable(state, weights)
        if not usable:
            return
        outputs = graphs.leaving_ids(state.graph)
        walk = Layerwise(state, [layer for weight in usable for layer in weight.layers])
        readers = {layer.node.name: weight for weight in usable for layer in weight.layers}
        product = second_moments.product()
        sums: dict[int, _Sums] = {}
        left = {id(weight): len(weight.layers) for weight in usable}
        for layer in walk.layers:
            weight = readers[layer.node.name]
            known = sums.setdefault(id(weight), _Sums(SecondMoments(product), SecondMoments(product, count_exact=True)))
            known.add(layer, walk.inputs(layer))
            left[id(weight)] -= 1
            if left[id(weight)] == 0:
                place = _corrected_bias(state, layer, outputs) if len(weight.layers) == 1 else None
                codes = self._codes(state, weight, _Last(layer, place), sums.pop(id(weight)), walk)
                if codes is not None:
                    yield weight, codes

    def _usable(self, state: State, weights: Sequence[_Weight]) -> list[_Weight]:
        here = {id(node) for node in state.graph.nodes}
        usable = []
        for weight in weights:
            reason = next(filter(None, (_obstacle(layer, weight.params, here) for layer in weight.layers)), None)
            reason = reason or ("no calibration sample is held" if not state.held else None)
            if reason is None:
                usable.append(weight)
            else:
                self._skip(state, weight, reason)
        return usable

    def _codes(self, state: State, weight: _Weight, last: _Last, sums: _Sums, walk: Layerwise) -> Array | None:
        """Codes of a weight, with which its last layer goes on; None where the nearest ones stay."""
        if not sums.fit.samples:
            self._skip(state, weight, "no calibration sample gives it finite inputs")
            return None
        layer, place = last.layer, last.bias
        rows = second_moments.rows(layer, weight.values)
        grid = Grid.of(weight.params, *rows.shape[:2])
        found = chosen(rows, grid, _METHODS[self.method], sums.fit, sums.apart, centred=place is not None)
        if found is None:
            self._skip(state, weight, "its output errs less so on samples kept apart")
        codes = grid.nearest(rows) if found is None else found
        stored = second_moments.from_rows(layer, codes, weight.values.shape).astype(
            affine.container(weight.params.spec)
        )
        walk.settle(layer.node.name, layer.weight_input, affine.dequantize(stored, weight.params))
        if place is not None:
            seen, exact = (sums.fit | sums.apart).average
            shift = (rows @ exact[:, :, None] - grid.values(codes) @ seen[:, :, None]).reshape(-1)
            walk.settle(place.node, place.index, (place.values + shift).astype(np.float32))
        return None if found is None else stored

    def _skip(self, state: State, weight: _Weight, reason: str) -> None:
        for layer in weight.layers:
            state.skip(self.name, layer.node.name, f"{reason}: rounded to nearest")


@dataclass
class _Sums:
    """Second moments of a weight's inputs, over the samples to choose its codes by and over those kept apart."""

    fit: SecondMoments
    apart: SecondMoments

    def add(self, layer: LinearLayer, inputs: Iterator[tuple[Array, Array]]) -> None:
        """Count what a layer reads, sample by sample."""
        for index, pair in enumerate(inputs):
            part = self.apart if index % _APART == _APART - 1 else self.fit
            part.add(*(second_moments.columns(layer, values) for values in pair))


@dataclass(frozen=True)
class _Bias:
    """Input ``index`` of node ``node``, which holds a layer's bias: float64 ``values``."""

    node: str
    index: int
    values: FloatArray


@dataclass(frozen=True)
class _Last:
    """The last layer that reads a weight, with its bias where that will keep the mean."""

    layer: LinearLayer
    bias: _Bias | None


def _corrected_bias(state: State, layer: LinearLayer, outputs: set[int]) -> _Bias | None:
    """The bias that will be shifted so that the layer keeps its mean; None where none will be."""
    place = bias_place(layer.node, outputs)
    if place is None or not state.recipe.bias_correction or state.recipe.bias_correction_method == "analytic":
        return None
    node = layer.node if place.node == layer.node.name else graphs.uses(layer.node.outputs[0])[0][0]
    values = cast(Array, graphs.constant(node.inputs[place.index]))
    return _Bias(place.node, place.index, values.astype(np.float64))


def _tensor(state: State, weight: _Weight) -> str:
    assert state.plan is not None
    return state.plan.tensors[weight.keys[0]]


def _stochastic(weight: _Weight, seed: int, name: str) -> Array:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    scale, zero = (part.astype(np.float64) for part in affine.expanded(weight.params, weight.values.shape))
    position = weight.values / scale + rng.random(weight.values.shape)
    codes = np.clip(np.floor(position) + zero, *affine.limits(weight.params, weight.values.shape))
    return codes.astype(affine.container(weight.params.spec))


def _obstacle(layer: LinearLayer, params: QuantParams, here: set[int]) -> str | None:
    if id(layer.node) not in here:
        return "it is inside a control-flow body"
    if graphs.is_constant(layer.node.inputs[0]):
        return "its input is a constant"
    granularity = params.spec.granularity
    if granularity.scheme is Scheme.PER_BLOCK or granularity.axis not in (None, layer.weight_axis):
        return "its scales are not those of output channels"
    reason = second_moments.obstacle(layer)
    if reason is None and second_moments.size(layer) > _MOMENT_BYTES:
        return "its inputs are too many for their second moments"
    return reason

"""Round weights otherwise than to the nearest code, at the scales that were chosen.

stochastic: up or down by chance, q = floor(w / S + u) with u uniform in [0, 1), so that the mean error of each weight
is 0 (Gupta et al., Deep Learning with Limited Numerical Precision, 2015). The generator starts from the recipe's seed
and the weight's name, so the order of layers does not matter.

gptq: so that the layer's outputs err least on the held calibration samples, from the second moments of its inputs
(:mod:`qdqtool.arithmetic.gptq`). The float model runs once for every few layers, whose inputs it then gives out.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final, Literal, cast

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qdqtool import runtime
from qdqtool.arithmetic import affine, gptq, second_moments
from qdqtool.arithmetic.second_moments import SecondMoments
from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.graph import Array
from qdqtool.graphs.linear import LinearLayer
from qdqtool.passes_api import Fact, State
from qdqtool.planning.plan import Key, Use, params_of
from qdqtool.planning.precision import FEW_BITS, width
from qdqtool.spec import QuantizedWeight, QuantParams, Scheme

_MOMENT_BYTES: Final = 1 << 29  # second moments held at once; a layer that needs more is alone


@dataclass
class _Weight:
    """A constant with the keys and layers that read it by the same scales."""

    values: Array
    params: QuantParams
    keys: list[Key]
    layers: list[LinearLayer]

    @property
    def moment_bytes(self) -> int:
        """Bytes of its second moments."""
        groups, _, inputs = _rows(self.layers[0], self.values).shape
        return 8 * int(groups) * int(inputs) ** 2


@dataclass(frozen=True)
class RoundWeights:
    """Choose the codes of weights so that they err less together than rounded one by one.

    Attributes:
        method: "gptq" or "stochastic".
        few_bits: only weights of up to 4 bits.
        seed: of the stochastic choice.
    """

    method: Literal["gptq", "stochastic"] = "gptq"
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
            codes = list(self._gptq(state, weights))
        assert state.params is not None
        changed = {key: QuantizedWeight(found, w.params) for w, found in codes for key in w.keys}
        state.params = {**state.params, **changed}
        return len(codes)

    def _weights(self, state: State) -> list[_Weight]:
        assert state.plan is not None
        assert state.params is not None
        nodes = {node.name: node for node in graphs.all_nodes(state.graph)}
        found: dict[tuple[str, bytes], _Weight] = {}
        for key in state.plan.constants:
            layer = LinearLayer.of(nodes[key.node]) if isinstance(key, Use) and key.index == 1 else None
            if layer is None or key not in state.params:
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

    def _gptq(self, state: State, weights: Sequence[_Weight]) -> Iterator[tuple[_Weight, Array]]:
        here = {id(node) for node in state.graph.nodes}
        usable = []
        for weight in weights:
            reason = next(filter(None, (_obstacle(layer, weight.params, here) for layer in weight.layers)), None)
            if reason is None:
                usable.append(weight)
            else:
                self._skip(state, weight, reason)
        for group in _grouped(usable):
            moments = _observed(state, group)
            for weight in group:
                known = moments[id(weight)]
                if known.samples:
                    yield weight, _by_moments(weight, known)
                else:
                    self._skip(state, weight, "no calibration sample gives it finite inputs")

    def _skip(self, state: State, weight: _Weight, reason: str) -> None:
        for layer in weight.layers:
            state.skip(self.name, layer.node.name, f"{reason}: rounded to nearest")


def _tensor(state: State, weight: _Weight) -> str:
    assert state.plan is not None
    return state.plan.tensors[weight.keys[0]]


def _stochastic(weight: _Weight, seed: int, name: str) -> Array:
    rng = np.random.default_rng([seed, zlib.crc32(name.encode())])
    scale, zero = (part.astype(np.float64) for part in affine.expanded(weight.params, weight.values.shape))
    position = weight.values / scale + rng.random(weight.values.shape)
    spec = weight.params.spec
    return np.clip(np.floor(position) + zero, spec.qmin, spec.qmax).astype(affine.container(spec))


def _obstacle(layer: LinearLayer, params: QuantParams, here: set[int]) -> str | None:
    if id(layer.node) not in here:
        return "it is inside a control-flow body"
    if graphs.is_constant(layer.node.inputs[0]):
        return "its input is a constant"
    granularity = params.spec.granularity
    if granularity.scheme is Scheme.PER_BLOCK or granularity.axis not in (None, layer.weight_axis):
        return "its scales are not those of output channels"
    return second_moments.obstacle(layer)


def _grouped(weights: Sequence[_Weight]) -> Iterator[list[_Weight]]:
    """Weights in order, as many at a time as their second moments leave memory for."""
    group: list[_Weight] = []
    held = 0
    for weight in weights:
        size = weight.moment_bytes
        if group and held + size > _MOMENT_BYTES:
            yield group
            group, held = [], 0
        group.append(weight)
        held += size
    if group:
        yield group


def _observed(state: State, group: Sequence[_Weight]) -> Mapping[int, SecondMoments]:
    """Second moments by weight, over the held samples; layers that share a weight are counted together."""
    assert state.batching is not None
    gram = second_moments.gram()
    found = {id(weight): SecondMoments(gram) for weight in group}
    names = list(dict.fromkeys(layer.node.inputs[0].name for weight in group for layer in weight.layers))
    session = runtime.session(_giving(state, names), provider=state.provider)
    for batch in state.batching.small().batches(state.held):
        given = dict(zip(names, runtime.run(session, names, batch.feeds), strict=True))
        for weight in group:
            for layer in weight.layers:
                values = given[layer.node.inputs[0].name]
                for sample in _samples(values, len(batch.samples), batch.rows):
                    found[id(weight)].add(second_moments.columns(layer, sample))
    return found


def _samples(values: Array, samples: int, rows: int) -> Iterator[Array]:
    """What belongs to each sample of a batch; all of it where axis 0 is not the batch's."""
    if values.ndim == 0 or values.shape[0] % rows or rows == 1:
        yield values
        return
    each = values.shape[0] // rows
    for index in range(samples):
        yield values[index * each : (index + 1) * each]


def _giving(state: State, names: Sequence[str]) -> onnx.ModelProto:
    """The float model with these tensors as its only outputs."""
    proto = models.to_proto(state.graph, state.header)
    del proto.graph.output[:]
    for name in names:
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return proto


def _by_moments(weight: _Weight, moments: SecondMoments) -> Array:
    layer, params = weight.layers[0], weight.params
    rows = _rows(layer, weight.values).astype(np.float64)
    outputs = (rows.shape[0] * rows.shape[1],)
    scale, zero = (
        np.broadcast_to(part.astype(np.float64), outputs).reshape(*rows.shape[:2], 1)
        for part in (params.scale, params.zero_point)
    )
    codes = gptq.rounded(rows, moments.shrunk(), scale, zero, params.spec)
    return _back(layer, codes, weight.values.shape).astype(affine.container(params.spec))


def _outputs_first(node: gs.Node) -> bool:
    return node.op == "Conv" or bool(node.op == "Gemm" and node.attrs.get("transB", 0))


def _rows(layer: LinearLayer, values: Array) -> Array:
    """A weight as (groups, outputs of a group, inputs of a group), inputs as in :func:`second_moments.columns`."""
    matrix = values.reshape(values.shape[0], -1) if _outputs_first(layer.node) else values.T
    return matrix.reshape(layer.groups, -1, matrix.shape[1])


def _back(layer: LinearLayer, rows: Array, shape: tuple[int, ...]) -> Array:
    """What :func:`_rows` made of a weight, in the weight's shape again."""
    flat = rows.reshape(-1, rows.shape[2])
    return np.ascontiguousarray(flat if _outputs_first(layer.node) else flat.T).reshape(shape)

"""The float model with a switch at every layer: what it reads and its weight are inputs that may be exchanged.

One session runs every assignment of widths to layers, as float arithmetic:

    y = W x^ + b,    x^ = round(min(max(x, lo), hi) / s) s,    y <- y + g (m - E[y])

W, lo, hi and s are initializers that a run may override. Their defaults leave the model as it is: s = 2^-60 is a power
of two, by which float numbers are divided and multiplied without error, and numbers that are large beside it are whole.
With the gain g = 1 a layer's mean output is kept at the float model's mean m, as bias correction does (Nagel et al.,
Data-Free Quantization Through Weight Equalization and Bias Correction, ICCV 2019).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qdqtool.data.fit import Feeds
from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.linear import BiasPlace, bias_place
from qdqtool.mixed_precision.candidates import Candidates, Coded, Layer
from qdqtool.passes_api import State
from qdqtool.spec import QuantParams

PREFIX: Final = "qdqtool.search."
_GAIN: Final = f"{PREFIX}gain"
_IDENTITY: Final = 2.0**-60
_MEAN_WITH_AXES_INPUT: Final = 18  # least opset whose ReduceMean takes its axes as an input


@dataclass(frozen=True)
class Switchboard:
    """A model with switches.

    Attributes:
        proto: the model; every switch is an input with a default.
        means: outputs that hold the mean of a layer's result, beside the input that wants the float model's.
    """

    proto: onnx.ModelProto
    means: Mapping[str, str]

    @staticmethod
    def of(candidates: Candidates, *, correct: bool) -> Switchboard:
        """Build it from the prepared graph; ``correct``: layers that have a bias keep their mean."""
        state = candidates.state
        return _Builder(state, candidates.layers, correct=correct).build()

    def feeds(self, chosen: Mapping[str, Coded], means: Mapping[str, np.ndarray] | None) -> Feeds:
        """What a run gets beside the sample: layers in integers, and the float model's means (None: that run)."""
        found: dict[str, Any] = {}
        for layer, coded in chosen.items():
            found[_switch(layer, "weight")] = coded.weight
            for index, params in coded.inputs.items():
                found |= _rounding(layer, index, params)
        if means:
            found[_GAIN] = np.ones((), np.float32)
            found |= {wanted: means[output] for output, wanted in self.means.items()}
        return found


def _switch(layer: str, what: str) -> str:
    return f"{PREFIX}{layer}.{what}"


def _rounding(layer: str, index: int, params: QuantParams) -> dict[str, np.ndarray]:
    ends, scale = params.range, params.scale
    values = {"lo": ends.lo, "hi": ends.hi, "scale": scale}
    axis = params.spec.granularity.axis
    return {
        _switch(layer, f"{name}{index}"): _beside(np.asarray(value, np.float32), axis) for name, value in values.items()
    }


def _beside(values: np.ndarray, axis: int | None) -> np.ndarray:
    """Values of channels in a shape that broadcasts; channels are axis 1 of four axes, or the last."""
    return values.reshape(-1, 1, 1) if axis == 1 and values.ndim else values


class _Builder:
    def __init__(self, state: State, layers: Sequence[Layer], *, correct: bool) -> None:
        self.header, self.layers, self.correct = state.header, layers, correct
        self.graph = graphs.copy(state.graph)
        self.nodes = {node.name: node for node in self.graph.nodes}
        self.switches: list[str] = []
        self.means: dict[str, str] = {}
        self.gain = self._overridable(_GAIN, np.zeros((), np.float32))

    def build(self) -> Switchboard:
        outputs = graphs.leaving_ids(self.graph)
        for layer in self.layers:
            node = self.nodes[layer.name]
            place = bias_place(node, outputs) if self.correct else None
            for index in layer.inputs:
                self._round(node, index)
            weight = self._overridable(_switch(layer.name, "weight"), node.inputs[1].values)
            graphs.set_input(node, 1, weight)
            if place is not None and (place.axis == -1 or place.rank is not None):
                self._keep_mean(self.nodes[place.node], place)
        graphs.sweep(self.graph)
        proto = models.to_proto(self.graph, self.header)
        self._expose(proto)
        return Switchboard(proto, self.means)

    def _overridable(self, name: str, values: np.ndarray) -> gs.Constant:
        self.switches.append(name)
        return gs.Constant(name, np.array(values))

    def _node(self, op: str, inputs: Sequence[gs.Tensor], name: str, dtype: Any, **attrs: Any) -> gs.Variable:
        result = gs.Variable(name, dtype=dtype)
        self.graph.nodes.append(gs.Node(op, name, attrs, list(inputs), [result]))
        return result

    def _round(self, node: gs.Node, index: int) -> None:
        x = node.inputs[index]
        stem, dtype = _switch(node.name, ""), x.dtype or np.float32
        lo, hi, scale = (
            self._overridable(f"{stem}{name}{index}", np.array(value, dtype))
            for name, value in (("lo", -np.inf), ("hi", np.inf), ("scale", _IDENTITY))
        )
        value = self._node(
            "Min", [self._node("Max", [x, lo], f"{stem}max{index}", dtype), hi], f"{stem}min{index}", dtype
        )
        whole = self._node(
            "Round", [self._node("Div", [value, scale], f"{stem}div{index}", dtype)], f"{stem}round{index}", dtype
        )
        graphs.set_input(node, index, self._node("Mul", [whole, scale], f"{stem}mul{index}", dtype))

    def _keep_mean(self, node: gs.Node, place: BiasPlace) -> None:
        """Put y + g (m - E[y]) behind a node, under the name of its result."""
        result, stem = node.outputs[0], _switch(node.name, "")
        dtype = result.dtype or np.float32
        raw = gs.Variable(f"{stem}raw", dtype=dtype)
        node.outputs[0] = raw
        mean = self._mean(raw, stem, place)
        wanted = self._overridable(f"{stem}wanted", np.zeros((), dtype))
        self.means[mean.name] = wanted.name
        error = self._node("Sub", [wanted, mean], f"{stem}error", dtype)
        shift = self._node("Mul", [error, self.gain], f"{stem}shift", dtype)
        self.graph.nodes.append(gs.Node("Add", f"{stem}add", {}, [raw, shift], [result]))

    def _mean(self, x: gs.Tensor, stem: str, place: BiasPlace) -> gs.Variable:
        """Mean of each channel over everything else: (1, channels, 1, ...), or (channels,) of the last axis."""
        if place.axis == -1:
            size = gs.Constant(f"{stem}rows", np.array([-1, place.channels], np.int64))
            x, axes = self._node("Reshape", [x, size], f"{stem}flat", x.dtype), [0]
        else:
            assert place.rank is not None
            axes = [index for index in range(place.rank) if index != place.axis]
        keepdims = int(place.axis != -1)
        if self.graph.opset < _MEAN_WITH_AXES_INPUT:
            return self._node("ReduceMean", [x], f"{stem}mean", x.dtype, axes=axes, keepdims=keepdims)
        given = gs.Constant(f"{stem}axes", np.array(axes, np.int64))
        return self._node("ReduceMean", [x, given], f"{stem}mean", x.dtype, keepdims=keepdims)

    def _expose(self, proto: onnx.ModelProto) -> None:
        """Make inputs of the switches, and outputs of the means."""
        proto.graph.value_info.clear()  # shapes that were inferred for the model without switches
        made = {tensor.name: tensor for tensor in proto.graph.initializer}
        for name in self.switches:
            if name in made:
                shape = list(made[name].dims) if name.endswith(".weight") else None
                proto.graph.input.append(onnx.helper.make_tensor_value_info(name, made[name].data_type, shape))
        for name in self.means:
            proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))

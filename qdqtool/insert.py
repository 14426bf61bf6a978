"""Put Q/DQ nodes into a graph: a pure function of graph, plan and parameters.

Every step that needs the quantized model (bias correction, verification, the final file) calls :func:`insert` on the
float graph, so that the codes of a derived bias always come from the bias and the scales of that moment.
"""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from qdqtool import graph as graphs
from qdqtool.errors import PipelineError
from qdqtool.plan import DerivedFrom, Key, Output, Parameters, Plan, Use, params_of
from qdqtool.spec import FORMATS, Format, QuantizedWeight, QuantParams, QuantSpec, Scheme, per_channel

_INT32_LIMIT = 2**31 - 1


def insert(graph: gs.Graph, plan: Plan, params: Parameters) -> gs.Graph:
    """Return a new graph with Q/DQ nodes where the plan wants them; ``graph`` stays as it is.

    Raises:
        PipelineError: a key of the plan has no parameters, or a derived bias does not fit into int32.
    """
    return _Inserter(graphs.copy(graph), plan, params).run()


class _Inserter:
    def __init__(self, graph: gs.Graph, plan: Plan, params: Parameters) -> None:
        self.graph, self.plan, self.params = graph, plan, params
        self.nodes: dict[str, gs.Node] = {node.name: node for node in graph.nodes}
        self.tensors: dict[str, gs.Tensor] = graph.tensors()
        self.taken = graphs.tensor_names(graph) | graphs.node_names(graph)
        self.before: dict[int, list[gs.Node]] = {}  # id(node) -> nodes to run right before it
        self.pairs: dict[tuple[str, int], list[tuple[QuantParams, gs.Tensor]]] = {}
        self.constants: dict[tuple[str, bytes], gs.Constant] = {}
        self.fresh: dict[str, gs.Node] = {}

    def run(self) -> gs.Graph:
        for key in self.plan.entries:
            if isinstance(key, Use):
                self._insert_use(key)
        for key in self.plan.entries:
            if isinstance(key, Output):
                self._insert_output(key)
        self.graph.nodes.extend(self.fresh.values())
        graphs.sweep(self.graph)
        return self.graph

    def _value(self, key: Key) -> QuantParams | QuantizedWeight:
        root = self.plan.resolve(key)
        try:
            return self.params[root]
        except KeyError:
            raise PipelineError(
                f"{root} is planned but has no scale and zero point; choose ranges before inserting"
            ) from None

    def _insert_use(self, key: Use) -> None:
        node = self.nodes[key.node]
        tensor = node.inputs[key.index]
        entry = self.plan.entries[key]
        if isinstance(entry, DerivedFrom):
            weight = derived_bias(
                cast(Any, graphs.constant(tensor)),
                *(params_of(self._value(k)) for k in (entry.activation, entry.weight)),
            )
            if weight is None:
                raise PipelineError(f"the bias {tensor.name!r} of {key.node!r} overflows int32; leave it in float")
            node.inputs[key.index] = self._stored(tensor, weight)
            return
        value = self._value(key)
        if isinstance(value, QuantizedWeight):
            node.inputs[key.index] = self._stored(tensor, value)
        else:
            node.inputs[key.index] = self._pair(tensor, value)

    def _insert_output(self, key: Output) -> None:
        """Give every reader, graph outputs included, the quantized tensor; the name of a graph output stays."""
        tensor = self.tensors[key.tensor]
        readers = [
            (node, i)
            for node, i in graphs.uses(tensor)
            if Use(node.name, i) not in self.plan.entries and node.name not in self.fresh
        ]
        given = [i for i, out in enumerate(self.graph.outputs) if out is tensor]
        result = self._pair(tensor, params_of(self._value(key)))
        for node, index in readers:
            node.inputs[index] = result
        for index in given:
            name = tensor.name
            tensor.name, result.name = graphs.fresh_name(f"{name}_float", self.taken), name
            self.graph.outputs[index] = result

    def _pair(self, tensor: gs.Tensor, params: QuantParams) -> gs.Tensor:
        """The dequantized copy of an activation; uses of one tensor with equal parameters share a pair."""
        known = self.pairs.setdefault((tensor.name, id(tensor)), [])
        for existing, result in known:
            if existing.same_codes(params):
                return result
        codes = gs.Variable(
            self._name(f"{tensor.name}_quantized"), dtype=_onnx_type(params.spec.format), shape=tensor.shape
        )
        result = gs.Variable(self._name(f"{tensor.name}_dequantized"), dtype=tensor.dtype, shape=tensor.shape)
        scale, zero = self._scale(tensor.name, params, tensor.dtype)
        axis = params.spec.granularity.axis
        attrs = {} if axis is None else {"axis": axis}
        name = self._name(f"{tensor.name}_QuantizeLinear")
        self.fresh[name] = gs.Node("QuantizeLinear", name, {**attrs}, [tensor, scale, zero], [codes])
        name = self._name(f"{tensor.name}_DequantizeLinear")
        self.fresh[name] = gs.Node("DequantizeLinear", name, {**attrs}, [codes, scale, zero], [result])
        known.append((params, result))
        return result

    def _stored(self, tensor: gs.Tensor, weight: QuantizedWeight) -> gs.Tensor:
        """The dequantized form of a constant stored in integers; equal copies for several uses are one."""
        known = self.pairs.setdefault((tensor.name, id(tensor)), [])
        for existing, result in known:
            if existing is weight.params or (
                existing.same_codes(weight.params) and existing.spec == weight.params.spec
            ):
                return result
        params = weight.params
        codes = self._codes(self._name(f"{tensor.name}_quantized"), weight.codes, params.spec.format)
        scale, zero = self._scale(tensor.name, params, tensor.dtype)
        result = gs.Variable(self._name(f"{tensor.name}_dequantized"), dtype=tensor.dtype, shape=tensor.shape)
        granularity = params.spec.granularity
        attrs: dict[str, int] = {}
        if granularity.scheme is not Scheme.PER_TENSOR:
            attrs["axis"] = cast(int, granularity.axis)
        if granularity.scheme is Scheme.PER_BLOCK:
            attrs["block_size"] = cast(int, granularity.block_size)
        name = self._name(f"{tensor.name}_DequantizeLinear")
        self.fresh[name] = gs.Node("DequantizeLinear", name, attrs, [codes, scale, zero], [result])
        known.append((params, result))
        return result

    def _scale(self, stem: str, params: QuantParams, dtype: Any) -> tuple[gs.Constant, gs.Constant]:
        scale = gs.Constant(self._name(f"{stem}_scale"), params.scale.astype(dtype or np.float32))
        return scale, self._codes(self._name(f"{stem}_zero_point"), params.zero_point, params.spec.format)

    def _codes(self, name: str, codes: npt.NDArray[Any], number_format: Format) -> gs.Constant:
        if number_format.bits >= 8:
            return gs.Constant(name, codes.astype(number_format.name))
        packed = onnx.helper.make_tensor(
            name, _onnx_type(number_format), codes.shape, pack(codes, number_format.bits), raw=True
        )
        return gs.Constant(name, gs.ir.tensor.LazyValues(packed))

    def _name(self, wanted: str) -> str:
        return graphs.fresh_name(wanted, self.taken)


def _onnx_type(number_format: Format) -> Any:
    if number_format.bits >= 8:
        return np.dtype(number_format.name)
    return getattr(onnx.TensorProto, number_format.name.upper())


def pack(codes: npt.NDArray[Any], bits: int) -> bytes:
    """Codes of 2 or 4 bits packed as ONNX stores them: the first element in the lowest bits of a byte."""
    per_byte = 8 // bits
    flat = np.zeros(-(-codes.size // per_byte) * per_byte, np.uint8)
    flat[: codes.size] = codes.reshape(-1).astype(np.int8).view(np.uint8) & ((1 << bits) - 1)
    packed = flat[::per_byte].copy()
    for position in range(1, per_byte):
        packed |= flat[position::per_byte] << (bits * position)
    return packed.tobytes()


def derived_bias(bias: npt.NDArray[Any], activation: QuantParams, weight: QuantParams) -> QuantizedWeight | None:
    """A bias in int32 with scale S_x * S_w and zero point 0; None where a code does not fit.

    Args:
        bias: float array (channels,).
        activation: parameters of the layer's input, per tensor.
        weight: parameters of the layer's weight, per tensor or per output channel.
    """
    scale = (activation.scale * weight.scale).astype(np.float32)
    codes = np.rint(bias.astype(np.float64) / scale)
    if np.abs(codes).max(initial=0.0) > _INT32_LIMIT:
        return None
    spec = QuantSpec(FORMATS["int32"], symmetric=True)
    if scale.ndim:
        spec = QuantSpec(FORMATS["int32"], symmetric=True, granularity=per_channel(0))
    return QuantizedWeight(codes.astype(np.int64), QuantParams(spec, scale, np.zeros(scale.shape, np.int64), "derived"))

"""Put Q/DQ nodes into a graph: a pure function of graph, plan and parameters.

Every step that needs the quantized model (bias correction, verification, the final file) calls :func:`insert` on the
float graph, so that the codes of a derived bias always come from the bias and the scales of that moment.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import onnx_graphsurgeon as gs

from qdqtool.arithmetic import blockwise
from qdqtool.errors import PipelineError
from qdqtool.graphs import graph as graphs
from qdqtool.graphs.lazy import peek
from qdqtool.planning import channel_widths, kept_float
from qdqtool.planning.plan import DerivedFrom, Key, Output, Parameters, Plan, Use, params_of
from qdqtool.spec import FORMATS, Format, IntArray, QuantizedWeight, QuantParams, QuantSpec, Scheme, per_channel

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
        self.nodes: dict[str, gs.Node] = {}
        self.homes: dict[str, gs.Graph] = {}  # node -> the graph that it is in
        for _, inner in graphs.all_graphs(graph):
            for node in inner.nodes:
                self.nodes[node.name], self.homes[node.name] = node, inner
        self.tensors = graphs.all_tensors(graph)
        self.taken = graphs.tensor_names(graph) | graphs.node_names(graph)
        # By name (bodies may hold copies of one constant) and graph: codes, scale and zero point, and the result.
        self.quantized: dict[tuple[str, int], list[tuple[QuantParams, list[gs.Tensor]]]] = {}
        self.pairs: dict[tuple[str, int], list[tuple[QuantParams, gs.Tensor]]] = {}
        self.fresh: dict[str, tuple[gs.Node, gs.Graph]] = {}

    def run(self) -> gs.Graph:
        for key in self.plan.entries:
            if isinstance(key, Use):
                self._insert_use(key)
        for key in self.plan.entries:
            if isinstance(key, Output):
                self._insert_output(key)
        for node, home in self.fresh.values():
            home.nodes.append(node)
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
        node, home = self.nodes[key.node], self.homes[key.node]
        tensor = node.inputs[key.index]
        entry = self.plan.entries[key]
        if isinstance(entry, DerivedFrom):
            weight = derived_bias(
                cast(Any, graphs.constant(tensor)),
                *(params_of(self._value(k)) for k in (entry.activation, entry.weight)),
            )
            if weight is None:
                raise PipelineError(f"the bias {tensor.name!r} of {key.node!r} overflows int32; leave it in float")
            node.inputs[key.index] = self._stored(tensor, weight, home)
            return
        value = self._value(key)
        if node.op == "Gather" and key in self.plan.constants:
            self._table(node, params_of(value))
        elif isinstance(value, QuantizedWeight) or key in self.plan.constants:
            node.inputs[key.index] = self._stored(tensor, value, home, own=key.node in self.plan.weight_only)
        else:
            node.inputs[key.index] = self._read(tensor, value, node, home)

    def _insert_output(self, key: Output) -> None:
        """Give every reader, graph outputs included, the quantized tensor; the name of a graph output stays.

        Readers in a control-flow body read the same codes, behind a DequantizeLinear of that body's own: the runtime
        fuses no conversion across the border of a graph.
        """
        tensor = self.tensors[key.tensor]
        home = self.homes[tensor.inputs[0].name]
        readers = [
            (node, i)
            for node, i in graphs.uses(tensor)
            if Use(node.name, i) not in self.plan.entries and node.name not in self.fresh
        ]
        params = params_of(self._value(key))
        for node, index in readers:
            node.inputs[index] = self._read(tensor, params, node, home, index)
        for index in [i for i, out in enumerate(home.outputs) if out is tensor]:
            name, result = tensor.name, self._pair(tensor, params, home, home)
            tensor.name, result.name = graphs.fresh_name(f"{name}_float", self.taken), name
            home.outputs[index] = result

    def _read(
        self, tensor: gs.Tensor, params: QuantParams, node: gs.Node, source: gs.Graph, index: int | None = None
    ) -> gs.Tensor:
        """What a node reads of an activation quantized in ``source``, so that what is planned in float runs in float.

        See :mod:`qdqtool.planning.kept_float`. ``index``: of the input, where its producer quantizes it.
        """
        home = self.homes[node.name]
        if index == 0 and Use(node.name, 1) not in self.plan.entries:
            spread = kept_float.spread(params, node)
            if spread is not None:
                codes = self._quantized(tensor, params, source)[0]
                return self._dequantized(tensor, [codes, *self._scale(tensor.name, spread, tensor.dtype)], spread, home)
        pair = self._pair(tensor, params, source, home)
        if node.op != "MatMul" or params.spec.granularity.axis is None:
            return pair
        least = gs.Constant(self._name(f"{tensor.name}_least"), kept_float.least(params, tensor))
        result = gs.Variable(self._name(f"{tensor.name}_apart"), dtype=tensor.dtype, shape=tensor.shape)
        self._add(gs.Node("Max", tensor.name, {}, [pair, least], [result]), home)
        return result

    def _pair(self, tensor: gs.Tensor, params: QuantParams, source: gs.Graph, reader: gs.Graph) -> gs.Tensor:
        """The dequantized copy of an activation; uses of one tensor with equal parameters share what they can.

        Args:
            tensor: the activation.
            params: its scale and zero point.
            source: the graph in which it is quantized.
            reader: the graph in which it is dequantized, the same or a body under it.
        """
        known = self.pairs.setdefault((tensor.name, id(reader)), [])
        for existing, result in known:
            if existing.same_codes(params):
                return result
        inputs = self._quantized(tensor, params, source)
        known.append((params, self._dequantized(tensor, inputs, params, reader)))
        return known[-1][1]

    def _quantized(self, tensor: gs.Tensor, params: QuantParams, home: gs.Graph) -> list[gs.Tensor]:
        """Codes, scale and zero point of an activation, quantized once for all that want the same codes."""
        made = self.quantized.setdefault((tensor.name, id(home)), [])
        inputs = next((i for existing, i in made if existing.same_codes(params)), None)
        if inputs is None:
            codes = gs.Variable(
                self._name(f"{tensor.name}_quantized"), dtype=_onnx_type(params.spec.format), shape=tensor.shape
            )
            inputs = [codes, *self._scale(tensor.name, params, tensor.dtype)]
            kept = tensor if params.spec.bits is None else self._clipped(tensor, params, home)
            self._add(gs.Node("QuantizeLinear", tensor.name, _along(params), [kept, *inputs[1:]], [codes]), home)
            made.append((params, inputs))
        return inputs

    def _dequantized(
        self, tensor: gs.Tensor, inputs: list[gs.Tensor], params: QuantParams, home: gs.Graph
    ) -> gs.Variable:
        result = gs.Variable(self._name(f"{tensor.name}_dequantized"), dtype=tensor.dtype, shape=tensor.shape)
        self._add(gs.Node("DequantizeLinear", tensor.name, _along(params), inputs, [result]), home)
        return result

    def _clipped(self, tensor: gs.Tensor, params: QuantParams, home: gs.Graph) -> gs.Tensor:
        """An activation kept inside fewer codes than its type has, at whose ends QuantizeLinear saturates."""
        axis = params.spec.granularity.axis
        shape = [] if axis is None else [-1] if axis == -1 else [-1] + [1] * (len(tensor.shape) - 1 - axis)
        stem = tensor.name
        for op, end, bound in (("Max", "least", params.range.lo), ("Min", "greatest", params.range.hi)):
            limit = gs.Constant(self._name(f"{stem}_{end}"), bound.astype(tensor.dtype).reshape(shape))
            kept = gs.Variable(self._name(f"{stem}_clipped"), dtype=tensor.dtype, shape=tensor.shape)
            self._add(gs.Node(op, stem, {}, [tensor, limit], [kept]), home)
            tensor = kept
        return tensor

    def _add(self, node: gs.Node, home: gs.Graph) -> None:
        """Add a node to a graph at the end of the run; its name becomes that of its stem that is free."""
        node.name = self._name(f"{node.name}_{node.op}")
        self.fresh[node.name] = node, home

    def _stored(
        self, tensor: gs.Tensor, value: QuantParams | QuantizedWeight, home: gs.Graph, *, own: bool = False
    ) -> gs.Tensor:
        """The dequantized form of a constant stored in integers; equal copies for several uses are one.

        Args:
            tensor: the constant.
            value: its codes, or the parameters to make them with.
            home: the graph of the node that reads it.
            own: the node that reads it fuses only with a DequantizeLinear that nothing else reads, whose codes and
                scales nothing else reads either, and that has a zero point only where it is not 0.
        """
        params = params_of(value)
        known = self.pairs.setdefault((tensor.name, id(home)), [])
        for existing, result in known:
            if not own and _same(existing, params):
                return result
        made = self.quantized.setdefault((tensor.name, 0), [])
        inputs = next((i for existing, i in made if not own and _same(existing, params)), None)
        weight = value if isinstance(value, QuantizedWeight) else None
        if weight is not None and params.spec.split and len(groups := channel_widths.groups(weight)) > 1:
            known.append((params, self._joined(tensor, groups, home)))
            return known[-1][1]
        if inputs is None:
            codes = blockwise.quantize(peek(tensor), params) if weight is None else weight.codes
            inputs = self._constants(tensor, QuantizedWeight(codes, params), own=own)
            made.append((params, inputs))
        # A copy of the shape, which else is a part of the float model's message and keeps all of it.
        shape = None if tensor.shape is None else list(tensor.shape)
        result = gs.Variable(self._name(f"{tensor.name}_dequantized"), dtype=tensor.dtype, shape=shape)
        granularity = params.spec.granularity
        attrs: dict[str, int] = {}
        if granularity.scheme is not Scheme.PER_TENSOR:
            attrs["axis"] = cast(int, granularity.axis)
        if granularity.scheme is Scheme.PER_BLOCK:
            attrs["block_size"] = cast(int, granularity.block_size)
        self._add(gs.Node("DequantizeLinear", tensor.name, attrs, inputs, [result]), home)
        known.append((params, result))
        return result

    def _constants(self, tensor: gs.Tensor, value: QuantizedWeight, *, own: bool = False) -> list[gs.Tensor]:
        """What a DequantizeLinear of a constant reads: codes, scale and, where it is needed, zero point."""
        stored = channel_widths.centred(value)
        params = stored.params
        codes = self._codes(self._name(f"{tensor.name}_quantized"), stored.codes, params.spec.format)
        scale, zero = self._scale(tensor.name, params, tensor.dtype)
        needed = params.zero_point.any() or not (own and params.spec.format.signed)
        return [codes, scale, zero] if needed else [codes, scale]

    def _joined(
        self, tensor: gs.Tensor, groups: Sequence[tuple[IntArray, QuantizedWeight]], home: gs.Graph
    ) -> gs.Tensor:
        """A constant whose channels are stored apart: each group dequantized, joined, and put back in order."""
        axis = cast(int, groups[0][1].params.spec.granularity.axis)
        parts = []
        for _, group in groups:
            parts.append(gs.Variable(self._name(f"{tensor.name}_part"), dtype=tensor.dtype, shape=group.codes.shape))
            inputs = self._constants(tensor, group)
            self._add(gs.Node("DequantizeLinear", tensor.name, {"axis": axis}, inputs, parts[-1:]), home)
        joined = gs.Variable(self._name(f"{tensor.name}_joined"), dtype=tensor.dtype, shape=tensor.shape)
        self._add(gs.Node("Concat", tensor.name, {"axis": axis}, parts, [joined]), home)
        order = np.concatenate([channels for channels, _ in groups])
        if (np.diff(order) > 0).all():
            return joined
        back = gs.Constant(self._name(f"{tensor.name}_order"), np.argsort(order))
        result = gs.Variable(self._name(f"{tensor.name}_dequantized"), dtype=tensor.dtype, shape=tensor.shape)
        self._add(gs.Node("Gather", tensor.name, {"axis": axis}, [joined, back], [result]), home)
        return result

    def _table(self, node: gs.Node, params: QuantParams) -> None:
        """Let a Gather read codes, and multiply what it found with the scales of the same rows.

        A DequantizeLinear before the Gather would dequantize the whole table at every run, one behind it would need a
        scale for each block, which no provider runs as fast as a product.
        """
        table, indices, result = node.inputs[0], node.inputs[1], node.outputs[0]
        known = self.pairs.setdefault((table.name, 0), [])
        if not known:
            codes = blockwise.quantize(peek(table), params)
            rows = params.scale.reshape(-1, *(1,) * (codes.ndim - 1)).astype(table.dtype)
            stored = self._codes(self._name(f"{table.name}_quantized"), codes, params.spec.format)
            known += [(params, stored), (params, gs.Constant(self._name(f"{table.name}_scale"), rows))]
        found = gs.Variable(self._name(f"{result.name}_quantized"), dtype=_onnx_type(params.spec.format))
        floats, scales = (
            gs.Variable(self._name(f"{result.name}_{part}"), dtype=table.dtype) for part in ("unscaled", "scale")
        )
        node.inputs[0] = known[0][1]
        node.outputs = [found]
        kind = onnx.helper.np_dtype_to_tensor_dtype(np.dtype(table.dtype))
        for op, attrs, inputs, output in (
            ("Gather", {"axis": 0}, [known[1][1], indices], scales),
            ("Cast", {"to": kind}, [found], floats),
            ("Mul", {}, [floats, scales], result),
        ):
            self._add(gs.Node(op, node.name, attrs, inputs, [output]), self.homes[node.name])

    def _scale(self, stem: str, params: QuantParams, dtype: Any) -> tuple[gs.Constant, gs.Constant]:
        scale = gs.Constant(self._name(f"{stem}_scale"), params.scale.astype(dtype or np.float32, copy=False))
        return scale, self._codes(self._name(f"{stem}_zero_point"), params.zero_point, params.spec.format)

    def _codes(self, name: str, codes: npt.NDArray[Any], number_format: Format) -> gs.Constant:
        if number_format.bits >= 8:
            return gs.Constant(name, codes.astype(number_format.name, copy=False))
        packed = onnx.helper.make_tensor(
            name, _onnx_type(number_format), codes.shape, blockwise.pack(codes, number_format.bits), raw=True
        )
        return gs.Constant(name, gs.ir.tensor.LazyValues(packed))

    def _name(self, wanted: str) -> str:
        return graphs.fresh_name(wanted, self.taken)


def _along(params: QuantParams) -> dict[str, int]:
    """Attributes of Q and DQ with these scales."""
    axis = params.spec.granularity.axis
    return {} if axis is None else {"axis": axis}


def _same(one: QuantParams, other: QuantParams) -> bool:
    return one is other or (one.same_codes(other) and one.spec == other.spec)


def _onnx_type(number_format: Format) -> Any:
    if number_format.bits >= 8:
        return np.dtype(number_format.name)
    return getattr(onnx.TensorProto, number_format.name.upper())


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

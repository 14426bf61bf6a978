"""Evaluates everything that does not depend on the model's inputs.

The nodes whose inputs are constants become one small model that onnxruntime runs once; what only reads dimensions is
answered from those that are known. Quantized weights are never folded back to float, and no small constant becomes a
large one (ConstantOfShape, Expand, Tile) unless it ends up as a layer's weight.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter

from qdqtool import runtime
from qdqtool.graphs import graph as graphs
from qdqtool.graphs.dimensions import fold_dimensions
from qdqtool.graphs.graph import Array
from qdqtool.graphs.linear import LINEAR_OPS
from qdqtool.passes_api import GRAPH_FACTS, Fact, State

_SMALL: Final = 1024  # bytes; smaller results are not worth sharing
_LARGE: Final = 64 * 1024  # bytes
_GROWTH: Final = 4  # a large result more than this many times its inputs is cheaper to compute than to store
_QUANTIZED: Final = frozenset({"QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear"})
_RANDOM: Final = frozenset({"RandomNormalLike", "RandomUniformLike", "Bernoulli", "Multinomial", "Dropout"})
_KEPT: Final = _QUANTIZED | _RANDOM


@dataclass(frozen=True)
class FoldConstants:
    """Evaluate nodes with constant inputs, and shape arithmetic on known dimensions."""

    name: ClassVar[str] = "fold-constants"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.FOLDED})
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES}

    def run(self, state: State) -> int:
        """Fold the graph and its control-flow bodies; returns how many nodes are gone."""
        outputs = graphs.output_ids(state.graph)
        changes = 0
        pool: dict[tuple[str, tuple[int, ...], bytes], gs.Tensor] = {}  # results by content
        for _, graph in graphs.all_graphs(state.graph):
            changes += fold_dimensions(graph, outputs)
            refused: dict[int, str] = {}
            while (folded := self._fold(graph, state, outputs, refused, pool)) is None:
                pass  # another round without the nodes just refused, which makes their inputs results
            changes += folded
            for node in graph.nodes:
                if id(node) in refused:
                    state.skip(self.name, node.name, refused[id(node)])
        graphs.sweep(state.graph)
        return changes

    def _fold(
        self,
        graph: gs.Graph,
        state: State,
        outputs: set[int],
        refused: dict[int, str],
        pool: dict[tuple[str, tuple[int, ...], bytes], gs.Tensor],
    ) -> int | None:
        """Evaluate what can be and is not refused; None where this found further nodes to refuse."""
        nodes = _evaluable(graph, outputs, refused)
        made = {id(tensor) for node in nodes for tensor in node.outputs}
        inside = {id(node) for node in nodes}
        results = [t for n in nodes for t in n.outputs if any(id(reader) not in inside for reader in t.outputs)]
        if not results:
            return 0
        ir_version = min(max(state.header.ir_version, 10), 13)
        try:
            values = _evaluate(nodes, made, results, graph.opset, ir_version)
        except Exception:  # whatever the runtime raises: find the guilty nodes one by one
            found = _failing(nodes, graph.opset, ir_version)
            refused.update(found or {id(node): "it cannot be evaluated together with others" for node in nodes})
            return None
        wrong = {id(t.inputs[0]): why for t, v in zip(results, values, strict=True) if (why := _unfit(t, v, nodes))}
        if wrong:
            refused.update(wrong)
            return None
        for node in nodes:
            graphs.unlink(node)
        for tensor, value in zip(results, values, strict=True):
            equal = pool.setdefault((value.dtype.str, value.shape, value.tobytes()), tensor) if value.nbytes else tensor
            if equal is tensor or value.nbytes < _SMALL:
                tensor.to_constant(value)
            else:  # the same weight transposed or reshaped in several places stays one constant
                graphs.redirect(tensor, equal)
        return len(nodes)


def _evaluable(graph: gs.Graph, outputs: set[int], refused: dict[int, str]) -> list[gs.Node]:
    """The nodes, in order, whose values are known beforehand; those left out for their size join ``refused``."""
    known: set[int] = set()
    candidates: list[gs.Node] = []
    for node in graph.nodes:
        if _is_evaluable(node, known) and id(node) not in refused and not any(id(t) in outputs for t in node.outputs):
            candidates.append(node)
            known.update(id(tensor) for tensor in node.outputs)
    weights = _towards_weights(candidates)
    known.clear()
    nodes = []
    for node in candidates:
        if not all(t.is_empty() or graphs.is_constant(t) or id(t) in known for t in node.inputs):
            continue
        sizes = [_nbytes(tensor) for tensor in node.outputs if not tensor.is_empty()]
        if (
            id(node) not in weights
            and all(s is not None for s in sizes)
            and _blows_up(node, sum(s or 0 for s in sizes))
        ):
            refused[id(node)] = _too_large(sum(s or 0 for s in sizes))
            continue
        nodes.append(node)
        known.update(id(tensor) for tensor in node.outputs)
    return nodes


def _is_evaluable(node: gs.Node, known: set[int]) -> bool:
    if node.domain not in (None, "", "ai.onnx") or node.op in _KEPT or "Sequence" in node.op or "Optional" in node.op:
        return False
    inputs = [tensor for tensor in node.inputs if not tensor.is_empty()]
    if not inputs or not all(_is_dense(tensor) or id(tensor) in known for tensor in inputs):
        return False
    return onnx.defs.has(node.op) and not any(isinstance(value, gs.Graph) for value in node.attrs.values())


def _is_dense(tensor: gs.Tensor) -> bool:
    return isinstance(tensor, gs.Constant) and not isinstance(
        getattr(tensor._values, "tensor", None), onnx.SparseTensorProto
    )


def _towards_weights(nodes: Sequence[gs.Node]) -> set[int]:
    """Identities of the nodes whose results become, perhaps through other ones of them, weights of layers."""
    found: set[int] = set()
    for node in reversed(nodes):
        for tensor in node.outputs:
            for reader, index in graphs.uses(tensor):
                if id(reader) in found or (reader.op in LINEAR_OPS and (index >= 1 or reader.op == "MatMul")):
                    found.add(id(node))
    return found


def _nbytes(tensor: gs.Tensor) -> int | None:
    """Size of a tensor's values; None where it is not known."""
    shape, dtype = tensor.shape, tensor.dtype
    if shape is None or dtype is None or not all(isinstance(d, int) and d >= 0 for d in shape):
        return None
    return int(math.prod(shape)) * (2 if isinstance(dtype, int) else np.dtype(dtype).itemsize)


def _blows_up(node: gs.Node, size: int) -> bool:
    return size > _LARGE and size > _GROWTH * sum(
        _nbytes(tensor) or 0 for tensor in node.inputs if not tensor.is_empty()
    )


def _too_large(size: int) -> str:
    return f"its result of {size} bytes is far larger than its inputs"


def _unfit(tensor: gs.Tensor, value: Array, nodes: Sequence[gs.Node]) -> str | None:
    """Why an evaluated result cannot become a constant."""
    if value.dtype == np.object_:
        return "its result is text"
    node = tensor.inputs[0]
    if _nbytes(tensor) is None and _blows_up(node, value.nbytes) and id(node) not in _towards_weights(nodes):
        return _too_large(value.nbytes)
    return None


def _evaluate(
    nodes: Sequence[gs.Node],
    made: set[int],
    results: Sequence[gs.Tensor],
    opset: int,
    ir_version: int,
    *,
    given: Mapping[str, Array] | None = None,
) -> list[Array]:
    """Values of ``results``, computed by ``nodes`` alone; ``given`` holds further tensors they read."""
    read = {
        tensor.name: tensor
        for node in nodes
        for tensor in node.inputs
        if not tensor.is_empty() and id(tensor) not in made
    }
    given = given or {}
    graph = onnx.helper.make_graph(
        [OnnxExporter.export_node(node) for node in nodes],
        "constants",
        [],
        [onnx.helper.make_empty_tensor_value_info(tensor.name) for tensor in results],
        initializer=[
            onnx.numpy_helper.from_array(given[name], name)
            if name in given
            else OnnxExporter.export_tensor_proto(tensor)
            for name, tensor in read.items()
        ],
    )
    proto = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)], ir_version=ir_version)
    active = runtime.session(proto, optimize=False, threads=1)
    return [np.asarray(value) for value in runtime.run(active, None, {})]


def _failing(nodes: Sequence[gs.Node], opset: int, ir_version: int) -> dict[int, str]:
    """The nodes that cannot be evaluated by themselves, with the runtime's first line of complaint."""
    values: dict[str, Array] = {}
    found: dict[int, str] = {}
    for node in nodes:
        tensors = [tensor for tensor in node.outputs if not tensor.is_empty()]
        if all(t.is_empty() or graphs.is_constant(t) or t.name in values for t in node.inputs):
            try:
                results = _evaluate([node], set(), tensors, opset, ir_version, given=values)
            except Exception as error:
                found[id(node)] = f"it cannot be evaluated: {str(error).strip().splitlines()[0]}"
            else:
                values.update(zip((tensor.name for tensor in tensors), results, strict=True))
    return found

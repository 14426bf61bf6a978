"""Turn Gemm by a constant weight into MatMul and Add, the form in which a runtime fuses a weight in integers.

    Gemm(x, W, C, transB = 1)   ->  Add(MatMul(x, W^T), C)
    Add(MatMul(x, W), y)        ->  Add(Add(MatMul(x, W), 0), y)      for y that is no vector, x of rank 2
    Relu(MatMul(x, W))          ->  Relu(Sub(MatMul(x, W), 0))        and Clip alike
    Relu(Add(MatMul(x, W), b))  ->  Relu(Sub(Add(MatMul(x, W), b), 0))      for x of rank 2

The runtime makes one node of DequantizeLinear and MatMul by a matrix [inputs, outputs] whose blocks run along the
inputs, and takes an Add of a vector behind it in as well. But where x has rank 2 it first makes Gemm of MatMul and any
Add, and a Gemm fuses with a vector alone; and no product fuses right before a Relu or Clip. Hence the zeros in between:
beside the product they cost nothing.

A transposed weight is not kept in memory: it is made where its values are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final, cast

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.graph import Array
from qdqtool.graphs.lazy import Derived
from qdqtool.graphs.linear import LinearLayer
from qdqtool.passes_api import GRAPH_FACTS, Fact, State
from qdqtool.planning.selection import Selection

_TILE: Final = 128  # rows and columns of a tile that fits into the processor's cache
_CLIPPING: Final = frozenset({"Relu", "Clip"})
"""The runtime takes these for the end of an integer layer, and leaves the product before them as it is."""


@dataclass(frozen=True)
class GemmToMatmul:
    """Turn Gemm by a constant weight into MatMul and Add, which fuse where the weight is stored in integers."""

    name: ClassVar[str] = "gemm-to-matmul"
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = (GRAPH_FACTS - {Fact.SHAPES}) | {Fact.QDQ}

    def run(self, state: State) -> int:
        """Rewrite the graph and its control-flow bodies; returns at how many places."""
        taken = graphs.tensor_names(state.graph) | graphs.node_names(state.graph)
        selection = Selection(state)
        homes = {node.name: inner for _, inner in graphs.all_graphs(state.graph) for node in inner.nodes}
        nodes = (node for node in graphs.all_nodes(state.graph) if not selection.left_out(node))
        layers = [layer for node in nodes if (layer := _by_constant(node))]
        # A bias of zeros is there for bias correction to write to, which needs data.
        zeros = state.data is None or not state.recipe.bias_correction
        turned: dict[int, tuple[gs.Constant, gs.Constant]] = {}
        count = 0
        for layer in layers:
            if layer.node.op != "Gemm":
                continue
            reason = _obstacle(layer)
            if reason is not None:
                state.skip(self.name, layer.node.name, reason)
                continue
            if layer.node.attrs.get("transB", 0):
                _transpose(layer, turned, taken)
            _turn(layer, homes[layer.node.name], state, taken, drop_zeros=zeros)
            count += 1
        for old, new in turned.values():
            if not old.outputs:  # it is gone: whoever names the weight means the transposed one
                new.name = old.name
        outputs = graphs.leaving_ids(state.graph)
        products = [layer for layer in layers if layer.node.op == "MatMul"]
        count += sum(_shield(layer, homes[layer.node.name], state, outputs, taken) for layer in products)
        if count:
            graphs.sweep(state.graph)
        return count


def _by_constant(node: gs.Node) -> LinearLayer | None:
    """A node that multiplies by a constant matrix on the right; None for any other."""
    layer = LinearLayer.of(node) if node.op in ("Gemm", "MatMul") else None
    if layer is None or not graphs.is_constant(layer.weight) or layer.channels is None:
        return None
    return layer if layer.weight.dtype in (np.float32, np.float16) else None


def _obstacle(layer: LinearLayer) -> str | None:
    attrs = layer.node.attrs
    if attrs.get("transA", 0):
        return "it stays Gemm: its input is transposed (transA = 1)"
    if attrs.get("alpha", 1.0) != 1.0:
        return f"it stays Gemm: alpha = {attrs['alpha']:g} could not be folded into its weight"
    if layer.bias is not None and attrs.get("beta", 1.0) != 1.0:
        return f"it stays Gemm: beta = {attrs['beta']:g} multiplies a computed bias"
    return None


def _transpose(layer: LinearLayer, turned: dict[int, tuple[gs.Constant, gs.Constant]], taken: set[str]) -> None:
    """Let the layer read the transposed weight; layers that share a weight share that too."""
    old = layer.weight
    if id(old) not in turned:
        values = Derived(old, tuple(reversed(old.shape)), np.dtype(old.dtype), transposed)
        turned[id(old)] = old, gs.Constant(graphs.fresh_name(f"{old.name}_transposed", taken), values)
    graphs.set_input(layer.node, layer.weight_input, turned[id(old)][1])


def transposed(values: Array) -> Array:
    """A matrix transposed, in C order; tile by tile, which is several times as fast as all at once."""
    rows, columns = values.shape
    result = np.empty((columns, rows), values.dtype)
    for row in range(0, rows, _TILE):
        for column in range(0, columns, _TILE):
            tile = values[row : row + _TILE, column : column + _TILE]
            result[column : column + _TILE, row : row + _TILE] = tile.T
    return result


def _turn(layer: LinearLayer, graph: gs.Graph, state: State, taken: set[str], *, drop_zeros: bool) -> None:
    """Make a MatMul of the Gemm, and an Add of its bias where there is one."""
    node, bias, result = layer.node, layer.bias, layer.node.outputs[0]
    values = graphs.constant(bias)
    if values is not None and drop_zeros and not values.any():
        bias = None
    node.op, node.attrs = "MatMul", {}
    if len(node.inputs) > 2:
        del node.inputs[2]
    if bias is not None:
        name = graphs.fresh_name(f"{result.name}_product", taken)
        node.outputs = [gs.Variable(name, dtype=result.dtype, shape=result.shape)]
        name = graphs.fresh_name(f"{node.name}.bias", taken)
        _append(graph, state, node, gs.Node("Add", name, inputs=[node.outputs[0], bias], outputs=[result]))


def _shield(layer: LinearLayer, graph: gs.Graph, state: State, outputs: set[int], taken: set[str]) -> bool:
    """Put zeros, added or subtracted, before what would keep the runtime from fusing a product, where there is such.

    ``outputs`` comes from :func:`qdqtool.graphs.graph.leaving_ids`.
    """
    node, tensor = layer.node, layer.node.outputs[0]
    reader = graphs.single_use(tensor, outputs)
    becomes_gemm = reader is not None and reader.op == "Add" and layer.output_rank in (2, None)
    if reader is not None and becomes_gemm and _adds_vector(reader, tensor):
        tensor, becomes_gemm = reader.outputs[0], False
        reader = graphs.single_use(tensor, outputs)
    # A single zero would be taken out again as doing nothing.
    if reader is None or layer.channels == 1 or not (becomes_gemm or reader.op in _CLIPPING):
        return False
    values = np.zeros(cast(int, layer.channels), layer.weight.dtype)
    zeros = gs.Constant(graphs.fresh_name(f"{node.name}.zeros", taken), values)
    result = gs.Variable(graphs.fresh_name(f"{tensor.name}_plain", taken), tensor.dtype, tensor.shape)
    graphs.set_input(reader, next(i for i, read in enumerate(reader.inputs) if read is tensor), result)
    # An Add becomes part of the product, a Sub does not.
    op, name = "Add" if becomes_gemm else "Sub", graphs.fresh_name(f"{node.name}.shield", taken)
    _append(graph, state, node, gs.Node(op, name, inputs=[tensor, zeros], outputs=[result]))
    return True


def _append(graph: gs.Graph, state: State, origin: gs.Node, added: gs.Node) -> None:
    """Add a node that does part of the work of ``origin`` in ``graph``, and answers to the same names."""
    graph.nodes.append(added)
    state.origins[added.name] = state.origins.get(origin.name, (origin.name,))


def _adds_vector(add: gs.Node, product: gs.Tensor) -> bool:
    """Whether what an Add adds to a product is a constant vector over the outputs."""
    other = add.inputs[1 if add.inputs[0] is product else 0]
    return graphs.is_constant(other) and all(extent == 1 for extent in other.shape[:-1])

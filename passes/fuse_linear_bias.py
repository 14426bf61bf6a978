"""Brings a matrix product and its bias into one form.

MatMul(x, W) + b        with x of rank 2  ->  Gemm(x, W, b)
MatMul(x, W) + b        of any other rank ->  Add(MatMul(x, W), b) with b of shape [N]
alpha x W + beta C                        ->  x (alpha W) + (beta C)
Gemm(x, W) + b                            ->  Gemm(x, W, b)

A factor left beside an integer bias, whose scale is S_x S_w, would ruin it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.absorb import absorb
from qdqtool.graphs.channels import constant_operand, stored
from qdqtool.graphs.graph import Array
from qdqtool.graphs.linear import LinearLayer, arithmetic, replace_constant
from qdqtool.passes_api import GRAPH_FACTS, Fact, State


@dataclass(frozen=True)
class FuseLinearBias:
    """Make MatMul and Add one Gemm, and put Gemm's alpha and beta into weight and bias."""

    name: ClassVar[str] = "fuse-linear-bias"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES}

    def run(self, state: State) -> int:
        """Bring every Gemm and MatMul into its form; returns how many nodes changed."""
        outputs, taken = graphs.output_ids(state.graph), graphs.tensor_names(state.graph)
        changes = 0
        for _, graph in graphs.all_graphs(state.graph):
            here = {id(node) for node in graph.nodes}
            for node in graph.nodes:
                layer = LinearLayer.of(node)
                if layer is None or node.op not in ("Gemm", "MatMul"):
                    continue
                if node.op == "Gemm":
                    changes += self._plain_gemm(layer, state, taken)
                if layer.bias is None and graphs.is_constant(layer.weight):
                    changes += self._add_behind(layer, state, here, outputs, taken)
        graphs.sweep(state.graph)
        return changes

    def _plain_gemm(self, layer: LinearLayer, state: State, taken: set[str]) -> int:
        """Fold alpha and beta, and bring the bias into shape [N]."""
        node = layer.node
        alpha, beta = float(node.attrs.get("alpha", 1.0)), float(node.attrs.get("beta", 1.0))
        changed = False
        if alpha != 1.0:
            changed |= self._multiply(node, "alpha", state, taken)
        if layer.bias is not None and beta == 0.0:
            del node.inputs[2]
            changed = True
        elif layer.bias is not None and beta != 1.0:
            changed |= self._multiply(node, "beta", state, taken)
        if layer.bias is None:
            node.attrs.pop("beta", None)
        values, vector = graphs.constant(layer.bias), layer.bias_values()
        if values is not None and vector is not None and values.shape != vector.shape:
            spread = np.array(np.broadcast_to(values.reshape(-1), vector.shape))
            replace_constant(node, 2, spread, f"{node.name}.bias", taken)
            changed = True
        return int(changed)

    def _multiply(self, node: gs.Node, attribute: str, state: State, taken: set[str]) -> bool:
        """Multiply a constant input by one of Gemm's factors and take the attribute away."""
        index, factor = (1 if attribute == "alpha" else 2), float(node.attrs[attribute])
        values = graphs.constant(node.inputs[index])
        if values is None or not graphs.is_float(node.inputs[index]):
            state.skip(self.name, node.name, f"{attribute} = {factor:g} stays: input {index} is computed or no float")
            return False
        product = stored(values.astype(np.float64) * factor, values.dtype)
        if product is None:
            state.skip(self.name, node.name, f"{attribute} = {factor:g} stays: the product would not be finite")
            return False
        replace_constant(node, index, product, f"{node.name}.{'weight' if index == 1 else 'bias'}", taken)
        node.attrs.pop(attribute)
        return True

    def _add_behind(self, layer: LinearLayer, state: State, here: set[int], outputs: set[int], taken: set[str]) -> int:
        """Take the Add of a constant behind a layer without a bias into it, or bring it into its form."""
        product = layer.node.outputs[0]
        add = next((n for n in product.outputs if n.op == "Add" and constant_operand(n) is not None), None)
        if add is None:
            return 0
        change = arithmetic(add, layer)
        if graphs.single_use(product, outputs) is None or id(add) not in here:
            reason: str | None = f"{product.name!r} is read elsewhere too, or is a graph output"
        elif isinstance(change, str):
            reason = change
        elif layer.node.attrs.get("transA", 0):
            reason = f"{layer.node.name!r} has transA = 1"
        else:
            if layer.node.op == "MatMul" and layer.output_rank != 2:
                return _normalize(add, layer, taken)
            reason = layer.scale_shift(change.scale, change.shift, taken)
            if reason is None:
                absorb(layer, [add], change, state)
                return 1
        state.skip(self.name, add.name, reason or "")
        return 0


def _normalize(add: gs.Node, layer: LinearLayer, taken: set[str]) -> int:
    """Product first, bias second and of shape [N]; returns whether that was not so."""
    index, channels = cast(int, constant_operand(add)), cast(int, layer.channels)
    values = cast(Array, graphs.constant(add.inputs[index]))
    if index == 1 and values.shape == (channels,):
        return 0
    if values.shape != (channels,):
        vector = np.array(np.broadcast_to(values.reshape(-1), (channels,)))
        replace_constant(add, index, vector, f"{add.name}.bias", taken)
    add.inputs = [add.inputs[1 - index], add.inputs[index]]
    return 1

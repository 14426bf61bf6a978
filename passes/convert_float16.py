"""Turn a float32 model into float16: constants, nodes and types, with a Cast wherever the two meet.

Inputs and outputs of the model keep their type unless the recipe says otherwise, those of control-flow bodies always.
Each tensor has one type, that of the node that makes it; who wants the other reads one Cast of it, which all such
readers of a graph share. A constant in float16 is made from the float32 one where its values are wanted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.float16 import ANY_TYPE, has_float32, is_float32
from qdqtool.graphs.graph import Array
from qdqtool.graphs.lazy import Derived
from qdqtool.passes_api import GRAPH_FACTS, Fact, State
from qdqtool.planning.float16_choice import Choice, choose

_CODES: Final[dict[type, int]] = {np.float16: onnx.TensorProto.FLOAT16, np.float32: onnx.TensorProto.FLOAT}


@dataclass(frozen=True)
class ConvertFloat16:
    """Turn the model into float16, apart from the nodes whose values do not fit."""

    name: ClassVar[str] = "convert-float16"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES, Fact.PLAN})
    gives: ClassVar[frozenset[Fact]] = frozenset({Fact.PARAMS})  # nothing is planned, so nothing wants numbers
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES, Fact.PLAN} | {Fact.QDQ}

    def run(self, state: State) -> int:
        """Rewrite the graph and its bodies; returns the number of nodes that now compute in float16."""
        choice = choose(state)
        nodes = [node for _, graph in graphs.all_graphs(state.graph) for node in graph.nodes if has_float32(node)]
        for node in nodes:
            if node.name in choice.reasons:
                state.skip(self.name, node.name, f"stays float32: {choice.reasons[node.name]}")
        state.notes.append(f"{len(choice.converted)} of {len(nodes)} nodes with floats compute in float16")
        if state.statistics is None:
            state.notes.append("constants alone were checked to fit into float16: for activations that needs data")
        _Converter(state, choice).run()
        state.params = {}
        return len(choice.converted)


class _Converter:
    def __init__(self, state: State, choice: Choice) -> None:
        self.graph, self.choice, self.keep = state.graph, choice, state.recipe.keep_io_types
        self.taken = graphs.tensor_names(state.graph) | graphs.node_names(state.graph)
        self.graphs = [graph for _, graph in graphs.all_graphs(state.graph)]
        self.inside = {id(node): graph for graph in self.graphs for node in graph.nodes}
        self.half: dict[int, gs.Tensor] = {}  # a float32 tensor that is now made in float16 -> that form
        self.whole: dict[int, gs.Tensor] = {}  # the same tensor -> its float32 form, where there is one
        self.constants: dict[int, tuple[gs.Constant, gs.Constant]] = {}
        self.casts: dict[tuple[int, int], gs.Tensor] = {}  # tensor and graph -> its other form there
        self.behind: dict[tuple[int, int], list[gs.Node]] = {}  # graph and node (0: its start) -> casts behind it

    def run(self) -> None:
        made = [
            (graph, node, index)
            for graph in self.graphs
            for node in graph.nodes
            if id(node) in self.choice.converted
            for index in sorted(self.choice.converted[id(node)].outputs)
        ]
        floats = {id(t) for graph in self.graphs for n in graph.nodes for t in (*n.inputs, *n.outputs) if is_float32(t)}
        floats |= {id(t) for graph in self.graphs for t in (*graph.inputs, *graph.outputs) if is_float32(t)}
        self._boundary(made)
        for graph in self.graphs:
            for node in list(graph.nodes):
                for index, tensor in enumerate(node.inputs):
                    if id(tensor) in floats:
                        self._read(graph, node, index, tensor)
        for _, node, _ in made:
            _set_type(node)
        for graph in self.graphs:
            behind = [each for node in graph.nodes for each in (node, *self._casts(graph, id(node)))]
            graph.nodes = [*self._casts(graph, 0), *behind]
        for old, new in self.constants.values():
            if not old.outputs:
                new.name = old.name
        self._drop_idle()
        graphs.sweep(self.graph)

    def _boundary(self, made: list[tuple[gs.Graph, gs.Node, int]]) -> None:
        """Give every result its type; what a graph gives out keeps name and type."""
        keeping = [graph for graph in self.graphs if graph is not self.graph or self.keep]
        given = {(id(graph), id(tensor)) for graph in keeping for tensor in graph.outputs}
        for graph, node, index in made:
            tensor = node.outputs[index]
            if (id(graph), id(tensor)) in given:
                inner = self._variable(tensor, "float16", np.float16)
                node.outputs[index] = inner
                self.half[id(tensor)], self.whole[id(tensor)] = inner, tensor
                self._place(graph, inner, tensor, np.float32)
            else:
                tensor.dtype = np.float16
                self.half[id(tensor)] = tensor
        if not self.keep:
            for tensor in self.graph.inputs:
                if is_float32(tensor):
                    tensor.dtype = np.float16
                    self.half[id(tensor)] = tensor
            for tensor in self.graph.outputs:
                self._give_half(tensor)
        for graph in self.graphs[1:]:
            for index, tensor in enumerate(graph.outputs):
                if id(tensor) in self.half and id(tensor) not in self.whole:  # an outer graph's tensor, handed through
                    graph.outputs[index] = self._other(graph, tensor, np.float32)

    def _give_half(self, tensor: gs.Tensor) -> None:
        """Let the model give out float16 under a name that a node makes in float32."""
        maker = graphs.producer(tensor)
        if not is_float32(tensor) or id(tensor) in self.half or maker is None:
            return
        inner = self._variable(tensor, "float32", np.float32)
        maker.outputs[next(i for i, made in enumerate(maker.outputs) if made is tensor)] = inner
        tensor.dtype = np.float16
        self.half[id(tensor)], self.whole[id(tensor)] = tensor, inner
        self._place(self.graph, inner, tensor, np.float16)

    def _read(self, graph: gs.Graph, node: gs.Node, index: int, tensor: gs.Tensor) -> None:
        """Let a node read a tensor in the type it computes in."""
        half = id(node) in self.choice.converted and index in self.choice.converted[id(node)].inputs
        if node.op in ANY_TYPE:
            half = id(tensor) in self.half
        if graphs.is_constant(tensor):
            wanted = self._constant(tensor) if half else tensor
        elif id(tensor) in self.half and half:
            wanted = self.half[id(tensor)]
        elif id(tensor) in self.half:
            wanted = self.whole.get(id(tensor)) or self._other(graph, tensor, np.float32)
        else:
            wanted = self._other(graph, tensor, np.float16) if half else tensor
        if wanted is not tensor:
            graphs.set_input(node, index, wanted)

    def _other(self, graph: gs.Graph, tensor: gs.Tensor, dtype: type) -> gs.Tensor:
        """The tensor in the type that its maker does not give it, by a Cast in the reader's graph."""
        key = id(tensor), id(graph)
        if key not in self.casts:
            self.casts[key] = self._variable(tensor, np.dtype(dtype).name, dtype)
            self._place(graph, tensor, self.casts[key], dtype)
        return self.casts[key]

    def _place(self, graph: gs.Graph, source: gs.Tensor, result: gs.Tensor, dtype: type) -> None:
        """Add a Cast right behind the node that makes its input, or at the graph's start."""
        maker = graphs.producer(source)
        here = maker is not None and self.inside.get(id(maker)) is graph
        name = graphs.fresh_name(f"{result.name}_Cast", self.taken)
        cast = gs.Node("Cast", name, {"to": _CODES[dtype]}, [source], [result])
        self.behind.setdefault((id(graph), id(maker) if here else 0), []).append(cast)

    def _drop_idle(self) -> None:
        """Take out the model's own Casts that now stand between equal types."""
        outputs = graphs.output_ids(self.graph)
        for graph in self.graphs:
            for node in graph.nodes:
                if node.op == "Cast" and node.inputs[0].dtype == np.float16 and node.attrs["to"] == _CODES[np.float16]:
                    graphs.bypass(node, graph, outputs)

    def _casts(self, graph: gs.Graph, maker: int) -> list[gs.Node]:
        return self.behind.get((id(graph), maker), [])

    def _constant(self, tensor: gs.Constant) -> gs.Constant:
        if id(tensor) not in self.constants:
            values = Derived(tensor, tensor.shape, np.dtype(np.float16), _halved)
            new = gs.Constant(graphs.fresh_name(f"{tensor.name}_float16", self.taken), values)
            self.constants[id(tensor)] = tensor, new
        return self.constants[id(tensor)][1]

    def _variable(self, tensor: gs.Tensor, suffix: str, dtype: type) -> gs.Variable:
        return gs.Variable(graphs.fresh_name(f"{tensor.name}_{suffix}", self.taken), dtype, tensor.shape)


def _halved(values: Array) -> Array:
    with np.errstate(over="ignore"):  # only bounds overflow here, which are as good when infinite
        return values.astype(np.float16)


def _set_type(node: gs.Node) -> None:
    """Change the attribute that names the type of a result."""
    if node.op == "Cast":
        node.attrs["to"] = onnx.TensorProto.FLOAT16
    elif node.op == "ConstantOfShape":
        given = node.attrs.get("value")
        values = np.zeros(1, np.float32) if given is None else given.values
        node.attrs["value"] = gs.Constant("", _halved(values))

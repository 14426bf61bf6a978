"""A thin helper over onnx-graphsurgeon, so that a pass reads as graph and mathematics.

Tensors of an outer graph that a control-flow body reads are the same objects inside it, so ``uses`` counts those
readers too.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx_graphsurgeon as gs

from qdqtool.errors import PipelineError

Array = npt.NDArray[Any]


def all_graphs(graph: gs.Graph) -> Iterator[tuple[str, gs.Graph]]:
    """Yield the graph and every control-flow body under it with its path ("" for the top, "node/branch" below)."""

    def walk(path: str, inner: gs.Graph) -> Iterator[tuple[str, gs.Graph]]:
        yield path, inner
        for node in inner.nodes:
            for name, value in node.attrs.items():
                if isinstance(value, gs.Graph):
                    yield from walk(f"{path}/{node.name}/{name}".lstrip("/"), value)

    yield from walk("", graph)


def all_nodes(graph: gs.Graph) -> Iterator[gs.Node]:
    """Nodes of the graph and of its control-flow bodies, those of a body behind all of the graph that it is in."""
    for _, inner in all_graphs(graph):
        yield from inner.nodes


def all_tensors(graph: gs.Graph) -> dict[str, gs.Tensor]:
    """Tensors of the graph and its control-flow bodies by name, which a loaded model uses for one tensor alone."""
    return {name: tensor for _, inner in all_graphs(graph) for name, tensor in inner.tensors().items()}


def constant(tensor: gs.Tensor | None) -> Array | None:
    """Values of a constant tensor, or None for a computed or missing one."""
    return cast(Array, tensor.values) if isinstance(tensor, gs.Constant) else None


def is_constant(tensor: gs.Tensor | None) -> bool:
    """Whether the tensor is a constant; its values are not read."""
    return isinstance(tensor, gs.Constant)


def is_float(tensor: gs.Tensor) -> bool:
    """Whether the tensor is known to hold float32, float16 or float64 values."""
    return tensor.dtype is not None and tensor.dtype in (np.float32, np.float16, np.float64)


def input_at(node: gs.Node, index: int) -> gs.Tensor | None:
    """The node's input at ``index``; None where it is omitted."""
    if index >= len(node.inputs) or node.inputs[index].is_empty():
        return None
    return node.inputs[index]


def producer(tensor: gs.Tensor) -> gs.Node | None:
    """The node that computes the tensor; None for graph inputs and constants."""
    return tensor.inputs[0] if tensor.inputs else None


def output_ids(graph: gs.Graph) -> set[int]:
    """Identities of the tensors that the graph or one of its control-flow bodies gives out."""
    return {id(tensor) for _, inner in all_graphs(graph) for tensor in inner.outputs}


def leaving_ids(graph: gs.Graph) -> set[int]:
    """Identities of the tensors that are known outside of the graph that makes them: given out, or read by a body."""
    leaving = output_ids(graph)
    for _, inner in all_graphs(graph):
        own = {id(tensor) for node in inner.nodes for tensor in node.outputs}
        leaving.update(id(t) for node in inner.nodes for t in node.inputs if t.inputs and id(t) not in own)
    return leaving


def single_use(tensor: gs.Tensor, outputs: set[int]) -> gs.Node | None:
    """The one node that reads the tensor at one input; None where it is read elsewhere too or is a graph output.

    ``outputs`` comes from :func:`output_ids`, or from :func:`leaving_ids` where a reader inside a body is none to find.
    """
    return tensor.outputs[0] if len(tensor.outputs) == 1 and id(tensor) not in outputs else None


def uses(tensor: gs.Tensor) -> list[tuple[gs.Node, int]]:
    """Every reader of the tensor with the input index at which it reads, once each."""
    seen: set[int] = set()
    found = []
    for node in tensor.outputs:
        if id(node) not in seen:
            seen.add(id(node))
            found += [(node, i) for i, read in enumerate(node.inputs) if read is tensor]
    return found


def unlink(node: gs.Node) -> None:
    """Let a node read and make nothing any more.

    The library's own ``clear`` finds the node among a tensor's readers with ``==``, which compares whole nodes: with
    one constant that thousands of nodes share, that takes minutes.
    """
    for own, others in ((node.inputs, "outputs"), (node.outputs, "inputs")):
        for tensor in own:
            _drop(getattr(tensor, others), node)
        list.clear(own)


def set_input(node: gs.Node, index: int, tensor: gs.Tensor) -> None:
    """Let a node read ``tensor`` at ``index``; as fast as :func:`unlink` is."""
    _drop(node.inputs[index].outputs, node)
    list.__setitem__(node.inputs, index, tensor)
    list.append(tensor.outputs, node)


def _drop(links: list[gs.Node], node: gs.Node) -> None:
    list.pop(links, next(index for index, other in enumerate(links) if other is node))


def redirect(old: gs.Tensor, new: gs.Tensor) -> None:
    """Make every reader of ``old``, those in control-flow bodies too, read ``new``; graph outputs are not touched."""
    for node, index in uses(old):
        set_input(node, index, new)


def bypass(node: gs.Node, graph: gs.Graph, outputs: set[int]) -> bool:
    """Take out a node whose first output equals its first input; returns whether that was possible.

    The name of a graph output stays: the producer then writes it directly. Not possible where input and output of the
    node are both known outside the graph (a graph input handed through, or a tensor given out under two names).
    """
    source, result = node.inputs[0], node.outputs[0]
    if id(result) in outputs:
        maker = producer(source)
        known = id(source) in outputs or maker is None or not any(maker is inner for inner in graph.nodes)
        if known or not any(result is given for given in graph.outputs):
            return False
        redirect(source, result)
        node.outputs.clear()
        assert maker is not None
        maker.outputs[next(i for i, made in enumerate(maker.outputs) if made is source)] = result
    else:
        redirect(result, source)
    unlink(node)
    return True


def sweep(graph: gs.Graph) -> None:
    """Drop nodes that nothing reads, here and in control-flow bodies, and restore topological order.

    Nodes keep their order as far as it is topological. The library's own ``cleanup`` and ``toposort`` do the same at
    ten times the cost.
    """
    made_by: dict[int, int] = {}
    for index, node in enumerate(graph.nodes):
        for value in node.attrs.values():
            if isinstance(value, gs.Graph):
                sweep(value)
        made_by |= dict.fromkeys(map(id, node.outputs), index)
    sources = [{made_by[id(tensor)] for tensor in reads(node) if id(tensor) in made_by} for node in graph.nodes]
    wanted = {made_by[id(tensor)] for tensor in graph.outputs if id(tensor) in made_by}
    waiting = list(wanted)
    while waiting:
        more = sources[waiting.pop()] - wanted
        wanted |= more
        waiting += more
    nodes = list(graph.nodes)
    for index in set(range(len(nodes))) - wanted:
        unlink(nodes[index])
    graph.nodes = [nodes[index] for index in _sorted(sources, wanted)]


def reads(node: gs.Node) -> Iterator[gs.Tensor]:
    """Every tensor that the node or one of its control-flow bodies reads."""
    yield from node.inputs
    for value in node.attrs.values():
        if isinstance(value, gs.Graph):
            for _, inner in all_graphs(value):
                for other in inner.nodes:
                    yield from other.inputs
                yield from inner.outputs


def _sorted(sources: Sequence[set[int]], wanted: set[int]) -> Iterator[int]:
    """The wanted ones, each behind its sources, the least possible one next (Kahn, 1962)."""
    missing = {index: len(sources[index]) for index in wanted}
    readers: dict[int, list[int]] = {}
    for index in wanted:
        for source in sources[index]:
            readers.setdefault(source, []).append(index)
    ready = [index for index, count in missing.items() if count == 0]
    heapq.heapify(ready)
    done = 0
    while ready:
        index = heapq.heappop(ready)
        done += 1
        yield index
        for reader in readers.get(index, ()):
            missing[reader] -= 1
            if missing[reader] == 0:
                heapq.heappush(ready, reader)
    if done < len(wanted):
        raise PipelineError("the graph has a cycle: a node reads what is computed from its own output")


def copy(graph: gs.Graph) -> gs.Graph:
    """An independent copy that shares the values of constants."""
    copied = graph.copy()
    kinds = {t.name: t.type for t in graph.tensors().values() if isinstance(t, gs.Variable) and t.type != "tensor_type"}
    for tensor in copied.tensors().values():  # the library's copy forgets that a tensor is a sequence or an optional
        if tensor.name in kinds:
            tensor.type = kinds[tensor.name]
    return copied


def tensor_names(graph: gs.Graph) -> set[str]:
    """Names of all tensors of the graph and its control-flow bodies."""
    return {name for _, inner in all_graphs(graph) for name in inner.tensors()}


def node_names(graph: gs.Graph) -> set[str]:
    """Names of all nodes of the graph and its control-flow bodies."""
    return {node.name for _, inner in all_graphs(graph) for node in inner.nodes}


def fresh_name(wanted: str, taken: set[str]) -> str:
    """``wanted``, or ``wanted_1``, ``wanted_2``, ...: the first not in ``taken``, which it then joins."""
    name, count = wanted, 0
    while name in taken:
        count += 1
        name = f"{wanted}_{count}"
    taken.add(name)
    return name

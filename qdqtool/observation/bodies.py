"""Control-flow bodies while a model is observed: what a body computes is handed out, level by level, to the top graph.

A tensor that a body computes becomes one more output of the node that holds the body, under its own name:

* If: the other branch gives an empty tensor, so that what comes out has values only where its branch ran;
* Loop and Scan: one more scan output, which stacks what the iterations compute;
* Loop, where the shape may change from one iteration to the next (it is not known, or the tensor is inside a further
  body): a value that the loop carries, to which each iteration adds its elements.

Statistics take values in any shape. Those of a tensor that was never computed are empty: see :func:`never_ran`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx import helper, numpy_helper

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.scopes import bodies, held
from qdqtool.planning.plan import Plan
from qdqtool.statistics.tensor import Statistics

_PREFIX: Final = "qdqtool.body."
_HANDS_OUT: Final = ("If", "Loop", "Scan")


def computed_inside(node: onnx.NodeProto) -> Iterator[str]:
    """Names of the tensors that the bodies in a node take in or compute."""
    for body in held(node):
        for graph in (body, *bodies(body)):
            yield from (value.name for value in graph.input)
            yield from (name for inner in graph.node for name in inner.output)


def expose(graph: onnx.GraphProto, wanted: Mapping[str, int]) -> None:
    """Let nodes with bodies give out the tensors wanted that are computed inside, under their names; in place.

    Args:
        graph: the top graph; names of tensors are unique in the model.
        wanted: tensor -> number of its element type; those that the top graph computes itself stay as they are.
    """
    for node in graph.node:
        _expose_of(node, graph, wanted)


def _expose_of(node: onnx.NodeProto, graph: onnx.GraphProto, wanted: Mapping[str, int]) -> list[str]:
    """Let a node give out what its bodies compute; returns the names, ``graph`` being the one that the node is in."""
    found = []
    for body in held(node) if node.op_type in _HANDS_OUT else ():
        direct = [value.name for value in body.input if value.name in wanted]
        nested: list[str] = []
        for inner in body.node:
            direct += [name for name in inner.output if name in wanted]
            if node.op_type != "Scan":
                nested += _expose_of(inner, body, wanted)
        fixed, taken = _fixed_shapes(body).intersection(direct), {v.name for v in (*body.input, *body.output)}
        for name in (*direct, *nested):
            if node.op_type == "Loop" and name not in fixed:
                _carried(node, body, graph, name, wanted[name])
            else:
                source = name
                if name in taken:  # no body gives out one tensor twice, or what it takes in
                    source = f"{_PREFIX}out.{name}"
                    body.node.append(helper.make_node("Identity", [name], [source]))
                give = _of_branch if node.op_type == "If" else _stacked
                give(node, body, name, source, wanted[name])
            found.append(name)
    return found


def _fixed_shapes(body: onnx.GraphProto) -> set[str]:
    """Tensors of a body whose every dimension is known."""
    return {
        value.name
        for value in (*body.input, *body.output, *body.value_info)
        if value.type.tensor_type.HasField("shape")
        and all(dim.HasField("dim_value") for dim in value.type.tensor_type.shape.dim)
    }


def _of_branch(node: onnx.NodeProto, body: onnx.GraphProto, name: str, source: str, kind: int) -> None:
    """Give out ``source`` of one branch as ``name``, and nothing from the other."""
    body.output.append(_value(source, kind))
    for other in held(node):
        if other is not body:
            nothing = f"{_PREFIX}none.{name}"
            other.node.append(helper.make_node("Constant", [], [nothing], value=_empty("", kind)))
            other.output.append(_value(nothing, kind))
    node.output.append(name)


def _stacked(node: onnx.NodeProto, body: onnx.GraphProto, name: str, source: str, kind: int) -> None:
    """Give out ``source`` as ``name``, a scan output."""
    body.output.append(_value(source, kind))
    node.output.append(name)
    for attribute in node.attribute:
        if attribute.name in ("scan_output_axes", "scan_output_directions"):
            attribute.ints.append(0)


def _carried(node: onnx.NodeProto, body: onnx.GraphProto, graph: onnx.GraphProto, name: str, kind: int) -> None:
    """Carry the elements of all iterations from one to the next, behind what the loop carries by itself."""
    count = len(body.input) - 2  # the iteration and its condition come first
    start, before, after, shape, flat = (f"{_PREFIX}{part}.{name}" for part in ("start", "in", "out", "shape", "flat"))
    graph.initializer.append(_empty(start, kind))
    node.input.append(start)
    node.output.insert(count, name)
    body.initializer.append(numpy_helper.from_array(np.array([-1]), shape))
    body.node.append(helper.make_node("Reshape", [name, shape], [flat]))
    body.node.append(helper.make_node("Concat", [before, flat], [after], axis=0))
    body.input.append(_value(before, kind))
    body.output.insert(count + 1, _value(after, kind))  # the condition comes first


def _value(name: str, kind: int) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, None)


def _empty(name: str, kind: int) -> onnx.TensorProto:
    return onnx.TensorProto(name=name, data_type=kind, dims=[0])


def hidden(graph: gs.Graph) -> dict[int, str]:
    """Nodes whose values cannot be handed out, by identity, and why.

    A Scan stacks what its iterations compute, which needs one shape: what a body inside its body computes is there in
    some iterations and not in others.
    """
    found: dict[int, str] = {}
    for node in graphs.all_nodes(graph):
        inside = [body for body in node.attrs.values() if isinstance(body, gs.Graph)]
        if node.op not in _HANDS_OUT:
            lost = inside
        elif node.op == "Scan":
            lost = [value for body in inside for one in body.nodes for value in one.attrs.values()]
        else:
            continue
        for body in lost:
            if isinstance(body, gs.Graph):
                reason = f"values inside {node.op} {node.name!r} cannot be observed there"
                found |= {id(one): reason for one in graphs.all_nodes(body)}
    return found


def never_ran(graph: gs.Graph, plan: Plan, statistics: Statistics) -> dict[str, str]:
    """Nodes of bodies that computed nothing while the model was observed, by name, and why they stay float."""
    observed = {name for name in plan.observed() if name in statistics.tensors}
    found: dict[str, str] = {}
    for path, body in graphs.all_graphs(graph):
        own = {t.name for node in body.nodes for t in node.outputs} | {t.name for t in body.inputs}
        known = own & observed
        if path and known and not any(statistics[name].histogram.total for name in known):
            what = "branch" if path.endswith("_branch") else "loop's body"
            reason = f"its {what} never ran on the calibration data"
            found |= {node.name: reason for node in graphs.all_nodes(body)}
    return found

"""Puts Gelu together from its parts, in whatever order an exporter wrote them.

    Gelu(x) = x/2 (1 + erf(x / sqrt 2))                                              (approximate = none)
    Gelu(x) ~ x/2 (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3)))                          (approximate = tanh)

(Hendrycks and Gimpel, "Gaussian Error Linear Units", 2016.) Around erf or tanh everything is a polynomial: its argument
is one of x, and what follows makes it x (p f + q) with p = q = 1/2. So the match compares numbers, not orders.

From opset 20 on the parts become the operator Gelu. An older model keeps its opset, because older runtimes are to load
it: its parts are brought into the one order that the runtime fuses on CPU and CUDA. For erf that is a division by
sqrt 2 (never a product with its reciprocal) and the factor 1/2 at the end, where it meets no quantized tensor; for tanh
it is Pow, and x/2 before the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.pattern import Formula, Rewriter, affine, is_op, near, read_outside
from qdqtool.passes_api import GRAPH_FACTS, Fact, State

_OPSET: Final = 20
_CUBE: Final = 0.044715
_ROOT: Final = math.sqrt(2 / math.pi)
_ARGUMENTS: Final = {"Erf": (0.0, math.sqrt(0.5)), "Tanh": (0.0, _ROOT, 0.0, _CUBE * _ROOT)}
"""What Erf and Tanh are applied to, as polynomials of x, constant first."""
_STEPS: Final = 5  # nodes behind Erf or Tanh


@dataclass(frozen=True)
class _Gelu:
    """A match: ``nodes`` compute Gelu of ``x``, the last one puts it out; ``fuses``: the runtime sees it too."""

    x: gs.Tensor
    function: str
    nodes: list[gs.Node]
    fuses: bool


@dataclass(frozen=True)
class FuseGelu:
    """Make one Gelu of its parts around Erf or Tanh, or bring them into the order that the runtime fuses."""

    name: ClassVar[str] = "fuse-gelu"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES}

    def run(self, state: State) -> int:
        """Rewrite every Gelu; returns how many."""
        outputs, rewriter, opset = graphs.output_ids(state.graph), Rewriter(state), state.graph.opset

        def rewrite(node: gs.Node, graph: gs.Graph) -> str | bool:
            found = _match(node, outputs) if is_op(node, *_ARGUMENTS) else None
            if not isinstance(found, _Gelu):
                return found or False
            reason = _obstacle(found, opset, outputs)
            if reason is None:
                _rewrite(found, opset, rewriter)
            return reason or True

        return rewriter.each(self.name, rewrite)


def _match(function: gs.Node, outputs: set[int]) -> _Gelu | str | None:
    """Follow what becomes of f = erf or tanh, as p f + q, until x (f + 1) / 2; a reason, or None for no candidate."""
    tensor, behind = function.outputs[0], list[gs.Node]()
    p, q, factor, place = 1.0, 0.0, None, 0
    while len(behind) < _STEPS:
        reader = graphs.single_use(tensor, outputs)
        if reader is None:
            break
        change = affine(reader, tensor)
        if change is not None and (factor is None or change[1] == 0):
            p, q = p * change[0], q * change[0] + change[1]
        elif factor is None and is_op(reader, "Mul") and reader.inputs[0] is not reader.inputs[1]:
            factor, place = next(read for read in reader.inputs if read is not tensor), len(behind)
        else:
            break
        behind.append(reader)
        tensor = reader.outputs[0]
        for x, scale, scaling in _variables(factor):
            if near(p * scale, 0.5, x) and near(q * scale, 0.5, x):
                argument = Formula(function.inputs[0], x)
                if argument.is_near(_ARGUMENTS[function.op]):
                    fuses = _fuses(function.op, argument.nodes, behind, place, scaling)
                    parts = {id(node): node for node in (*argument.nodes, *scaling, function, *behind)}
                    return _Gelu(x, function.op, list(parts.values()), fuses)
    if function.op == "Tanh" and not (q != 0 and near(p, q, tensor)):
        return None
    if tensor.outputs and graphs.single_use(tensor, outputs) is None:
        return f"{tensor.name!r} is read elsewhere too, or is a graph output"
    return "what follows is not the rest of a Gelu"


def _variables(factor: gs.Tensor | None) -> Iterator[tuple[gs.Tensor, float, list[gs.Node]]]:
    """What may be x where ``factor`` is x times a scalar: the tensor, the scalar and the node that multiplies."""
    if factor is None:
        return
    yield factor, 1.0, []
    scaling = graphs.producer(factor)
    if scaling is not None:
        for read in scaling.inputs:
            change = None if graphs.is_constant(read) else affine(scaling, read)
            if change is not None and change[1] == 0:
                yield read, change[0], [scaling]


def _fuses(function: str, argument: list[gs.Node], behind: list[gs.Node], place: int, scaling: list[gs.Node]) -> bool:
    """Whether the parts are in the order that the runtime fuses and that quantization leaves alone."""
    orders = [[node.op for node in nodes] for nodes in (argument, behind, scaling)]
    if function == "Erf":
        return orders == [["Div"], ["Add", "Mul", "Mul"], []] and place == 1
    return orders == [["Pow", "Mul", "Add", "Mul"], ["Add", "Mul"], ["Mul"]]


def _obstacle(found: _Gelu, opset: int, outputs: set[int]) -> str | None:
    if found.x.dtype not in (np.float32, np.float16):
        kind = "unknown" if found.x.dtype is None else np.dtype(found.x.dtype).name
        return f"the runtime has no Gelu for type {kind} on every provider"
    outside = read_outside(found.nodes, outputs)
    if outside is not None:
        return f"{outside!r} inside it is read elsewhere too, or is a graph output"
    if found.fuses and opset < _OPSET:
        return f"opset {opset} has no Gelu, and the runtime fuses these parts itself"
    return None


def _rewrite(found: _Gelu, opset: int, rewriter: Rewriter) -> None:
    last, x = found.nodes[-1], found.x
    if opset >= _OPSET:
        attributes = {} if found.function == "Erf" else {"approximate": "tanh"}
        rewriter.replace(last, "Gelu", [x], found.nodes, **attributes)
        return

    def part(op: str, left: gs.Tensor, right: gs.Tensor | float | None = None) -> gs.Tensor:
        name = f"{last.name}.{op.lower()}"
        second = rewriter.constant(f"{name}.value", right, x) if isinstance(right, float) else right
        return rewriter.node(op, name, [left] if second is None else [left, second], x)

    if found.function == "Erf":
        curve = part("Erf", part("Div", x, math.sqrt(2)))
        operands = [part("Mul", x, part("Add", curve, 1.0)), rewriter.constant(f"{last.name}.half", 0.5, x)]
    else:
        cube = part("Mul", part("Pow", x, 3.0), _CUBE)
        curve = part("Tanh", part("Mul", part("Add", x, cube), _ROOT))
        operands = [part("Mul", x, 0.5), part("Add", curve, 1.0)]
    rewriter.replace(last, "Mul", operands, found.nodes)

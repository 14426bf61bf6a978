"""Brings hard sigmoid and hard swish, from parts or operators, into the form that runs fastest where they stand.

    hard sigmoid   h(x) = clip(alpha x + beta, 0, 1) = alpha clip(x + beta / alpha, 0, 1 / alpha)
    hard swish     x h(x) with alpha = 1/6, beta = 1/2, or x clip(x + 3, 0, 6) / 6

(Howard et al., "Searching for MobileNetV3", 2019, section 5.2.) There are three forms:

* A gate that is all that a linear layer is for: clip(alpha x + beta, 0, 1). The layer takes over alpha and beta
  (fold-scale-shift), and the Clip vanishes into its output codes. The operator HardSigmoid has no integer kernel, and
  a gate in float keeps the product with a whole feature map in float, too.
* Where x comes in integers, from a convolution, and is read elsewhere too, as in hard swish: clip(x + beta / alpha, 0,
  1 / alpha). Add and Mul have integer kernels, the Clip vanishes into the codes of the Add, and the factor alpha, put
  behind all other products, folds into the weights of the layers that follow (fold-input-scale). Measured on the CPU,
  layers with the operator HardSwish take 1.3 to 1.6 times as long.
* Elsewhere x is float, and an operator is best: HardSwish from opset 14 on, one kernel on CUDA and two on the CPU.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.linear import LinearLayer
from qdqtool.graphs.pattern import Rewriter, affine, is_op, near, read_outside, scalar
from qdqtool.passes_api import GRAPH_FACTS, Fact, State

_SWISH_OPSET: Final = 14
_STEPS: Final = 3  # nodes between x and the clamp, at most
_PATH: Final = 8  # nodes looked at between x and a convolution
_INTEGER_OPS: Final = frozenset(
    {"Add", "AveragePool", "Clip", "Concat", "DepthToSpace", "Flatten", "GlobalAveragePool", "LeakyRelu", "MaxPool",
     "Mul", "Pad", "Relu", "Reshape", "Resize", "Sigmoid", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)  # fmt: skip


@dataclass(frozen=True)
class _Step:
    """A node of a form: it reads the one before (the first: x) and ``operands``; ``label`` says what it is for."""

    label: str
    op: str
    operands: Sequence[gs.Tensor | float] = ()
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass
class _Match:
    """``factor`` * ``other`` * clip(``slope`` x + ``offset``, 0, ``top``); the last of ``nodes`` puts it out."""

    x: gs.Tensor
    slope: float
    offset: float
    top: float
    nodes: list[gs.Node]
    labels: list[str]
    factor: float = 1.0
    other: gs.Tensor | None = None

    @property
    def is_scaled(self) -> bool:
        """Whether the clamp ends at 1 after all factors."""
        return near(self.factor * self.top, 1.0, self.x)

    @property
    def is_swish(self) -> bool:
        slopes = near(self.factor * self.slope, 1 / 6, self.x) and near(self.factor * self.offset, 1 / 2, self.x)
        return self.other is self.x and self.is_scaled and slopes


@dataclass(frozen=True)
class FuseHardSwish:
    """Bring hard sigmoid and hard swish into integer kernels behind a linear layer, else into one operator."""

    name: ClassVar[str] = "fuse-hard-swish"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS - {Fact.SHAPES}

    def run(self, state: State) -> int:
        """Rewrite each that is not in its best form; returns how many."""
        outputs, rewriter = graphs.output_ids(state.graph), Rewriter(state)

        def rewrite(node: gs.Node, graph: gs.Graph) -> str | bool:
            found = _match(node, outputs)
            steps = [] if found is None else _form(found, state.graph.opset, outputs)
            if found is None or [step.label for step in steps] == found.labels:
                return False
            reason = _obstacle(found, outputs)
            if reason is None:
                _rewrite(found, steps, rewriter)
            return reason or True

        return rewriter.each(self.name, rewrite)


def _match(node: gs.Node, outputs: set[int]) -> _Match | None:
    """The hard swish or hard sigmoid that a clamp belongs to, with as much in front as nothing else reads."""
    found = [match for match in _clamps(node) if _follow(match, outputs)]
    ranked = [match for match in found if match.is_swish] + found[::-1]
    return next((match for match in ranked if _obstacle(match, outputs) is None), ranked[0] if ranked else None)


def _clamps(node: gs.Node) -> Iterator[_Match]:
    """What a node clamps to [0, top], as slope x + offset, for each tensor that may be x."""
    if is_op(node, "HardSwish"):
        yield _Match(node.inputs[0], 1 / 6, 1 / 2, 1.0, [node], ["HardSwish"], other=node.inputs[0])
    elif is_op(node, "HardSigmoid"):
        slope, offset = float(node.attrs.get("alpha", 0.2)), float(node.attrs.get("beta", 0.5))
        if slope > 0:
            yield _Match(node.inputs[0], slope, offset, 1.0, [node], ["HardSigmoid"])
    tensor, top, nodes = _clamped(node)
    slope, offset = 1.0, 0.0
    for _ in range(_STEPS if top > 0 else 0):
        maker = graphs.producer(tensor)
        source = None if maker is None else next((t for t in maker.inputs if not graphs.is_constant(t)), None)
        change = None if maker is None or source is None else affine(maker, source)
        if maker is None or source is None or change is None:
            return
        slope, offset = slope * change[0], slope * change[1] + offset
        tensor, nodes = source, [maker, *nodes]
        if slope > 0 and offset != 0:
            yield _Match(source, slope, offset, top, list(nodes), [part.op for part in nodes])


def _clamped(node: gs.Node) -> tuple[gs.Tensor, float, list[gs.Node]]:
    """What a Clip, or a Min behind a Relu, clamps to [0, top], with top and nodes; top is 0 for any other node."""
    source = node.inputs[0] if node.inputs else None
    if is_op(node, "Clip"):
        given = [(graphs.input_at(node, index), name) for index, name in ((1, "min"), (2, "max"))]
        lower, upper = (node.attrs.get(n) if t is None else scalar(t, source) for t, n in given)
        return source, float(upper or 0) if lower == 0 else 0.0, [node]
    if is_op(node, "Min") and len(node.inputs) == 2:
        for index, tensor in enumerate(node.inputs):
            maker, top = graphs.producer(tensor), scalar(node.inputs[1 - index], tensor)
            if maker is not None and is_op(maker, "Relu") and top is not None:
                return maker.inputs[0], top, [maker, node]
    return source, 0.0, []


def _follow(found: _Match, outputs: set[int]) -> bool:
    """Take in the factors and the product behind the clamp; whether all that is a hard sigmoid or hard swish."""
    while not found.is_swish:
        tensor = found.nodes[-1].outputs[0]
        reader = graphs.single_use(tensor, outputs)
        if reader is None:
            break
        change = affine(reader, tensor)
        if change is not None and change[1] == 0 and not found.is_scaled:
            found.factor *= change[0]
            found.labels.append("factor" if reader.op == "Mul" else reader.op)
        elif found.other is None and is_op(reader, "Mul") and not any(graphs.is_constant(t) for t in reader.inputs):
            found.other = next((read for read in reader.inputs if read is not tensor), tensor)
            found.labels.append("product")
        else:
            break
        found.nodes.append(reader)
        _unscale(found)
    return found.is_scaled


def _unscale(found: _Match) -> None:
    """Where x comes multiplied by a scalar, as in (x / 6) clip(x + 3, 0, 6), count that among the factors."""
    scaling = None if found.other is None or found.other is found.x else graphs.producer(found.other)
    change = None if scaling is None else affine(scaling, found.x)
    if scaling is not None and change is not None and change[1] == 0:
        found.factor *= change[0]
        found.other = found.x
        found.labels.insert(0, "factor")
        found.nodes.insert(0, scaling)


def _form(found: _Match, opset: int, outputs: set[int]) -> list[_Step]:
    """The nodes that are best where it stands."""
    layer = LinearLayer.of(graphs.producer(found.x))
    alone = found.other is not found.x and graphs.single_use(found.x, outputs) is not None
    if alone and layer is not None and layer.obstacle(shift=True) is None:
        scale, shift, top, factor = found.slope / found.top, found.offset / found.top, 1.0, found.factor * found.top
    elif found.x.dtype == np.float32 and _is_integer(found.x):
        scale, shift, top = 1.0, found.offset / found.slope, found.top / found.slope
        factor = found.factor * found.slope
    elif found.is_swish and opset >= _SWISH_OPSET:
        return [_Step("HardSwish", "HardSwish")]
    else:
        attrs = {"alpha": found.slope / found.top, "beta": found.offset / found.top}
        return [_Step("HardSigmoid", "HardSigmoid", attrs=attrs), *_behind(found, found.factor * found.top)]
    steps = [] if near(scale, 1.0, found.x) else [_Step("Mul", "Mul", [scale])]
    return [*steps, _Step("Add", "Add", [shift]), _Step("Clip", "Clip", [0.0, top]), *_behind(found, factor)]


def _is_integer(tensor: gs.Tensor) -> bool:
    """Whether the tensor comes from a convolution through operators that have integer kernels or move values."""
    for _ in range(_PATH):
        maker = graphs.producer(tensor)
        if maker is None or not is_op(maker, *_INTEGER_OPS):
            return is_op(maker, "Conv") and maker is not None and graphs.is_constant(maker.inputs[1])
        tensor = next((read for read in maker.inputs if not graphs.is_constant(read)), tensor)
    return False


def _behind(found: _Match, factor: float) -> list[_Step]:
    product = [] if found.other is None else [_Step("product", "Mul", [found.other])]
    return [*product, *([] if near(factor, 1.0, found.x) else [_Step("factor", "Mul", [factor])])]


def _obstacle(found: _Match, outputs: set[int]) -> str | None:
    if found.x.dtype not in (np.float32, np.float16):
        kind = "unknown" if found.x.dtype is None else np.dtype(found.x.dtype).name
        return f"the runtime has no HardSigmoid for type {kind} on every provider"
    outside = read_outside(found.nodes, outputs)
    return None if outside is None else f"{outside!r} inside it is read elsewhere too, or is a graph output"


def _rewrite(found: _Match, steps: Sequence[_Step], rewriter: Rewriter) -> None:
    last, tensor, like = found.nodes[-1], found.x, found.x
    for step in steps:
        name = f"{last.name}.{step.label.lower()}"
        operands = [
            rewriter.constant(f"{name}.value", given, found.x) if isinstance(given, float) else given
            for given in step.operands
        ]
        if step is steps[-1]:
            rewriter.replace(last, step.op, [tensor, *operands], found.nodes, **step.attrs)
            return
        like = last.outputs[0] if step.label == "product" else like
        tensor = rewriter.node(step.op, name, [tensor, *operands], like, **step.attrs)

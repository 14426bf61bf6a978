"""What the runtime really made of a Q/DQ graph: integer kernels, float operators, conversions left over.

An optimized graph keeps the names of what it was made from: an integer kernel has its node's name, and a rewritten node
has it with something around it (``fused conv``, ``fc/MatMulAddFusion``, ``conv_token_6`` where the layout was changed).
Where the name is lost, as that of one Slice of several that became a Split, the output tensor still has its own.
"""

from __future__ import annotations

import re
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import onnx

from qdqtool import runtime
from qdqtool.graphs.links import CONVERSIONS, Links
from qdqtool.graphs.scopes import bodies
from qdqtool.planning.plan import Plan
from qdqtool.planning.target import Target
from qdqtool.verification.unfused import why_float

_INTEGER_OPS = frozenset(
    {
        "QGemm",
        "MatMulIntegerToFloat",
        "MatMulInteger",
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulNBits",
        "QAttention",
    }
)
_REWRITTEN: Final = re.compile(r"(?:fused )?(.+?)(?:/\w+Fusion/?|/duplicated|_token_\d+)?")
_CODES: Final = frozenset(
    getattr(onnx.TensorProto, name) for name in ("INT8", "UINT8", "INT16", "UINT16", "INT4", "UINT4")
)


def is_integer_kernel(op: str) -> bool:
    """Whether an operator of an optimized graph computes on integer codes."""
    return op.startswith("QLinear") or op in _INTEGER_OPS


@dataclass(frozen=True)
class Placement:
    """What became of each planned node in the graph that the runtime makes of a quantized model.

    Attributes:
        provider: on which execution provider.
        kernels: planned node -> the operator that does its work on integers.
        gone: planned nodes that need no kernel: moved into a layout, merged with an equal one.
        floats: planned node -> why it runs in float.
        conversions: every QuantizeLinear and DequantizeLinear that is left -> what it stands between.
    """

    provider: str
    kernels: Mapping[str, str] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    floats: Mapping[str, str] = field(default_factory=dict)
    conversions: Mapping[str, str] = field(default_factory=dict)

    @property
    def planned(self) -> int:
        """Number of nodes that were to run in integers."""
        return len(self.kernels) + len(self.gone) + len(self.floats)


def load(
    proto: onnx.ModelProto, *, provider: str = "cpu", config: Mapping[str, str] | None = None
) -> tuple[onnx.ModelProto, Any]:
    """Load a model with all optimizations; returns the graph that really runs, and the session.

    The graph of a large model is without the values of its large tensors.

    Args:
        proto: the model.
        provider: a key of :data:`qdqtool.runtime.PROVIDERS`.
        config: session configuration entries.

    Raises:
        ModelError: the runtime refuses the model.
    """
    with tempfile.TemporaryDirectory(prefix="qdqtool-") as folder:
        path = Path(folder) / "optimized.onnx"
        active = runtime.session(proto, provider=provider, config=config, optimized_path=path)
        return onnx.load(path, load_external_data=False), active


def operators(proto: onnx.ModelProto) -> dict[str, int]:
    """Operator -> how many nodes of it there are, control-flow bodies included; the most frequent first."""
    nodes = (node for graph in (proto.graph, *bodies(proto.graph)) for node in graph.node)
    return dict(Counter(node.op_type for node in nodes).most_common())


def load_and_count(proto: onnx.ModelProto, *, provider: str = "cpu") -> tuple[dict[str, int], Any]:
    """Load a model with all optimizations; returns operator -> count in the graph that really runs, and the session."""
    optimized, active = load(proto, provider=provider)
    return operators(optimized), active


def place(
    quantized: onnx.ModelProto, optimized: onnx.ModelProto, plan: Plan, target: Target, *, provider: str = "cpu"
) -> Placement:
    """Find every planned node again in the optimized graph.

    Args:
        quantized: the model with Q/DQ nodes.
        optimized: what the runtime made of it.
        plan: what was to run in integers; its nodes are those of ``quantized``.
        target: whose rules the plan follows.
        provider: where ``optimized`` was made.
    """
    homes = {node.name: (node, links) for links in Links.of(quantized.graph).everywhere() for node in links.graph.node}
    after = Optimized(optimized.graph, {name: node for name, (node, _) in homes.items()})
    kernels, floats, gone = {}, {}, []
    for name, op in plan.kernels.items():
        if name not in homes:  # nothing read what it made
            gone.append(name)
            continue
        node, before = homes[name]
        found = after.find(node, before)
        if found is not None and found.in_integers:
            kernels[name] = found.node.op_type
        elif found is not None and name in plan.weight_only:
            floats[name] = "its weight is dequantized at every run: no kernel takes it in integers"
        elif found is not None:
            floats[name] = why_float(node, before, target.by_op[op])
        elif after.converts(node, before):
            floats[name] = "the runtime made it part of another operator, which runs in float"
        else:
            gone.append(name)
    return Placement(provider, kernels, tuple(gone), floats, after.conversions())


@dataclass(frozen=True)
class Found:
    """A node of an optimized graph, and the index of the graph that it is in."""

    node: onnx.NodeProto
    links: Links

    @property
    def in_integers(self) -> bool:
        """Whether the node computes on codes, or moves them."""
        node, links = self.node, self.links
        if is_integer_kernel(node.op_type):
            return True
        if not node.input:
            return False
        while (known := links.types.get(node.input[0])) is None:
            maker = links.makers.get(node.input[0])  # types of tensors in the runtime's own layout are not told
            if maker is None or maker.op_type in CONVERSIONS or is_integer_kernel(maker.op_type):
                return maker is not None and maker.op_type != "DequantizeLinear"
            node = maker
        return known in _CODES


class Optimized:
    """An optimized graph with its bodies, asked about the nodes that it was made from."""

    def __init__(self, graph: onnx.GraphProto, known: Mapping[str, onnx.NodeProto]) -> None:
        """``known``: nodes before, which keep their names even where these look rewritten."""
        self.top = Links.of(graph)
        found = [Found(node, links) for links in self.top.everywhere() for node in links.graph.node]
        self.work = [each for each in found if each.node.op_type not in CONVERSIONS]
        self.by_name = {name_before(each.node, known): each for each in self.work}
        self.by_tensor = {name: each for each in self.work for name in each.node.output}
        self.left = [each for each in found if each.node.op_type in CONVERSIONS]
        self.names_left = {name_before(each.node, known): each for each in self.left}

    def find(self, node: onnx.NodeProto, before: Links) -> Found | None:
        """The node that does a node's work: by its name, else by a tensor that it puts out, in float or quantized."""
        found = self.by_name.get(node.name)
        for tensor in node.output if found is None else ():
            quantized = [q.output[0] for q in before.read(tensor) if q.op_type == "QuantizeLinear"]
            for name in (tensor, *quantized):
                if name in self.by_tensor:
                    return self.by_tensor[name]
        return found

    def converts(self, node: onnx.NodeProto, before: Links) -> bool:
        """Whether a conversion that stood before or behind a node is still there."""
        around = [before.dequantizer(name) for name in node.input]
        around += [q for name in node.output for q in before.read(name) if q.op_type == "QuantizeLinear"]
        return any(q is not None and q.input[0] not in before.constants and q.name in self.names_left for q in around)

    def conversions(self) -> dict[str, str]:
        """Every conversion left -> what it stands between."""
        return {each.node.name: self.between(each) for each in self.left}

    def between(self, conversion: Found) -> str:
        """What a conversion that is left stands between."""
        holder = "the model" if conversion.links is self.top else "a control-flow body"
        return _between(conversion.node, conversion.links, holder)


def _between(node: onnx.NodeProto, links: Links, holder: str) -> str:
    """What a conversion stands between, in a graph that is called ``holder``."""
    if node.op_type == "QuantizeLinear":
        maker = links.makers.get(node.input[0])
        if maker is None:
            return f"{holder} takes in {node.input[0]!r} in float"
        return f"{_shown(maker)} puts out float"
    readers = ", ".join(_shown(reader) for reader in links.read(node.output[0]))
    if not readers:
        return f"{holder} gives out {node.output[0]!r} in float"
    what = "a constant in float" if node.input[0] in links.constants else "float"
    return f"{readers} takes in {what}"


def name_before(node: onnx.NodeProto, known: Mapping[str, onnx.NodeProto]) -> str:
    """The name of what a node was made from; of a name that was there before, its operator must be part of the new."""
    name = node.name
    while name not in known or known[name].op_type not in node.op_type:
        found = _REWRITTEN.fullmatch(name)
        if found is None or found[1] == name:
            return node.name if node.name in known else name
        name = found[1]
    return name


def _shown(node: onnx.NodeProto) -> str:
    return f"{node.op_type} {node.name!r}"

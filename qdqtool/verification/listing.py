"""What became of every node and of every Q/DQ pair of a quantized model on an execution provider, one row each.

A row is plain data for reports: what it is about, where it runs, and where that is not an integer kernel, why and what
would change it. Integer kernels in the rows are as many as in the graph that the runtime made.
"""

from __future__ import annotations

import enum
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import onnx

from qdqtool import runtime
from qdqtool.graphs.links import CONVERSIONS, Links
from qdqtool.planning.target import TARGETS
from qdqtool.verification.partition import Partition
from qdqtool.verification.placement import Found, Optimized, is_integer_kernel, name_before
from qdqtool.verification.unfused import Cause, cause_of

_NO_KERNEL: Final = Cause(
    "the CUDA provider has no integer kernel for it", "run the file with --provider tensorrt, or use --precision fp16"
)
_NO_PAIRS: Final = Cause("the CUDA provider runs it as kernels of their own", _NO_KERNEL.remedy)
_UNKNOWN: Final = Cause("no Q/DQ pair is around it")
_SHAPES: Final = Cause("it computes shapes or indices, which the runtime keeps on the CPU")
_NO_CUDA_KERNEL: Final = Cause("CUDAExecutionProvider has no kernel for it with these types")
_CUDA_CODES: Final = "leave biases float and use 8-bit codes, as files made with --target cuda do"


_RETURNED: Final = Cause(
    f"the file has its weight in float; the runtime's {runtime.BIAS_OPTIMIZER} quantizes it at load",
    f"to keep it float, open sessions with {runtime.WITHOUT_OPTIMIZERS}={runtime.BIAS_OPTIMIZER}",
)


class Fate(enum.StrEnum):
    """Where a node or a pair ended up."""

    INTEGER = "integer"
    FLOAT = "float"
    PART = "part of another"
    COMPILED = "compiled"
    MOVED = "moved"


@dataclass(frozen=True)
class Placed:
    """One node, or one Q/DQ pair, and where it runs.

    Attributes:
        name: the node's name; of a pair the tensor that is quantized.
        kind: "node" or "pair".
        operator: of the node in the quantized model; of a pair "Q/DQ", of a constant's DequantizeLinear "DQ".
        state: a value of :class:`Fate`: an integer kernel (of a pair: taken into one), float, done by another node's
            kernel or not needed any more, compiled by TensorRT, which does not tell, or on another provider than asked.
        kernel: operator that does its work in the graph that runs; "" where it has none of its own.
        provider: execution provider that runs it.
        reason: why it is no integer kernel; "" where it is one.
        remedy: what would change that; "" where nothing would.
    """

    name: str
    kind: str
    operator: str
    state: str
    kernel: str
    provider: str
    reason: str = ""
    remedy: str = ""


def listing(
    quantized: onnx.ModelProto,
    optimized: onnx.ModelProto,
    *,
    provider: str = "cpu",
    partition: Partition | None = None,
    skipped: Mapping[str, str] | None = None,
) -> tuple[Placed, ...]:
    """Find every node and every Q/DQ pair of a quantized model in the graph that the runtime made of it.

    Args:
        quantized: the model with Q/DQ nodes.
        optimized: what the runtime made of it, see :func:`qdqtool.verification.placement.load`.
        provider: where that was, a key of :data:`qdqtool.runtime.PROVIDERS`.
        partition: which provider runs which node, where that is not the CPU alone.
        skipped: node -> why it was not to be quantized, as far as that is known.
    """
    return tuple(_Listing(quantized, optimized, provider, partition, skipped or {}).rows())


def counts(rows: Iterable[Placed]) -> dict[str, dict[str, int]]:
    """Kind -> state -> number of rows."""
    found: dict[str, Counter[str]] = {"node": Counter(), "pair": Counter()}
    for row in rows:
        found[row.kind][row.state] += 1
    return {kind: dict(states) for kind, states in found.items()}


class _Listing:
    """Both graphs, indexed, and the rows that they give."""

    def __init__(
        self,
        quantized: onnx.ModelProto,
        optimized: onnx.ModelProto,
        provider: str,
        partition: Partition | None,
        skipped: Mapping[str, str],
    ) -> None:
        self.scopes = list(Links.of(quantized.graph).everywhere())
        self.known = {node.name: node for links in self.scopes for node in links.graph.node if node.name}
        self.after = Optimized(optimized.graph, self.known)
        self.provider, self.skipped = provider, skipped
        self.main = runtime.PROVIDERS[provider][0]
        self.fallen = {} if partition is None else {**partition.fallen, **partition.shapes}
        self.shapes = {} if partition is None else partition.shapes
        nodes = {} if partition is None else partition.nodes
        self.homes = {name: where for where, names in nodes.items() for name in names}
        self.claimed: set[int] = set()
        self.integer: set[str] = set()

    def rows(self) -> Iterator[Placed]:
        """Nodes first, then what the runtime added, then pairs."""
        for links in self.scopes:
            for node in links.graph.node:
                if node.op_type not in CONVERSIONS:
                    yield self._node(node, links)
        for found in self.after.work:
            if is_integer_kernel(found.node.op_type) and id(found.node) not in self.claimed:
                op = found.node.op_type
                yield Placed(found.node.name, "node", op, Fate.INTEGER, op, self._home(found.node.name))
        for links in self.scopes:
            for node in links.graph.node:
                if node.op_type == "QuantizeLinear":
                    yield self._pair(node, links)
                elif node.op_type == "DequantizeLinear" and node.input[0] in links.constants:
                    yield self._constant(node, links)

    def _home(self, *names: str) -> str:
        """The provider that runs the first of the names that is known to it."""
        cpu = runtime.PROVIDERS["cpu"][0]
        return next(
            (cpu if name in self.fallen else self.homes[name] for name in names if name in self.homes), self.main
        )

    def _node(self, node: onnx.NodeProto, links: Links) -> Placed:
        found = self.after.find(node, links)
        kernel = "" if found is None else found.node.op_type
        home = self._home(node.name, "" if found is None else found.node.name)

        def row(state: Fate, cause: Cause | None = None) -> Placed:
            why = cause or Cause("")
            return Placed(node.name, "node", node.op_type, state, kernel, home, why.reason, why.remedy)

        if home == runtime.PROVIDERS["tensorrt"][0]:
            return row(Fate.COMPILED, Cause("which of its layers run in integers, only TensorRT tells"))
        if found is None and not self.after.converts(node, links):
            kernel = ""
            return row(Fate.PART, Cause("no kernel of its own is left: fused into a neighbour, or not needed"))
        owner = None if found is None else self._owner(found, node)
        if owner is not None:
            return row(Fate.PART, Cause(f"{kernel} {owner!r} does its work"))
        if home != self.main:
            return row(Fate.MOVED, _SHAPES if node.name in self.shapes else _NO_CUDA_KERNEL)
        if found is not None and (is_integer_kernel(kernel) or found.in_integers):
            if not is_integer_kernel(kernel) and not _is_between(node, links):
                return row(Fate.PART, Cause(f"the kernel before it does its work, and {kernel} moves the codes"))
            self.claimed.add(id(found.node))
            self.integer.add(node.name)
            return row(Fate.INTEGER, _RETURNED if _is_left_float(node, links) else None)
        return row(Fate.FLOAT, self._why(node, links, part_of_other=found is None))

    def _owner(self, found: Found, node: onnx.NodeProto) -> str | None:
        """The other node that a kernel was made from, where it was; kernels that only move codes have no owner."""
        owner = name_before(found.node, self.known)
        other = owner != node.name and owner in self.known and self.known[owner].op_type not in CONVERSIONS
        return owner if other and found.node.op_type != "Split" else None

    def _why(self, node: onnx.NodeProto, links: Links, *, part_of_other: bool) -> Cause:
        if node.name in self.skipped:
            return Cause(self.skipped[node.name])
        if not _is_between(node, links):
            return _UNKNOWN
        if part_of_other:
            return Cause("the runtime made it part of another operator, which runs in float")
        if self.provider != "cpu":
            return _NO_KERNEL
        rule = TARGETS["cpu"].by_op.get(node.op_type)
        if rule is None or rule.weight_only:
            return Cause(f"the CPU provider has no integer kernel for {node.op_type}")
        return cause_of(node, links, rule)

    def _pair(self, quantizer: onnx.NodeProto, links: Links) -> Placed:
        """A QuantizeLinear and every DequantizeLinear behind it."""
        behind = [r for r in links.read(quantizer.output[0]) if r.op_type == "DequantizeLinear"]
        left = [node.name for node in (quantizer, *behind) if node.name in self.after.names_left]
        state, cause = self._fate(left, whole=bool(behind) and len(left) == 1 + len(behind))
        home = self._home(*left, quantizer.name)
        return Placed(quantizer.input[0], "pair", "Q/DQ", state, self._kernels(left), home, cause.reason, cause.remedy)

    def _constant(self, dequantizer: onnx.NodeProto, links: Links) -> Placed:
        left = [dequantizer.name] if dequantizer.name in self.after.names_left else []
        state, cause = self._fate(left, whole=True)
        if not left and not any(reader.name in self.integer for reader in links.read(dequantizer.output[0])):
            # A bias that is added behind its product was fused where the product took it in.
            kept = any(reader.op_type == "Add" for reader in links.read(dequantizer.output[0]))
            state, cause = (Fate.PART, cause) if kept else (Fate.FLOAT, Cause("the runtime folds it to float at load"))
        home = self._home(*left, dequantizer.name)
        name = dequantizer.input[0].removesuffix("_quantized")
        return Placed(name, "pair", "DQ", state, self._kernels(left), home, cause.reason, cause.remedy)

    def _kernels(self, left: list[str]) -> str:
        return ", ".join(dict.fromkeys(self.after.names_left[name].node.op_type for name in left))

    def _fate(self, left: list[str], *, whole: bool) -> tuple[Fate, Cause]:
        """State and cause of conversions of which ``left`` are still there; ``whole``: that is all of them."""
        if not left:
            return Fate.INTEGER, Cause("")
        moved = [name for name in left if name in self.fallen]
        if moved:
            return Fate.MOVED, Cause(f"{_NO_CUDA_KERNEL.reason} ({moved[0]!r})", _CUDA_CODES)
        around = "; ".join(self.after.between(self.after.names_left[name]) for name in left)
        if not whole:
            return Fate.INTEGER, Cause(f"one conversion is left at the border: {around}")
        if self.provider != "cpu":
            return Fate.FLOAT, Cause(f"{_NO_PAIRS.reason}: {around}", _NO_PAIRS.remedy)
        return Fate.FLOAT, Cause(around, "leave what stands around it in float with --exclude")


def _is_between(node: onnx.NodeProto, links: Links) -> bool:
    """Whether a DequantizeLinear is before the node."""
    return any(links.dequantizer(name) is not None for name in node.input if name)


def _is_left_float(node: onnx.NodeProto, links: Links) -> bool:
    """Whether a layer reads integers, but a weight that the file has in float."""
    rule = TARGETS["cpu"].by_op.get(node.op_type)
    constant = len(node.input) > 1 and node.input[1] in links.constants
    return rule is not None and rule.weight and constant and _is_between(node, links)

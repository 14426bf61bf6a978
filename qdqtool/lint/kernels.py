"""Which nodes of a Q/DQ graph run in integers on a target, as far as the graph and the target's rules tell."""

from __future__ import annotations

from collections.abc import Iterator

import onnx

from qdqtool.graphs.links import Links
from qdqtool.lint.subject import Conversion, Subject, type_name
from qdqtool.planning.target import Emit, OpRule, Target
from qdqtool.spec import FORMATS
from qdqtool.verification.unfused import UNKNOWN, why_float


class Kernels:
    """The nodes that a target's rules are about, and which of them run in integers.

    Attributes:
        meant: node -> itself, the index of its graph and its rule, where every operand comes in integers.
        integer: names of nodes that run in integers, or move integers.
        weights: names of matrix products whose weight alone is in integers, and fused.
    """

    def __init__(self, subject: Subject, target: Target) -> None:
        """Look at every node once."""
        self.subject, self.target = subject, target
        self.meant: dict[str, tuple[onnx.NodeProto, Links, OpRule]] = {}
        self.integer: set[str] = set()
        self.weights: set[str] = set()
        for node, links in subject.nodes():
            rule = target.by_op.get(node.op_type)
            if rule is not None and not rule.weight_only and self._comes_in_integers(node, rule):
                self.meant[node.name] = node, links, rule
                if not target.for_cpu or not rule.kernel or why_float(node, links, rule) == UNKNOWN:
                    self.integer.add(node.name)
            elif self._is_residual(node, links):
                self.integer.add(node.name)
            elif self.weight_alone(node, links) is None:
                self.weights.add(node.name)

    def _comes_in_integers(self, node: onnx.NodeProto, rule: OpRule) -> bool:
        indices = range(len(node.input)) if rule.activations is None else rule.activations
        if rule.weight:
            indices = (0, 1)
        read = [i for i in indices if i < len(node.input) and node.input[i]]
        return bool(read) and all(self.subject.operand(node, i) is not None for i in read)

    def _is_residual(self, node: onnx.NodeProto, links: Links) -> bool:
        """An Add that fuses with the convolution behind one of its inputs, the other coming in integers."""
        if not self.target.residual or node.op_type != "Add":
            return False
        makers = [links.makers.get(name) for name in node.input]
        dequantized = any(self.subject.dequantizer(name) is not None for name in node.input)
        return dequantized and any(maker is not None and maker.op_type == "Conv" for maker in makers)

    def weight_alone(self, node: onnx.NodeProto, links: Links) -> str | None:
        """Why a product of floats by a weight in integers is not fused; None where it is."""
        weight = self.subject.operand(node, 1)
        if node.op_type != "MatMul" or weight is None or weight.stored is None:
            return f"{node.op_type} has no kernel that takes this input alone in integers"
        if self.subject.operand(node, 0) is not None:
            return "both of its inputs come in integers"
        if len(weight.stored.dims) != 2:
            return f"its weight has rank {len(weight.stored.dims)}, and only a matrix is fused"
        if len(links.read(weight.result)) > 1:
            return "several nodes read it, and only a DequantizeLinear with one reader is fused"
        number = FORMATS.get(type_name(weight.codes))
        sizes = None if number is None else self.target.weights.block_sizes.get(number.bits)
        if number is None or sizes is None:
            return f"weights in {type_name(weight.codes)} have no kernel on target {self.target.name}"
        if weight.block_size and weight.block_size not in sizes:
            known = ", ".join(map(str, sorted(sizes))) or "none: one scale for each channel"
            return f"blocks of {weight.block_size} are none of those that target {self.target.name} fuses ({known})"
        return None

    def outputs(self, node: onnx.NodeProto, links: Links) -> Iterator[tuple[str, bool]]:
        """Every output with readers, behind an activation function that vanishes -> whether it is quantized."""
        for output in filter(None, node.output):
            tensor = output
            readers = links.read(tensor)
            if len(readers) == 1 and readers[0].op_type in self.target.absorbed and tensor not in links.outputs:
                tensor = readers[0].output[0]
            read = links.read(tensor)
            if read or tensor in links.outputs:
                yield tensor, any(reader.op_type == "QuantizeLinear" for reader in read)

    def missing_output(self, node: onnx.NodeProto, links: Links, rule: OpRule) -> str | None:
        """The first output that a kernel would put out in integers, but that is not quantized; None without any."""
        if rule.output in (Emit.WANTED, Emit.NEVER) or not rule.kernel or self.subject.opset < rule.min_opset:
            return None
        return next((tensor for tensor, quantized in self.outputs(node, links) if not quantized), None)

    def serves(self, conversion: Conversion) -> bool:
        """Whether an integer kernel, or what should be one, reads what a DequantizeLinear gives."""
        for reader in conversion.links.read(conversion.result):
            rule = self.target.by_op.get(reader.op_type)
            if self._is_kernel(reader.name) or reader.name in self.weights or (rule is not None and rule.weight_only):
                return True
            if reader.op_type == "Add" and self._adds_bias(reader, conversion):
                return True
        return False

    def _is_kernel(self, name: str) -> bool:
        return name in self.integer or name in self.meant

    def _adds_bias(self, add: onnx.NodeProto, bias: Conversion) -> bool:
        makers = [bias.links.makers.get(name) for name in add.input if name != bias.result]
        return bias.stored is not None and any(maker is not None and self._is_kernel(maker.name) for maker in makers)

    def is_put_out(self, quantizer: Conversion) -> bool:
        """Whether an integer kernel, or what should be one, puts out what a QuantizeLinear makes."""
        links, tensor = quantizer.links, quantizer.source
        for _ in range(3):  # the kernel, before it an activation function, before that the Add of a bias
            maker = links.makers.get(tensor)
            if maker is None:
                return False
            if self._is_kernel(maker.name) or maker.op_type == "DequantizeLinear":
                return True
            if maker.op_type not in self.target.absorbed | {"Add"}:
                return False
            tensor = next((name for name in maker.input if name not in links.constants), "")
            if maker.op_type == "Add":
                sources = [n for n in maker.input if (found := links.makers.get(n)) and found.op_type == "MatMul"]
                tensor = sources[0] if sources else ""
        return False

"""Which tensor loses how much: with everything before it quantized, and with its own layer quantized alone.

The SQNR of a tensor in the quantized model is what has come together up to there (cumulative). What its own layer does
(local) is seen in one run of both models as one: every quantized layer reads the float model's tensors, so that nothing
is handed on from layer to layer.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import onnx

from qdqtool import runtime
from qdqtool.data.batching import Batch
from qdqtool.graphs import model as models
from qdqtool.graphs.scopes import bodies
from qdqtool.observation import observe
from qdqtool.verification.sqnr import Sqnr

PREFIX = "qdqtool.quantized."
"""Before the names of the second model where two are joined."""


def cumulative(
    reference: onnx.ModelProto, quantized: onnx.ModelProto, batches: Iterable[Batch], provider: str = "cpu"
) -> dict[str, float]:
    """SQNR in dB of every float tensor that both models have by name, as readers in the quantized one see it."""
    pairs = _shared(reference, quantized)
    if not pairs:
        return {}
    float_session = runtime.session(observe.with_outputs(reference, pairs), provider=provider)
    quantized_session = runtime.session(
        observe.with_outputs(quantized, pairs.values()), provider=provider, optimize=False
    )
    sums = {name: Sqnr() for name in pairs}
    for batch in batches:
        want = runtime.run(float_session, list(pairs), batch.feeds)
        got = runtime.run(quantized_session, list(pairs.values()), batch.feeds)
        for name, x, y in zip(pairs, want, got, strict=True):
            sums[name].add(batch.real(x), batch.real(y))
    return {name: s.db for name, s in sums.items()}


def local(
    reference: onnx.ModelProto, quantized: onnx.ModelProto, batches: Iterable[Batch], provider: str = "cpu"
) -> dict[str, float]:
    """SQNR in dB of the same tensors where each layer alone is quantized and reads what the float model computes.

    A layer's share is the rounding of what it reads, its weights and its bias; that of its output is its readers'.
    Empty where a model has control-flow bodies, whose tensors cannot be read from outside, or where the float model
    cannot be raised to the quantized one's opset.
    """
    pairs = _shared(reference, quantized)
    if not pairs or any(True for proto in (reference, quantized) for _ in bodies(proto.graph)):
        return {}
    version = models.opset(quantized)
    if models.opset(reference) != version:
        try:
            reference = onnx.version_converter.convert_version(reference, version)
        except (RuntimeError, onnx.onnx_cpp2py_export.version_converter.ConvertError):
            return {}
    computed = _computed(quantized, pairs)
    wanted = [*computed.values(), *(PREFIX + name for name in computed)]
    both = observe.with_outputs(joined(reference, quantized, computed), wanted)
    active = runtime.session(both, provider=provider, optimize=False)
    sums = {name: Sqnr() for name in computed.values()}
    for batch in batches:
        values = [batch.real(value) for value in runtime.run(active, wanted, batch.feeds)]
        for total, want, got in zip(sums.values(), values[: len(sums)], values[len(sums) :], strict=True):
            total.add(want, got)
    return {name: s.db for name, s in sums.items()}


def joined(reference: onnx.ModelProto, quantized: onnx.ModelProto, computed: Mapping[str, str]) -> onnx.ModelProto:
    """Both models as one, the second one's names prefixed; what both have, its nodes read from the first one.

    Args:
        reference: the first model; neither has control-flow bodies.
        quantized: the second model, whose opset serves both.
        computed: name in the second model -> the first one's name of the same tensor.
    """
    both = onnx.ModelProto(ir_version=quantized.ir_version, opset_import=quantized.opset_import)
    both.functions.extend(quantized.functions)
    both.graph.CopyFrom(reference.graph)
    given = {value.name: value.name for value in quantized.graph.input} | dict(computed)
    for tensor in quantized.graph.initializer:
        both.graph.initializer.append(tensor)
        both.graph.initializer[-1].name = PREFIX + tensor.name
    for node in quantized.graph.node:
        copied = both.graph.node.add()
        copied.CopyFrom(node)
        copied.name = PREFIX + node.name if node.name else ""
        for index, name in enumerate(node.input):
            if name:
                copied.input[index] = given.get(name, PREFIX + name)
        for index, name in enumerate(node.output):
            copied.output[index] = PREFIX + name if name else ""
    return both


def _computed(quantized: onnx.ModelProto, names: Iterable[str]) -> dict[str, str]:
    """Name in the quantized model of what a layer computes, before it is quantized -> the float model's name of it."""
    made = {name: node for node in quantized.graph.node for name in node.output}
    found = {}
    for name in names:
        computed, node = name, made[name]
        while node.op_type in ("DequantizeLinear", "QuantizeLinear") and node.input[0] in made:
            computed = node.input[0]
            node = made[computed]
        found[computed] = name
    return found


def _shared(reference: onnx.ModelProto, quantized: onnx.ModelProto) -> dict[str, str]:
    """Name in the float model -> name in the quantized one, for float results of nodes at the top level."""
    made = {name: node for node in quantized.graph.node for name in node.output}
    read_by_q = {node.input[0]: node.output[0] for node in quantized.graph.node if node.op_type == "QuantizeLinear"}
    by_codes = {node.input[0]: node.output[0] for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    types = {v.name: v.type.tensor_type.elem_type for v in (*reference.graph.value_info, *quantized.graph.value_info)}
    found = {}
    for node in reference.graph.node:
        for name in node.output:
            if name in made and types.get(name) == onnx.TensorProto.FLOAT:
                found[name] = by_codes.get(read_by_q.get(name, ""), name)
    return found

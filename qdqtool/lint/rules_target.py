"""Rules about what the target makes of a graph: kernels that need integers, pairs that serve none, types it lacks."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Final

import onnx

from qdqtool import runtime
from qdqtool.errors import ModelError
from qdqtool.graphs.links import Links
from qdqtool.lint.findings import Hit, Severity
from qdqtool.lint.kernels import Kernels
from qdqtool.lint.subject import Conversion, Subject, type_name
from qdqtool.planning.plan import Plan
from qdqtool.planning.target import Target
from qdqtool.verification import placement
from qdqtool.verification.unfused import UNKNOWN, why_float

_CONVERTED: Final[Mapping[str, frozenset[str]]] = {
    "CUDAExecutionProvider": frozenset(
        {"int8", "uint8", "int4", "uint4", "int2", "uint2"}
        | {"float8e4m3fn", "float8e4m3fnuz", "float8e5m2", "float8e5m2fnuz"}
    ),
    "TensorrtExecutionProvider": frozenset({"int8", "int4", "float8e4m3fn"}),
}
"""Types of codes that a provider's QuantizeLinear and DequantizeLinear take; the CPU's are all that load."""
_NO_KERNEL: Final = "NOT_IMPLEMENTED"


def _target(subject: Subject) -> Target:
    assert subject.target is not None
    return subject.target


@functools.lru_cache(maxsize=1)
def _kernels(subject: Subject) -> Kernels:
    """Three rules ask for them in a row."""
    return Kernels(subject, _target(subject))


def missing_output(subject: Subject) -> Iterator[Hit]:
    """Nodes whose inputs come in integers and whose kernel puts out integers alone, but whose output is float."""
    kernels = _kernels(subject)
    for node, links, rule in kernels.meant.values():
        tensor = kernels.missing_output(node, links, rule)
        if tensor is not None:
            message = f"{node.op_type} reads integers and its output is not quantized: it runs in float on"
            severity = None if rule.weight else Severity.NOTE
            yield Hit(f"{message} target {kernels.target.name}", node.name, tensor, severity)


def float_kernel(subject: Subject) -> Iterator[Hit]:
    """Nodes between Q/DQ that run in float all the same: by the graph, and on the CPU by the runtime's own word."""
    kernels = _kernels(subject)
    left = _left_float(subject, kernels)
    for name, (node, links, rule) in kernels.meant.items():
        if (name in kernels.integer and name not in left) or kernels.missing_output(node, links, rule) is not None:
            continue
        reason = why_float(node, links, rule)
        if reason == UNKNOWN:
            reason = _signed(node, links, subject) or UNKNOWN
        yield Hit(f"{node.op_type} between Q/DQ runs in float on target {kernels.target.name}: {reason}", name)


def _left_float(subject: Subject, kernels: Kernels) -> frozenset[str]:
    """What the CPU provider left in float, where the file is for it; nothing of a model that it does not load."""
    if not kernels.target.for_cpu or not kernels.meant:
        return frozenset()
    planned = {name: node.op_type for name, (node, _, rule) in kernels.meant.items() if rule.kernel}
    try:
        optimized = subject.optimized
    except ModelError:  # another rule's finding
        return frozenset()
    return frozenset(placement.place(subject.proto, optimized, Plan(kernels=planned), kernels.target).floats)


def _signed(node: onnx.NodeProto, links: Links, subject: Subject) -> str | None:
    """That activations have signed codes, which the runtime rewrites to unsigned ones, but not everywhere."""
    read = [found for name in node.input if (found := subject.dequantizer(name)) is not None and found.stored is None]
    behind = (reader.output[0] for name in node.output for reader in links.read(name))
    put_out = [found for name in behind if (found := subject.quantizer(name)) is not None]
    if any(type_name(conversion.codes) == "int8" for conversion in (*read, *put_out)):
        return "codes of its activations are int8, and those of uint8 fuse at more places"
    return None


def idle_conversion(subject: Subject) -> Iterator[Hit]:
    """Conversions that no integer kernel reads or puts out: float work, or a constant that is folded at load."""
    kernels = _kernels(subject)
    for conversion in subject.conversions:
        if conversion.quantizes or kernels.serves(conversion):
            continue
        readers = conversion.links.read(conversion.result)
        if any(reader.name in kernels.meant for reader in readers):
            continue  # what keeps that one in float is another rule's finding
        named = ", ".join(f"{r.op_type} {r.name!r}" for r in readers[:3]) or "the model's output"
        if conversion.stored is not None:
            reason = kernels.weight_alone(readers[0], conversion.links) if readers else "nothing else reads it"
            message = f"the runtime turns this constant into floats before {named}: {reason}"
            yield Hit(message, conversion.node.name, conversion.source, Severity.NOTE)
            continue
        maker = subject.quantizer(conversion.source)
        if maker is None or _serves_elsewhere(maker, kernels, subject):
            continue
        message = f"no integer kernel of target {kernels.target.name} makes or reads these codes, only {named} does"
        yield Hit(message, conversion.node.name, conversion.source)


def _serves_elsewhere(maker: Conversion, kernels: Kernels, subject: Subject) -> bool:
    """Whether the codes themselves are of use: a kernel puts them out, or one reads them at another place."""
    readers = maker.links.read(maker.result)
    others = [subject.dequantizer(reader.output[0]) for reader in readers if reader.output]
    return kernels.is_put_out(maker) or any(other is None or kernels.serves(other) for other in others)


def unsupported(subject: Subject) -> Iterator[Hit]:
    """Operators and types that the target's runtime has no kernel for."""
    target = _target(subject)
    provider = target.providers[0] if target.providers else ""
    known = _CONVERTED.get(provider)
    for conversion in subject.conversions if known is not None else ():
        name = type_name(conversion.codes)
        if known is not None and name not in known and conversion.codes:
            kind = conversion.node.op_type
            message = f"{provider} has no {kind} of {name}: the node runs on the CPU, with copies, or not at all"
            yield Hit(message, conversion.node.name, conversion.source)
    yield from _refused(subject, target)


def _refused(subject: Subject, target: Target) -> Iterator[Hit]:
    """What the runtime says; the CPU provider tells all but which kernels another one has."""
    try:
        _ = subject.optimized if target.for_cpu else runtime.session(subject.proto, optimize=False)
    except ModelError as error:
        if target.for_cpu or _NO_KERNEL not in str(error):
            yield Hit(str(error))
        else:
            message = f"the CPU provider lacks a kernel, and whether {target.name} has it was not tried: {error}"
            yield Hit(message, severity=Severity.NOTE)


def asymmetric(subject: Subject) -> Iterator[Hit]:
    """Zero points other than 0 where the target's kernels take none."""
    target = _target(subject)
    strict = target.providers[:1] == ("TensorrtExecutionProvider",)
    for conversion in subject.conversions:
        zero = conversion.zero_point
        if zero is None or not zero.any():
            continue
        if conversion.stored is None:
            forbidden, what = target.activation_symmetric, "activations"
        elif _is_weight_alone(conversion, subject):
            forbidden, what = not target.weights.asymmetric, "weights"
        else:
            forbidden, what = target.activation_symmetric, "weights"
        if forbidden:
            shown = int(zero.flat[0]) if zero.size == 1 else f"up to {int(abs(zero).max())}"
            message = f"its zero point is {shown}, and target {target.name} takes {what} with zero point 0 alone"
            severity = Severity.ERROR if strict else None
            yield Hit(message, conversion.node.name, conversion.source, severity)


def _is_weight_alone(weight: Conversion, subject: Subject) -> bool:
    """Whether no reader of a weight has another operand in integers."""
    readers = weight.links.read(weight.result)
    others = (name for reader in readers for name in reader.input if name != weight.result)
    return all(subject.dequantizer(name) is None for name in others)


def unequal_scales(subject: Subject) -> Iterator[Hit]:
    """Inputs of one operator with several scales, where the target's kernel needs a single one."""
    target = _target(subject)
    for node, _ in subject.nodes():
        if node.op_type not in target.equal_scales:
            continue
        read = [found for found in map(subject.dequantizer, node.input) if found is not None and found.stored is None]
        if any(not read[0].same_codes(other) for other in read[1:]):
            scales = ", ".join(f"{float(c.scale.flat[0]):.5g}" for c in read if c.scale is not None and c.scale.size)
            message = f"the inputs of {node.op_type} have several scales ({scales}), and target {target.name} wants one"
            yield Hit(message, node.name)

"""Rules about how a graph is put together: pairs that disagree, values rounded twice, constants that nobody reads."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator

import onnx

from qdqtool.graphs.scopes import bodies
from qdqtool.lint.findings import Hit
from qdqtool.lint.subject import Conversion, Subject, type_name


def invalid_model(subject: Subject) -> Iterator[Hit]:
    """What ONNX's checker says against the model."""
    if subject.invalid is not None:
        yield Hit(subject.invalid)


def unequal_pair(subject: Subject) -> Iterator[Hit]:
    """DequantizeLinear nodes that read codes with other parameters than they were made with."""
    for conversion in subject.conversions:
        maker = None if conversion.quantizes else subject.quantizer(conversion.source)
        if maker is None or maker.scale is None or conversion.scale is None:
            continue
        if conversion.zero_type and maker.codes != conversion.zero_type:
            continue  # a mismatch of types, which is another rule's
        if not maker.same_codes(conversion):
            message = f"it gives codes back with another scale, zero point or axis than {maker.node.name!r} made them"
            yield Hit(message, conversion.node.name, conversion.source)


def double_quantization(subject: Subject) -> Iterator[Hit]:
    """QuantizeLinear nodes right behind a DequantizeLinear: values are rounded once more, for nothing."""
    for quantizer, before in _doubled(subject):
        same = quantizer.same_codes(before)
        how = "with the same parameters, which changes nothing" if same else "with other parameters"
        message = f"it quantizes again what {before.node.name!r} has just dequantized, {how}"
        yield Hit(message, quantizer.node.name, quantizer.source, fixable=same and _is_removable(quantizer))


def _doubled(subject: Subject) -> Iterator[tuple[Conversion, Conversion]]:
    for conversion in subject.conversions:
        before = subject.dequantizer(conversion.source) if conversion.quantizes else None
        if before is not None:
            yield conversion, before


def _is_removable(quantizer: Conversion) -> bool:
    """Whether readers can take other codes instead: all are nodes of the same graph."""
    links, name = quantizer.links, quantizer.result
    return name not in links.outputs and all(name in reader.input for reader in links.read(name))


def mend_double_quantization(subject: Subject) -> int:
    """Let readers take the first codes; Q(DQ(c)) = c where both have the same parameters."""
    found = [(q, before) for q, before in _doubled(subject) if q.same_codes(before) and _is_removable(q)]
    codes: dict[str, str] = {}
    for quantizer, before in found:  # in order, so that of a row of pairs all read the first one's codes
        codes[quantizer.result] = codes.get(before.source, before.source)
    for quantizer, _ in found:
        for reader in quantizer.links.read(quantizer.result):
            for index, name in enumerate(reader.input):
                if name == quantizer.result:
                    reader.input[index] = codes[name]
    _remove(subject, {quantizer.result for quantizer, _ in found})
    _remove(subject, _unread(subject))
    return len(found)


def _unread(subject: Subject) -> set[str]:
    """Results of conversions that nothing reads."""
    read = _names_read(subject)
    return {c.result for c in subject.conversions if not read[c.result]}


def _remove(subject: Subject, results: set[str]) -> None:
    for links in subject.graphs:
        kept = [node for node in links.graph.node if not (node.output and node.output[0] in results)]
        if len(kept) < len(links.graph.node):
            copies = [_copied(node) for node in kept]  # the messages die with the field
            del links.graph.node[:]
            links.graph.node.extend(copies)


def _copied(node: onnx.NodeProto) -> onnx.NodeProto:
    copied = onnx.NodeProto()
    copied.CopyFrom(node)
    return copied


def _names_read(subject: Subject) -> Counter[str]:
    """How often each name is read by a node or given out by a graph, bodies included."""
    graphs = (subject.proto.graph, *bodies(subject.proto.graph))
    found: Counter[str] = Counter()
    for graph in graphs:
        found.update(name for node in graph.node for name in node.input)
        found.update(value.name for value in graph.output)
    return found


def unused_initializer(subject: Subject) -> Iterator[Hit]:
    """Initializers that nothing reads, such as float weights beside their codes."""
    read = _names_read(subject)
    for links in subject.graphs:
        inputs = {value.name for value in links.graph.input}
        for tensor in links.graph.initializer:
            if not read[tensor.name]:
                what = f"{type_name(tensor.data_type)} {list(tensor.dims)}"
                message = f"nothing reads this constant, {what}: {math.prod(tensor.dims)} values that only make a file"
                yield Hit(f"{message} larger", tensor=tensor.name, fixable=tensor.name not in inputs)


def remove_unused_initializers(subject: Subject) -> int:
    """Take them out, but for those that a caller may override."""
    read, done = _names_read(subject), 0
    for links in subject.graphs:
        inputs = {value.name for value in links.graph.input}
        for index in reversed(range(len(links.graph.initializer))):
            name = links.graph.initializer[index].name
            if not read[name] and name not in inputs:
                del links.graph.initializer[index]
                done += 1
    return done

"""Rules about scales and zero points: values, shapes, types, and the bias that must stand at S_x·S_w."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, numpy_helper

from qdqtool.lint.findings import Hit, Severity
from qdqtool.lint.subject import LAYERS, Conversion, Subject, type_name, weight_axis
from qdqtool.spec import FORMATS

_INT32_LIMIT: Final = 2**31 - 1
_CLOSE: Final = 1e-4
"""Relative difference of bias scales that no 8-bit code shows; float32 products made in another order differ less."""


def invalid_scale(subject: Subject) -> Iterator[Hit]:
    """Scales that are zero, negative, not finite or, in float32, denormal."""
    for conversion in subject.conversions:
        if conversion.scale is None or not conversion.scale.size:
            continue
        values = conversion.scale.astype(np.float64)
        # Processors flush denormal float32 to zero and a division by one overflows; float16 is computed in float32.
        tiny = np.finfo(np.float32).tiny if conversion.scale.dtype == np.float32 else 0.0
        for what, wrong in (
            ("not finite", ~np.isfinite(values)),
            ("zero", values == 0),
            ("negative", values < 0),
            ("denormal", (values > 0) & (values < tiny)),
        ):
            if wrong.any():
                places = f" in {int(wrong.sum())} of {values.size} places" if values.size > 1 else ""
                message = f"its scale is {what}{places}: {values[wrong].flat[0]:g}"
                yield _hit(conversion, message)


def scale_shape(subject: Subject) -> Iterator[Hit]:
    """Scales whose number does not go with the tensor's shape, the axis and the block size."""
    for conversion in subject.conversions:
        if conversion.scale is not None:
            wrong = _wrong_shape(conversion, subject)
            if wrong is not None:
                yield _hit(conversion, wrong)


def _wrong_shape(conversion: Conversion, subject: Subject) -> str | None:
    assert conversion.scale is not None
    shape, zero = conversion.scale.shape, conversion.zero_point
    if zero is not None and zero.shape != shape and (zero.size, conversion.scale.size) != (1, 1):
        return f"its zero point has shape {list(zero.shape)} and its scale {list(shape)}; they must be equal"
    if conversion.scale.size == 1 and len(shape) <= 1 and not conversion.block_size:
        return None
    tensor = subject.shapes.get(conversion.source) or subject.shapes.get(conversion.result)
    if tensor is None:
        return None
    if not -len(tensor) <= conversion.axis < len(tensor):
        return f"its axis {conversion.axis} is none of the tensor's {len(tensor)} dimensions"
    axis = conversion.axis % len(tensor)
    if conversion.block_size:
        wanted = [*tensor]
        length = tensor[axis]
        wanted[axis] = None if length is None else math.ceil(length / conversion.block_size)
    else:
        wanted = [tensor[axis]]
    fits = len(shape) == len(wanted) and all(w is None or n == w for n, w in zip(shape, wanted, strict=True))
    blocks = f" and blocks of {conversion.block_size}" if conversion.block_size else ""
    shown = ["?" if d is None else d for d in tensor]
    return None if fits else f"its scale has shape {list(shape)}, for a tensor {shown}, axis {axis}{blocks}"


def weight_channels(subject: Subject) -> Iterator[Hit]:
    """Weights whose scales run along another axis than the layer's output channels."""
    for node, _ in subject.nodes():
        weight = subject.operand(node, 1) if node.op_type in LAYERS else None
        if weight is None or weight.stored is None or weight.block_size or weight.scale is None:
            continue
        rank = len(weight.stored.dims)
        wanted = weight_axis(node, rank)
        if weight.scale.size == 1 or wanted is None or not -rank <= weight.axis < rank or weight.axis % rank == wanted:
            continue
        message = (
            f"its weight has scales along axis {weight.axis % rank}, and the output channels of {node.op_type} are "
            f"axis {wanted}: a sum mixes scales, which no integer kernel can do"
        )
        yield Hit(message, node.name, weight.source)


def zero_point_type(subject: Subject) -> Iterator[Hit]:
    """Zero points of another type than the codes."""
    for conversion in subject.conversions:
        zero = conversion.zero_type
        codes = conversion.codes
        if conversion.quantizes:
            codes = next((a.i for a in conversion.node.attribute if a.name == "output_dtype" and a.i), zero)
        if zero and codes and zero != codes:
            yield _hit(conversion, f"its zero point is {type_name(zero)} and its codes are {type_name(codes)}")


def opset_of_types(subject: Subject) -> Iterator[Hit]:
    """Conversions that their operator set does not know yet."""
    for conversion in subject.conversions:
        for what, least in _wants(conversion):
            if subject.opset < least:
                yield _hit(conversion, f"{what} exist from opset {least} on, and the model is of opset {subject.opset}")
                break


def _wants(conversion: Conversion) -> Iterator[tuple[str, int]]:
    name = type_name(conversion.codes)
    known = {**{f.name: f.min_opset for f in FORMATS.values()}, "float4e2m1": 23}
    yield f"{name} codes", 19 if name.startswith("float8") else known.get(name, 0)
    if conversion.block_size:
        yield "blocks", 21
    if conversion.scale is not None:
        if conversion.scale.ndim == 1 and conversion.scale.size > 1:
            yield "scales for each channel", 13
        if conversion.scale.dtype != np.float32:
            yield f"scales in {conversion.scale.dtype.name}", 19


# The bias


@dataclass(frozen=True)
class _Bias:
    """An int32 bias with the layer whose sums it is added to."""

    layer: onnx.NodeProto
    bias: Conversion
    activation: Conversion
    weight: Conversion
    expected: npt.NDArray[np.float64]

    @property
    def scale(self) -> npt.NDArray[np.float64]:
        assert self.bias.scale is not None
        return self.bias.scale.astype(np.float64).reshape(-1)

    @property
    def codes(self) -> npt.NDArray[np.int64]:
        assert self.bias.stored is not None
        return numpy_helper.to_array(self.bias.stored).astype(np.int64).reshape(-1)

    @property
    def is_wrong(self) -> bool:
        zero = self.bias.zero_point
        if zero is not None and zero.any():
            return True
        if self.scale.size not in (1, self.codes.size) or self.expected.size not in (1, self.codes.size):
            return False  # another rule's finding
        return bool((np.abs(self.scale - self.expected) > _CLOSE * self.expected).any())

    def at_expected(self) -> npt.NDArray[np.float64]:
        """The codes that stand for the same values at S_x·S_w."""
        zero = 0 if self.bias.zero_point is None else self.bias.zero_point
        return np.rint((self.codes - zero) * self.scale / self.expected)

    @property
    def is_fixable(self) -> bool:
        """Whether the values fit at S_x·S_w, and nothing else reads their codes or their scale."""
        codes = self.at_expected()
        links, inputs = self.bias.links, self.bias.node.input
        alone = all(len(links.read(name)) == 1 for name in (*inputs, self.bias.result))
        return alone and bool(np.isfinite(codes).all() and (np.abs(codes) <= _INT32_LIMIT).all())


def _biases(subject: Subject) -> Iterator[_Bias]:
    for node, links in subject.nodes():
        bias = next((b for b in map(subject.dequantizer, node.input) if b is not None and b.stored is not None), None)
        if node.op_type in LAYERS:
            layer, bias = node, subject.operand(node, 2)
        elif node.op_type == "Add" and bias is not None:
            other = next((name for name in node.input if name != bias.result), "")
            maker = links.makers.get(other)
            if maker is None or maker.op_type != "MatMul":
                continue
            layer = maker
        else:
            continue
        activation, weight = subject.operand(layer, 0), subject.operand(layer, 1)
        if bias is None or bias.stored is None or bias.codes != TensorProto.INT32 or bias.scale is None:
            continue
        if activation is None or weight is None or not (_is_usable(activation) and _is_usable(weight)):
            continue
        assert activation.scale is not None
        assert weight.scale is not None
        if activation.scale.size == 1 and not weight.block_size:
            expected = np.float64(activation.scale.reshape(-1)[0]) * weight.scale.astype(np.float64).reshape(-1)
            yield _Bias(layer, bias, activation, weight, expected)


def _is_usable(conversion: Conversion) -> bool:
    """Whether scales are numbers to compute with; others are another rule's finding."""
    return conversion.scale is not None and bool((np.isfinite(conversion.scale) & (conversion.scale > 0)).all())


def bias_scale(subject: Subject) -> Iterator[Hit]:
    """int32 biases at another scale than that of the sums they are added to."""
    for found in _biases(subject):
        if found.is_wrong:
            ratio = float(np.max(found.scale / found.expected))
            zero = found.bias.zero_point
            what = "has a zero point" if zero is not None and zero.any() else f"is up to {ratio:.4g} times S_x·S_w"
            message = f"the scale of its int32 bias {what}; integer kernels add the codes as they are"
            yield Hit(message, found.layer.name, found.bias.source, fixable=found.is_fixable)


def mend_bias_scale(subject: Subject) -> int:
    """Store such biases at S_x·S_w; a value changes by half a step of the sums at most."""
    done = 0
    for found in _biases(subject):
        if not (found.is_wrong and found.is_fixable):
            continue
        scale_name, stored = found.bias.node.input[1], found.bias.stored
        assert stored is not None
        codes = found.at_expected().astype(np.int32).reshape(tuple(stored.dims))
        scale = np.broadcast_to(found.expected, found.scale.shape if found.expected.size == 1 else found.codes.shape)
        old = found.bias.links.constants[scale_name]
        shape = tuple(old.dims) if scale.size == math.prod(old.dims) else scale.shape
        old.CopyFrom(numpy_helper.from_array(scale.astype(np.float32).reshape(shape), scale_name))
        if len(found.bias.node.input) > 2 and found.bias.node.input[2]:
            zero = found.bias.links.constants[found.bias.node.input[2]]
            zero.CopyFrom(numpy_helper.from_array(np.zeros(shape, np.int32), zero.name))
        stored.CopyFrom(numpy_helper.from_array(codes, stored.name))
        _set_axis(found.bias.node, 0 if shape else None)
        done += 1
    return done


def _set_axis(node: onnx.NodeProto, axis: int | None) -> None:
    kept = [a for a in node.attribute if a.name != "axis"]
    del node.attribute[:]
    node.attribute.extend(kept)
    if axis is not None:
        node.attribute.append(onnx.helper.make_attribute("axis", axis))


def bias_overflow(subject: Subject) -> Iterator[Hit]:
    """int32 biases that were clipped, or that leave too little room for the products beside them."""
    for found in _biases(subject):
        codes = np.abs(found.codes)
        if codes.size and codes.max() >= _INT32_LIMIT:
            message = f"{int((codes >= _INT32_LIMIT).sum())} of {codes.size} codes of its bias are clipped to int32"
            yield Hit(message, found.layer.name, found.bias.source)
            continue
        reach = _products(found)
        if reach is not None and reach.size in (1, codes.size) and codes.size:
            most = int((codes + reach).max())
            if most > _INT32_LIMIT:
                message = f"bias and products may sum to {most:.3g}, and its int32 sums wrap at {_INT32_LIMIT:.3g}"
                yield Hit(message, found.layer.name, found.bias.source, severity=Severity.WARNING)


def _products(found: _Bias) -> npt.NDArray[np.int64] | None:
    """The greatest magnitude that products can sum to, by output channel: Σ|w - z_w| · max|x - z_x|."""
    stored, number = found.weight.stored, FORMATS.get(type_name(found.activation.codes))
    axis = None if stored is None else weight_axis(found.layer, len(stored.dims))
    if stored is None or number is None or axis is None:
        return None
    zero = found.activation.zero_point
    offset = 0 if zero is None or not zero.size else int(zero.flat[0])
    magnitude = max(number.qmax - offset, offset - number.qmin)
    codes = np.moveaxis(numpy_helper.to_array(stored), axis, 0).astype(np.int64)
    codes = codes.reshape(len(codes), math.prod(codes.shape[1:]))
    own = found.weight.zero_point
    if own is not None and own.size not in (1, len(codes)):
        return None  # another rule's finding
    sums: npt.NDArray[np.int64] = np.abs(codes - (0 if own is None else own.reshape(-1, 1))).sum(axis=1)
    return sums * magnitude


def _hit(conversion: Conversion, message: str) -> Hit:
    return Hit(message, conversion.node.name, conversion.source)

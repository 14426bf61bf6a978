"""Precisions with quantized activations: how many bits a layer's weight and inputs have, and the weight's codes.

Codes of 2 or 4 bits are a matter of accuracy and of size, not of kernels: no execution provider computes on them. A
weight is therefore stored in a type of 4 bits, which makes the smallest file and a float kernel, or with the same codes
in 8 bits, which integer kernels take.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from qdqtool.spec import FORMATS, Format, QuantSpec

INTEGER_PRECISIONS: Final = ("w8a8", "w4a8", "w4a4", "w8a4", "w2a8")
Storage = Literal["packed", "int8", "split"]
_PACKED_BITS: Final = 4
FEW_BITS: Final = 4
"""Up to here steps are so wide that how a weight is rounded matters."""


@dataclass(frozen=True)
class Precision:
    """Bits of a layer's weight and of the activations that it reads; those of 16 bits are for single layers."""

    weights: int = 8
    activations: int = 8

    @staticmethod
    def of(name: str) -> Precision:
        """The precision of a name such as "w4a8": of :data:`INTEGER_PRECISIONS` or one of single nodes."""
        found = re.fullmatch(r"w(\d+)a(\d+)", name)
        assert found is not None
        return Precision(int(found[1]), int(found[2]))

    @property
    def few(self) -> bool:
        """Whether weights have so few bits that their rounding matters."""
        return self.weights <= FEW_BITS

    @property
    def wide(self) -> bool:
        """Whether codes are wider than integer kernels take: at their scale int32 has no room for a bias."""
        return self.weights > Precision.weights


def weight_spec(base: Format, bits: int, storage: Storage) -> QuantSpec:
    """Symmetric codes of so many bits: in a type of 4 bits where packed, else in ``base``; per tensor.

    The least code is left out as it is in 8 bits, but for 2 bits, which would lose a level of four. The type of 2 bits
    is not used: beside quantized activations the runtime takes it for one of 8 bits, and does not load the model.
    """
    if bits > max(base.bits, Precision.weights):
        return QuantSpec(widened(base, bits), symmetric=True, narrow=True)
    if bits >= base.bits:
        return QuantSpec(base, symmetric=True, narrow=True)
    stored = base.bits if storage == "int8" or bits > _PACKED_BITS else _PACKED_BITS
    form = FORMATS[f"{'' if base.signed else 'u'}int{stored}"]
    return QuantSpec(form, symmetric=True, narrow=bits > 2, bits=None if stored == bits else bits)


def widened(base: Format, bits: int) -> Format:
    """The format of so many bits that is signed as ``base`` is."""
    return FORMATS[f"{'int' if base.signed else 'uint'}{bits}"]


def width(spec: QuantSpec) -> int:
    """Bits of the codes in use."""
    return spec.bits or spec.format.bits

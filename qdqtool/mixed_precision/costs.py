"""What widths cost: bits of the weights, bytes of the file, or time of a run, as a sum over layers."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from qdqtool import units
from qdqtool.errors import RecipeError
from qdqtool.mixed_precision.candidates import Layer
from qdqtool.mixed_precision.widths import Assignment, Width
from qdqtool.planning.precision import Storage
from qdqtool.spec import FloatArray

_SCALE_BYTES = 4


@dataclass(frozen=True)
class Costs:
    """What every layer costs at every width, and what they may cost together.

    Attributes:
        layers: their names.
        widths: names of the widths.
        values: float64 (layers, widths).
        limit: of the sum.
        unit: "bits", "bytes" or "ms", for messages.
        base: cost of everything else, for messages.
    """

    layers: tuple[str, ...]
    widths: tuple[str, ...]
    values: FloatArray
    limit: float = math.inf
    unit: str = "bytes"
    base: float = 0.0

    def of(self, assignment: Assignment) -> float:
        """Cost of an assignment."""
        columns = [self.widths.index(assignment[layer]) for layer in self.layers]
        return math.fsum(self.values[np.arange(len(columns)), columns])

    def keeps(self, assignment: Assignment) -> bool:
        """Whether an assignment keeps the limit."""
        return self.of(assignment) <= self.limit * (1 + 1e-9)

    def assignment(self, columns: Sequence[int]) -> dict[str, str]:
        """The assignment that chooses a column of each row."""
        return {layer: self.widths[column] for layer, column in zip(self.layers, columns, strict=True)}

    def check(self, budget: str) -> None:
        """Refuse a budget that no assignment keeps; RecipeError names the least that can be reached."""
        least = float(self.values.min(axis=1).sum())
        if least <= self.limit * (1 + 1e-9):
            return
        raise RecipeError(
            f"budget {budget} cannot be met with widths {', '.join(self.widths)}: the least is {self._shown(least)}, "
            f"{self._shown(self.limit)} {'are' if self.unit == 'bytes' else 'is'} allowed; allow more, or add narrower "
            f"widths"
        )

    def _shown(self, value: float) -> str:
        if self.unit == "bytes":
            return units.size(round(value + self.base))
        return f"{value + self.base:.3g} {self.unit}"


def mean_bits(layers: Sequence[Layer], widths: Sequence[Width], limit: float = math.inf) -> Costs:
    """Bits of weights, as the mean over all elements of the layers searched."""
    elements = np.array([layer.elements for layer in layers], np.float64)
    bits = np.array([width.bits for width in widths], np.float64)
    values = elements[:, None] * bits[None, :] / elements.sum()
    return Costs(_names(layers), _names(widths), values, limit, "bits in the mean")


def file_bytes(
    layers: Sequence[Layer], widths: Sequence[Width], storage: Storage, limit: float = math.inf, base: float = 0.0
) -> Costs:
    """Bytes of weights and their scales.

    Args:
        layers: the layers.
        widths: what each may have.
        storage: how codes of few bits are stored.
        limit: bytes of the file.
        base: bytes of all that is no weight of these layers, taken off the limit.
    """
    values = np.array(
        [
            [
                math.ceil(layer.elements * width.stored_bits(storage) / 8)
                + (0 if width.precision is None else _SCALE_BYTES * layer.scales)
                for width in widths
            ]
            for layer in layers
        ],
        np.float64,
    )
    return Costs(_names(layers), _names(widths), values, limit - base, "bytes", base)


def run_times(
    layers: Sequence[Layer],
    widths: Sequence[Width],
    storage: Storage,
    shares: Mapping[str, Sequence[float]],
    *,
    limit: float = math.inf,
    base: float = 0.0,
) -> Costs:
    """Time of a run as a share of the float model's.

    Args:
        layers: the layers.
        widths: what each may have; only codes that are stored in 8 bits have integer kernels.
        storage: how codes of few bits are stored.
        shares: layer -> its share in float and in integers.
        limit: of the whole model's.
        base: share of all that is no layer, taken off the limit.
    """
    integer = [int(width.stored_bits(storage) == 8) for width in widths]
    values = np.array([[shares[layer.name][column] for column in integer] for layer in layers], np.float64)
    return Costs(_names(layers), _names(widths), values, limit - base, "of the float model's time", base)


def _names(values: Sequence[Layer] | Sequence[Width]) -> tuple[str, ...]:
    return tuple(value.name for value in values)

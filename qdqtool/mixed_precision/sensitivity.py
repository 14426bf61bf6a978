"""How much of the outputs' noise each layer brings in at each width.

local: the layer alone is quantized, all others read what the float model computes.
cumulative: all layers before it have the same width.
around an assignment: the layer has the next width up or down, all others stay; less the least of these figures. So they
tell what a change of one width does where errors of layers are related.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from qdqtool.mixed_precision.widths import FLOAT, Assignment
from qdqtool.spec import FloatArray

Measure = Callable[[Assignment], float]


def local(layers: Sequence[str], widths: Sequence[str], noise: Measure) -> FloatArray:
    """Noise with one layer quantized alone, float64 (layers, widths)."""
    return np.array([[0.0 if width == FLOAT else noise({layer: width}) for width in widths] for layer in layers])


def cumulative(layers: Sequence[str], widths: Sequence[str], noise: Measure) -> FloatArray:
    """Noise with a layer and all before it at one width, float64 (layers, widths)."""
    found = np.zeros((len(layers), len(widths)))
    for row in range(len(layers)):
        for column, width in enumerate(widths):
            if width != FLOAT:
                found[row, column] = noise(dict.fromkeys(layers[: row + 1], width))
    return found


def around(assignment: Mapping[str, str], widths: Sequence[str], noise: Measure) -> FloatArray:
    """What each layer adds at its width and the next ones while all others stay as assigned.

    Returns:
        float64 (layers, widths), at least 0; inf for widths farther away, which were not measured: a step goes no
        farther than what it was measured for.
    """
    whole = noise(assignment)
    rows = np.full((len(assignment), len(widths)), np.inf)
    for row, (layer, own) in enumerate(assignment.items()):
        column = widths.index(own)
        for other in range(max(0, column - 1), min(len(widths), column + 2)):
            rows[row, other] = whole if other == column else noise({**assignment, layer: widths[other]})
    least: FloatArray = rows.min(axis=1, keepdims=True)
    found: FloatArray = rows - least
    return found

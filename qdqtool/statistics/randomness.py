"""Whether arrays are noise: what a user fed who took random numbers for calibration data.

Arrays count as noise if nothing in them hangs together and their values are normal or uniform. After standardizing all
values to mean 0 and variance 1, noise has, each within a few standard errors,

    skewness 0, excess kurtosis 0 (normal) or -6/5 (uniform),
    Σ x_i x_(i+1) / n = 0 along every axis, with standard error 1/√n,
    Σ_(s≠t) x_s·x_t = 0 over pairs of samples, with standard error √(2 S (S - 1) P) for S samples of P values,
    n U - P = 1 + kurtosis, with standard error 2, for John's U = P tr(C²)/tr(C)² - 1 of the covariance C of the places,

where n = S - 1. The last one sees correlations between any two places, as features have them (Wang and Yao, On the
sphericity test with large-dimensional observations, 2013; for P far beyond S: Li and Yao, Testing the sphericity of a
covariance matrix when the dimension is much larger than the sample size, 2016).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, Final, Literal

import numpy as np
import numpy.typing as npt

from qdqtool.spec import FloatArray

if TYPE_CHECKING:
    from qdqtool.data.batching import Sample

Noise = Literal["normal", "uniform"]

LEAST_VALUES: Final = 1000
"""Fewer values tell no distribution: the standard error of the kurtosis would be above 0.15."""
_ERRORS: Final = 4.5  # standard errors; ten such tests all pass on 99.99 % of noise
_LEAST_AXIS: Final = 8  # neighbours along a shorter axis (colours, coordinates) need not be alike in real data
_LEAST_SAMPLES: Final = 16  # from which on U is near its limit
_LIMIT: Final = 6 * 2.0  # six standard errors of n U - P, whose right tail is heavier than a normal one's
_MOST_VALUES: Final = 1 << 22  # some of many large samples say enough
# Name, excess kurtosis, and the variances of sample skewness and kurtosis times the number of values.
_SHAPES: Final[tuple[tuple[Noise, float, float, float], ...]] = (
    ("normal", 0.0, 6.0, 24.0),
    ("uniform", -1.2, 72 / 35, 1.317),
)


def random_inputs(samples: Iterable[Sample]) -> dict[str, Noise]:
    """Float inputs whose values over all samples look like random numbers, and their distribution."""
    distinct = {sample.digest: sample.feeds for sample in samples}
    names = dict.fromkeys(name for feeds in distinct.values() for name in feeds)
    found = {}
    for name in names:
        arrays = [feeds[name] for feeds in distinct.values() if name in feeds and feeds[name].dtype.kind == "f"]
        kind = noise(arrays)
        if kind is not None:
            found[name] = kind
    return found


def noise(samples: Sequence[npt.NDArray[Any]]) -> Noise | None:
    """The distribution that the samples' values are independent draws of; None where they are no noise, or too few.

    Args:
        samples: float arrays of any shapes, each one sample (or one batch).
    """
    samples = _some(samples)
    size = sum(array.size for array in samples)
    if size < LEAST_VALUES:
        return None
    values = np.concatenate([array.reshape(-1) for array in samples]).astype(np.float64)
    spread = float(values.std()) if np.isfinite(values).all() else 0.0
    if not spread > 0:
        return None
    values = (values - values.mean()) / spread
    kind = _distribution(values)
    if kind is None:
        return None
    ends = np.cumsum([array.size for array in samples])[:-1]
    standard = [part.reshape(array.shape) for part, array in zip(np.split(values, ends), samples, strict=True)]
    return None if _neighbours_correlate(standard) or _samples_correlate(standard, kind) else kind


def _some(samples: Sequence[npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """The first samples, as many as hold enough values to tell."""
    sizes = np.cumsum([array.size for array in samples])
    return list(samples[: max(2, int(np.searchsorted(sizes, _MOST_VALUES)) + 1)])


def _distribution(values: FloatArray) -> Noise | None:
    """The distribution whose skewness and kurtosis these standardized values have."""
    square = values * values
    skewness, kurtosis = float((square * values).mean()), float((square * square).mean()) - 3
    for kind, excess, skewness_variance, kurtosis_variance in _SHAPES:
        near = abs(skewness) < _ERRORS * math.sqrt(skewness_variance / values.size)
        if near and abs(kurtosis - excess) < _ERRORS * math.sqrt(kurtosis_variance / values.size):
            return kind
    return None


def _neighbours_correlate(samples: Sequence[FloatArray]) -> bool:
    for axis in range(max(array.ndim for array in samples)):
        long = [array for array in samples if array.ndim > axis and array.shape[axis] >= _LEAST_AXIS]
        pairs = [(np.moveaxis(a, axis, 0)[:-1], np.moveaxis(a, axis, 0)[1:]) for a in long]
        number = sum(one.size for one, _ in pairs)
        if abs(sum(float((one * other).sum()) for one, other in pairs)) > _ERRORS * math.sqrt(number):
            return True
    return False


def _samples_correlate(samples: Sequence[FloatArray], kind: Noise) -> bool:
    """Whether samples of one shape are alike at the same place, or their places hang together."""
    shapes: dict[tuple[int, ...], list[FloatArray]] = {}
    for array in samples:
        shapes.setdefault(array.shape, []).append(array.reshape(-1))
    excess = {name: kurtosis for name, kurtosis, *_ in _SHAPES}[kind]
    for group in shapes.values():
        rows = np.stack(group)
        count, places = rows.shape
        alike = float((rows.sum(axis=0) ** 2).sum() - (rows**2).sum())
        if count > 1 and abs(alike) > _ERRORS * math.sqrt(2 * count * (count - 1) * places):
            return True
        if count >= _LEAST_SAMPLES and abs(_sphericity(rows) - 1 - excess) > _LIMIT:
            return True
    return False


def _sphericity(rows: FloatArray) -> float:
    """The statistic n U - P of (S, P) rows, from the S x S products of the rows, whose squares sum to n² tr(C²)."""
    count, places = rows.shape
    centred = rows - rows.mean(axis=0)
    products = centred @ centred.T
    trace = float(np.trace(products))
    return (count - 1) * (places * float((products**2).sum()) / trace**2 - 1) - places if trace > 0 else math.inf

"""What a calibrator is: a pure function from a tensor's statistics and a spec to the range that codes should cover."""

from __future__ import annotations

import enum
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from qdqtool.spec import QuantSpec, Range

if TYPE_CHECKING:
    from qdqtool.statistics.tensor import TensorStatistics


class Stat(enum.StrEnum):
    """A part of a tensor's statistics that a calibrator reads; what nobody needs is not collected."""

    EXTREMES = "least and greatest value"
    HISTOGRAM = "histogram"
    SAMPLES = "least and greatest value of each sample, in the data's order"


@runtime_checkable
class Calibrator(Protocol):
    """Chooses ranges of activations; implementations are frozen dataclasses whose fields are the options.

    The range returned lies within what was observed (give or take two steps), and contains 0 once widened by
    :mod:`qdqtool.arithmetic.affine`.
    """

    name: ClassVar[str]
    needs: ClassVar[frozenset[Stat]]

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the range for a tensor observed as ``stats`` and quantized as ``spec``.

        Raises:
            StatisticsError: ``stats`` lack what the method needs.
        """
        ...


def choose(calibrator: Calibrator, stats: TensorStatistics, spec: QuantSpec) -> Range:
    """What ``calibrator.choose`` returns, worked out once for these statistics: whoever compares methods asks again."""
    key = (calibrator, spec)
    try:
        known = stats.chosen.get(key)
    except TypeError:  # options that have no hash, as lists
        return calibrator.choose(stats, spec)
    if known is None:
        known = stats.chosen[key] = calibrator.choose(stats, spec)
    return known

"""The calibrator that suits the tensor: the one whose range makes the least expected squared error on the histogram."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, cast

from qdqtool.affine import expected_error
from qdqtool.calibrator_api import Calibrator, Stat
from qdqtool.registry import catalogue
from qdqtool.spec import QuantSpec, Range
from qdqtool.statistics import TensorStatistics


@dataclass(frozen=True)
class Auto:
    """The best of all registered calibrators, plugins too, each with its default options; :meth:`explain` reports them.

    Methods that read single samples in their order (moving_average) do not take part: the result depends on no order.
    """

    name: ClassVar[str] = "auto"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES, Stat.HISTOGRAM})

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the range with the least expected error; the first in the catalogue's order on a tie."""
        ranges = self._ranges(stats, spec)
        errors = _errors(ranges, stats, spec)
        return ranges[min(errors, key=errors.__getitem__)]

    def explain(self, stats: TensorStatistics, spec: QuantSpec) -> dict[str, float]:
        """Expected squared error of each candidate, by its name."""
        return _errors(self._ranges(stats, spec), stats, spec)

    @cached_property
    def candidates(self) -> dict[str, Calibrator]:
        """The calibrators that take part, by name; looked up once, as reading entry points takes milliseconds."""
        others = {name: entry for name, entry in catalogue("calibrators").items() if name != self.name}
        return {name: cast(Calibrator, entry()) for name, entry in others.items() if entry.needs <= self.needs}  # type: ignore[attr-defined]  # every entry is a Calibrator by contract

    def _ranges(self, stats: TensorStatistics, spec: QuantSpec) -> dict[str, Range]:
        return {name: candidate.choose(stats, spec) for name, candidate in self.candidates.items()}


def _errors(ranges: dict[str, Range], stats: TensorStatistics, spec: QuantSpec) -> dict[str, float]:
    errors = expected_error(stats.bins, [r.lo for r in ranges.values()], [r.hi for r in ranges.values()], spec)
    return dict(zip(ranges, errors.tolist(), strict=True))

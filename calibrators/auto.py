"""The calibrator that suits the tensor: the one whose range makes the least expected squared error on the histogram."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Final

from qdqtool.arithmetic.affine import expected_error
from qdqtool.calibrator_api import Calibrator, Stat, choose
from qdqtool.errors import RecipeError
from qdqtool.registry import catalogue, make
from qdqtool.spec import QuantSpec, Range
from qdqtool.statistics.tensor import TensorStatistics

_ON_REQUEST: Final = frozenset({"ifmr", "hfmg"})
"""They look for the least of the error that mse finds the least of, among fewer ranges, and would only cost time."""


@dataclass(frozen=True)
class Auto:
    """The best of several calibrators for each tensor, each with its default options; :meth:`explain` reports them.

    Methods that read single samples in their order (moving_average) cannot take part: the result depends on no order.

    Attributes:
        candidates: names of those that take part. None given: all there are, plugins too, but for ifmr and hfmg, which
            look for what mse finds.
    """

    candidates: tuple[str, ...] = ()

    name: ClassVar[str] = "auto"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES, Stat.HISTOGRAM})

    def __post_init__(self) -> None:
        for name in self.candidates:
            if name == self.name or not make("calibrators", name, {}).needs <= self.needs:
                raise RecipeError(
                    f"auto: {name!r} cannot be a candidate, as it "
                    f"{'is auto itself' if name == self.name else 'depends on the order of the data'}; name others, "
                    f'e.g. ["mse", "percentile"]'
                )

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the range with the least expected error; the first candidate's on a tie."""
        ranges = self._ranges(stats, spec)
        errors = _errors(ranges, stats, spec)
        return replace(ranges[min(errors, key=errors.__getitem__)], errors=errors)

    def explain(self, stats: TensorStatistics, spec: QuantSpec) -> dict[str, float]:
        """Expected squared error of each candidate, by its name."""
        return _errors(self._ranges(stats, spec), stats, spec)

    @cached_property
    def _calibrators(self) -> dict[str, Calibrator]:
        """Those that take part, by name; looked up once, as reading entry points takes milliseconds."""
        known = catalogue("calibrators")
        names = self.candidates or [name for name in known if name != self.name and name not in _ON_REQUEST]
        made: dict[str, Calibrator] = {name: known[name]() for name in names}
        return {name: calibrator for name, calibrator in made.items() if calibrator.needs <= self.needs}

    def _ranges(self, stats: TensorStatistics, spec: QuantSpec) -> dict[str, Range]:
        return {name: choose(calibrator, stats, spec) for name, calibrator in self._calibrators.items()}


def _errors(ranges: dict[str, Range], stats: TensorStatistics, spec: QuantSpec) -> dict[str, float]:
    bins = stats.bins.weighted(spec.negative_weight)
    errors = expected_error(bins, [r.lo for r in ranges.values()], [r.hi for r in ranges.values()], spec)
    return dict(zip(ranges, errors.tolist(), strict=True))

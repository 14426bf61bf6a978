"""Who judges the trials of a repair: figures on samples to choose by, and others that only report."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from qdqtool.repairs.probes import Judge, Ratio, score, worst
from qdqtool.repairs.workbench import Trial, Workbench, multiply_accumulates


@dataclass(frozen=True)
class Rules:
    """What a repair may do.

    Attributes:
        allow: names of remedies, from cheapest to dearest.
        min_gain: dB that a step must gain.
        max_float: share of the multiply-accumulates that may leave integers.
        enough: dB beyond which nothing counts; None: all counts, and only layers that hurt are looked at.
        every_layer: look at layers that are no worse than usual too, because there is a goal to reach.
    """

    allow: tuple[str, ...]
    min_gain: float
    max_float: float
    enough: float | None = None
    every_layer: bool = False


@dataclass(frozen=True)
class Tried:
    """A trial, what the choosing samples say of it, and that as one figure."""

    trial: Trial
    ratios: Mapping[str, Ratio]
    score: float
    macs: int


class Jury:
    """Judges trials by the rules of a repair.

    Attributes:
        bench: makes trials.
        choosing: judges candidates.
        reporting: says what kept steps gained; never asked for a choice.
        rules: what may be done.
        reached: whether a trial, with its figures on the choosing samples, is good enough.
        least_macs: multiply-accumulates that must stay in integers.
    """

    def __init__(
        self, bench: Workbench, choosing: Judge, reporting: Judge, rules: Rules, reached: Callable[[Tried], bool]
    ) -> None:
        self.bench, self.choosing, self.reporting, self.rules, self.reached = bench, choosing, reporting, rules, reached
        self._macs: Mapping[str, int] = {}
        self.least_macs = 0

    def begin(self, start: Trial) -> Tried:
        """Judge the trial that all others are counted from."""
        self._macs = multiply_accumulates(start)
        self.least_macs = self._in_integers(start) - round(self.rules.max_float * sum(self._macs.values()))
        return self.judged(start)

    def judged(self, trial: Trial) -> Tried:
        """What the choosing samples say of a trial."""
        ratios = self.choosing.ratios(trial.proto)
        return Tried(trial, ratios, score(ratios, self.rules.enough), self._in_integers(trial))

    def exact(self, tried: Tried) -> Tried:
        """A trial without what was kept of others, before it is kept itself."""
        trial = self.bench.exact(tried.trial)
        return tried if trial is tried.trial else self.judged(trial)

    def reported(self, trial: Trial) -> float:
        """SQNR of the worst output on the reporting samples."""
        return worst(self.reporting.ratios(trial.proto)).db

    def _in_integers(self, trial: Trial) -> int:
        return sum(self._macs.get(name, 0) for name in trial.integer_layers())

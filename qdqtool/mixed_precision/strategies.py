"""From sensitivities to a verified assignment: the best under a budget, or the smallest that loses little enough."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from qdqtool import units
from qdqtool.errors import GateError
from qdqtool.mixed_precision import assignment as solving
from qdqtool.mixed_precision.costs import Costs, file_bytes, mean_bits, run_times
from qdqtool.mixed_precision.goals import Budget, Loss
from qdqtool.mixed_precision.results import Quality, Trial
from qdqtool.mixed_precision.widths import Assignment
from qdqtool.mixed_precision.workbench import Workbench
from qdqtool.spec import FloatArray

_ROUNDS: Final = 4
"""Times that sensitivities are measured around the best assignment, at most."""
_VERIFIED: Final = 2
"""Assignments that are quantized, those of least noise."""
_TIGHTENED: Final = 3
_BISECTIONS: Final = 7
_ERRORS: Final = 2.0
_FLOOR: Final = 1e-12  # noise that counts as none


@dataclass
class UnderBudget:
    """Least noise under a budget.

    Attributes:
        bench: where to measure.
        budget: what the model may take.
        baseline: the widest model of one width that keeps the budget.
    """

    bench: Workbench
    budget: Budget
    baseline: Trial | None = None

    def run(self) -> None:
        """Search; the best is ``bench.best``.

        Raises:
            RecipeError: no assignment keeps the budget; names the least that can be reached.
            OutOfTime: the time is up.
        """
        bench = self.bench
        bench.rank, bench.timed = self.rank, self.budget.kind == "latency"
        costs = self._costs()
        costs.check(str(self.budget))
        kept = [width.name for width in bench.integers if costs.keeps(bench.uniform(width.name))]
        if kept:
            self.baseline = bench.trial(bench.uniform(kept[-1]))
        else:  # the user has a result at once
            bench.trial(costs.assignment([int(column) for column in costs.values.argmin(axis=1)]))
        matrix = bench.local()
        chain = [self._solved(matrix, costs)]
        for _ in range(_ROUNDS):
            matrix = bench.around(chain[-1])
            found = self._solved(matrix, costs)
            if found in chain or bench.noise(found) >= bench.noise(chain[-1]):
                break
            chain.append(found)
        self._verify(chain, matrix, costs)

    def _verify(self, chain: Sequence[Assignment], matrix: FloatArray, costs: Costs) -> None:
        """Quantize the assignments of least noise; where the file breaks the budget, tighten it and solve again."""
        bench = self.bench
        ordered = sorted(chain, key=bench.noise)[:_VERIFIED]
        bench.stage("quantizing and verifying", len(ordered))
        for found in ordered:
            trial = bench.trial(found)
            for _ in range(_TIGHTENED):
                if self._keeps(trial):
                    break
                costs = replace(costs, limit=costs.limit - self._excess(trial))
                trial = bench.trial(self._solved(matrix, costs))

    def _costs(self) -> Costs:
        bench, budget = self.bench, self.budget
        if budget.kind == "bits":
            return mean_bits(bench.layers, bench.widths, budget.amount)
        if budget.kind == "latency":
            return self._time_costs()
        plain = file_bytes(bench.layers, bench.widths, bench.base.storage)
        widest = bench.uniform(bench.integers[-1].name)
        rest = bench.trial(widest).bytes - plain.of(widest)
        return file_bytes(bench.layers, bench.widths, bench.base.storage, self._limit, rest)

    def _time_costs(self) -> Costs:
        """Time as a sum over layers, beside what the model of 8 bits takes for conversions and other operators."""
        bench = self.bench
        usual = "8" if "8" in bench.width_names else bench.integers[-1].name
        bench.stage("timing layers", 2)
        first, shares = bench.trial(bench.uniform(usual)), bench.layer_times()
        assert first.latency is not None
        plain = run_times(bench.layers, bench.widths, bench.base.storage, shares)
        rest = first.latency - plain.of(bench.uniform(usual))
        return run_times(bench.layers, bench.widths, bench.base.storage, shares, limit=self.budget.amount, base=rest)

    @property
    def _limit(self) -> float:
        whole = self.bench.state.float_bytes if self.budget.share else 1
        return self.budget.amount * whole

    def _solved(self, noise: FloatArray, costs: Costs) -> dict[str, str]:
        columns = solving.least(noise, costs.values, costs.limit)
        if columns is None:
            costs.check(str(self.budget))
            raise AssertionError("the budget was checked")
        return costs.assignment([int(column) for column in columns])

    def _keeps(self, trial: Trial) -> bool:
        return self._excess(trial) <= 0

    def _excess(self, trial: Trial) -> float:
        """What a trial takes above the budget."""
        if self.budget.kind == "bits":
            return 0.0 if trial.bits <= self.budget.amount * (1 + 1e-9) else trial.bits - self.budget.amount
        if self.budget.kind == "latency":
            return math.inf if trial.latency is None else trial.latency - self.budget.amount
        return trial.bytes - self._limit

    def rank(self, trial: Trial) -> tuple[float, ...] | None:
        """SQNR on the selection samples; a score below the baseline's comes behind all others."""
        if not self._keeps(trial):
            return None
        kept = self.baseline is None or not _worse(trial.selection, self.baseline.selection)
        return (float(kept), trial.selection.sqnr_db)

    def settle(self) -> Trial:
        """The best trial that the samples held out do not find worse than the baseline.

        Raises:
            GateError: none keeps the budget.
        """
        ranked = [(rank, trial) for trial in self.bench.trials if (rank := self.rank(trial)) is not None]
        for _, trial in sorted(ranked, key=lambda one: one[0], reverse=True):
            if self.baseline is None or trial == self.baseline or self._holds(trial, self.baseline):
                return trial
        least = min(self.bench.trials, key=self._excess)
        reached = units.size(least.bytes) if least.latency is None else f"{least.latency:.2f} of the float model's time"
        raise GateError(f"budget {self.budget} is not met: the nearest model found takes {reached}")

    @staticmethod
    def _holds(trial: Trial, baseline: Trial) -> bool:
        better = trial.holdout.sqnr_db >= baseline.holdout.sqnr_db
        return better and not _worse(trial.holdout, baseline.holdout)


def _worse(one: Quality, other: Quality) -> bool:
    """Whether a score is lower by more than chance would make it, two standard errors: else SQNR tells more."""
    if one.score is None or other.score is None:
        return False
    return one.score < other.score - _ERRORS * (one.error or 0.0)


@dataclass
class LeastBytes:
    """The smallest model that loses no more than it may.

    Attributes:
        bench: where to measure.
        loss: what may be lost.
        wanted: the same, tighter where samples held out asked for it.
        baseline: the narrowest model of one width that was found to keep it.
    """

    bench: Workbench
    loss: Loss
    wanted: Loss
    baseline: Trial | None = None

    def run(self) -> None:
        """Search; the best is ``bench.best``.

        Raises:
            OutOfTime: the time is up.
        """
        bench = self.bench
        bench.rank = self.rank
        self._first()
        self._bisect(bench.local(), self._guess())
        if bench.best is not None:
            self._around(bench.best)
        for _ in range(_TIGHTENED):
            best = bench.best
            if best is None or self._lacks(best.holdout, self.loss) == (0.0, 0.0):
                return
            lacking = self._lacks(best.holdout, self.loss)
            self.wanted = _tightened(self.wanted, lacking)
            bench.best = None
            for trial in list(bench.trials):
                bench.trial(trial.assignment)
            self._around(best)

    def _guess(self) -> float:
        """Noise that may keep the loss: what the SQNR wanted is, or that of 8 bits everywhere."""
        if self.wanted.min_sqnr is not None:
            return float(10 ** (-self.wanted.min_sqnr / 10))
        return sum(self.bench.noise({layer: self.bench.integers[-1].name}) for layer in self.bench.names)

    def _around(self, best: Trial) -> None:
        """Look for smaller models among those a step away from a good one."""
        matrix = self.bench.around(best.assignment)
        columns = [self.bench.width_names.index(width) for width in best.assignment.values()]
        self._bisect(matrix, float(matrix[np.arange(len(columns)), columns].sum()))

    def _first(self) -> None:
        """Models of one width, until one keeps the loss: the user has a result at once."""
        bench = self.bench
        usual = [width.name for width in bench.widths if width.bits >= 8] or [bench.integers[-1].name]
        bench.stage("one width for all layers", len(usual))
        for width in usual:
            trial = bench.trial(bench.uniform(width))
            if self.rank(trial) is not None:
                self.baseline = trial
                return

    def _bisect(self, matrix: FloatArray, begin: float) -> None:
        """Find how much noise by ``matrix`` the smallest model may have that keeps the loss; ``begin`` is a guess."""
        bench = self.bench
        costs = file_bytes(bench.layers, bench.widths, bench.base.storage)
        most = np.where(np.isfinite(matrix), matrix, 0.0).max(axis=1).sum()
        low, high = (math.log(max(float(end), _FLOOR)) for end in (matrix.min(axis=1).sum(), most))
        level = min(max(math.log(max(begin, _FLOOR)), low), high)
        bench.stage("quantizing and verifying", _BISECTIONS)
        tried: list[Assignment] = []
        for _ in range(_BISECTIONS):
            columns = solving.least(costs.values, matrix, math.exp(level) * (1 + 1e-9))
            found = None if columns is None else costs.assignment([int(column) for column in columns])
            if found in tried:
                break
            if found is None or self.rank(bench.trial(found)) is not None:
                low = level
            else:
                high = level
            tried += [] if found is None else [found]
            level = (low + high) / 2

    def rank(self, trial: Trial) -> tuple[float, ...] | None:
        """Fewer bytes are better, where the loss on the selection samples may be."""
        return (
            None if any(self._lacks(trial.selection, self.wanted)) else (-float(trial.bytes), trial.selection.sqnr_db)
        )

    @staticmethod
    def _lacks(quality: Quality, loss: Loss) -> tuple[float, float]:
        """By how many dB and how much of the metric a model misses what it should keep; zeros where it does not."""
        sqnr = 0.0 if loss.min_sqnr is None else max(0.0, loss.min_sqnr - quality.sqnr_db)
        drop = 0.0 if loss.max_drop is None or quality.drop is None else max(0.0, quality.drop - loss.max_drop)
        return sqnr, drop

    def settle(self) -> Trial:
        """The smallest trial that keeps the loss on the selection samples and on those held out.

        Raises:
            GateError: there is none; names the best that was reached.
        """
        kept = [
            trial
            for trial in self.bench.trials
            if not any((*self._lacks(trial.selection, self.loss), *self._lacks(trial.holdout, self.loss)))
        ]
        if kept:
            return min(kept, key=lambda trial: trial.bytes)
        best = max(self.bench.trials, key=lambda trial: (trial.holdout.sqnr_db, -trial.bytes))
        drop = "" if best.holdout.drop is None else f", and the metric loses {best.holdout.drop:.3g}"
        raise GateError(
            f"no model keeps {self.loss} with widths {', '.join(self.bench.width_names)}: the best reaches "
            f"{units.db(best.holdout.sqnr_db)} on the samples held out{drop}; allow more, or add wider widths"
        )


def _tightened(loss: Loss, lacking: tuple[float, float]) -> Loss:
    sqnr, drop = lacking
    return Loss(
        None if loss.min_sqnr is None else loss.min_sqnr + sqnr,
        None if loss.max_drop is None else loss.max_drop - drop,
    )


def strategy(bench: Workbench, goal: Budget | Loss) -> UnderBudget | LeastBytes:
    """The way to a goal."""
    return UnderBudget(bench, goal) if isinstance(goal, Budget) else LeastBytes(bench, goal, goal)

"""The greedy search for remedies: the worst layer first, the cheapest remedy that works for it first.

What a layer could gain at most is found by leaving it in float. A remedy works that wins half of that in dB; where none
does, the best one is kept. Whatever is kept gains ``min_gain`` dB at the outputs at least, on the choosing samples. So
the number of models quantized grows with the layers that hurt, not with those of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from qdqtool.errors import QdqError
from qdqtool.repairs.analysis import Analysis, LayerError, analyse
from qdqtool.repairs.probes import Judge, Ratio, score, worst
from qdqtool.repairs.pruning import Change, pruned
from qdqtool.repairs.remedies import MODEL_WIDE, REMEDIES, Candidate, Site, to_float
from qdqtool.repairs.values import Left, Step
from qdqtool.repairs.workbench import Trial, Workbench, multiply_accumulates

_ANALYSED: Final = 8
"""Samples on which layers are measured."""
_AGAIN: Final = 3.0
"""dB that the outputs must have gained since a layer was left before it is looked at again: half of the noise."""
_NOTICED: Final = 0.05
"""dB by which a dearer candidate must be better than a cheaper one."""
_AT_ONCE: Final = frozenset({"bits", "float"})
"""Remedies whose candidates have different costs: the first that works is taken."""
Watch = Callable[[str], None]


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


@dataclass
class Mender:
    """Improves a trial step by step.

    Attributes:
        bench: makes trials.
        choosing: judges candidates.
        reporting: says what kept steps gained; never asked for a choice.
        rules: what may be done.
        reached: whether a trial, with its figures on the choosing samples, is good enough.
        watch: told in words what is being tried.
        changes: what was kept, step by step.
        steps: those of them that are needed in the end.
        left: layers that were left alone, by name.
    """

    bench: Workbench
    choosing: Judge
    reporting: Judge
    rules: Rules
    reached: Callable[[Tried], bool]
    watch: Watch
    changes: list[Change] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    left: dict[str, Left] = field(default_factory=dict)
    _left_at: dict[str, float] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)
    _macs: Mapping[str, int] = field(default_factory=dict)
    _allowed_macs: int = 0

    def run(self, start: Trial) -> Trial:
        """Improve a trial until it is good enough, or nothing that is allowed helps."""
        self._macs = multiply_accumulates(start)
        self._allowed_macs = self._integer_macs(start) - round(self.rules.max_float * sum(self._macs.values()))
        first = best = self.judged(start)
        current: Tried | None = first
        while current is not None:
            best = current
            current = None if self.reached(best) else self._improved(best)
        self.watch("looking for steps that are not needed any more")
        best, self.steps = pruned(self, first, best, self.changes)
        return best.trial

    def _improved(self, current: Tried) -> Tried | None:
        """The model with a remedy for the worst layer that one helps; None where none does."""
        for layer in self._suspects(current):
            better = self._mend(current, layer)
            if better is not None:
                return better
        return None

    def judged(self, trial: Trial) -> Tried:
        """What the choosing samples say of a trial."""
        ratios = self.choosing.ratios(trial.proto)
        return Tried(trial, ratios, score(ratios, self.rules.enough), self._integer_macs(trial))

    def _integer_macs(self, trial: Trial) -> int:
        return sum(self._macs.get(name, 0) for name in trial.integer_layers())

    def _suspects(self, current: Tried) -> list[LayerError]:
        """Layers to look at, the worst first."""
        self.watch("finding where the error is made")
        found = look(self.bench, self.choosing, current.trial, current.ratios)
        wanted = found.worst_first() if self.rules.every_layer else found.suspects()
        never = -float("inf")
        return [one for one in wanted if one.node not in self._left_at or self._risen(current, one.node, never)]

    def _risen(self, current: Tried, node: str, never: float) -> bool:
        return current.score - self._left_at.get(node, never) >= _AGAIN

    def _mend(self, current: Tried, layer: LayerError) -> Tried | None:
        """The model with a remedy for a layer; None, with the reason recorded, where none helps."""
        node = next(node for node in current.trial.reference.graph.node if node.name == layer.node)
        site = Site(current.trial, node)
        in_float = self._in_float(site)
        if in_float is None:
            return None
        room, reasons = in_float.score - current.score, list[str]()
        best: tuple[float, str, Candidate, Tried] | None = None
        for remedy in self._remedies(room):
            gained = -float("inf")
            for candidate in REMEDIES[remedy](site):
                tried = self._try(candidate, in_float, reasons)
                if tried is None:
                    continue
                gain = tried.score - current.score
                gained = max(gained, gain)
                if gain >= self.rules.min_gain and (best is None or gain > best[0] + _NOTICED):
                    best = gain, remedy, candidate, tried
                if remedy in _AT_ONCE and best is not None and self._works(best[0], room, best[3]):
                    break
            if best is not None and self._works(best[0], room, best[3]):
                break
            if remedy in MODEL_WIDE and gained < self.rules.min_gain:
                self._refused.add(remedy)
        exact = None if best is None else self._exact(best[3])
        if best is None or exact is None or exact.score - current.score < self.rules.min_gain:
            self._leave(current, layer, in_float, reasons)
            return None
        self._keep(current, layer, in_float, (best[1], best[2].change, exact))
        return exact

    def _remedies(self, room: float) -> list[str]:
        """Remedies worth trying: those of one layer only where it can gain something."""
        worth = room >= self.rules.min_gain
        return [one for one in self.rules.allow if (one not in self._refused if one in MODEL_WIDE else worth)]

    def _works(self, gain: float, room: float, tried: Tried) -> bool:
        enough = self.rules.enough is not None and worst(tried.ratios).sure >= self.rules.enough
        return gain >= max(self.rules.min_gain, room / 2) or enough

    def _in_float(self, site: Site) -> Tried | None:
        """The model with the layer in float, and with it what puts out its inputs: as good as it can become."""
        candidate = list(to_float(site))[-1]
        self.watch(f"{site.node.name}: what it costs")
        try:
            return self.judged(self.bench.quantize(candidate.recipe))
        except QdqError as error:
            self.left[site.node.name] = Left(site.node.name, site.node.op_type, f"it cannot be tried in float: {error}")
            self._left_at[site.node.name] = float("inf")
            return None

    def _try(self, candidate: Candidate, in_float: Tried, reasons: list[str]) -> Tried | None:
        """A candidate, judged; None, with the reason, where it fails or takes too much out of integers."""
        self.watch(candidate.change)
        if candidate.recipe == in_float.trial.recipe:
            tried = in_float
        else:
            try:
                tried = self.judged(self.bench.quantize(candidate.recipe))
            except QdqError as error:
                reasons.append(f"{candidate.change}: {error}")
                return None
        if tried.macs < self._allowed_macs:
            reasons.append("what helps takes more of the arithmetic out of integers than --max-float lets")
            return None
        return tried

    def _exact(self, tried: Tried) -> Tried:
        """A trial without what was kept of others, before it is kept itself."""
        trial = self.bench.exact(tried.trial)
        return tried if trial is tried.trial else self.judged(trial)

    def _keep(self, current: Tried, layer: LayerError, in_float: Tried, best: tuple[str, str, Tried]) -> None:
        remedy, change, tried = best
        before, after, bound = (self.reported(one.trial) for one in (current, tried, in_float))
        macs, grown = current.macs - tried.macs, tried.trial.size - current.trial.size
        step = Step(layer.node, layer.op, remedy, change, before, after, max(after, bound), macs, grown)
        self.changes.append(Change(step, current.trial.recipe, tried.trial.recipe))
        self.left.pop(layer.node, None)

    def _leave(self, current: Tried, layer: LayerError, in_float: Tried, reasons: Sequence[str]) -> None:
        gain = self.reported(in_float.trial) - self.reported(current.trial)
        if in_float.score - current.score < self.rules.min_gain:
            reason = f"in float it would change the outputs by {gain:+.1f} dB"
        else:
            reason = f"nothing allowed gains {self.rules.min_gain:g} dB; in float the outputs would gain {gain:.1f} dB"
        why = f" ({'; '.join(dict.fromkeys(reasons))})" if reasons else ""
        self.left[layer.node] = Left(layer.node, layer.op, reason + why)
        self._left_at[layer.node] = current.score

    def reported(self, trial: Trial) -> float:
        """SQNR of the worst output on the reporting samples."""
        return worst(self.reporting.ratios(trial.proto)).db


def look(bench: Workbench, judge: Judge, trial: Trial, ratios: Mapping[str, Ratio]) -> Analysis:
    """Measure every layer of a trial on a judge's samples."""
    batches, count = [], 0
    for batch in judge.batches:
        if count >= _ANALYSED:
            break
        batches.append(batch)
        count += len(batch.samples)
    plain = bench.uncorrected(trial)
    return analyse(trial, plain, batches, {name: ratio.db for name, ratio in ratios.items()}, trial.state.provider)

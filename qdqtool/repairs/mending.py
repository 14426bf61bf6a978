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
from qdqtool.repairs.jury import Jury, Rules, Tried
from qdqtool.repairs.probes import Judge, Ratio, worst
from qdqtool.repairs.pruning import Change, pruned
from qdqtool.repairs.remedies import MODEL_WIDE, REMEDIES, Candidate, Site, to_float
from qdqtool.repairs.values import Left, Step
from qdqtool.repairs.workbench import Trial, Workbench

_ANALYSED: Final = 8
"""Samples on which layers are measured."""
_AGAIN: Final = 3.0
"""dB that the outputs must have gained since a layer was left before it is looked at again: half of the noise."""
_NOTICED: Final = 0.05
"""dB by which a dearer candidate must be better than a cheaper one."""
_AT_ONCE: Final = frozenset({"bits", "float"})
"""Remedies whose candidates have different costs: the first that works is taken."""
Watch = Callable[[str], None]


@dataclass
class Mender:
    """Improves a trial step by step.

    Attributes:
        jury: makes and judges trials.
        watch: told in words what is being tried.
        changes: what was kept, step by step.
        steps: those of them that are needed in the end.
        left: layers that were left alone, by name.
    """

    jury: Jury
    watch: Watch
    changes: list[Change] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    left: dict[str, Left] = field(default_factory=dict)
    _left_at: dict[str, float] = field(default_factory=dict)
    _refused: set[str] = field(default_factory=set)

    @property
    def rules(self) -> Rules:
        """What may be done."""
        return self.jury.rules

    def run(self, start: Trial) -> Trial:
        """Improve a trial until it is good enough, or nothing that is allowed helps."""
        first = best = self.jury.begin(start)
        current: Tried | None = first
        while current is not None:
            best = current
            current = None if self.jury.reached(best) else self._improved(best)
        self.watch("looking for steps that are not needed any more")
        best, self.steps = pruned(self.jury, first, best, self.changes)
        return best.trial

    def _improved(self, current: Tried) -> Tried | None:
        """The model with a remedy for the worst layer that one helps; None where none does."""
        for layer in self._suspects(current):
            better = self._mend(current, layer)
            if better is not None:
                return better
        return None

    def _suspects(self, current: Tried) -> list[LayerError]:
        """Layers to look at, the worst first."""
        self.watch("finding where the error is made")
        found = look(self.jury.bench, self.jury.choosing, current.trial, current.ratios)
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
        exact = None if best is None else self.jury.exact(best[3])
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
            return self.jury.judged(self.jury.bench.quantize(candidate.recipe))
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
                tried = self.jury.judged(self.jury.bench.quantize(candidate.recipe))
            except QdqError as error:
                reasons.append(f"{candidate.change}: {error}")
                return None
        if tried.macs < self.jury.least_macs:
            reasons.append("what helps takes more of the arithmetic out of integers than --max-float lets")
            return None
        return tried

    def _keep(self, current: Tried, layer: LayerError, in_float: Tried, best: tuple[str, str, Tried]) -> None:
        remedy, change, tried = best
        before, after, bound = (self.jury.reported(one.trial) for one in (current, tried, in_float))
        macs, grown = current.macs - tried.macs, tried.trial.size - current.trial.size
        step = Step(layer.node, layer.op, remedy, change, before, after, max(after, bound), macs, grown)
        self.changes.append(Change(step, current.trial.recipe, tried.trial.recipe))
        self.left.pop(layer.node, None)

    def _leave(self, current: Tried, layer: LayerError, in_float: Tried, reasons: Sequence[str]) -> None:
        gain = self.jury.reported(in_float.trial) - self.jury.reported(current.trial)
        if in_float.score - current.score < self.rules.min_gain:
            reason = f"in float it would change the outputs by {gain:+.1f} dB"
        else:
            reason = f"nothing allowed gains {self.rules.min_gain:g} dB; in float the outputs would gain {gain:.1f} dB"
        why = f" ({'; '.join(dict.fromkeys(reasons))})" if reasons else ""
        self.left[layer.node] = Left(layer.node, layer.op, reason + why)
        self._left_at[layer.node] = current.score


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

"""What calibration data are worth, in words: a line when all is well, one more for each kind of finding."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from qdqtool.statistics.adequacy import FEW, SETTLED, TOLERANCE, Adequacy, Outlier, TensorAdequacy
from qdqtool.statistics.extremes import SampleId
from qdqtool.units import count, listed

_NAMED = 3
_ROWS = 8


def summary(found: Adequacy) -> str:
    """Whether there are enough samples for the ranges, in a sentence; "" where no range was taken."""
    ranges = _ranges(found)
    if not ranges:
        return ""
    samples = count(found.samples, "sample")
    if found.repeats:
        samples += f" ({found.distinct} distinct)"
    if found.distinct < FEW:
        few = "is little" if found.samples == 1 else "are few"
        return f"{samples} {few} to take ranges from; a few dozen to a few hundred are usual"
    if found.settled:
        whose = "ranges" if found.stable_after == found.last_stable_after else f"{_percent(1 - SETTLED)} of the ranges"
        return f"{whose} stable after {found.stable_after} of {samples}"
    name, worst = max(ranges.items(), key=lambda item: item[1].sole_share)
    growing = f"as many again would widen about {max(1, round(found.growing))} of {count(len(ranges), 'range')}"
    alone = f"one sample alone makes {_percent(worst.sole_share)} of {name}"
    return f"{samples}; {growing} by more than {_percent(TOLERANCE)} ({alone})"


def findings(found: Adequacy) -> list[str]:
    """What is odd about the data, a sentence for each kind of finding."""
    lines = [
        f"input {name!r} looks like random numbers ({kind}): neither neighbours nor samples have anything in common. "
        "Ranges of random data mean nothing; give real samples, unless the model is made for noise."
        for name, kind in found.random_inputs.items()
    ]
    if found.outliers:
        lines.append(_outliers(found.outliers, len(_ranges(found))))
    bad = {name: tensor for name, tensor in found.tensors.items() if tensor.first_non_finite is not None}
    if bad:
        first = min((t.first_non_finite for t in bad.values() if t.first_non_finite), key=lambda s: s.position)
        lines.append(f"{_tensors(list(bad))} held NaN or Inf, first in {first}; ranges come from the finite values.")
    for content, what in (
        ("zero", "0 in every sample, which leaves the range open"),
        ("constant", "one and the same value in every sample"),
    ):
        names = [name for name, tensor in found.tensors.items() if tensor.content == content]
        if names:
            lines.append(f"{_tensors(names)} held {what}.")
    unseen = [n for n, t in found.tensors.items() if t.content == "nothing" and t.first_non_finite is None]
    return [*lines, f"{_tensors(unseen)} got no value from any sample."] if unseen else lines


def details(found: Adequacy) -> list[Table | Text]:
    """The tensors whose range depends most on one sample, and the samples that set most ends."""
    table = Table.grid(padding=(0, 2), pad_edge=True)
    for justify in ("left", "right", "right", "left", "left"):
        table.add_column(justify=justify, overflow="fold")
    titles = ("tensor", "stable after", "one sample's share", "least value in", "greatest value in")
    table.add_row(*(Text(title, style="dim") for title in titles))
    ordered = sorted(_ranges(found).items(), key=lambda item: -item[1].sole_share)
    for name, tensor in ordered[:_ROWS]:
        ends = [Text(_short(end)) for end in (tensor.lo_sample, tensor.hi_sample)]
        table.add_row(Text(name), str(tensor.stable_after), _percent(tensor.sole_share), *ends)
    setters = ", ".join(f"{setter.sample} {setter.ends}" for setter in found.setters)
    return [table, *([Text(f"  Ends of ranges set by one sample alone: {setters}", style="dim")] if setters else [])]


def _ranges(found: Adequacy) -> dict[str, TensorAdequacy]:
    return {name: tensor for name, tensor in found.tensors.items() if tensor.content != "nothing"}


def _outliers(outliers: Sequence[Outlier], ranges: int) -> str:
    words = [
        f"{one.sample} {one.ratio:.{0 if one.ratio >= 10 else 1}f} times the usual magnitude "
        f"in {one.tensors} of {count(ranges, 'range')}"
        for one in outliers[:_NAMED]
    ]
    more = f"; and {len(outliers) - _NAMED} more" if len(outliers) > _NAMED else ""
    verb = "reaches" if len(outliers) == 1 else "reach"
    return f"{count(len(outliers), 'sample')} {verb} far beyond the others: {'; '.join(words)}{more}. Are they valid?"


def _tensors(names: Sequence[str]) -> str:
    return f"{count(len(names), 'tensor')} ({listed(names, _NAMED)})"


def _short(sample: SampleId | None) -> str:
    return "several" if sample is None else str(sample)


def _percent(share: float) -> str:
    return f"{100 * share:.0f} %"

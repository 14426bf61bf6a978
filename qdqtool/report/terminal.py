"""Result values as calm text for a terminal: few lines, every number with its unit, the worst first."""

from __future__ import annotations

import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from qdqtool.passes_api import Skip, State, Timing
from qdqtool.planning.plan import DerivedFrom, Entry, SharedWith
from qdqtool.planning.precision import INTEGER_PRECISIONS
from qdqtool.report import calibration
from qdqtool.report.layout import by_reason, grid, head, more, operators
from qdqtool.report.placed import fits, integers, listed_rows, target_of
from qdqtool.report.values import Report
from qdqtool.units import count, db, duration, percent, size
from qdqtool.verification.comparison import Comparison
from qdqtool.verification.significance import Difference

OUTPUTS = 8
"""Outputs and tensors listed before the rest is only counted."""
PLAN_ROWS = 40
PLANNERS = frozenset({"plan", "plan-weights", "scale-weights", "convert-float16"})
"""Passes that decide what stays float."""
_PERCENT = frozenset({"top1", "top5"})
_ROLE = re.compile(r":\w+:`~?([^`]*)`|``([^`]*)``")
"""Markup of docstrings, which says nothing in a terminal."""


def console(*, stderr: bool = False) -> Console:
    """A console that colours terminals only, and is wide enough for a log file elsewhere."""
    stream = sys.stderr if stderr else sys.stdout
    return Console(stderr=stderr, highlight=False, width=None if stream.isatty() else 110)


def quantization(
    report: Report, *, source: str, output: str, written: Sequence[str] = (), verbose: bool = False
) -> RenderableType:
    """What ``quantize`` shows: accuracy, what runs in integers, what stayed float and why, times, paths."""
    sizes = report.sizes
    ratio = sizes.float_bytes / max(sizes.quantized_bytes, 1)
    change = f"{ratio:.2f} times smaller" if ratio >= 1 else f"{1 / ratio:.2f} times larger"
    parts = [
        *_synthetic(report.synthetic),
        Text.assemble(
            (f"{source} -> {output}", "bold"),
            f"   {size(sizes.float_bytes)} -> {size(sizes.quantized_bytes)}, {change}",
        ),
        Text(f"{_settings(report.recipe)}, {count(report.samples, 'calibration sample')}", style="dim"),
        *_calibration(report),
        *_accuracy(report),
        *integers(report),
        *stayed_float(report.skipped, {*report.layers} - {*report.weight_only}),
        *_notes(report.notes),
        *(
            (
                *listed_rows(report.listing),
                *_adequacy(report),
                *_ranges(report),
                *_bytes(report),
                *_passes(report.timings),
            )
            if verbose
            else ()
        ),
        Text(""),
        _times(report.timings),
        *([Text(f"Wrote {', '.join(written)}", style="bold green")] if written else []),
    ]
    return Group(*parts)


def comparison(found: Comparison, *, reference: str, quantized: str) -> RenderableType:
    """What ``validate`` shows."""
    title = Text.assemble((f"{reference} against {quantized}", "bold"), f"   {count(found.samples, 'sample')}")
    parts: list[RenderableType] = [title, *_sqnr([("", found)], found.provider), *_score(found)]
    parts += [] if found.warning is None else [Text(found.warning, style="yellow")]
    if found.tensors:
        table = grid(3)
        table.add_row(*(Text(title, style="dim") for title in ("tensor", "alone", "with all before")))
        rows = sorted(found.tensors.items(), key=lambda item: found.local.get(item[0], item[1]))
        for name, value in rows[:OUTPUTS]:
            alone = found.local.get(name)
            table.add_row(Text(name), "" if alone is None else db(alone), db(value))
        parts += [head("Tensors in between", "the worst layers first; first samples only, emulated"), table]
        parts += more(len(rows) - OUTPUTS, "tensor", "--json lists all")
    return Group(*parts)


def plan(state: State, *, source: str, verbose: bool = False) -> RenderableType:
    """What ``quantize --dry-run`` shows: what would be quantized and how, what would not and why."""
    assert state.plan is not None
    table = grid(2, justify="left")
    entries = list(state.plan.entries.items())
    for key, entry in entries if verbose else entries[:PLAN_ROWS]:
        table.add_row(Text(str(key).removeprefix("::")), Text(entry_text(entry)))
    kernels = Counter(state.plan.kernels.values())
    return Group(
        Text.assemble((source, "bold"), "   plan only: nothing was calibrated and nothing is written"),
        Text(_settings(json.loads(state.recipe.to_json())), style="dim"),
        head("To run in integers", f"{count(kernels.total(), 'operator')}: {operators(kernels)}"),
        *stayed_float(state.skipped, state.plan.kernels),
        *_notes(state.notes),
        head("Plan", f"{len(entries)} tensors and uses (node::input)"),
        table,
        *([] if verbose else more(len(entries) - PLAN_ROWS, "entry", "-v lists all")),
    )


def listing(title: str, rows: Iterable[tuple[str, str, str]]) -> RenderableType:
    """Name, one line about it, and where it comes from ("" for built in)."""
    table = grid(2, justify="left")
    for name, summary, origin in rows:
        mark = Text(f"  (plugin of {origin})", style="magenta") if origin else Text("")
        table.add_row(Text(name, style="bold"), Text.assemble(_ROLE.sub(r"\1\2", summary), mark))
    return Group(Text(title, style="dim"), table)


def entry_text(entry: Entry) -> str:
    """A plan's entry in words."""
    if isinstance(entry, SharedWith):
        return f"shares the range of {str(entry.key).removeprefix('::')}"
    if isinstance(entry, DerivedFrom):
        return "int32, at the scales of activation and weight"
    return str(entry) + (f", range [{entry.fixed[0]:g}, {entry.fixed[1]:g}]" if entry.fixed else "")


def _settings(recipe: Mapping[str, object]) -> str:
    """The recipe in a line: target, precision and calibrator where one chooses, then what differs from its default."""
    calibrator = recipe["calibrator"]
    assert isinstance(calibrator, Mapping)
    chosen = ", ".join(f"{name} {value}" for name, value in calibrator.items() if name != "name")
    method = [f"calibrator {calibrator['name']}" + (f" ({chosen})" if chosen else "")]
    more = [f"{name} {value}" for name, value in recipe.items() if name not in ("target", "precision", "calibrator")]
    used = method if recipe["precision"] in INTEGER_PRECISIONS else []
    return ", ".join([f"target {target_of(recipe).name}", str(recipe["precision"]), *used, *more])


def _synthetic(synthetic: bool) -> list[RenderableType]:
    line = "SYNTHETIC DATA: ranges come from random samples. Do not ship this file."
    return [Text(f" {line} ", style="bold white on red")] if synthetic else []


def _calibration(report: Report) -> list[RenderableType]:
    """Whether the calibration data suffice; of random data made here there is nothing to say."""
    if report.calibration is None or report.synthetic:
        return []
    line = calibration.summary(report.calibration)
    findings = [Text(f"  {line}", style="yellow") for line in calibration.findings(report.calibration)]
    return [*([Text(f"Calibration data: {line}", style="dim")] if line else []), *findings]


def _accuracy(report: Report) -> list[RenderableType]:
    target = target_of(report.recipe)
    rows = [("of calibration", report.verification), ("of evaluation", report.evaluation)]
    known = [(origin, found) for origin, found in rows if found is not None]
    if not known:
        return []
    provider = known[0][1].provider
    parts = _sqnr(known, provider)
    if not fits(target, provider):
        line = f"  The file is made for {target.name}; these figures are the {provider.upper()} provider's."
        parts.append(Text(line, style="yellow"))
    return parts + (_score(report.evaluation) if report.evaluation is not None else [])


def _sqnr(rows: Sequence[tuple[str, Comparison]], provider: str) -> list[RenderableType]:
    table = Table.grid(padding=(0, 2), pad_edge=True)
    for justify in ("left", "left", "right", "right"):
        table.add_column(justify=justify)
    table.add_row(*(Text(title, style="dim") for title in ("SQNR of output", "samples", "fused", "emulated")))
    hidden = 0
    for origin, found in rows:
        outputs = sorted(found.fused.items(), key=lambda item: item[1])
        hidden += max(0, len(outputs) - OUTPUTS)
        for name, value in outputs[:OUTPUTS]:
            table.add_row(Text(name), f"{found.samples} {origin}".strip(), db(value), db(found.emulated[name]))
    return [
        head("Accuracy", f"against the float model, on the {provider.upper()} provider"),
        table,
        *more(hidden, "better output", "--json lists all"),
        Text("  fused: as the runtime runs it; emulated: every Q and DQ as written, in float", style="dim"),
    ]


def _score(found: Comparison) -> list[RenderableType]:
    table = Table.grid(padding=(0, 2), pad_edge=True)
    for justify in ("left", "right", "right", "right", "right"):
        table.add_column(justify=justify)
    if found.metric is not None and found.float_score is not None and found.quantized_score is not None:
        difference = round(found.quantized_score - found.float_score, 6) + 0.0  # no -0.00
        is_share = found.metric in _PERCENT
        form = percent if is_share else "{:.4g}".format
        emulated = "" if found.emulated_score is None else form(found.emulated_score)
        table.add_row(*(Text(title, style="dim") for title in ("task", "float", "emulated", "fused", "fused - float")))
        table.add_row(
            Text(found.metric), form(found.float_score), emulated, form(found.quantized_score),
            f"{difference:+.2f} points" if is_share else f"{difference:+.4g}",
        )  # fmt: skip
    parts: list[RenderableType] = [Text(""), table] if table.row_count else []
    if found.difference is not None and found.difference.value:
        parts.append(Text(f"  {_interval(found.difference)}", style="dim"))
    elif found.difference is None and found.float_score is not None:
        parts.append(Text("  one number over all samples: no interval of the difference", style="dim"))
    if found.agreement is not None:
        share = f"  agreement {percent(100 * found.agreement)} of {count(found.samples, 'sample')}"
        parts.append(Text.assemble(share, ("  (greatest entry of the first output at the same place)", "dim")))
    return parts


def _interval(found: Difference) -> str:
    chance = "more than chance" if found.significant else "may be chance"
    p = ", samples drawn anew" if found.p is None else f", p = {found.p:.3f}"
    return f"95 % interval {found.lo:+.2g} to {found.hi:+.2g}{p}: {chance}"


def stayed_float(skipped: Iterable[Skip], integers: Iterable[str]) -> list[RenderableType]:
    """What was left alone, grouped by reason with the most frequent first; nodes among ``integers`` are not listed."""
    done = frozenset(integers)
    parts: list[RenderableType] = []
    groups: dict[bool, dict[str, list[str]]] = {True: {}, False: {}}
    for skip in skipped:
        planned = skip.pass_name in PLANNERS
        if not (planned and skip.node in done):
            reason = skip.reason if planned else f"{skip.pass_name}: {skip.reason}"
            groups[planned].setdefault(reason, []).append(skip.node)
    for planned, reasons in groups.items():
        if reasons:
            total = sum(map(len, reasons.values()))
            title = "Stayed float" if planned else "Left as they were by preparation"
            parts += [head(title, f"{count(total, 'node')}, by reason"), by_reason(reasons)]
    return parts


def _notes(notes: Sequence[str]) -> list[RenderableType]:
    return [head("Notes", ""), *(Text(f"  {note}") for note in notes)] if notes else []


def _adequacy(report: Report) -> list[RenderableType]:
    found = report.calibration
    if found is None or report.synthetic or not found.tensors:
        return []
    return [head("Calibration data", "ranges that depend most on one sample"), *calibration.details(found)]


def _ranges(report: Report) -> list[RenderableType]:
    table = Table.grid(padding=(0, 2), pad_edge=True)
    for _ in range(5):
        table.add_column(overflow="fold")
    table.add_row(*(Text(t, style="dim") for t in ("tensor", "codes", "range", "observed", "by")))
    for item in report.tensors:
        seen = "" if item.observed is None else f"[{item.observed[0]:.4g}, {item.observed[1]:.4g}]"
        table.add_row(Text(item.tensor), item.codes, Text(f"[{item.lo:.4g}, {item.hi:.4g}]"), Text(seen), item.method)
    return [head("Ranges", f"{count(len(report.tensors), 'tensor')}, in the units of the model's own values"), table]


def _bytes(report: Report) -> list[RenderableType]:
    table = grid(2)
    for name, number in report.sizes.parts.items():
        table.add_row(name, size(number))
    return [head("Parts of the file", ""), table]


def _passes(timings: Sequence[Timing]) -> list[RenderableType]:
    table = grid(3)
    for timing in timings:
        table.add_row(timing.pass_name, duration(timing.seconds), count(timing.changes, "place"))
    return [head("Passes", "wall time and places changed"), table]


def _times(timings: Sequence[Timing]) -> Text:
    steps: Counter[str] = Counter()
    for timing in timings:
        steps[timing.pass_name] += timing.seconds  # type: ignore[assignment]  # a Counter adds floats as well
    total = sum(steps.values())
    large = [(name, seconds) for name, seconds in steps.most_common() if seconds >= 0.03 * total]
    rest = total - sum(seconds for _, seconds in large)
    words = [f"{name} {duration(seconds)}" for name, seconds in large]
    words += [f"the rest {duration(rest)}"] if len(large) < len(steps) else []
    return Text(f"Took {duration(total)}: {', '.join(words)}", style="dim")

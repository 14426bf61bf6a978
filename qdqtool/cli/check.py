"""The command that checks quantized models: a linter of Q/DQ graphs, for people and for CI."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from qdqtool.cli.options import PROVIDERS, REPORT, Command, option, say, wrote

if TYPE_CHECKING:
    import onnx

    from qdqtool.lint.findings import Checked, Finding, Rule
    from qdqtool.planning.target import Target

_PATH: Final = click.Path(path_type=Path)
_FORMATS: Final = ("text", "json", "junit", "sarif", "github")
_mending = partial(option, section="Mending")
_baseline = partial(option, section="Baseline")


@dataclass(frozen=True)
class _Baseline:
    """The options around a baseline."""

    baseline: Path | None
    update_baseline: bool
    reference: str | None
    data: str | None
    metric: str | None
    provider: str
    max_range_drift: float
    max_sqnr_drop: float
    max_score_drop: float
    max_latency_increase: float


@click.command(
    cls=Command,
    examples=(
        "qdqtool check model.qdq.onnx",
        "qdqtool check model.qdq.onnx --target cpu --format sarif > findings.sarif",
        "qdqtool check model.qdq.onnx --fix -o mended.onnx",
        "qdqtool check model.qdq.onnx --baseline baseline.json --update-baseline",
        "qdqtool check model.qdq.onnx --baseline baseline.json --float model.onnx --data eval.npz --metric top1",
    ),
)
@click.argument("files", nargs=-1, metavar="MODEL...")
@option("--target", metavar="NAME", help="What the files are for. [default: what their metadata name]")
@option("--format", "form", type=click.Choice(_FORMATS), default="text", help="[default: text]")
@option("--select", multiple=True, metavar="RULE,...", help="Only these rules, by id or name (repeatable).")
@option("--ignore", multiple=True, metavar="RULE,...", help="Not these rules (repeatable).")
@option("--rules", "list_rules", is_flag=True, help="List the rules instead.")
@REPORT
@option("-q", "--quiet", is_flag=True, help="Print errors and machine formats only.")
@_mending("--fix", "mend", is_flag=True, help="Mend what can be without changing outputs; needs -o or --in-place.")
@_mending("-o", "--output", type=_PATH, metavar="FILE", help="Where the mended model goes.")
@_mending("--in-place", is_flag=True, help="Replace the files.")
@_baseline("--baseline", type=_PATH, metavar="FILE", help="Compare with this state of the model.")
@_baseline("--update-baseline", is_flag=True, help="Write the state instead.")
@_baseline("--float", "reference", metavar="FILE", help="The float model, to measure SQNR, score and latency.")
@_baseline("--data", metavar="PATH", help="Samples to measure on, with 'labels' for --metric.")
@_baseline("--metric", metavar="NAME", help="top1, top5 or package.module:function.")
@_baseline("--provider", type=click.Choice(PROVIDERS), default="cpu", help="Where to measure. [default: cpu]")
@_baseline("--max-range-drift", type=float, default=0.1, metavar="SHARE", help="Of the range's width. [default: 0.1]")
@_baseline("--max-sqnr-drop", type=float, default=1.0, metavar="DB", help="[default: 1]")
@_baseline("--max-score-drop", type=float, default=0.5, metavar="N", help="In the metric's own units. [default: 0.5]")
@_baseline("--max-latency-increase", type=float, default=0.2, metavar="SHARE", help="Of the ratio. [default: 0.2]")
def check(files: tuple[str, ...], form: str, list_rules: bool, report: Path | None, **given: Any) -> None:
    """Check quantized MODELs against what ONNX and their target ask of Q/DQ graphs.

    Exit status: 0 no errors, 1 findings of severity error or a broken baseline, 2 wrong usage or input. Machine
    formats go to standard output alone, all else to standard error.
    """
    from qdqtool.errors import GateError
    from qdqtool.lint import rules as catalogue
    from qdqtool.lint import text
    from qdqtool.lint.findings import Severity
    from qdqtool.report import folder, terminal
    from qdqtool.report.files import check_folder

    select, ignore = (_split(given.pop(name)) for name in ("select", "ignore"))
    rules = catalogue.chosen(select, ignore)
    if list_rules:
        terminal.console().print(text.listing(rules))
        return
    options = _Baseline(**{name: given.pop(name) for name in _Baseline.__dataclass_fields__})
    _refuse(files, options, **given)
    if report is not None:
        check_folder(report)
    checked = [_check(path, rules, options, **given) for path in files]
    _show(checked, rules, form, quiet=given["quiet"])
    if report is not None:
        wrote(folder.checked(report, checked, rules), quiet=given["quiet"])
    errors = sum(one.count(Severity.ERROR) for one in checked)
    if errors:
        bad = [one.path for one in checked if one.count(Severity.ERROR)]
        raise GateError(f"{errors} finding{'s' * (errors != 1)} of severity error in {', '.join(bad)}")


def _split(given: Sequence[str]) -> list[str]:
    return [name.strip() for names in given for name in names.split(",") if name.strip()]


def _refuse(
    files: tuple[str, ...],
    options: _Baseline,
    *,
    mend: bool,
    output: Path | None,
    in_place: bool,
    **_: object,
) -> None:
    """Wrong usage, before any work."""
    from qdqtool.report.files import check_output

    problems = {
        "Missing argument 'MODEL...'.": not files,
        "--fix needs -o FILE for the mended model, or --in-place.": mend and output is None and not in_place,
        "-o and --in-place go with --fix.": not mend and (output is not None or in_place),
        "-o and --in-place exclude each other.": output is not None and in_place,
        "-o takes one model; --in-place mends several.": output is not None and len(files) > 1,
        "--baseline takes one model.": options.baseline is not None and len(files) > 1,
        "--update-baseline needs --baseline FILE.": options.update_baseline and options.baseline is None,
        "--float and --data go with --baseline.": options.baseline is None and bool(options.reference or options.data),
        "--float and --data go together.": bool(options.reference) != bool(options.data),
        "--metric needs --float and --data.": options.metric is not None and not options.data,
    }
    for problem, holds in problems.items():
        if holds:
            raise click.UsageError(problem)
    sources = [*files, *filter(None, (options.reference, options.data))]
    for path, inputs in ((output, sources), (options.baseline if options.update_baseline else None, sources)):
        if path is not None:
            check_output(path, inputs)


def _check(
    path: str,
    rules: Sequence[Rule],
    options: _Baseline,
    *,
    target: str | None,
    mend: bool,
    output: Path | None,
    quiet: bool,
    **_: object,
) -> Checked:
    """One model: mended where that was asked for, checked, and compared with its baseline."""
    from qdqtool.lint import linting, subject
    from qdqtool.planning.target_file import resolve

    proto = subject.load(path)
    wanted = linting.target_of(proto) if target is None else resolve(target)
    if mend:
        _mend(path, proto, wanted, rules, output or Path(path), quiet=quiet)
    checked = linting.check(proto, wanted, rules, path=path)
    found = _compare(proto, wanted, options, quiet=quiet) if options.baseline is not None else []
    ids = {rule.id for rule in rules}
    kept = [finding for finding in found if finding.rule in ids]
    return replace(checked, findings=linting.in_order([*checked.findings, *kept]))


def _mend(
    path: str, proto: onnx.ModelProto, target: Target | None, rules: Sequence[Rule], output: Path, *, quiet: bool
) -> None:
    from qdqtool.graphs import model as models
    from qdqtool.lint import linting, text

    done = linting.fix(proto, target, rules)
    if done or output != Path(path):
        models.save(proto, output, external_data=linting.has_external_data(path) or None)
    if not quiet:
        wrote = f"wrote {output}: " if done or output != Path(path) else f"{path}: "
        click.echo(f"{wrote}{text.fixed(done)}", err=True)


def _compare(proto: onnx.ModelProto, target: Target | None, options: _Baseline, *, quiet: bool) -> list[Finding]:
    """Differences from the baseline; none where it is written."""
    from qdqtool import runtime
    from qdqtool.errors import ModelError
    from qdqtool.lint import baseline
    from qdqtool.lint.measure import measure
    from qdqtool.report.files import write_text

    assert options.baseline is not None
    if target is None:
        raise ModelError("the model's metadata name no target to compare with a baseline for; name one with --target")
    before = None if options.update_baseline else baseline.read(options.baseline)
    measures = None
    if options.reference is not None and options.data is not None:
        provider, note = runtime.resolve_provider(options.provider)
        if note is not None and not quiet:
            say(note)
        measures = measure(options.reference, proto, options.data, metric=options.metric, provider=provider)
    now = baseline.of(proto, target, measures)
    if before is None:
        write_text(now.to_json(), options.baseline)
        if not quiet:
            click.echo(f"wrote {options.baseline}", err=True)
        return []
    if before.measures is not None and measures is None and not quiet:
        say("SQNR, score and latency were not compared: give --float and --data")
    limits = baseline.Tolerances(
        options.max_range_drift, options.max_sqnr_drop, options.max_score_drop, options.max_latency_increase
    )
    return baseline.compare(now, before, limits)


def _show(checked: Sequence[Checked], rules: Sequence[Rule], form: str, *, quiet: bool) -> None:
    from qdqtool.lint import machine, text
    from qdqtool.report import terminal

    for one in checked:
        for note in () if quiet else one.notes:
            say(f"{one.path}: {note}")
    if form != "text":
        found = machine.FORMATS[form](checked, rules)
        if found:
            click.echo(found)
    elif not quiet:
        terminal.console().print(text.page(checked))

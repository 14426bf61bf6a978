"""The option that says which backend cases run, and their counts at the end of the tests."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Final

import pytest

if TYPE_CHECKING:
    from tests.backend.harness import Outcome

KEY: Final = "backend"
_WIDTH: Final = 150


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--backend",
        default="tenth",
        metavar="all|tenth|NAME",
        help="which of the ONNX package's backend cases run; NAME as in node/test_add",
    )


def record(record_property: Any, outcomes: dict[str, Outcome]) -> None:
    """Keep outcomes with the test, from where they reach the summary even out of another process."""
    record_property(KEY, {name: asdict(outcome) for name, outcome in outcomes.items()})


def pytest_terminal_summary(terminalreporter: Any) -> None:
    found = dict(_outcomes(terminalreporter.stats))
    if not found:
        return
    terminalreporter.section("ONNX backend cases")
    run = [one for one in found.values() if one["runs"]]
    equal, quantized = (sum(one[key] for one in run) for key in ("equal", "quantized"))
    failed = sum(bool(one["failure"]) for one in run)
    refused = sum(bool(one["reason"]) for one in run)
    counts = f"{equal} equal once prepared, {quantized} quantized, {refused} refused, {failed} failed"
    terminalreporter.write_line(f"{len(run)} run: {counts}; {len(found) - len(run)} not run by onnxruntime")
    for title, some in (("refused", run), ("not run", [one for one in found.values() if not one["runs"]])):
        reasons = Counter(_general(one["reason"]) for one in some if one["reason"])
        for reason, count in reasons.most_common():
            terminalreporter.write_line(f"{title} {count:4}: {reason}")


def _outcomes(stats: dict[str, list[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for reports in stats.values():
        for report in reports:
            if getattr(report, "when", None) == "call":
                yield from (one for key, value in report.user_properties if key == KEY for one in value.items())


def _general(reason: str) -> str:
    """A reason without names and numbers of one case."""
    reason = re.sub(r"^.*(ONNX Runtime only|\) was false\. )", r"\1", reason)  # behind where it was said in the source
    reason = re.sub(r"/onnxruntime_src/\S+ |\[ONNXRuntimeError\] : \d+ : ", "", reason)
    return re.sub(r"'[^']*'|\"[^\"]*\"|\b\d+(\.\d+)*\b(?! is under)", "_", reason)[:_WIDTH]

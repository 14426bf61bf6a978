"""A result as two files in a folder: ``report.json`` for programs, ``report.html`` for people.

A search and a repair have names of their own there, beside what ``quantize`` says about the model that they made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from qdqtool.report.files import write_text
from qdqtool.report.html import render

if TYPE_CHECKING:
    import onnx

    from qdqtool.lint.findings import Checked, Rule
    from qdqtool.mixed_precision.results import SearchResult
    from qdqtool.passes_api import State
    from qdqtool.repairs.values import Repair
    from qdqtool.report.validation import Validation
    from qdqtool.report.values import Report

JSON: Final = "report.json"


def quantized(
    folder: Path, state: State, report: Report, proto: onnx.ModelProto, *, source: str, output: str
) -> list[Path]:
    """Write what a run of ``quantize`` found out; returns the files.

    Args:
        folder: made where it does not exist.
        state: as the run left it, for what the report leaves out.
        report: of the run.
        proto: the quantized model.
        source: the float model's file.
        output: the quantized one's.

    Raises:
        QdqError: a file cannot be written.
    """
    from qdqtool.report import page_data
    from qdqtool.report.html import quantized as pages

    data = page_data.collect(state, report, proto)
    page = pages.page(report, data, source=Path(source).name, output=Path(output).name)
    return [write_text(f"{report.to_json()}\n", folder / JSON), render.write(page, folder)]


def compared(
    folder: Path, found: Validation, *, reference: str, quantized: str, broken: Sequence[str] = ()
) -> list[Path]:
    """Write what a comparison found, and which gates it breaks (in words); returns the files.

    Raises:
        QdqError: a file cannot be written.
    """
    from qdqtool.report.html import compared as pages

    page = pages.page(found, reference=Path(reference).name, quantized=Path(quantized).name, broken=broken)
    return [write_text(f"{found.to_json()}\n", folder / JSON), render.write(page, folder)]


def checked(folder: Path, models: Sequence[Checked], rules: Sequence[Rule]) -> list[Path]:
    """Write what the linter found; returns the files. QdqError where that is not possible."""
    from qdqtool.lint import machine
    from qdqtool.report.html import checked as pages

    page = pages.page(models, rules)
    return [write_text(f"{machine.to_json(models, rules)}\n", folder / JSON), render.write(page, folder)]


def searched(folder: Path, found: SearchResult, *, source: str) -> list[Path]:
    """Write what a search found as ``search.json`` and ``search.html``; returns the files.

    Raises:
        QdqError: a file cannot be written.
    """
    from qdqtool.report.html import searched as pages

    page = pages.page(found, source=Path(source).name)
    return [
        write_text(f"{found.to_json()}\n", folder / "search.json"),
        render.write(page, folder, name="search.html"),
    ]


def repaired(folder: Path, found: Repair, *, reference: str, quantized: str) -> list[Path]:
    """Write what a repair found out and did as ``repair.json`` and ``repair.html``; returns the files.

    Raises:
        QdqError: a file cannot be written.
    """
    from qdqtool.report.html import repaired as pages

    page = pages.page(found, reference=Path(reference).name, quantized=Path(quantized).name)
    return [
        write_text(f"{found.to_json()}\n", folder / "repair.json"),
        render.write(page, folder, name="repair.html"),
    ]

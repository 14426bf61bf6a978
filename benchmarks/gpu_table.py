"""The table of ``benchmarks.gpu`` as Markdown: one row for each case, precision and batch size, and what has none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

_REPLAYED: Final = "replayed ms"
_TITLES: Final = (
    "case", "precision", "batch", "p50 ms", "p90 ms", "ratio", "95 % interval", _REPLAYED, "peak MB", "SQNR dB",
    "integer kernels", "fell to CPU", "copies",
)  # fmt: skip
_LENGTH: Final = 300  # of a note; gpu.json has the whole reason


def markdown(table: Mapping[str, Any]) -> str:
    """The table for people."""
    replayed = table["provider"] == "cuda"
    titles = [title for title in _TITLES if replayed or title != _REPLAYED]
    lines = [table["title"], "", f"| {' | '.join(titles)} |", f"|{'---|' * len(titles)}"]
    notes = []
    for case, found in table["cases"].items():
        notes += [f"* {case}: {found['failed']}"] if "failed" in found else []
        for form, made in found["made"].items():
            notes += [f"* {case}, {form}: {made['failed']}"] if "failed" in made else []
        for batch, cells in found["batches"].items():
            for form, row in _rows(cells).items():
                notes += [f"* {case}, {form}, batch {batch}: {row['failed']}"] if "failed" in row else []
                made = found["made"].get(form, {})
                placed = (str(made.get(key, "")) for key in ("integer_kernels", "fallen", "copies"))
                times = _times(row, replayed=replayed)
                parts = [case, form, str(batch), *times, _peak(cells, form), _number(made.get("sqnr_db")), *placed]
                lines.append(f"| {' | '.join(parts)} |")
    shown = [" ".join(note.split())[:_LENGTH] for note in notes]
    return "\n".join([*lines, "", *(["Not measured:", "", *shown] if shown else []), ""])


def _rows(cells: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Precision -> its times, or why there are none."""
    rows: dict[str, dict[str, Any]] = {}
    for bench in cells["runs"]:
        for name, times in bench.get("latency", {}).items():
            rows.setdefault(name, {"times": times, "ratio": bench["ratios"].get(name)})
        failed = bench.get("failed", {})
        for name, reason in ({"all": failed} if isinstance(failed, str) else failed).items():
            rows[name] = {"failed": reason}
    for bench in (bench for benches in cells["replayed"] for bench in benches):
        for name, times in bench.get("latency", {}).items():
            rows.get(name, {})["replayed"] = times
    return rows


def _times(row: Mapping[str, Any], *, replayed: bool) -> list[str]:
    times, ratio, again = row.get("times") or {}, row.get("ratio"), row.get("replayed") or {}
    interval = f"{ratio['lo']:.2f} to {ratio['hi']:.2f}" if ratio else ""
    found = [*(f"{times[key]:.3f}" if times else "failed" for key in ("p50", "p90"))]
    found += [f"{ratio['value']:.2f}" if ratio else "", interval]
    return [*found, f"{again['p50']:.3f}" if again else "not possible"] if replayed else found


def _peak(cells: Mapping[str, Any], form: str) -> str:
    known = cells.get("memory", {}).get(form, {})
    return f"{known['peak'] / 1e6:.0f}" if "peak" in known else ""


def _number(value: float | str | None) -> str:
    return "" if value is None else value if isinstance(value, str) else f"{value:.1f}"

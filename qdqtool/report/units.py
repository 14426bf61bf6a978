"""Numbers as people read them, each with its unit."""

from __future__ import annotations

import math
from collections.abc import Sequence


def db(value: float) -> str:
    """A signal to noise ratio; "equal" where there is no noise."""
    if math.isinf(value):
        return "equal" if value > 0 else "-inf dB"
    return f"{value:.1f} dB"


def percent(value: float) -> str:
    """A share given in percent."""
    return f"{value:.2f} %"


def size(number: int) -> str:
    """Bytes, in decimal units."""
    value, unit = float(number), "B"
    for unit in ("B", "kB", "MB", "GB", "TB"):  # noqa: B007 (the unit at which the loop stops)
        if value < 999.5:
            break
        value /= 1000
    return f"{number} B" if unit == "B" else f"{value:.1f} {unit}" if value < 99.95 else f"{value:.0f} {unit}"


def duration(seconds: float) -> str:
    """Wall time."""
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.2g} s" if seconds < 9.95 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min"


def count(number: int, what: str) -> str:
    """A number of things: ``1 sample``, ``2 samples``, ``3 entries``."""
    if number == 1:
        return f"1 {what}"
    return f"{number} {what[:-1]}ies" if what.endswith("y") else f"{number} {what}s"


def listed(names: Sequence[str], most: int = 3) -> str:
    """The first few names and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more

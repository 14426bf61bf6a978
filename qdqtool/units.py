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
    return f"{value:.1f} %"


def size(number: int) -> str:
    """Bytes, in decimal units."""
    power = sum(number >= 999.5 * 1000**p for p in range(4))
    if power == 0:
        return f"{number} B"
    value = number / 1000**power
    return f"{value:.{1 if value < 99.95 else 0}f} {('kB', 'MB', 'GB', 'TB')[power - 1]}"


def quantity(number: int) -> str:
    """A large number of anything: ``9,120``, ``1.3 million``, ``12 billion``."""
    power = sum(number >= 999.5 * 1000**p for p in (1, 2, 3))
    if power == 0:
        return f"{number:,}"
    value = number / 1000 ** (power + 1)
    return f"{value:.{1 if value < 9.95 else 0}f} {('million', 'billion', 'trillion')[power - 1]}"


def duration(seconds: float) -> str:
    """Wall time."""
    if seconds < 0.0005:
        return "<1 ms"
    if seconds < 0.0995:
        return f"{1000 * seconds:.0f} ms"
    if seconds < 99.5:
        return f"{seconds:.2f} s" if seconds < 9.995 else f"{seconds:.0f} s"
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

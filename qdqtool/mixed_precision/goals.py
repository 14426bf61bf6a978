"""What a search is for: the best accuracy under a budget, or the smallest model that loses little enough."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Final, Literal

from qdqtool.errors import RecipeError, nearest

_UNITS: Final = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9}
_SECONDS: Final = {"s": 1.0, "m": 60.0, "h": 3600.0}
_KINDS: Final = ("size", "bits", "latency")
_EXAMPLES: Final = "bits=4, size=0.3, size=120kB, latency=0.8"


@dataclass(frozen=True)
class Budget:
    """What the model may take.

    Attributes:
        kind: "bits": mean bits of the weights of the layers searched; "size": bytes of the file; "latency": time of a
            run.
        amount: bits, bytes, or a share of the float model's.
        share: ``amount`` is a share of the float model's.
    """

    kind: Literal["size", "bits", "latency"]
    amount: float
    share: bool = False

    @staticmethod
    def of(text: str) -> Budget:
        """Read ``bits=4``, ``size=0.3`` (of the float file), ``size=120kB`` or ``latency=0.8`` (of the float model's).

        Raises:
            RecipeError: anything else.
        """
        kind, _, value = text.partition("=")
        found = re.fullmatch(r"([0-9.]+)\s*([a-zA-Z]*)", value.strip())
        kind = kind.strip()
        if kind not in _KINDS:
            raise RecipeError(f"unknown budget {text!r}; known: {_EXAMPLES}.{nearest(kind, _KINDS)}")
        try:
            number = float(found[1]) if found is not None else math.nan
        except ValueError:
            number = math.nan
        unit = found[2] if found is not None else ""
        if not number > 0 or (unit and (kind != "size" or unit not in _UNITS)):
            raise RecipeError(f"budget {text!r} has no positive number with a unit it may have, as in {_EXAMPLES}")
        if kind == "size" and unit:
            return Budget("size", number * _UNITS[unit])
        if kind == "bits":
            return Budget("bits", number)
        return Budget("size" if kind == "size" else "latency", number, share=True)

    def __str__(self) -> str:
        return f"{self.kind}={self.amount:g}{'' if self.share or self.kind == 'bits' else 'B'}"


@dataclass(frozen=True)
class Loss:
    """What the smallest model may lose.

    Attributes:
        min_sqnr: dB that every output keeps; None: not asked for.
        max_drop: of the metric, in its own units; None: not asked for.
    """

    min_sqnr: float | None = None
    max_drop: float | None = None

    def __str__(self) -> str:
        named = {"min_sqnr": self.min_sqnr, "max_drop": self.max_drop}
        return ", ".join(f"{name}={value:g}" for name, value in named.items() if value is not None)


Goal = Budget | Loss


def usual_widths(goal: Goal) -> tuple[str, ...]:
    """Widths that layers may have where the user names none.

    Where bytes count, widths that are stored in the room of wider ones gain nothing; nor, where time counts, do those
    without an integer kernel.
    """
    kind = goal.kind if isinstance(goal, Budget) else "size"
    return {"bits": ("2", "3", "4", "5", "6", "8"), "size": ("4", "8", "float"), "latency": ("8", "float")}[kind]


def goal(budget: str | None, max_drop: float | None, min_sqnr: float | None, metric: str | None) -> Goal:
    """The goal that a user's options name.

    Raises:
        RecipeError: none, a budget beside an allowed loss, or a loss of a metric without one.
    """
    lossy = max_drop is not None or min_sqnr is not None
    if (budget is not None) == lossy:
        raise RecipeError(f"give either a budget ({_EXAMPLES}) or what may be lost (max_drop, min_sqnr)")
    if max_drop is not None and metric is None:
        raise RecipeError("max_drop is a loss of a metric; name one, and give evaluation data with labels")
    if max_drop is not None and not max_drop >= 0:
        raise RecipeError(f"max_drop must be at least 0, in the metric's units, not {max_drop}")
    return Loss(min_sqnr, max_drop) if budget is None else Budget.of(budget)


def seconds(text: str) -> float:
    """Read a duration as ``90``, ``90s``, ``10m`` or ``1h``, in seconds; RecipeError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([smh]?)", text.strip())
    if found is None or float(found[1]) <= 0:
        raise RecipeError(f"{text!r} is no duration, as in 90s, 10m or 1h")
    return float(found[1]) * _SECONDS[found[2] or "s"]

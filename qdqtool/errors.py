"""The errors a user can meet: few kinds under one base, each message saying what to do next."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QdqError(Exception):
    """Base of every error that qdqtool raises on purpose; the command line shows its message alone and exits 2."""


class ModelError(QdqError):
    """The model cannot be read, is invalid, or needs something that no runtime offers."""


class DataError(QdqError):
    """Calibration or evaluation data do not fit the model."""


class RecipeError(QdqError):
    """A choice of the user is unknown, misspelt or contradicts another."""


class PipelineError(QdqError):
    """A pass failed, or the chain of passes cannot work; the message names the pass."""


class StatisticsError(QdqError):
    """Statistics are missing, or cannot give the range that was asked for."""


class RuntimeUnavailableError(QdqError):
    """What was asked for cannot run: an execution provider does not load, or Ray is missing or out of reach."""


class GateError(QdqError):
    """The quantized model failed a check the user set (exit status 1); nothing was written."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` with the known name nearest to ``name``, or ``""`` where none is near.

    Long names that differ in a part (``layer1/conv``, ``layer1/Conv_3``) count as near.
    """
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""

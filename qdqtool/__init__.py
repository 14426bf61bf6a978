"""qdqtool: float ONNX model in, verified QDQ model out."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qdqtool.compare import Comparison, compare
    from qdqtool.errors import QdqError
    from qdqtool.pipeline import Result, plan, quantize
    from qdqtool.recipe import Recipe
    from qdqtool.report.values import Report

__all__ = ["Comparison", "QdqError", "Recipe", "Report", "Result", "__version__", "compare", "plan", "quantize"]

_HOMES = {
    "Comparison": "compare",
    "compare": "compare",
    "QdqError": "errors",
    "Result": "pipeline",
    "plan": "pipeline",
    "quantize": "pipeline",
    "Recipe": "recipe",
    "Report": "report.values",
}


def __getattr__(name: str) -> object:
    """Import a public name where it is first used, so that ``import qdqtool`` stays fast."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'qdqtool' has no attribute {name!r}")
    return getattr(import_module(f"qdqtool.{_HOMES[name]}"), name)

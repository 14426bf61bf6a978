"""qdqtool: float ONNX model in, verified QDQ model out.

A public name here must not be a module's too: importing the module would put the module in the name's place.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

if TYPE_CHECKING:
    from qdqtool.errors import QdqError
    from qdqtool.mixed_precision.results import SearchResult
    from qdqtool.mixed_precision.search import search
    from qdqtool.observation.calibration import Calibration
    from qdqtool.pipeline import Result, calibrate, dry_run, quantize
    from qdqtool.recipe import Recipe
    from qdqtool.repairs.repairing import repair
    from qdqtool.repairs.values import Repair
    from qdqtool.report.values import Report
    from qdqtool.verification.comparison import Comparison, compare

_HOMES = {
    "Calibration": "observation.calibration",
    "Comparison": "verification.comparison",
    "compare": "verification.comparison",
    "QdqError": "errors",
    "Result": "pipeline",
    "calibrate": "pipeline",
    "dry_run": "pipeline",
    "quantize": "pipeline",
    "Recipe": "recipe",
    "Repair": "repairs.values",
    "Report": "report.values",
    "repair": "repairs.repairing",
    "SearchResult": "mixed_precision.results",
    "search": "mixed_precision.search",
}
__all__ = [
    "Calibration",
    "Comparison",
    "QdqError",
    "Recipe",
    "Repair",
    "Report",
    "Result",
    "SearchResult",
    "__version__",
    "calibrate",
    "compare",
    "dry_run",
    "quantize",
    "repair",
    "search",
]


def __getattr__(name: str) -> object:
    """Import a public name where it is first used, so that ``import qdqtool`` stays fast."""
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module 'qdqtool' has no attribute {name!r}")
    return getattr(import_module(f"qdqtool.{_HOMES[name]}"), name)

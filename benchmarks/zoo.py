"""Find the model zoo to measure on: a folder with a ``zoo.py`` beside the checkout, or the one given by --zoo."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

DEFAULT = Path(__file__).resolve().parents[2] / "shared" / "zoo"


def load_zoo(folder: str | Path = DEFAULT) -> ModuleType:
    """Import the zoo's module; SystemExit says where it was looked for."""
    file = Path(folder) / "zoo.py"
    if not file.exists():
        raise SystemExit(f"no model zoo at {folder}; give its folder with --zoo")
    spec = importlib.util.spec_from_file_location("model_zoo", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["model_zoo"] = module
    spec.loader.exec_module(module)
    return module

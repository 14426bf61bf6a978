"""Fixtures for every test: real models, which are not part of the project, where the machine has them."""

from __future__ import annotations

import importlib.util
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
ZOO = ROOT.parent / "shared" / "zoo"
NO_ZOO = f"no real models in {ZOO.parent.name}/{ZOO.name} beside the project"


@pytest.fixture(scope="session", autouse=True)
def no_cache_of_the_user(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """For fixtures that live longer than a test."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("QDQTOOL_CACHE_DIR", str(tmp_path_factory.getbasetemp() / "cache"))
        yield


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty cache for each test: nothing comes from another test or from the user, or goes to them."""
    folder = tmp_path_factory.getbasetemp() / f"cache-{uuid.uuid4().hex}"
    monkeypatch.setenv("QDQTOOL_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(scope="session")
def zoo() -> Any:
    """The module that loads real models with their data."""
    if not (ZOO / "zoo.py").is_file():
        pytest.skip(NO_ZOO)
    spec = importlib.util.spec_from_file_location("zoo", ZOO / "zoo.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["zoo"] = module  # its dataclasses look themselves up there
    spec.loader.exec_module(module)
    return module


def _real_models() -> list[Any]:
    found = sorted((ZOO / "models").glob("*.onnx"))
    return found or [pytest.param(None, marks=pytest.mark.skip(reason=NO_ZOO))]


@pytest.fixture(params=_real_models(), ids=lambda path: path.stem if path else "none")
def real_model(request: pytest.FixtureRequest) -> Path:
    """Path of one real model after another."""
    path: Path = request.param
    return path

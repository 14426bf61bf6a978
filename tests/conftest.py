"""Fixtures for every test: real models, which are not part of the project, where the machine has them."""

from __future__ import annotations

import importlib.util
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from tests.backend.summary import pytest_addoption, pytest_terminal_summary

if TYPE_CHECKING:
    from tests.cuda_stub import CudaStub

__all__ = ["pytest_addoption", "pytest_terminal_summary"]  # hooks of the backend cases; pytest finds them here alone

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


@pytest.fixture
def any_data(request: pytest.FixtureRequest) -> Callable[[Path], Any]:
    """Data with which a real model runs, for tests to which values do not matter."""

    def find(path: Path) -> Any:
        if path.stem != "silero_vad":
            return "synthetic:2"
        zoo = request.getfixturevalue("zoo")  # audio must have a certain length, which no shape tells
        return zoo.feeds(zoo.load(path.stem), 2)

    return find


@pytest.fixture(scope="session")
def cuda_stub(tmp_path_factory: pytest.TempPathFactory) -> CudaStub:
    """``cuda_stub(proto, config=None)``: the partition of a model on CUDA, with CUDA libraries that do nothing."""
    from tests import cuda_stub

    reason = cuda_stub.obstacle()
    if reason is not None:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cuda")
    cuda_stub.build(folder)
    return cuda_stub.CudaStub(folder)

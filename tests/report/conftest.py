from __future__ import annotations

from pathlib import Path

import pytest

from qdqtool.report import folder
from tests.report.runs import EVIL, Again, Run, network, run


@pytest.fixture(scope="session")
def finished() -> Run:
    return run(network(EVIL))


@pytest.fixture(scope="session")
def page(finished: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of that run, as a file."""
    out = tmp_path_factory.mktemp("report")
    files = folder.quantized(
        out, finished.state, finished.report, finished.proto, source="in/net.onnx", output="out/net.qdq.onnx"
    )
    assert [path.name for path in files] == ["report.json", "report.html"]
    return out / "report.html"


@pytest.fixture(scope="session")
def again() -> Again:
    """Quantize the network with other fields of the recipe."""
    return lambda **fields: run(network(), **fields)

"""--report of every command: which files it writes, what it says about them, and what it refuses before any work."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from qdqtool.cli.main import main
from tests.builders import feeds
from tests.report.runs import network

Invoke = Callable[..., Result]


@pytest.fixture
def invoke(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Invoke:
    """Run the tool in a folder with model.onnx, calib.npz and model.qdq.onnx."""
    proto = network()
    onnx.save(proto, tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", **feeds(proto, 12))  # type: ignore[arg-type]  # arrays by name
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> Result:
        return CliRunner().invoke(main, list(arguments))

    return run


def quantize(invoke: Invoke, *more: str) -> Result:
    return invoke("quantize", "model.onnx", "--data", "calib.npz", "--target", "cpu", *more)


def test_quantize_names_both_files_among_what_it_wrote(invoke: Invoke) -> None:
    result = quantize(invoke, "--report", "out", "--eval", "calib.npz")
    assert result.exit_code == 0, result.output
    said = " ".join(result.stdout.split())
    assert "Wrote model.qdq.onnx, out/report.json, out/report.html" in said
    assert "model.qdq.onnx: quantization report" in Path("out/report.html").read_text()
    report = json.loads(Path("out/report.json").read_text())
    assert report["verification"]["tensors"] == {}, "evaluation data tell"
    assert report["evaluation"]["local"]
    assert len(Path("out/report.json").read_text()) < 100_000


def test_without_data_there_is_a_page_too(invoke: Invoke) -> None:
    result = invoke("quantize", "model.onnx", "--precision", "w4a16", "--target", "cpu", "--report", "out")
    assert result.exit_code == 0, result.output
    assert "was not measured" in Path("out/report.html").read_text()


def test_validate_writes_even_where_a_gate_fails(invoke: Invoke) -> None:
    assert quantize(invoke, "-q").exit_code == 0
    result = invoke(
        "validate", "model.onnx", "model.qdq.onnx", "--data", "calib.npz", "--min-sqnr", "200", "--report", "out"
    )
    assert result.exit_code == 1
    assert "Wrote out/report.json, out/report.html" in result.stderr
    assert "A gate failed" in Path("out/report.html").read_text()
    assert json.loads(Path("out/report.json").read_text())["samples"] == 12


def test_check_writes_findings(invoke: Invoke) -> None:
    assert quantize(invoke, "-q").exit_code == 0
    result = invoke("check", "model.qdq.onnx", "--report", "out", "-q")
    assert (result.exit_code, result.output) == (0, "")
    assert "model.qdq.onnx: check report" in Path("out/report.html").read_text()
    assert json.loads(Path("out/report.json").read_text())["models"][0]["path"] == "model.qdq.onnx"


@pytest.mark.parametrize("command", ["quantize", "validate", "check"])
def test_a_folder_that_is_a_file_is_refused_before_any_work(invoke: Invoke, command: str) -> None:
    arguments = {
        "quantize": ["model.onnx", "--data", "calib.npz"],
        "validate": ["model.onnx", "model.onnx", "--data", "calib.npz"],
        "check": ["model.onnx"],
    }[command]
    result = invoke(command, *arguments, "--report", "calib.npz")
    assert result.exit_code == 2
    assert "cannot write into calib.npz: calib.npz is a file; name a folder" in result.stderr
    assert sorted(path.name for path in Path().iterdir()) == ["calib.npz", "model.onnx"]

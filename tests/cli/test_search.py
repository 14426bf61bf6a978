"""Searching from files as a user meets it: exit status, messages, files, streams."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from qdqtool.cli.main import main
from qdqtool.mixed_precision.emulation import Emulator
from tests.mixed_precision.network import data, labelled, network

Run = Callable[..., Result]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with net.onnx, calib.npz and eval.npz with labels."""
    onnx.save(network(), tmp_path / "net.onnx")
    fed, labels = labelled()
    np.savez(tmp_path / "calib.npz", x=data()["x"])
    np.savez(tmp_path / "eval.npz", x=fed["x"], labels=labels)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(work: Path) -> Run:
    """Run the command in the work folder, with an exit status of 0 unless another one is expected."""

    def invoke(*arguments: str, status: int = 0) -> Result:
        fixed = ("search", "net.onnx", "--data", "calib.npz", "--eval", "eval.npz", "--target", "cpu")
        found = CliRunner().invoke(main, [*fixed, "--provider", "cpu", "--no-cache", *arguments])
        assert found.exit_code == status, found.output
        return found

    return invoke


def test_writes_the_best_model_its_recipe_and_what_was_found(run: Run, work: Path) -> None:
    found = run("--budget", "bits=4", "--widths", "2,4,8", "--metric", "top1", "--json", "--report", "out")
    values = json.loads(found.stdout)
    assert values == json.loads((work / "out" / "search.json").read_text())
    assert values["widths"] == ["2", "4", "8"]
    assert (work / "net.qdq.onnx").stat().st_size == values["best"]["bytes"]
    assert tomllib.loads((work / "net.qdq.toml").read_text())["nodes"] == values["recipe"]["nodes"]
    for text in ("net.qdq.onnx, net.qdq.toml, net.qdq.search.json", "bits=4", "held out"):
        assert text in found.stderr


@pytest.mark.parametrize(
    ("arguments", "message", "status"),
    [
        ((), "either a budget", 2),
        (("--budget", "bytes=4"), "unknown budget 'bytes=4'", 2),
        (("--budget", "bits=4", "--widths", "4,7"), "not 7", 2),
        (("--budget", "bits=4", "--time", "soon"), "'soon' is no duration", 2),
        (("--budget", "bits=1.5"), "the least is 2 bits in the mean", 2),
        (("--min-sqnr", "90", "--widths", "8"), "no model keeps min_sqnr=90", 1),
        (("--budget", "bits=4", "-o", "calib.npz"), "would be overwritten", 2),
    ],
)
def test_says_what_is_wrong(run: Run, work: Path, arguments: tuple[str, ...], message: str, status: int) -> None:
    found = run(*arguments, status=status)
    assert message in found.stderr
    assert not (work / "net.qdq.onnx").exists()


def test_an_interrupt_keeps_the_best_and_says_so(run: Run, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(self: Emulator, assignment: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Emulator, "measure", interrupted)
    found = run("--budget", "bits=4", "--widths", "4,8", status=130)
    assert "net.qdq.onnx is the best model so far" in found.stderr
    onnx.checker.check_model(onnx.load(work / "net.qdq.onnx"))

"""Every sample runs as its README says, from a folder of the user's, and leaves the repository as it was."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

SAMPLES = Path(__file__).parents[1] / "samples"
DIGITS = SAMPLES / "01_quantize_a_model"


def run_script(script: Path, cwd: Path) -> str:
    command = [sys.executable, "-W", "error", str(script)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout


def test_quantize_a_model(tmp_path: Path) -> None:
    before = sorted(path.name for path in DIGITS.iterdir())
    printed = run_script(DIGITS / "quantize.py", tmp_path)

    assert [path.name for path in tmp_path.iterdir()] == ["digits.qdq.onnx"]
    assert sorted(path.name for path in DIGITS.iterdir()) == before
    quantized = onnx.load(tmp_path / "digits.qdq.onnx")
    onnx.checker.check_model(quantized)
    assert sum(node.op_type == "QuantizeLinear" for node in quantized.graph.node) >= 10
    assert len(quantized.SerializeToString()) < 0.5 * (DIGITS / "digits.onnx").stat().st_size

    found = re.search(r"logits: ([\d.]+) dB SQNR on 16 calibration images", printed)
    assert found is not None
    assert float(found[1]) > 33
    integer = re.search(r"(\d+) integer kernels among (.*)", printed)
    assert integer is not None
    assert int(integer[1]) >= 18
    assert "14 QLinearConv" in integer[2]
    accuracy = {name: float(value) for name, value in re.findall(r"(\w+): top-1 ([\d.]+) %", printed)}
    assert accuracy["float"] == pytest.approx(99.8, abs=0.05)
    assert accuracy["quantized"] >= accuracy["float"] - 0.25


@pytest.mark.parametrize("folder", sorted(SAMPLES.iterdir()), ids=lambda path: path.name)
def test_every_sample_is_a_readme_and_a_short_script(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    scripts = [path for path in folder.glob("*.py") if path.name != "train.py"]
    assert scripts
    for script in scripts:
        assert len(script.read_text(encoding="utf-8").splitlines()) < 60
    for name in re.findall(r"^\| `([^`]+)` \|", text, re.MULTILINE):
        assert (folder / name).is_file()
    assert sum(path.stat().st_size for path in folder.glob("*.onnx")) < 1e6

"""A third party's distribution, built and installed for real, and used by a process that knows nothing else of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
PLUGIN = ROOT / "tests" / "plugin"
SAMPLE = ROOT / "samples" / "02_write_a_calibrator"

USE = """
import json
import numpy as np
import onnx
from qdqtool import pipeline, quantize
from qdqtool.passes_api import PassManager
from qdqtool.recipe import Recipe
from qdqtool.registry import make

text = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 4] x) => (float[N, 3] y) { a = Neg(x) b = Neg(a) y = %s }'
plain, negated = (onnx.parser.parse_model(text % last) for last in ("MatMul(x, w)", "MatMul(b, w)"))
for proto in (plain, negated):
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.eye(4, 3, dtype=np.float32), "w"))
data = {"x": np.linspace(0, 3, 40, dtype=np.float32).reshape(10, 4)}

def scale(calibrator):
    model = quantize(plain, data, target="cpu", provider="cpu", calibrator=calibrator).model
    (first,) = [node for node in model.graph.node if node.op_type == "QuantizeLinear" and node.input[0] == "x"]
    (found,) = [onnx.numpy_helper.to_array(t) for t in model.graph.initializer if t.name == first.input[1]]
    return float(found) * 255

state, _ = pipeline.load(negated, Recipe(), "cpu")
changed = PassManager([make("passes", "remove-double-neg", {})]).run(state)[0].changes
print(json.dumps({
    "ends": [scale("minmax"), scale("power_of_two"), scale({"name": "power_of_two", "halvings": 1})],
    "changed": changed,
    "operators": [node.op for node in state.graph.nodes],
}))
"""


def installed(source: Path, tmp: Path) -> Path:
    """A folder into which pip, without network, built and installed the distribution in ``source``."""
    copy = shutil.copytree(source, tmp / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    options = ("--no-deps", "--no-index", "--no-build-isolation", "--disable-pip-version-check")
    command = [sys.executable, "-m", "pip", "install", "--quiet", *options, "--target", str(tmp / "site"), str(copy)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    return tmp / "site"


def python(*arguments: str, site: Path | None, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run an interpreter that also sees ``site``; tables are wide enough not to be folded."""
    environment = {**os.environ, "PYTHONPATH": str(site or ""), "COLUMNS": "200"}
    command = [sys.executable, "-W", "error", *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False, timeout=300)


@pytest.fixture(scope="module")
def plugin(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return installed(PLUGIN, tmp_path_factory.mktemp("plugin"))


@pytest.mark.parametrize(
    ("command", "row"),
    [
        ("calibrators", "Ends at powers of two, the greatest that were seen. [halvings=0]  (plugin of acme-qdq)"),
        ("passes", "Read the input of two Neg nodes in a row instead of their output.  (plugin of acme-qdq)"),
    ],
)
def test_entries_are_listed_once_installed(plugin: Path, tmp_path: Path, command: str, row: str) -> None:
    with_it, without = (python("-m", "qdqtool", command, site=site, cwd=tmp_path) for site in (plugin, None))
    assert (with_it.returncode, with_it.stderr, without.returncode) == (0, "", 0)
    assert " ".join(row.split()) in " ".join(with_it.stdout.split())  # the page wraps lines
    assert "acme" not in without.stdout


def test_calibrator_and_pass_do_their_work(plugin: Path, tmp_path: Path) -> None:
    done = python("-c", USE, site=plugin, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    assert found["ends"] == pytest.approx([3, 2, 1], rel=1e-6)
    assert found["changed"] == 1
    assert found["operators"] == ["MatMul"]


def test_a_name_that_is_taken_is_an_error_that_names_both(plugin: Path, tmp_path: Path) -> None:
    site = shutil.copytree(plugin, tmp_path / "site")
    (entries,) = site.glob("acme_qdq-*.dist-info/entry_points.txt")
    entries.write_text(entries.read_text(encoding="utf-8").replace("power_of_two =", "mse ="), encoding="utf-8")
    done = python("-m", "qdqtool", "calibrators", site=site, cwd=tmp_path)
    assert done.returncode == 2
    assert "acme-qdq offers 'mse' in qdqtool.calibrators, but qdqtool itself has that name already" in done.stderr


def test_the_sample_calibrator_beats_those_that_heed_broken_samples(tmp_path: Path) -> None:
    site = installed(SAMPLE, tmp_path)
    done = python(str(SAMPLE / "use_calibrator.py"), site=site, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    found = {name: float(db) for name, db in re.findall(r"^(\w+): ([\d.]+) dB SQNR$", done.stdout, re.MULTILINE)}
    assert list(found) == ["minmax", "mse", "sample_quantile"]
    assert found["sample_quantile"] > max(found["minmax"], found["mse"]) + 15
    assert sorted(path.name for path in tmp_path.iterdir()) == ["site", "source"]

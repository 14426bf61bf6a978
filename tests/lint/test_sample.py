"""The sample for CI: its script prints what its README says, and its workflow runs commands that exist."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import yaml
from click.testing import CliRunner

from qdqtool.cli.main import main

SAMPLE = Path(__file__).parents[2] / "samples" / "03_check_in_ci"


def test_the_script_finds_no_change(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", str(SAMPLE / "check_model.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    readme = (SAMPLE / "README.md").read_text(encoding="utf-8")
    assert done.stdout in readme
    assert [path.name for path in tmp_path.iterdir()] == ["digits.qdq.onnx"]

    found = CliRunner().invoke(
        main, ["check", str(tmp_path / "digits.qdq.onnx"), "--baseline", str(SAMPLE / "baseline.json")]
    )
    assert found.exit_code == 0, found.output


def test_the_workflow_runs_what_exists() -> None:
    workflow = yaml.safe_load((SAMPLE / "workflow.yml").read_text(encoding="utf-8"))
    steps = workflow["jobs"]["check"]["steps"]
    lines = [step["run"] for step in steps if step.get("run", "").startswith("qdqtool ")]
    assert any("--format sarif" in line for line in lines)
    options = {name for parameter in main.commands["check"].params for name in parameter.opts}
    for line in lines:
        _, command, *arguments = shlex.split(line.partition(">")[0])
        assert command == "check"
        assert {argument for argument in arguments if argument.startswith("-")} <= options
    written = re.search(r"> (\S+)", lines[0])
    assert written is not None
    uploads = [step["with"]["sarif_file"] for step in steps if "sarif" in step.get("uses", "")]
    assert uploads == [written[1]]

"""Checking models as a user meets it: exit status, streams, formats, fixes, baselines and messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from qdqtool.cli.main import main
from qdqtool.graphs import model as models
from tests.builders import conv_chain, feeds, quantized
from tests.lint.models import model

FLOAT = conv_chain(2)
Run = Callable[..., Result]


@pytest.fixture(scope="module")
def made() -> onnx.ModelProto:
    return quantized(FLOAT, feeds(FLOAT, 8)).model


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: onnx.ModelProto) -> Path:
    """The current folder, with the tool's own model, a foreign one, a broken one, and one that can be mended."""
    onnx.save(FLOAT, tmp_path / "float.onnx")
    onnx.save(made, tmp_path / "own.onnx")
    onnx.save(model(), tmp_path / "foreign.onnx")
    onnx.save(model({"rs": np.array(0, np.float32)}), tmp_path / "broken.onnx")
    onnx.save(model({"left": np.ones((40, 50), np.float32)}), tmp_path / "mendable.onnx")
    np.savez(tmp_path / "eval.npz", x=feeds(FLOAT, 8)["x"])
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(work: Path) -> Run:
    """Run the command, with an exit status of 0 unless another one is expected."""

    def invoke(*arguments: str, status: int = 0) -> Result:
        found = CliRunner().invoke(main, ["check", *arguments])
        assert found.exit_code == status, found.output
        return found

    return invoke


def test_a_clean_model(run: Run) -> None:
    found = run("own.onnx")
    assert "target cpu" in found.stdout
    assert found.stdout.rstrip().endswith("clean")
    assert found.stderr == ""
    assert run("own.onnx", "-q").output == ""


def test_an_error_is_status_1(run: Run) -> None:
    found = run("broken.onnx", "own.onnx", "--target", "cpu", status=1)
    assert "error QDQ001 invalid-scale" in found.stdout
    assert "error: 2 findings of severity error in broken.onnx" in found.stderr
    run("broken.onnx", "--target", "cpu", "--ignore", "QDQ001", "--ignore", "unequal-pair")
    run("broken.onnx", "--select", "QDQ009,QDQ010")


def test_warnings_are_status_0(run: Run) -> None:
    assert "1 warning" in run("mendable.onnx", "--target", "cpu").stdout


def test_without_a_target_the_user_is_told(run: Run) -> None:
    found = run("foreign.onnx")
    assert "no target" in found.stdout
    assert "note: foreign.onnx: its metadata name no target, so QDQ011" in found.stderr
    assert run("float.onnx").stderr == ""  # nothing there that a target could ask for


@pytest.mark.parametrize("form", ["json", "junit", "sarif", "github"])
def test_machine_formats_are_alone_on_stdout(run: Run, form: str) -> None:
    found = run("broken.onnx", "mendable.onnx", "--format", form, status=1)
    assert "QDQ001" in found.stdout
    assert "note: " in found.stderr
    assert "note: " not in found.stdout
    if form in ("json", "sarif"):
        json.loads(found.stdout)
    assert run("own.onnx", "-q", "--format", form).stderr == ""


def test_the_rules_are_listed(run: Run) -> None:
    found = run("--rules")
    assert "QDQ001 invalid-scale" in found.stdout
    assert "QDQ105" in found.stdout


def test_fix_writes_another_file(run: Run, work: Path) -> None:
    before = (work / "mendable.onnx").read_bytes()
    found = run("mendable.onnx", "--target", "cpu", "--fix", "-o", "mended.onnx")
    assert "wrote mended.onnx: mended QDQ009 at 1 place" in found.stderr
    assert found.stdout.rstrip().endswith("clean")
    assert (work / "mendable.onnx").read_bytes() == before
    assert len((work / "mended.onnx").read_bytes()) < len(before) - 7500
    run("mended.onnx", "--target", "cpu")


def test_fix_in_place_touches_what_it_mends_alone(run: Run, work: Path) -> None:
    before = {path: path.read_bytes() for path in work.glob("*.onnx")}
    found = run("own.onnx", "mendable.onnx", "--fix", "--in-place")
    assert "own.onnx: nothing to mend" in found.stderr
    changed = {path.name for path, content in before.items() if path.read_bytes() != content}
    assert changed == {"mendable.onnx"}
    assert not [path for path in work.iterdir() if path.name.startswith(".")]
    run("own.onnx", "mendable.onnx", "--fix", "--in-place", "-q")


def test_fix_keeps_tensors_beside_the_file(run: Run, work: Path) -> None:
    models.save(model({"left": np.ones((40, 50), np.float32)}), work / "large.onnx", external_data=True)
    run("large.onnx", "--fix", "--in-place")
    assert (work / "large.onnx.data").is_file()
    assert "left" not in {t.name for t in models.load(work / "large.onnx").graph.initializer}


def test_a_baseline(run: Run, work: Path) -> None:
    found = run("own.onnx", "--baseline", "baseline.json", "--update-baseline")
    assert "wrote baseline.json" in found.stderr
    assert json.loads((work / "baseline.json").read_text())["placement"].keys() == {"c0", "c1"}
    run("own.onnx", "--baseline", "baseline.json")
    worse = quantized(FLOAT, {"x": 3 * feeds(FLOAT, 8)["x"]}).model
    onnx.save(worse, work / "worse.onnx")
    found = run("worse.onnx", "--baseline", "baseline.json", status=1)
    assert "error QDQ101 range-drift" in found.stdout
    run("worse.onnx", "--baseline", "baseline.json", "--max-range-drift", "9")
    run("worse.onnx", "--baseline", "baseline.json", "--ignore", "range-drift")


def test_a_baseline_with_measures(run: Run, work: Path) -> None:
    measured = ("--float", "float.onnx", "--data", "eval.npz")
    run("own.onnx", "--baseline", "b.json", "--update-baseline", *measured)
    written = json.loads((work / "b.json").read_text())
    assert written["measures"]["sqnr_db"]["r1"] > 25
    assert "were not compared: give --float and --data" in run("own.onnx", "--baseline", "b.json").stderr
    written["measures"]["sqnr_db"]["r1"] += 5
    written["measures"]["latency_ratio"] = 1e3
    (work / "b.json").write_text(json.dumps(written))
    found = run("own.onnx", "--baseline", "b.json", "--format", "json", *measured, status=1)
    assert [one["rule"] for one in json.loads(found.stdout)["models"][0]["findings"]] == ["QDQ103"]
    run("own.onnx", "--baseline", "b.json", "--max-sqnr-drop", "6", *measured)


WRONG = [
    ((), "Missing argument 'MODEL...'"),
    (("missing.onnx",), "model file missing.onnx does not exist"),
    (("eval.npz",), "eval.npz is no ONNX model"),
    (("own.onnx", "--target", "cpuu"), "Did you mean 'cpu'?"),
    (("own.onnx", "--select", "QDQ999"), "there is no rule 'QDQ999'"),
    (("own.onnx", "--fix"), "--fix needs -o FILE"),
    (("own.onnx", "-o", "x.onnx"), "go with --fix"),
    (("own.onnx", "--fix", "-o", "x.onnx", "--in-place"), "exclude each other"),
    (("own.onnx", "broken.onnx", "--fix", "-o", "x.onnx"), "-o takes one model"),
    (("own.onnx", "--fix", "-o", "own.onnx"), "is an input of this run"),
    (("own.onnx", "--fix", "-o", "nowhere/x.onnx"), "does not exist"),
    (("own.onnx", "--update-baseline"), "needs --baseline"),
    (("own.onnx", "broken.onnx", "--baseline", "b.json"), "--baseline takes one model"),
    (("own.onnx", "--baseline", "b.json"), "baseline b.json cannot be read"),
    (("foreign.onnx", "--baseline", "b.json", "--update-baseline"), "name no target"),
    (("own.onnx", "--baseline", "own.onnx"), "cannot be read"),
    (("own.onnx", "--baseline", "own.onnx", "--update-baseline"), "is an input of this run"),
    (("own.onnx", "--baseline", "b.json", "--data", "eval.npz"), "--float and --data go together"),
    (("own.onnx", "--float", "float.onnx", "--data", "eval.npz"), "go with --baseline"),
    (("own.onnx", "--baseline", "b.json", "--metric", "top1"), "--metric needs"),
    (
        ("own.onnx", "--baseline", "b.json", "--update-baseline", "--float", "float.onnx", "--data", "eval.npz",
         "--metric", "top1"),
        "needs labels",
    ),
]  # fmt: skip


def test_wrong_usage_is_status_2_and_changes_nothing(run: Run, work: Path) -> None:
    before = {path: path.read_bytes() for path in work.iterdir()}
    for arguments, message in WRONG:
        found = run(*arguments, status=2)
        assert message in " ".join(found.stderr.split()), arguments
        assert found.stdout == "", arguments
        assert "Traceback" not in found.output
        assert {path: path.read_bytes() for path in work.iterdir()} == before, arguments


def test_the_pre_commit_hook_runs_the_command() -> None:
    import yaml

    (hook,) = yaml.safe_load((Path(__file__).parents[2] / ".pre-commit-hooks.yaml").read_text(encoding="utf-8"))
    assert hook["id"] == "qdqtool-check"
    assert hook["entry"].split()[:2] == ["qdqtool", "check"]
    assert hook["language"] == "python"
    assert hook["files"] == r"\.onnx$"

"""Repairing a model as a user meets it: files, streams, exit status and messages."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

import qdqtool
from qdqtool.cli.main import main
from qdqtool.recipe import Recipe
from tests.builders import feeds
from tests.repairs.models import GOOD, SAMPLES

Run = Callable[..., Result]


@pytest.fixture(scope="module")
def made() -> dict[str, onnx.ModelProto]:
    """A good model, and one of which a range is too narrow."""
    recipe = {"target": "cpu", "calibrator": "minmax"}
    narrow = {**recipe, "tensors": {"r1": {"range": [0, 0.2]}}}
    return {
        name: qdqtool.quantize(GOOD, feeds(GOOD, SAMPLES), recipe=one, cache=False, provider="cpu").model
        for name, one in (("good", recipe), ("bad", narrow))
    }


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, made: dict[str, onnx.ModelProto]) -> Run:
    """Run the command in a folder with models and data; exit status 0 unless another one is expected."""
    onnx.save(GOOD, tmp_path / "float.onnx")
    for name, proto in made.items():
        onnx.save(proto, tmp_path / f"{name}.onnx")
    np.savez(tmp_path / "calib.npz", x=feeds(GOOD, SAMPLES)["x"])
    monkeypatch.chdir(tmp_path)

    def invoke(*arguments: str, status: int = 0) -> Result:
        found = CliRunner().invoke(main, ["repair", "float.onnx", *arguments, "--data", "calib.npz"])
        assert found.exit_code == status, found.output
        return found

    return invoke


def test_a_model_is_repaired(run: Run) -> None:
    found = run("bad.onnx", "--recipe-out", "repaired.toml")
    assert "c2" in found.stdout
    assert "range of r1 chosen by minmax instead of set" in found.stdout
    assert "Wrote bad.repaired.onnx, repaired.toml" in found.stdout
    assert found.stderr == ""
    onnx.checker.check_model(onnx.load("bad.repaired.onnx"))
    recipe = Recipe.of(tomllib.loads(Path("repaired.toml").read_text(encoding="utf-8")))
    assert recipe.tensors == {}


def test_the_recipe_that_is_written_makes_the_model_that_is_written(run: Run) -> None:
    run("bad.onnx", "-o", "one.onnx", "--recipe-out", "repaired.toml")
    arguments = ["quantize", "float.onnx", "--data", "calib.npz", "--recipe", "repaired.toml", "-o", "other.onnx"]
    assert CliRunner().invoke(main, [*arguments, "-q"]).exit_code == 0
    assert Path("one.onnx").read_bytes() == Path("other.onnx").read_bytes()


def test_a_good_model_is_left_alone(run: Run) -> None:
    found = run("good.onnx")
    assert "nothing to repair" in found.stdout
    assert not Path("good.repaired.onnx").exists()


def test_programs_get_json_alone(run: Run) -> None:
    found = run("bad.onnx", "--json", "-q")
    values = json.loads(found.stdout)
    assert found.stderr == ""
    assert values["steps"][0]["remedy"] == "calibrator"
    assert {one["node"] for one in values["analysis"]["layers"]} >= {"c0", "c1", "c2", "c3"}


def test_a_goal_out_of_reach_ends_with_status_1_and_the_best_is_written(run: Run) -> None:
    found = run("bad.onnx", "--min-sqnr", "90", "--allow", "calibrator, bias", status=1)
    assert "below --min-sqnr 90 dB, and nothing more that is allowed helps" in found.stderr
    assert Path("bad.repaired.onnx").exists()
    run("bad.onnx", "--min-sqnr", "30", "--allow", "calibrator")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["bad.onnx", "--allow", "magic"], "unknown remedy 'magic'"),
        (["bad.onnx", "--max-drop", "1"], "name one with --metric"),
        (["bad.onnx", "--metric", "top1"], "give them with --eval"),
        (["float.onnx"], "holds no DequantizeLinear"),
        (["absent.onnx"], "absent.onnx does not exist"),
        (["bad.onnx", "-o", "calib.npz"], "is an input of this run"),
        (["bad.onnx", "-o", "no/where.onnx"], "the folder no does not exist"),
    ],
)
def test_wrong_usage_ends_with_status_2_and_writes_nothing(run: Run, arguments: list[str], message: str) -> None:
    before = sorted(Path().iterdir())
    assert message in run(*arguments, status=2).stderr
    assert sorted(Path().iterdir()) == before

"""Searching from the model to the best assignment, its recipe and its files."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qdqtool
from qdqtool.errors import DataError, GateError, RecipeError
from qdqtool.mixed_precision.emulation import Emulator
from qdqtool.mixed_precision.results import SearchResult
from qdqtool.mixed_precision.workbench import Step
from tests.mixed_precision.network import LAYERS, data, labelled, network, searched, sqnr_of


@pytest.fixture(scope="module")
def four_bits(tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchResult, Path]:
    """A search for 4 bits in the mean, and the file that it wrote."""
    output = tmp_path_factory.mktemp("search") / "net.qdq.onnx"
    return searched(budget="bits=4", output=output), output


def test_mean_of_4_bits_is_nearer_than_4_bits_everywhere(four_bits: tuple[SearchResult, Path]) -> None:
    result, _ = four_bits
    assert result.best.bits <= 4 + 1e-9
    assert result.baseline is not None
    assert result.baseline.uniform == "4"
    assert result.best.holdout.sqnr_db > result.baseline.holdout.sqnr_db + 1
    assert result.best.selection.sqnr_db == max(trial.selection.sqnr_db for trial in result.trials)


def test_the_recipe_beside_the_file_makes_the_same_model(four_bits: tuple[SearchResult, Path]) -> None:
    result, output = four_bits
    fields = tomllib.loads(output.with_suffix(".toml").read_text())
    again = qdqtool.quantize(network(), data(), recipe=fields, provider="cpu", cache=False)
    assert again.recipe == result.recipe
    assert again.model.SerializeToString() == onnx.load(output).SerializeToString()
    assert output.stat().st_size == result.best.bytes


def test_figures_are_those_of_the_file_on_samples_held_out(four_bits: tuple[SearchResult, Path]) -> None:
    result, output = four_bits
    fed, _ = labelled()
    whole = sqnr_of(onnx.load(output), fed)
    parts = (result.best.selection.sqnr_db, result.best.holdout.sqnr_db)
    assert min(parts) <= whole <= max(parts)
    assert result.best.selection.samples == result.best.holdout.samples == 30


def test_every_layer_has_its_sensitivity_at_every_width(four_bits: tuple[SearchResult, Path]) -> None:
    result, _ = four_bits
    values = json.loads(result.to_json())
    assert values["layers"] == [*LAYERS]
    assert values["widths"] == ["2", "3", "4", "5", "6", "8"]
    assert values["chosen"] == result.best.assignment
    for name in LAYERS:
        alone, together = (list(values[kind][name].values()) for kind in ("local_db", "cumulative_db"))
        assert np.all(np.diff(alone) > 0)
        assert len(together) == len(values["widths"])
        assert np.all(np.array(together) <= np.array(alone) + 1.0)
    assert values["local_db"]["c0"] == pytest.approx(values["cumulative_db"]["c0"])


def test_an_interrupted_search_goes_on_to_the_same_end(
    four_bits: tuple[SearchResult, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, measure, runs = tmp_path / "net.qdq.onnx", Emulator.measure, []

    def interrupted(self: Emulator, assignment: Any) -> tuple[float, float | None]:
        runs.append(assignment)
        if len(runs) == 17:
            raise KeyboardInterrupt
        return measure(self, assignment)

    monkeypatch.setattr(Emulator, "measure", interrupted)
    with pytest.raises(KeyboardInterrupt):
        searched(budget="bits=4", output=output)
    onnx.checker.check_model(onnx.load(output))  # the uniform model is there
    first = len(runs)
    result = searched(budget="bits=4", output=output)
    whole, file = four_bits
    assert result.to_dict() == whole.to_dict()
    assert output.read_bytes() == file.read_bytes()
    measured = {tuple(sorted(one.items())) for one in runs}
    assert len(runs) - 1 == len(measured), "a figure was measured twice"
    assert len(runs) > first


def test_another_search_takes_no_figures_of_other_data(four_bits: tuple[SearchResult, Path]) -> None:
    _, output = four_bits
    before = json.loads(output.with_suffix(".search.json").read_text())
    fed, _ = labelled(20)
    searched(budget="bits=4", output=output.with_name("other.onnx"), evaluation=fed, labels=None, widths=["4"])
    after = json.loads(output.with_name("other.search.json").read_text())
    assert before["key"] != after["key"]


def test_the_time_ends_a_search_with_what_it_has(tmp_path: Path) -> None:
    result = searched(budget="bits=4", output=tmp_path / "net.onnx", seconds=1e-6)
    assert not result.complete
    assert result.best.uniform == "4"
    assert (tmp_path / "net.onnx").stat().st_size == result.best.bytes


def test_a_share_of_the_file_is_kept() -> None:
    result = searched(budget="size=0.6", widths=["4", "8", "float"])
    assert result.best.bytes <= 0.6 * result.float_bytes
    assert result.baseline is not None
    assert result.best.holdout.sqnr_db > result.baseline.holdout.sqnr_db


def test_the_smallest_model_that_keeps_its_sqnr() -> None:
    result = searched(min_sqnr=22.0, widths=["4", "8", "float"])
    kept = [t for t in result.trials if min(t.selection.sqnr_db, t.holdout.sqnr_db) >= 22.0]
    assert result.best == min(kept, key=lambda trial: trial.bytes)
    uniform = next(trial for trial in result.trials if trial.uniform == "8")
    assert result.best.bytes < uniform.bytes


def test_the_smallest_model_whose_metric_drops_little_enough() -> None:
    result = searched(max_drop=4.0, metric="top1", widths=["2", "4", "8"])
    for quality in (result.best.selection, result.best.holdout):
        assert quality.drop is not None
        assert quality.drop <= 4.0
    assert result.local_drop["c0"].keys() == {"2", "4", "8"}


def test_a_latency_budget_is_measured() -> None:
    result = searched(budget="latency=50", widths=["8", "float"])
    assert result.best.latency is not None
    assert 0 < result.best.latency <= 50


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"budget": "bits=1"}, "the least is 2 bits in the mean"),
        ({"budget": "size=0.01", "widths": ["4", "8"]}, r"the least is [0-9.]+ kB"),
        ({"budget": "latency=0.0001"}, "of the float model's time"),
    ],
)
def test_a_budget_that_cannot_be_met_names_the_least(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        searched(**options)


def test_a_loss_that_no_model_keeps_names_the_best(tmp_path: Path) -> None:
    with pytest.raises(GateError, match=r"the best reaches [0-9.]+ dB"):
        searched(min_sqnr=90.0, widths=["4", "8"], output=tmp_path / "net.onnx")
    assert not (tmp_path / "net.onnx").exists()


def test_what_does_not_go_together_is_refused() -> None:
    with pytest.raises(RecipeError, match="leave precision w4a8 out"):
        searched(budget="bits=4", precision="w4a8")
    with pytest.raises(RecipeError, match="one that is not float"):
        searched(budget="size=0.5", widths=["float"])
    with pytest.raises(DataError, match="one of them held out"):
        searched(budget="bits=4", evaluation={"x": data(1)["x"]})
    with pytest.raises(DataError, match="no labels"):
        searched(max_drop=0.5, metric="top1", labels=None)


def test_progress_names_the_stage_and_the_best(monkeypatch: pytest.MonkeyPatch) -> None:
    steps: list[Step] = []
    searched(budget="bits=4", widths=["4", "8"], progress=steps.append, seconds=600)
    assert {"sensitivity of single layers", "quantizing and verifying"} <= {step.stage for step in steps}
    assert steps[-1].best is not None
    assert all(step.done <= step.total and step.left is not None for step in steps)

"""Observing, merging and quantizing from files as a user meets it: exit status, messages, files, streams."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from qdqtool.cli.main import main
from qdqtool.graphs import model as models
from qdqtool.observation import statistics_file
from qdqtool.pipeline import SYNTHETIC_KEY
from tests.calibrated import NETWORK, content, data, network, quantize, watch

X = data()["x"]
Run = Callable[..., Result]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with net.onnx, data.npz with all samples, and two folders with the halves of them."""
    onnx.save(NETWORK, tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=X)
    for name, part in (("shard1", X[:9]), ("shard2", X[9:])):
        (tmp_path / name).mkdir()
        np.savez(tmp_path / name / "part.npz", x=part)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(work: Path) -> Run:
    """Run the tool in the work folder, with an exit status of 0 unless another one is expected."""

    def invoke(*arguments: str, status: int = 0) -> Result:
        found = CliRunner().invoke(main, [*arguments, *(["--provider", "cpu"] if arguments[0] != "merge" else [])])
        assert found.exit_code == status, found.output
        return found

    return invoke


def quantized(run: Run, *arguments: str, status: int = 0) -> Result:
    return run("quantize", "net.onnx", "--target", "cpu", "--calibrator", "minmax", *arguments, status=status)


def test_shards_observed_merged_and_quantized_are_one_run(run: Run, work: Path) -> None:
    for name in ("shard1", "shard2"):
        found = run("observe", "net.onnx", "--data", f"{name}/", "-o", f"{name}.stats")
        count = {"shard1": 9, "shard2": 15}[name]
        samples = f"{count} samples of {name} ({count} samples)"
        assert found.stdout == f"wrote {name}.stats: statistics of 8 tensors over {samples}\n"
        assert found.stderr == ""
    assert run("merge", "shard1.stats", "shard2.stats", "-o", "all.stats").stdout == (
        "wrote all.stats: statistics over 24 samples of 2 files\n"
    )
    quantized(run, "--statistics", "all.stats", "--data", "data.npz", "-o", "merged.onnx")
    assert (work / "merged.onnx").read_bytes() == content(quantize({"x": X}))
    assert not [path.name for path in work.iterdir() if path.name.startswith(".")]


def test_the_output_has_a_name_of_its_own(run: Run, work: Path) -> None:
    run("observe", "net.onnx", "--data", "data.npz", "-q", "--target", "tensorrt")
    assert statistics_file.read(work / "net.stats").statistics.tensors.keys() == {"x", "r0", "r1", "f"}


def test_observing_twice_gives_the_same_file(run: Run, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = watch(monkeypatch)
    for name, *how in (("a",), ("b", "--memory", "4kB", "--no-cache"), ("c",)):
        taken.clear()
        found = run("observe", "net.onnx", "--data", "data.npz", "-o", f"{name}.stats", *how)
    assert taken == []
    assert "note: statistics of 8 of 8 tensors were kept from an earlier run" in found.stderr
    files = {(work / f"{name}.stats").read_bytes() for name in "abc"}
    assert len(files) == 1


def test_a_recipe_says_what_is_quantized_too(run: Run, work: Path) -> None:
    (work / "recipe.toml").write_text('samples = 5\n[tensors.r1]\ngranularity = "per_channel"\n')
    run("observe", "net.onnx", "--data", "data.npz", "--recipe", "recipe.toml", "-o", "a.stats", "--target", "cpu")
    found = statistics_file.read(work / "a.stats")
    assert found.statistics.samples == 5
    assert found.has("r1", 1)
    run("observe", "net.onnx", "--data", "data.npz", "--recipe", "recipe.toml", "-o", "b.stats", "--samples", "7")
    assert statistics_file.read(work / "b.stats").statistics.samples == 7


# Memory


@pytest.mark.parametrize("command", ["observe", "quantize"])
def test_sweeps_are_told_on_stderr_before_they_begin(run: Run, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    watch(monkeypatch, fail_after=0)  # so the first batch fails
    output = CliRunner().invoke(main, [command, "net.onnx", "--data", "data.npz", "--memory", "3kB"])
    assert output.exit_code != 0
    assert output.stdout == ""
    plan, beyond = [line for line in output.stderr.splitlines() if line.startswith("note: ")]
    assert re.match(r"note: the data pass \d times, for up to ", plan)
    assert beyond.startswith("note: 3.0 kB for observed activations are exceeded: 'r0' alone takes 4.6 kB for the 4")


def test_sweeps_are_in_the_report_too(run: Run, work: Path) -> None:
    found = quantized(run, "--data", "data.npz", "--memory", "5kB", "--json")
    notes = json.loads(found.stdout)["notes"]
    assert notes[0].startswith("the data pass 4 times")
    assert found.stderr.count("the data pass 4 times") == 2  # before the work, and among all else at the end
    assert (work / "net.qdq.onnx").read_bytes() == content(quantize({"x": X}))
    assert quantized(run, "--data", "data.npz", "--memory", "5kB", "-q", "--no-cache").output == ""


def test_an_amount_that_is_none_is_an_error(run: Run) -> None:
    found = run("observe", "net.onnx", "--data", "data.npz", "--memory", "much", status=2)
    assert found.stderr == "error: 'much' is no amount of memory; give bytes, or as in 4GB or 512MiB\n"


# Quantizing from statistics


def test_without_data_what_is_left_out_is_named(run: Run, work: Path) -> None:
    run("observe", "net.onnx", "--data", "data.npz", "-q")
    found = quantized(run, "--statistics", "net.stats", "--json", "--report", "out")
    report = json.loads(found.stdout)
    assert report == json.loads((work / "out" / "report.json").read_text())
    assert report["verification"] is None
    assert report["samples"] == 24
    assert [note.partition(":")[0] for note in report["notes"]] == [
        "not compared with the float model",
        "biases were corrected from BatchNormalization alone",
    ]
    assert all(note in " ".join(found.stderr.split()) for note in report["notes"])
    assert "Accuracy" not in found.stderr


def test_a_gate_needs_data(run: Run, work: Path) -> None:
    run("observe", "net.onnx", "--data", "data.npz", "-q")
    found = quantized(run, "--statistics", "net.stats", "--min-sqnr", "10", status=2)
    assert "--min-sqnr compares on data" in found.stderr
    assert not (work / "net.qdq.onnx").exists()
    quantized(run, "--statistics", "net.stats", "--data", "data.npz", "--min-sqnr", "10")


def test_statistics_of_random_data_mark_what_is_made_of_them(run: Run, work: Path) -> None:
    warning = "warning: the ranges come from random samples; do not ship this file\n"
    assert run("observe", "net.onnx", "--data", "synthetic:3", "-q").output == warning
    assert "SYNTHETIC DATA" in quantized(run, "--statistics", "net.stats").stdout
    assert SYNTHETIC_KEY in models.metadata(onnx.load(work / "net.qdq.onnx"))
    assert quantized(run, "--statistics", "net.stats", "-q").output == warning
    assert json.loads(quantized(run, "--statistics", "net.stats", "--json").stdout)["synthetic"] is True


# What goes wrong


@pytest.fixture
def files(run: Run, work: Path) -> Path:
    """One file after another that is wrong in its own way."""
    run("observe", "net.onnx", "--data", "data.npz", "-q", "-o", "good.stats")
    run("observe", "net.onnx", "--data", "shard1", "-q", "-o", "tensorrt.stats", "--target", "tensorrt")
    run("observe", "net.onnx", "--data", "data.npz", "-q", "-o", "again.stats", "--no-cache")
    onnx.save(network(seed=1), work / "other.onnx")
    run("observe", "other.onnx", "--data", "shard1", "-q", "-o", "other.stats")
    (work / "text.stats").write_text("no statistics")
    (work / "short.stats").write_bytes((work / "good.stats").read_bytes()[:-40])
    return work


WRONG = [
    (["quantize", "net.onnx", "--statistics", "nothing.stats"], "statistics file nothing.stats does not exist"),
    (["quantize", "net.onnx", "--statistics", "text.stats"], "text.stats is no readable statistics file"),
    (["quantize", "net.onnx", "--statistics", "short.stats"], "short.stats is no readable statistics file"),
    (["quantize", "net.onnx", "--statistics", "shard1"], "shard1 is no readable statistics file"),
    (["quantize", "net.onnx", "--statistics", "data.npz"], "data.npz is no statistics file; make one with"),
    (
        ["quantize", "net.onnx", "--statistics", "other.stats"],
        "other.stats: the statistics do not belong to this model: they were observed on the same graph with other",
    ),
    (
        ["quantize", "net.onnx", "--target", "cpu", "--statistics", "tensorrt.stats"],
        "tensorrt.stats: no statistics of 'c1', 'c2', 'l' and 1 more tensors",
    ),
    (["quantize", "net.onnx", "--statistics", "good.stats", "-o", "good.stats"], "good.stats is an input of this run"),
    (["observe", "net.onnx"], "Missing option '--data'"),
    (["observe", "net.onnx", "--data", "data.npz", "--target", "gpu"], "unknown target 'gpu'; known: cpu"),
    (["observe", "net.onnx", "--data", "data.npz", "-o", "no/a.stats"], "cannot write no/a.stats: the folder no does"),
    (["observe", "net.onnx", "--data", "data.npz", "-o", "shard1"], "cannot write shard1: it is a folder"),
    (["observe", "net.onnx", "--data", "data.npz", "-o", "net.onnx"], "net.onnx is an input of this run"),
    (["observe", "net.onnx", "--data", "nothing.npz"], "nothing.npz does not exist"),
    (["merge", "good.stats", "-o", "good.stats"], "good.stats is an input of this run"),
    (["merge", "good.stats", "good.stats", "-o", "a.stats"], "the same file is given twice"),
    (["merge", "good.stats", "again.stats", "-o", "a.stats"], "good.stats and again.stats are of the same data"),
    (
        ["merge", "good.stats", "tensorrt.stats", "-o", "a.stats"],
        "tensorrt.stats cannot be merged: they differ in what",
    ),
    (["merge", "good.stats", "other.stats", "-o", "a.stats"], "cannot be merged: the second is of the same graph with"),
    (["merge", "good.stats", "short.stats", "-o", "a.stats"], "short.stats is no readable statistics file"),
    (["merge", "good.stats", "-o", "no/a.stats"], "cannot write no/a.stats: the folder no does not exist"),
    (["merge", "-o", "a.stats"], "Missing argument 'FILE...'"),
]


def test_each_mistake_is_a_message_and_status_2_and_writes_nothing(run: Run, files: Path) -> None:
    before = {path: path.read_bytes() for path in files.rglob("*") if path.is_file()}
    for arguments, message in WRONG:
        found = run(*arguments, status=2)
        assert message in found.stderr, arguments
        assert "Traceback" not in found.output
        assert found.stdout == ""
        assert {path: path.read_bytes() for path in files.rglob("*") if path.is_file()} == before, arguments


# The cache


def test_the_cache_shows_and_clears(own_cache: Path, run: Run) -> None:
    def shown(*arguments: str) -> str:
        found = CliRunner().invoke(main, ["cache", *arguments])
        assert found.exit_code == 0, found.output
        return " ".join(found.stdout.split())

    assert shown() == f"{own_cache}: 0 files, 0 B (at most 2.1 GB)"
    run("observe", "net.onnx", "--data", "data.npz", "-q", "--no-cache")
    assert not own_cache.exists()
    run("observe", "net.onnx", "--data", "data.npz", "-q")
    (path,) = own_cache.iterdir()
    assert shown().startswith(f"{own_cache}: 1 file, {path.stat().st_size / 1e3:.1f} kB")
    assert shown("--clear") == f"removed 1 file from {own_cache}"
    assert shown("--clear") == f"removed 0 files from {own_cache}"


def test_who_has_no_home_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qdqtool.observation.cache.default_folder", lambda: None)
    found = CliRunner().invoke(main, ["cache", "--clear"])
    assert found.stdout == "nothing is kept: you have no home folder; QDQTOOL_CACHE_DIR names another\n"

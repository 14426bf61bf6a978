"""The validate command: placement, latency, kernels, and metrics of one number."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from click.testing import CliRunner, Result

from qdqtool.cli.main import main
from tests.builders import conv_chain, feeds, quantized
from tests.cuda_stub import CudaStub

Validate = Callable[..., Result]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("validate")
    proto = conv_chain(2)
    data = feeds(proto, 24)
    onnx.save(proto, work / "float.onnx")
    onnx.save(quantized(proto, bias_correction=False).model, work / "int8.onnx")
    labels = np.arange(24)
    np.savez(work / "eval.npz", allow_pickle=False, labels=labels, **data)
    return work


@pytest.fixture
def validate(folder: Path) -> Validate:
    def run(*options: str) -> Result:
        files = [str(folder / name) for name in ("float.onnx", "int8.onnx")]
        arguments = ["validate", *files, "--data", str(folder / "eval.npz"), "--provider", "cpu", *options]
        return CliRunner().invoke(main, arguments)

    return run


@pytest.fixture
def metrics(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("task_metrics")
    vars(module)["mean"] = lambda outputs, labels: float(next(iter(outputs.values())).mean())
    vars(module)["pair"] = lambda outputs, labels: np.zeros((len(labels), 2))
    monkeypatch.setitem(sys.modules, "task_metrics", module)
    return module


def test_latency_and_placement_are_in_the_json(validate: Validate) -> None:
    done = validate("--json", "-q", "--latency")
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    assert found["samples"] == 24
    assert found["latency"]["ratios"].keys() == {"quantized"}
    (placing,) = found["placing"]
    kernels = [row["kernel"] for row in placing["rows"] if row["kind"] == "node" and row["state"] == "integer"]
    assert kernels == ["QLinearConv"] * 2
    assert {kernel["operator"] for kernel in found["kernels"]} == {"QLinearConv"}


def test_latency_is_not_measured_unasked(validate: Validate) -> None:
    done = validate("--json", "--no-tensors")
    assert json.loads(done.stdout)["latency"] is None
    assert "Latency" not in done.stderr


def test_the_latency_gate(validate: Validate) -> None:
    done = validate("--no-tensors", "--max-latency-ratio", "0.000001", "--min-sqnr", "200")
    assert done.exit_code == 1
    assert "more than --max-latency-ratio 1e-06" in done.stderr
    assert "below --min-sqnr 200 dB" in done.stderr
    assert "Latency" in done.stdout


def test_where_everything_runs_is_listed_on_demand(validate: Validate) -> None:
    assert "Where nodes run" not in validate("--no-tensors").stdout
    shown = validate("--no-tensors", "-v").stdout
    assert "Where nodes run  2 integer, 2 part of another" in shown
    assert "Where Q/DQ pairs went" in shown


def test_kernels_are_compared_with_the_nodes_they_stand_for(validate: Validate) -> None:
    assert "Fused against emulated  the worst output" in validate().stdout


def test_a_metric_of_one_number(validate: Validate, metrics: Any) -> None:
    shown = validate("--metric", "task_metrics:mean", "--no-tensors").stdout
    assert "emulated" in shown
    assert "samples drawn anew" in shown
    found = json.loads(validate("--metric", "task_metrics:mean", "--no-tensors", "--json").stdout)
    interval = found["difference"]
    assert interval["p"] is None
    assert interval["lo"] <= interval["value"] <= interval["hi"]
    assert found["emulated_score"] == pytest.approx(found["quantized_score"], abs=1e-3)
    plain = validate("--metric", "task_metrics:mean", "--no-tensors", "--draws", "0")
    assert "one number over all samples: no interval of the difference" in plain.stdout


def test_a_metric_that_gives_neither_is_refused(validate: Validate, metrics: Any) -> None:
    done = validate("--metric", "task_metrics:pair", "--no-tensors")
    assert done.exit_code == 2
    assert "metric 'task_metrics:pair' gave an array of shape [24, 2] for 24 samples" in done.stderr


def test_placement_on_cuda_without_a_gpu(validate: Validate, cuda_stub: CudaStub) -> None:
    done = validate("--no-tensors", "--stubs", str(cuda_stub.folder))
    assert done.exit_code == 0, done.output
    assert "placement only: no GPU, nothing ran there" in done.stdout
    found = json.loads(validate("--no-tensors", "--json", "--stubs", str(cuda_stub.folder)).stdout)
    on_cuda = found["placing"][1]
    assert on_cuda["placement_only"]
    assert {row["state"] for row in on_cuda["rows"] if row["name"] in ("b0", "b1")} == {"moved"}


def test_stubs_that_are_no_folder_are_refused(validate: Validate, tmp_path: Path) -> None:
    assert validate("--stubs", str(tmp_path / "none")).exit_code == 2

"""The GPU benchmark, run on the CPU: every cell works, and one that crashes does not lose the others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from benchmarks import gpu, synthetic
from benchmarks.gpu_table import markdown
from qdqtool import runtime
from tests.builders import run

RATIO = {"value": 0.5, "lo": 0.4, "hi": 0.6}
TIMES = {"p50": 1.0, "p90": 2.0, "p99": 3.0, "mean": 1.0}


def test_the_synthetic_resnet_is_a_resnet_50() -> None:
    proto = synthetic.resnet50(size=32, width=8)
    ops = [node.op_type for node in proto.graph.node]
    assert ops.count("Conv") == 53
    assert ops.count("Gemm") == 1
    (y,) = run(proto, {"x": synthetic.images(4, 32)}).values()
    assert y.shape == (4, 1000)
    assert 0.1 < y.std() < 20
    assert np.ptp(y.argmax(1)) > 0 or y.std(axis=0).mean() > 0.05  # it tells its inputs apart


def test_the_synthetic_transformer_keeps_its_scale() -> None:
    proto = synthetic.transformer(tokens=8, width=64, heads=4, layers=4)
    onnx.checker.check_model(proto, full_check=True)
    (y,) = run(proto, {"x": synthetic.embeddings(4, 8, 64)}).values()
    assert y.shape == (4, 8, 64)
    assert 0.5 < y.std() < 2


def test_a_full_size_resnet_has_its_parameters() -> None:
    proto = synthetic.resnet50()
    parameters = sum(int(np.prod(tensor.dims)) for tensor in proto.graph.initializer)
    assert 25.4e6 < parameters < 25.7e6  # 25.6 million, those of BatchNormalization folded away


def _answers(crashing: str) -> Any:
    """Cells that give fixed figures; whatever measures the precision that crashes takes its process with it."""

    def cell(name: str, **given: Any) -> dict[str, Any]:
        if name == "time":
            if crashing in given["wanted"]:
                return {"failed": "signal 11: no word"}
            others = given["wanted"][1:]
            times = dict.fromkeys(given["wanted"], TIMES)
            return {"latency": times, "ratios": dict.fromkeys(others, RATIO), "failed": {}}
        if name == "make":
            return {"sqnr_db": 40.0, "integer_kernels": 3, "fallen": 0, "copies": 0}
        return {"peak": 5_000_000, "how": ""} if name == "peak" else {}

    return cell


def test_a_crash_loses_one_cell_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "cell", _answers("w4a16"))
    gpu.main(["--provider", "cpu", "--quick", "--out", str(tmp_path), "--cases", "transformer", "--batch", "1,8"])
    rows = [line for line in (tmp_path / "gpu.md").read_text().splitlines() if line.startswith("| transformer")]
    assert len(rows) == 2 * (len(gpu.FORMS) - 1)  # on the CPU there is no TF32 to leave out
    failed = [row for row in rows if "failed" in row]
    assert [row.split(" | ")[1] for row in failed] == ["w4a16", "w4a16"]
    assert "| 1.000 | 2.000 | 0.50 | 0.40 to 0.60 | 5 | 40.0 | 3 | 0 | 0 |" in rows[1]
    assert "* transformer, w4a16, batch 8: signal 11: no word" in (tmp_path / "gpu.md").read_text()
    assert json.loads((tmp_path / "gpu.json").read_text())["cases"]["transformer"]["made"]["fp16"]["sqnr_db"] == 40.0


def test_cases_of_an_earlier_run_stay(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(gpu, "cell", _answers("none"))
    for case in ("resnet50", "transformer"):
        gpu.main(["--provider", "cpu", "--out", str(tmp_path), "--cases", case, "--batch", "1", "--no-memory"])
    assert list(json.loads((tmp_path / "gpu.json").read_text())["cases"]) == ["resnet50", "transformer"]


def test_a_cell_that_fails_says_why(tmp_path: Path) -> None:
    found = gpu.cell("peak", folder=tmp_path, form="float32", batch=1, provider="cpu")
    assert "float.onnx" in found["failed"]


def test_unknown_precisions_are_refused() -> None:
    with pytest.raises(SystemExit):
        gpu.parse(["--forms", "w9a9"])


def test_on_cuda_there_are_times_with_graphs() -> None:
    bench = {"latency": {"float32": TIMES}, "ratios": {}, "failed": {"w8a8": "copies"}}
    replayed = {"latency": {"float32": {**TIMES, "p50": 0.7}}}
    cells = {"runs": [bench], "replayed": [[replayed]]}
    case = {"made": {}, "batches": {1: cells}}
    shown = markdown({"title": "", "provider": "cuda", "cases": {"a": case}})
    assert "replayed ms" in shown
    assert "| a | float32 | 1 | 1.000 | 2.000 |  |  | 0.700 |" in shown
    assert "| a | w8a8 | 1 | failed | failed |  |  | not possible |" in shown


@pytest.mark.slow
def test_the_same_code_runs_on_the_cpu(tmp_path: Path) -> None:
    arguments = ["--provider", "cpu", "--quick", "--out", str(tmp_path), "--cases", "transformer", "--batch", "2"]
    gpu.main([*arguments, "--forms", "float32,w8a16-fp16"])
    found = json.loads((tmp_path / "gpu.json").read_text())["cases"]["transformer"]
    assert found["made"]["w8a16-fp16"]["integer_kernels"] == 12
    assert found["made"]["w8a16-fp16"]["sqnr_db"] > 30
    assert found["made"]["float32"]["sqnr_db"] == "inf"
    (timed,) = found["batches"]["2"]["runs"]
    assert timed["batch"] == 2
    assert timed["latency"]["w8a16-fp16"]["p50"] > 0


@pytest.mark.gpu
def test_everything_runs_on_cuda(tmp_path: Path) -> None:
    if runtime.resolve_provider("auto")[0] != "cuda":
        pytest.skip("no CUDA device")
    gpu.main(["--quick", "--out", str(tmp_path), "--cases", "resnet50,transformer", "--batch", "1"])
    for case in json.loads((tmp_path / "gpu.json").read_text())["cases"].values():
        assert not [form for form, made in case["made"].items() if "failed" in made]
        assert case["made"]["float32-no-tf32"]["sqnr_db"] > 80
        assert case["made"]["fp16"]["sqnr_db"] > 30
        assert case["made"]["w8a8"]["fallen"] == case["made"]["w8a8"]["copies"] == 0
        timed = case["batches"]["1"]
        assert set(timed["runs"][0]["latency"]) == set(gpu.FORMS)
        assert all(peak["peak"] > 0 for peak in timed["memory"].values())

"""Latency: what is measured, in which order, and how sure a ratio is; no test depends on how fast anything is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
from click.testing import CliRunner

from qdqtool import pipeline
from qdqtool.cli.main import main
from qdqtool.data.source import open_data
from qdqtool.errors import DataError, ModelError
from qdqtool.graphs import model as models
from qdqtool.report.latency import why_slower
from qdqtool.verification import latency, memory
from qdqtool.verification.running import Work
from tests.builders import conv_chain, feeds
from tests.cuda_stub import CudaStub


class Clock:
    """A clock that moves only where somebody says so."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_rounds_run_every_model_once_in_changing_order() -> None:
    clock, order = Clock(), []

    def runner(name: str, seconds: float) -> None:
        clock.now += seconds
        order.append(name)

    runs = [lambda: runner("a", 0.001), lambda: runner("b", 0.003)]
    times = latency.measured(runs, seconds=0.8, clock=clock)
    assert times.shape == (2, 200)
    np.testing.assert_allclose(times, [[1.0] * 200, [3.0] * 200])
    counted = order[2 * latency.WARM_UP :]
    rounds = [tuple(counted[i : i + 2]) for i in range(0, len(counted), 2)]
    assert set(rounds) == {("a", "b"), ("b", "a")}


def test_slow_models_get_enough_rounds() -> None:
    clock = Clock()

    def run() -> None:
        clock.now += 10

    assert latency.measured([run], seconds=1.0, clock=clock).shape == (1, latency.LEAST_ROUNDS)


@pytest.mark.parametrize("drift", [0.0, 0.5])
def test_the_interval_holds_the_true_ratio(drift: float) -> None:
    held, rounds = 0, 300
    for seed in range(60):
        rng = np.random.default_rng(seed)
        load = 1 + drift * np.sin(np.arange(rounds) / 40 + seed)  # of both alike, for a while
        one, two = (load * (base + rng.gamma(2, 0.05, rounds)) for base in (1.0, 1.5))
        ratio = latency.ratio_of(one, two, seed)
        medians = np.median(rng.gamma(2, 0.05, 100_000))
        held += int(ratio.lo <= (1.5 + medians) / (1 + medians) <= ratio.hi)
    assert held >= 51  # 95 % of 60 are 57; fewer than 51 come once in ten thousand


def _series(seed: int, drift: float) -> latency.Ratio:
    """What is said of two models that take 1.0 and 1.2 ms, on a machine with noise and a load that comes and goes."""
    rng = np.random.default_rng(seed)
    rounds = 400
    steps = rng.standard_normal(rounds)
    load = np.empty(rounds)  # an autoregressive process: a disturbance lasts for some 20 rounds
    load[0] = steps[0]
    for index in range(1, rounds):
        load[index] = 0.95 * load[index - 1] + np.sqrt(1 - 0.95**2) * steps[index]
    shared = np.exp(drift * load)
    one, two = (base * shared * (1 + rng.gamma(1, 0.05, rounds)) for base in (1.0, 1.2))
    return latency.ratio_of(one, two, seed)


@pytest.mark.parametrize("drift", [0.0, 0.2])
def test_two_measurements_of_the_same_models_agree(drift: float) -> None:
    """Two measurements, each with noise and drift of its own, give intervals that overlap."""
    pairs = [(_series(2 * trial, drift), _series(2 * trial + 1, drift)) for trial in range(40)]
    overlap = sum(a.lo <= b.hi and b.lo <= a.hi for a, b in pairs)
    assert overlap >= 0.9 * len(pairs)
    assert all(
        ratio.hi - ratio.lo < 0.2 for pair in pairs for ratio in pair
    )  # wide ones would overlap, and say nothing


def test_percentiles() -> None:
    found = latency.latency_of(np.arange(1.0, 102.0))
    assert (found.p50, found.p90, found.p99, found.mean) == (51.0, 91.0, 100.0, 51.0)


def test_samples_are_joined_and_repeated() -> None:
    proto = conv_chain(1)
    inputs = models.inputs(proto)
    data = feeds(proto, 3)
    joined = latency.batch_of(inputs, open_data(data, inputs), 5)
    (name,) = data
    np.testing.assert_array_equal(joined[name], data[name][[0, 1, 2, 0, 1]])


def test_a_model_without_a_batch_takes_one_feed() -> None:
    proto = conv_chain(1)
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    inputs = models.inputs(proto)
    data = feeds(proto, 1)
    assert len(next(iter(latency.batch_of(inputs, open_data(data, inputs), 1).values()))) == 1
    with pytest.raises(DataError, match="3 samples cannot be joined"):
        latency.batch_of(inputs, open_data(data, inputs), 3)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Path]:
    folder = tmp_path_factory.mktemp("bench")
    proto = conv_chain(2)
    data = feeds(proto)
    onnx.save(proto, folder / "float.onnx")
    pipeline.quantize(proto, data, target="cpu", cache=False).save(folder / "int8.onnx")
    (name,) = data
    np.savez(folder / "data.npz", allow_pickle=False, **{name: data[name]})
    return folder / "float.onnx", folder / "int8.onnx", folder / "data.npz"


def test_two_models_are_measured(files: tuple[Path, Path, Path]) -> None:
    one, two, data = files
    inputs = models.inputs(models.load(one))
    before = os.sched_getaffinity(0)
    batch = latency.batch_of(inputs, open_data(data, inputs), 4)
    found = latency.bench({"float": one, "int8": two}, batch, seconds=0.0, threads=1)
    assert os.sched_getaffinity(0) == before
    assert (found.rounds, found.batch, found.threads) == (latency.LEAST_ROUNDS, 4, 1)
    assert all(0 < t.p50 <= t.p90 <= t.p99 for t in found.latency.values())
    ratio = found.ratios["int8"]
    assert ratio.lo <= ratio.value <= ratio.hi
    assert found.work["int8"].operators["QLinearConv"] == 2
    assert found.work["int8"].layers == ()
    assert "QLinearConv" not in found.work["float"].operators
    assert len(found.work["float"].layers) == 2


def test_threads_that_are_not_there_are_refused(files: tuple[Path, Path, Path]) -> None:
    with pytest.raises(DataError, match="999 threads were asked for"):
        latency.bench({"float": files[0]}, {}, threads=999)


_ON_STUBS = """
from qdqtool.verification import latency, memory
from qdqtool.verification.variants import WITHOUT_TF32
from tests.builders import feeds, normal, parse

proto = parse("[p] y = MatMul(x, m)", "float[N, 64] x", "float[N, 64] y", {"m": normal(64, 64)})
sources = {"float": proto, "off": latency.Variant(proto, provider_options=WITHOUT_TF32)}
found = latency.bench(sources, feeds(proto, 2), provider="cuda", seconds=0.0)
print(found.provider, found.batch, *found.ratios, found.work["off"].fallen)
print(memory.peak(proto, feeds(proto, 2), provider="cuda").how)
"""


def test_the_way_over_cuda_works_on_libraries_that_do_nothing(cuda_stub: CudaStub) -> None:
    """No time means anything there; inputs, outputs and options are bound and set as on a device."""
    done = subprocess.run(
        (sys.executable, "-c", _ON_STUBS),
        env={**os.environ, "LD_LIBRARY_PATH": str(cuda_stub.folder)},
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["cuda 2 off ()", memory.HOW["cuda"]]


def test_the_command(files: tuple[Path, Path, Path]) -> None:
    arguments = ["bench", *map(str, files[:2]), "--data", str(files[2]), "--seconds", "0", "--provider", "cpu"]
    shown = CliRunner().invoke(main, arguments)
    assert shown.exit_code == 0
    assert "95 % interval" in shown.stdout
    gated = CliRunner().invoke(main, [*arguments, "--json", "--max-latency-ratio", "0.000001"])
    assert gated.exit_code == 1
    assert json.loads(gated.stdout)["runs"][0]["ratios"].keys() == {str(files[1])}
    assert "more than --max-latency-ratio 1e-06" in gated.stderr
    twice = CliRunner().invoke(main, ["bench", str(files[0]), str(files[0]), "--data", str(files[2])])
    assert twice.exit_code == 2


def test_several_batch_sizes_and_precisions_are_one_table(files: tuple[Path, Path, Path]) -> None:
    arguments = ["bench", *map(str, files[:2]), "--data", str(files[2]), "--seconds", "0", "--provider", "cpu"]
    shown = CliRunner().invoke(main, [*arguments, "--batch", "1,4", "--beside", "fp16,w8a16", "--json"])
    assert shown.exit_code == 0
    found = json.loads(shown.stdout)
    assert [run["batch"] for run in found["runs"]] == [1, 4]
    assert all(f"fp16 of {files[0]}" in run["ratios"] for run in found["runs"])
    assert "no product by a constant weight" in found["missing"]["w8a16"]
    assert shown.stderr.count("fp16 of") >= 2
    for wrong in (["--batch", "1,x"], ["--batch", "0"], ["--beside", "w4a4"]):
        assert CliRunner().invoke(main, [*arguments, *wrong]).exit_code == 2


def test_models_that_do_not_load_are_told(files: tuple[Path, Path, Path]) -> None:
    proto = models.load(files[0])
    broken = onnx.ModelProto()
    broken.CopyFrom(proto)
    broken.graph.node[0].op_type = "NoSuchOperator"
    inputs = models.inputs(proto)
    batch = latency.batch_of(inputs, open_data(files[2], inputs), 1)
    found = latency.bench({"float": proto, "broken": broken}, batch, seconds=0.0, strict=False)
    assert list(found.latency) == ["float"]
    assert "NoSuchOperator" in found.failed["broken"]
    with pytest.raises(ModelError, match="NoSuchOperator"):
        latency.bench({"float": proto, "broken": broken}, batch, seconds=0.0)


def test_a_slower_model_is_explained() -> None:
    operators = {"QuantizeLinear": 3, "DequantizeLinear": 4, "FusedConv": 2, "QLinearAdd": 1}
    work = Work(operators, tuple("abcdefg"), ("one", "two"), ("far",), ("t", "u"))
    slow, unsure = latency.Ratio(1.5, 1.4, 1.6), latency.Ratio(1.1, 0.9, 1.3)
    found = latency.Bench("cuda", 0, 8, 100, {}, {"q": slow}, {"q": work})
    assert why_slower(found, "q", slow) == [
        "q is slower at batch 8, with 1 operator in integers",
        "  7 Q or DQ nodes that fused into nothing: a, b, c and 4 more",
        "  2 convolution or matrix products in float: one, two",
        "  1 node on the CPU provider: far",
        "  2 copies between devices at every run: t, u",
    ]
    assert why_slower(found, "q", unsure) == []

"""What runs on CUDA and what falls to the CPU, found without a GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest

import qdqtool
from qdqtool import runtime
from qdqtool.errors import ModelError, RuntimeUnavailableError
from qdqtool.graphs import model as models
from qdqtool.passes import Verify
from qdqtool.passes_api import State
from qdqtool.planning.target import target
from qdqtool.recipe import Recipe
from qdqtool.verification import partition, placement
from qdqtool.verification.partition import Partition
from tests.builders import Array, conv, conv_chain, conv_values, normal, parse, quantized, weight
from tests.cuda_stub import CudaStub

CUDA = "CUDAExecutionProvider"
IMAGE = "float[N, 8, 8, 8]"
EVERY_OPTIMIZER = {runtime.WITHOUT_OPTIMIZERS: ""}
VALUES: dict[str, Array] = conv_values(3) | {
    "head": weight(10, 8),
    "head_bias": normal(10),
    "m": weight(16, 16),
    "m_bias": normal(16),
    "six": np.array(6, np.float32),
    "gain": np.ones(16, np.float32),
}
RESIDUAL = f"""{conv("a", "x")} [r] r = Relu(a) {conv("b", "r", 1)} {conv("d", "x", 2)} [s] s = Add(b, d)
    [t] t = Relu(s) [p] p = GlobalAveragePool(t) [f] f = Flatten(p) [fc] y = Gemm <transB = 1> (f, head, head_bias)"""
ATTENTION = """[q] q = MatMul(x, m) [k] k = MatMul(x, m) [v] v = MatMul(x, m) [t] t = Transpose <perm = [0, 2, 1]> (k)
    [s] s = MatMul(q, t) [d] d = Div(s, six) [p] p = Softmax(d) [o] o = MatMul(p, v) [w] w = MatMul(o, m)
    [bias] e = Add(w, m_bias) [skip] z = Add(e, x) [n] y = LayerNormalization <axis = -1> (z, gain, m_bias)"""
TOKENS = "float[N, 4, 16]"
CLASS_TOKEN = """[w] w = MatMul(x, m) [i] i = Shape(w) [g] g = Gather(i, first) [u] u = Unsqueeze(g, axis)
    [c] c = Concat <axis = 0> (u, rest) [e] e = Expand(token, c) [k] y = Concat <axis = 1> (e, w)"""
NETS = {
    "convolutions": conv_chain(4),
    "residual": parse(RESIDUAL, f"{IMAGE} x", "float[N, 10] y", {n: VALUES[n] for n in VALUES if n[0] in "wbh"}),
    "transposed": parse(
        f"[up] u = ConvTranspose <pads = [1, 1, 1, 1]> (x, w0, b0) [r] r = Relu(u) {conv('y', 'r', 1)}",
        f"{IMAGE} x",
        f"{IMAGE} y",
        {n: VALUES[n] for n in ("w0", "b0", "w1", "b1")},
    ),
    "gemms": parse(
        "[one] o = Gemm <transB = 1> (x, m, m_bias) [r] r = Relu(o) [two] t = Gemm(r, m, m_bias) [v] y = MatMul(t, m)",
        "float[N, 16] x",
        "float[N, 16] y",
        {n: VALUES[n] for n in ("m", "m_bias")},
    ),
    "attention": parse(ATTENTION, f"{TOKENS} x", f"{TOKENS} y", {n: VALUES[n] for n in ("m", "m_bias", "six", "gain")}),
}


def cuda(proto: onnx.ModelProto, **fields: Any) -> onnx.ModelProto:
    return quantized(proto, target="cuda", bias_correction=False, **fields).model


@pytest.mark.parametrize("name", NETS)
def test_a_file_made_for_cuda_stays_on_cuda(cuda_stub: CudaStub, name: str) -> None:
    seen = cuda_stub(cuda(NETS[name]))
    assert dict(seen.fallen) == {}
    assert seen.copies == ()
    assert set(seen.nodes) == {CUDA}
    assert {"QuantizeLinear", "DequantizeLinear"} <= set(seen.nodes[CUDA].values())


@pytest.mark.parametrize(
    ("name", "biases"), [("convolutions", 3), ("residual", 2), ("transposed", 1), ("gemms", 2), ("attention", 0)]
)
def test_biases_come_back_where_sessions_do_not_forbid_it(cuda_stub: CudaStub, name: str, biases: int) -> None:
    proto = cuda(NETS[name])
    returning = partition.returning_biases(proto)
    seen = cuda_stub(proto, EVERY_OPTIMIZER)
    assert len(returning) == biases
    assert dict(seen.fallen) == {f"{node}_bias_dq": "DequantizeLinear" for node in returning}
    assert len(seen.copies) == biases


def test_int32_biases_fall_to_the_cpu(cuda_stub: CudaStub) -> None:
    seen = cuda_stub(quantized(NETS["convolutions"], target="cpu", bias_correction=False).model)
    assert dict(seen.fallen) == {f"b{i}_DequantizeLinear": "DequantizeLinear" for i in range(4)}
    assert len(seen.copies) == 4


def test_shapes_are_computed_on_the_cpu_where_they_belong(cuda_stub: CudaStub) -> None:
    values = {"m": VALUES["m"], "first": np.array(0), "axis": np.array([0]), "rest": np.array([1, 16])}
    values["token"] = normal(1, 1, 16)
    seen = cuda_stub(cuda(parse(CLASS_TOKEN, f"{TOKENS} x", "float[N, 5, 16] y", values)))
    assert dict(seen.fallen) == {}
    assert seen.copies == ()
    assert dict(seen.shapes) == {"g": "Gather", "u": "Unsqueeze", "c": "Concat"}


@pytest.mark.parametrize("precision", ["w8a16", "w4a16"])
def test_weights_alone_become_one_kernel_with_their_product(cuda_stub: CudaStub, precision: str) -> None:
    body = "[w] w = MatMul(x, m) [bias] b = Add(w, m_bias) [r] r = Relu(b) [v] y = MatMul(r, m)"
    proto = parse(body, f"{TOKENS} x", f"{TOKENS} y", {name: VALUES[name] for name in ("m", "m_bias")})
    seen = cuda_stub(quantized(proto, target="cuda", precision=precision, bias_correction=False).model)
    assert dict(seen.fallen) == {}
    assert seen.copies == ()
    assert seen.operators["MatMulNBits"] == 2
    assert "DequantizeLinear" not in seen.operators


def test_a_condition_is_copied_to_the_cpu(cuda_stub: CudaStub) -> None:
    inner = "then_branch = t () => (float[2] p) { p = Neg(x) }, else_branch = e () => (float[2] q) { q = Abs(x) }"
    body = f"[less] f = Less(a, b) y = If (f) <{inner}>"
    seen = cuda_stub(parse(body, "float[2] x, float a, float b", "float[2] y", {}))
    assert seen.nodes[CUDA]["less"] == "Less"
    assert len(seen.copies) == 1
    assert seen.copies[0].startswith("f")


def test_it_says_that_there_was_no_gpu(cuda_stub: CudaStub) -> None:
    seen = cuda_stub(NETS["convolutions"])
    assert not seen.gpu
    assert str(seen) == "8 on CUDAExecutionProvider; 0 fell to the CPU, 0 copies (placement only, no GPU)"


def test_a_stub_is_never_taken_for_a_device(cuda_stub: CudaStub, tmp_path: Path) -> None:
    """Whatever ran on it would be wrong."""
    code = "from qdqtool import runtime; print(*runtime.resolve_provider('auto'))"
    done = subprocess.run(
        (sys.executable, "-c", code),
        env={**os.environ, "LD_LIBRARY_PATH": str(cuda_stub.folder)},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    assert (
        done.stdout
        == "cpu No CUDA provider (the NVIDIA driver is a stub without a device): measuring on the CPU provider.\n"
    )


# Without any CUDA


def test_libraries_that_are_no_cuda(tmp_path: Path) -> None:
    if runtime.resolve_provider("auto")[0] == "cuda":
        pytest.skip("CUDA is here")
    path = models.save(NETS["convolutions"], tmp_path / "model.onnx")
    with pytest.raises(ModelError, match=r"model\.onnx cannot be placed on CUDA: .*does not load here"):
        partition.partition_apart(path, tmp_path)


def test_a_provider_that_did_not_load() -> None:
    active = SimpleNamespace(get_providers=lambda: ["CPUExecutionProvider"])
    with pytest.raises(RuntimeUnavailableError, match="CUDAExecutionProvider does not load here"):
        partition.read(active, NETS["convolutions"], "cuda")


def test_a_runtime_that_does_not_tell() -> None:
    active = SimpleNamespace(get_providers=lambda: [CUDA])
    with pytest.raises(RuntimeUnavailableError, match="does not tell which provider runs what"):
        partition.read(active, NETS["convolutions"], "cuda")


def test_the_partition_of_the_cpu_alone() -> None:
    seen = partition.partition(NETS["convolutions"], provider="cpu")
    assert set(seen.nodes) == {"CPUExecutionProvider"}
    assert not seen.fallen
    assert not seen.copies


@pytest.mark.parametrize(("name", "said"), [("cuda", True), ("tensorrt", True), ("cpu", False)])
def test_the_report_names_the_biases_that_come_back(name: str, said: bool) -> None:
    notes = quantized(NETS["convolutions"], target=name, bias_correction=False).report.notes
    found = [note for note in notes if "3 float biases into int32" in note]
    assert len(found) == said
    assert all("optimization.disable_specified_optimizers=WeightBiasQuantization" in note for note in found)
    assert partition.on_gpu(target(name)) == said


def test_where_models_run_on_cuda_the_report_has_both(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file for the CPU is verified on the CPU even where its figures come from a GPU."""
    asked: list[str] = []
    load, known = placement.load, Partition("cuda", gpu=True, fallen={"a": "DequantizeLinear"})

    def on_cpu(proto: onnx.ModelProto, *, provider: str = "cpu", config: Any = None) -> Any:
        asked.append(provider)
        return load(proto, config=config)

    plan = quantized(NETS["convolutions"], bias_correction=False)
    graph, header = models.to_graph(plan.model)
    state = State(graph, header, Recipe(target="cpu"), target("cpu"), plan=plan.plan, provider="cuda")
    monkeypatch.setattr(placement, "load", on_cpu)
    monkeypatch.setattr(partition, "read", lambda active, optimized, provider: known)
    Verify()._place(plan.model, state)
    assert asked == ["cuda", "cpu"]
    assert state.partition is known
    assert state.placement is not None
    assert set(state.placement.kernels.values()) == {"QLinearConv"}


@pytest.mark.zoo
@pytest.mark.slow
def test_real_models_stay_on_cuda(cuda_stub: CudaStub, real_model: Path, any_data: Callable[[Path], Any]) -> None:
    done = qdqtool.quantize(
        real_model, any_data(real_model), target="cuda", provider="cpu", bias_correction=False, calibrator="minmax"
    )
    before, after = cuda_stub(models.load(real_model)), cuda_stub(done.model)
    assert dict(after.fallen) == {}
    assert len(after.copies) <= len(before.copies)  # a condition that a model computes is copied anyway
    returning = partition.returning_biases(done.model)
    assert set(cuda_stub(done.model, EVERY_OPTIMIZER).fallen) == {f"{node}_bias_dq" for node in returning}

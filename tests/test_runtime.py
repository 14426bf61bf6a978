"""Sessions are quiet, providers that cannot load are one line, and errors carry the runtime's own words."""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from qdqtool import runtime
from qdqtool.errors import ModelError, RuntimeUnavailableError
from qdqtool.graphs import model as models

HEAD = '<ir_version: 8, opset_import: ["": 17]>'
CONV_RELU = onnx.parser.parse_model(
    f"{HEAD} g (float[1, 1, 4, 4] x) => (float[1, 1, 4, 4] y) {{ [conv] a = Conv(x, w) [relu] y = Relu(a) }}"
)
CONV_RELU.graph.initializer.append(numpy_helper.from_array(np.ones((1, 1, 1, 1), np.float32), "w"))


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    """What was found out about this machine's providers is forgotten before and after every test."""
    runtime._why_no_gpu.cache_clear()
    yield
    runtime._why_no_gpu.cache_clear()


class Driver:
    """Stands for NVIDIA's driver library."""

    def __init__(self, devices: int = 1, status: int = 0) -> None:
        self.devices, self.status = devices, status

    def cuInit(self, flags: int) -> int:
        return self.status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self.devices
        return 0


def machine(
    monkeypatch: pytest.MonkeyPatch, *, providers: tuple[str, ...], driver: Driver | None, loads: bool = True
) -> None:
    """Pretend to be a machine with these providers in the build, and this driver."""

    def load(name: str) -> Driver:
        if driver is None:
            raise OSError(f"{name}: cannot open shared object file")
        return driver

    given = [*providers, "CPUExecutionProvider"] if loads else ["CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [*providers, "CPUExecutionProvider"])
    monkeypatch.setattr(ctypes, "CDLL", load)
    monkeypatch.setattr(runtime, "session", lambda *_, **__: SimpleNamespace(get_providers=lambda: given))


GPU = ("TensorrtExecutionProvider", "CUDAExecutionProvider")


def test_the_cpu_is_never_asked_about() -> None:
    assert runtime.resolve_provider("cpu") == ("cpu", None)


def test_auto_takes_cuda_where_it_loads(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, providers=GPU, driver=Driver())
    assert runtime.resolve_provider("auto") == ("cuda", None)
    assert runtime.resolve_provider("tensorrt") == ("tensorrt", None)
    assert runtime.resolve_provider("cuda") == ("cuda", None)


@pytest.mark.parametrize(
    ("providers", "driver", "loads", "reason"),
    [
        ((), Driver(), True, rf"this build of onnxruntime \({onnxruntime.__version__}\) has no CUDAExecutionProvider"),
        (GPU, None, True, "no NVIDIA driver was found"),
        (GPU, Driver(devices=0), True, "the NVIDIA driver reports no device"),
        (GPU, Driver(status=100), True, "the NVIDIA driver reports no device"),
        (GPU, Driver(), False, "CUDAExecutionProvider failed to load its libraries"),
    ],
    ids=["no provider", "no driver", "no device", "driver error", "no libraries"],
)
def test_auto_falls_back_to_the_cpu_with_one_line(
    monkeypatch: pytest.MonkeyPatch, providers: tuple[str, ...], driver: Driver | None, loads: bool, reason: str
) -> None:
    machine(monkeypatch, providers=providers, driver=driver, loads=loads)
    provider, note = runtime.resolve_provider("auto")
    assert provider == "cpu"
    assert note is not None
    assert "\n" not in note
    assert note.startswith("No CUDA provider (")
    with pytest.raises(RuntimeUnavailableError, match=f"the cuda provider cannot load here: {reason}") as caught:
        runtime.resolve_provider("cuda")
    assert "\n" not in str(caught.value)
    assert "Use --provider cpu, or install qdqtool[cuda]" in str(caught.value)


def test_tensorrt_is_not_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    machine(monkeypatch, providers=GPU[1:], driver=Driver())
    assert runtime.resolve_provider("auto") == ("cuda", None)
    with pytest.raises(RuntimeUnavailableError, match="has no TensorrtExecutionProvider"):
        runtime.resolve_provider("tensorrt")


def test_this_machine_prints_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    provider, note = runtime.resolve_provider("auto")
    assert (provider == "cpu") == (note is not None)
    assert capfd.readouterr() == ("", "")


def test_what_native_code_writes_is_dropped_for_a_while(capfd: pytest.CaptureFixture[str]) -> None:
    os.write(2, b"before ")
    with runtime.quiet_native():
        os.write(2, b"noise ")
        with runtime.quiet_native():
            os.write(2, b"more noise ")
    os.write(2, b"after")
    assert capfd.readouterr().err == "before after"
    with pytest.raises(ValueError, match="boom"), runtime.quiet_native():
        raise ValueError("boom")
    os.write(2, b"still there")
    assert capfd.readouterr().err == "still there"


def test_both_runtime_packages_at_once_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    installed: set[str] = set()

    def distribution(name: str) -> Any:
        if name not in installed:
            raise PackageNotFoundError(name)
        return SimpleNamespace(metadata={"Name": name})

    monkeypatch.setattr(runtime, "distribution", distribution)
    for only in ("onnxruntime", "onnxruntime-gpu"):
        installed = {only}
        assert runtime.conflicting_packages() is None
    installed = {"onnxruntime", "onnxruntime-gpu"}
    line = runtime.conflicting_packages()
    assert line is not None
    assert "\n" not in line
    assert line.endswith("pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu")


@pytest.mark.parametrize(
    ("flags", "saturates"),
    [
        ("fpu sse avx avx2", True),
        ("fpu avx2 avx512f avx512_vnni", False),
        ("fpu avx2 avx_vnni", False),
        ("fpu sse4_2", False),
        ("asimd fp", False),
    ],
)
def test_processors_without_vnni_are_recognised(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, flags: str, saturates: bool
) -> None:
    file = tmp_path / "cpuinfo"
    file.write_text(f"flags\t\t: {flags}\n")
    monkeypatch.setattr(runtime, "Path", lambda _: file)
    assert runtime.saturates_u8s8() is saturates
    file.unlink()
    assert not runtime.saturates_u8s8()


# Sessions


def test_the_optimized_graph_is_what_really_runs() -> None:
    assert "Relu" not in {node.op_type for node in runtime.optimized(CONV_RELU).graph.node}
    plain = runtime.session(CONV_RELU, optimize=False)
    x = np.full((1, 1, 4, 4), -2, np.float32)
    (y,) = runtime.run(plain, None, {"x": x})
    assert (y == 0).all()


def test_a_model_over_the_limit_goes_by_a_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(CONV_RELU)
    proto.graph.initializer.append(numpy_helper.from_array(np.ones(5000, np.float32), "unused"))
    monkeypatch.setattr(models, "fits_protobuf", lambda _: False)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    path = tmp_path / "optimized.onnx"
    active = runtime.session(proto, optimized_path=path)
    (y,) = runtime.run(active, ["y"], {"x": np.ones((1, 1, 4, 4), np.float32)})
    assert (y == 1).all()
    assert "optimized.onnx" in {p.name for p in tmp_path.iterdir()}
    assert not any(p.name.startswith("qdqtool-") for p in tmp_path.iterdir())


def test_a_model_that_does_not_load_says_why(capfd: pytest.CaptureFixture[str]) -> None:
    proto = onnx.ModelProto()
    proto.CopyFrom(CONV_RELU)
    proto.graph.node[0].op_type = "Convolve"
    with pytest.raises(
        ModelError, match=rf"ONNX Runtime {onnxruntime.__version__} does not load the model: .*Convolve"
    ):
        runtime.session(proto)
    assert capfd.readouterr() == ("", "")


def test_a_model_that_does_not_run_says_node_and_inputs(capfd: pytest.CaptureFixture[str]) -> None:
    proto = helper.make_model(
        onnx.parser.parse_graph("g (float[N] x, float[M] k) => (float[L] y) { [adder] y = Add(x, k) }"),
        opset_imports=[helper.make_opsetid("", 17)],
        ir_version=8,
    )
    active = runtime.session(proto)
    feeds = {"x": np.zeros(3, np.float32), "k": np.zeros(2, np.float32)}
    with pytest.raises(ModelError, match=r"cannot run the model on inputs x float32\[3\], k float32\[2\]: .*adder"):
        runtime.run(active, None, feeds)
    assert capfd.readouterr() == ("", "")


@pytest.mark.skipif(sys.platform == "win32", reason="file descriptors differ")
def test_sessions_leave_no_files_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    runtime.optimized(CONV_RELU)
    assert list(tmp_path.iterdir()) == []

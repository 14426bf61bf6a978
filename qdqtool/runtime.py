"""The only module that creates ONNX Runtime sessions: providers, options, quiet failure where one cannot load."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any, Final

import numpy.typing as npt
import onnx

from qdqtool import foreign
from qdqtool.errors import ModelError, RuntimeUnavailableError
from qdqtool.graphs import model as models

PROVIDERS: Final[Mapping[str, tuple[str, ...]]] = {
    "cpu": ("CPUExecutionProvider",),
    "cuda": ("CUDAExecutionProvider", "CPUExecutionProvider"),
    "tensorrt": ("TensorrtExecutionProvider", "CUDAExecutionProvider", "CPUExecutionProvider"),
}
WITHOUT_OPTIMIZERS: Final = "optimization.disable_specified_optimizers"
"""Session configuration: optimizers that are left out, parted by semicolons."""
BIAS_OPTIMIZER: Final = "WeightBiasQuantization"
"""The optimizer that turns float biases into int32, for which CUDA has no kernel: they would be copied at every run."""
WIDE_SUMS: Final = {"session.x64quantprecision": "1"}
"""Session configuration: integer products on x86 are added in 32 bits also where that is slower than in 16."""
STUB: Final = "qdqtool_stub"
"""Symbol of a driver library without a device behind it, with which models are partitioned and never run."""


def session(
    proto: onnx.ModelProto,
    *,
    provider: str = "cpu",
    optimize: bool = True,
    threads: int = 0,
    config: Mapping[str, str] | None = None,
    provider_options: Mapping[str, str] | None = None,
    optimized_path: str | Path | None = None,
    layout: bool = True,
    profile: str | Path | None = None,
) -> Any:
    """Create an ``onnxruntime.InferenceSession`` that prints nothing of its own.

    Args:
        proto: the model; a large one is handed over through a temporary file, whose tensors the runtime reads in place.
        provider: a key of :data:`PROVIDERS`, already known to load (see :func:`resolve_provider`).
        optimize: all graph optimizations (integer kernels), or none (every node as written).
        threads: intra-op threads; 0 leaves the choice to the runtime.
        config: session configuration entries.
        provider_options: of the provider that comes first.
        optimized_path: where the runtime saves the graph it really runs.
        profile: how the name of the file begins to which the runtime writes times of kernels, at ``end_profiling``.
        layout: where it optimizes, it may also change the layout of tensors, which renames them.

    Raises:
        ModelError: the runtime refuses the model; its own words are part of the message.
    """
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    level = ort.GraphOptimizationLevel
    best = level.ORT_ENABLE_ALL if layout else level.ORT_ENABLE_EXTENDED
    options.graph_optimization_level = best if optimize else level.ORT_DISABLE_ALL
    # Threads that spin while they wait slow down whatever runs beside them (counting, another program).
    defaults = {"session.intra_op.allow_spinning": "0"}
    if provider != "cpu":
        defaults[WITHOUT_OPTIMIZERS] = BIAS_OPTIMIZER
    for key, value in {**defaults, **(config or {})}.items():
        options.add_session_config_entry(key, value)
    if profile is not None:
        options.enable_profiling, options.profile_file_prefix = True, str(profile)
    if optimized_path is not None:
        options.optimized_model_filepath = str(optimized_path)
        if models.is_large(proto):
            name = f"{Path(optimized_path).name}.data"
            options.add_session_config_entry("session.optimized_model_external_initializers_file_name", name)
    first, *others = PROVIDERS[provider]
    providers = [(first, dict(provider_options or {})), *others]
    try:
        if not models.is_large(proto):
            return ort.InferenceSession(proto.SerializeToString(), options, providers=providers)
        with tempfile.TemporaryDirectory(prefix="qdqtool-") as folder:
            path = models.save(proto, Path(folder) / "model.onnx", external_data=True)
            return ort.InferenceSession(str(path), options, providers=providers)
    except Exception as error:  # the runtime's own exceptions share no base but Exception
        raise ModelError(f"ONNX Runtime {ort.__version__} does not load the model: {error}") from error


def run(active: Any, names: Sequence[str] | None, feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Run a session; ModelError carries the runtime's message, which names the node.

    Where the model takes float16, float32 values are rounded to it.
    """
    half = {given.name for given in active.get_inputs() if given.type == "tensor(float16)"}
    fed = {k: v.astype("float16") if k in half and v.dtype == "float32" else v for k, v in feeds.items()}
    start = foreign.run if foreign.is_needed(active) else type(active).run
    try:
        outputs: list[npt.NDArray[Any]] = start(active, names, fed)
    except Exception as error:  # as in session()
        raise _cannot_run(feeds, error) from error
    return outputs if names is None else outputs[: len(names)]  # an empty list makes the runtime give all


def comparable(active: Any) -> list[str]:
    """Names of the outputs that are tensors of numbers; text, sequences, maps and optionals are none."""
    return [one.name for one in active.get_outputs() if one.type.startswith("tensor(") and one.type != "tensor(string)"]


def run_bound(active: Any, places: Mapping[str, str], feeds: Mapping[str, npt.NDArray[Any]]) -> list[Any]:
    """Run a session and leave its outputs where they are wanted, which saves a copy of those wanted on the device.

    Args:
        active: the session.
        places: output -> "cpu" or "cuda".
        feeds: on the host.

    Returns:
        An ``onnxruntime.OrtValue`` for each of ``places``, complete; memory is free again when all of them are gone.

    Raises:
        ModelError: as :func:`run`.
    """
    try:
        binding = active.io_binding()
        for name, value in feeds.items():
            if foreign.is_foreign(value.dtype):
                binding.bind_ortvalue_input(name, foreign.to_runtime(value))
            else:
                binding.bind_cpu_input(name, value)
        for name, place in places.items():
            binding.bind_output(name, place)
        active.run_with_iobinding(binding)
        # DLPack hands memory to another stream, and the runtime takes no notice of which: all must be done by then. A
        # run waits for its own stream by default; this waits for the device, whatever the default becomes.
        binding.synchronize_outputs()
        return list(binding.get_outputs())
    except Exception as error:  # as in session()
        raise _cannot_run(feeds, error) from error


def _cannot_run(feeds: Mapping[str, npt.NDArray[Any]], error: Exception) -> ModelError:
    shapes = ", ".join(f"{name} {value.dtype}{list(value.shape)}" for name, value in feeds.items())
    return ModelError(f"ONNX Runtime cannot run the model on inputs {shapes}: {error}")


def optimized(proto: onnx.ModelProto, *, provider: str = "cpu") -> onnx.ModelProto:
    """The graph that the runtime really runs after all its optimizations."""
    with tempfile.TemporaryDirectory(prefix="qdqtool-") as folder:
        path = Path(folder) / "optimized.onnx"
        session(proto, provider=provider, optimized_path=path)
        return onnx.load(path)


def describe(provider: str) -> str:
    """What computes values, as in ``onnxruntime 1.31.1, cpu``: with another version or provider bits may differ."""
    import onnxruntime as ort

    return f"onnxruntime {ort.__version__}, {provider}"


def resolve_provider(wanted: str) -> tuple[str, str | None]:
    """Choose the execution provider.

    Returns:
        A key of :data:`PROVIDERS`, and one line for the user where "auto" fell back to the CPU (None otherwise).

    Raises:
        RuntimeUnavailableError: the provider asked for by name cannot load here.
    """
    if wanted == "cpu":
        return "cpu", None
    reason = _why_no_gpu("tensorrt" if wanted == "tensorrt" else "cuda")
    if reason is None:
        return ("cuda" if wanted == "auto" else wanted), None
    if wanted == "auto":
        return "cpu", f"No CUDA provider ({reason}): measuring on the CPU provider."
    raise RuntimeUnavailableError(
        f"the {wanted} provider cannot load here: {reason}. Use --provider cpu, or install qdqtool[cuda]"
    )


@functools.cache
def _why_no_gpu(provider: str) -> str | None:
    """Why the provider cannot load, in one line; None where it can.

    The driver is asked before the runtime is, because a provider that fails to load prints errors from native code.
    """
    import onnxruntime as ort

    name = PROVIDERS[provider][0]
    if name not in ort.get_available_providers():
        return f"this build of onnxruntime ({ort.__version__}) has no {name}"
    driver = _driver()
    if driver is None:
        return "no NVIDIA driver was found"
    if is_stub_driver():
        return "the NVIDIA driver is a stub without a device"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return "the NVIDIA driver reports no device"
    with quiet_native():
        if hasattr(ort, "preload_dlls"):
            ort.preload_dlls()
        found = session(tiny_model(), provider=provider).get_providers()
    return None if name in found else f"{name} failed to load its libraries (CUDA, cuDNN or TensorRT)"


def _driver() -> Any:
    """The NVIDIA driver's library; None where there is none."""
    try:
        return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None


def is_stub_driver() -> bool:
    """Whether the driver's library says of itself that it has no device and only lets models be partitioned."""
    return hasattr(_driver(), STUB)


def tiny_model() -> onnx.ModelProto:
    """A model that only tells whether a provider loads."""
    text = '<ir_version: 8, opset_import: ["" : 17]> g (float[1] x) => (float[1] y) { y = Identity(x) }'
    return onnx.parser.parse_model(text)


@contextlib.contextmanager
def quiet_native() -> Iterator[None]:
    """Send what native code writes to standard error to nowhere for a while."""
    sys.stderr.flush()
    saved = os.dup(2)
    try:
        with open(os.devnull, "wb") as sink:
            os.dup2(sink.fileno(), 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def conflicting_packages() -> str | None:
    """A line for the user where onnxruntime and onnxruntime-gpu, which overwrite each other's files, are both there."""
    found = []
    for name in ("onnxruntime", "onnxruntime-gpu"):
        with contextlib.suppress(PackageNotFoundError):
            found.append(distribution(name).metadata["Name"])
    if len(found) < 2:
        return None
    return (
        "Both onnxruntime and onnxruntime-gpu are installed and overwrite each other's files. Mend it with: "
        "pip uninstall -y onnxruntime onnxruntime-gpu && pip install onnxruntime-gpu"
    )


def saturates_u8s8() -> bool:
    """Whether this x86 processor lacks VNNI, so that 16-bit sums of u8 x s8 products saturate."""
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore")
    except OSError:
        return False
    return "avx2" in flags and "avx512_vnni" not in flags and "avx_vnni" not in flags

"""How much memory a model takes, each in a process of its own.

On the CPU: the greatest size that the process had in memory (VmHWM of Linux; elsewhere ru_maxrss), less what it had
before the model was loaded. Loading is part of it. On CUDA: how much less of the device is free behind the runs than
before the session was made (cudaMemGetInfo); the runtime's arena gives nothing back while a session lives and grows by
what is asked for alone, so this is its peak. Other programs on the device disturb it. Not yet measured on a GPU.
"""

from __future__ import annotations

import ctypes
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from qdqtool import runtime
from qdqtool.data.fit import Feeds
from qdqtool.errors import ModelError, QdqError, RuntimeUnavailableError
from qdqtool.graphs import model as models
from qdqtool.graphs.model import ModelSource
from qdqtool.verification.running import runner

RUNS: Final = 3
ARENA: Final[Mapping[str, str]] = {"arena_extend_strategy": "kSameAsRequested"}
"""Option of the CUDA provider: the arena grows by what is asked for, not by powers of two."""
HOW: Final[Mapping[str, str]] = {
    "cpu": "greatest size of a process of its own, less that before the model was loaded",
    "cuda": "device memory taken by a process of its own, by cudaMemGetInfo",
}


@dataclass(frozen=True)
class Memory:
    """Peak memory of a model on one run's inputs.

    Attributes:
        peak: bytes.
        how: what was measured.
    """

    peak: int
    how: str


def peak(
    source: ModelSource, feeds: Feeds, *, provider: str = "cpu", provider_options: Mapping[str, str] | None = None
) -> Memory:
    """Load and run a model in a process of its own and see what that takes.

    Args:
        source: the model.
        feeds: one run's inputs.
        provider: execution provider, already known to load.
        provider_options: of that provider.

    Raises:
        ModelError: the model does not load or run there; the last line of its words is given.
    """
    with tempfile.TemporaryDirectory(prefix="qdqtool-") as folder:
        model, data = Path(folder) / "model.onnx", Path(folder) / "feeds.npz"
        models.save(models.load(source), model)
        np.savez(data, *feeds.values())
        call = {"names": list(feeds), "provider": provider, "options": dict(provider_options or {})}
        command = (sys.executable, "-c", "from qdqtool.verification.memory import main; main()")
        done = subprocess.run(
            (*command, str(model), str(data), json.dumps(call)), capture_output=True, text=True, check=False
        )
    if done.returncode != 0:
        raise ModelError(f"its memory cannot be measured: {(done.stderr.splitlines() or ['it crashed'])[-1]}")
    return Memory(int(done.stdout.split()[-1]), HOW["cpu" if provider == "cpu" else "cuda"])


def main() -> None:
    """Print the bytes that the model ``argv[1]`` takes on the feeds ``argv[2]``; ``argv[3]`` says where, as JSON."""
    model, data, text = sys.argv[1:]
    call = json.loads(text)
    with np.load(data) as arrays:
        feeds = {name: arrays[f"arr_{index}"] for index, name in enumerate(call["names"])}
    try:
        print(_taken(model, feeds, call["provider"], call["options"]))
    except QdqError as error:
        sys.exit(" ".join(str(error).split()))


def _taken(model: str, feeds: Feeds, provider: str, options: Mapping[str, str]) -> int:
    import onnxruntime as ort

    # A first session brings in what every one needs: the provider's libraries and its context on the device.
    tiny = runtime.session(runtime.tiny_model(), provider=provider)
    used = _resident if provider == "cpu" else _device_memory()
    before = used()
    settings = ort.SessionOptions()
    settings.log_severity_level = 4
    arena = ARENA if provider == "cuda" else {}
    first, *others = runtime.PROVIDERS[provider]
    active = ort.InferenceSession(model, settings, providers=[(first, {**arena, **options}), *others])
    run = runner(active, feeds, "cpu" if provider == "cpu" else "cuda")
    for _ in range(RUNS):
        run()
    after = _peak_resident() if provider == "cpu" else used()
    del tiny
    return max(0, after - before)


def _device_memory() -> Callable[[], int]:
    """A function that tells how many bytes of the device are in use."""
    library = _cudart()

    def used() -> int:
        free, total = ctypes.c_size_t(0), ctypes.c_size_t(0)
        status = library.cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
        if status != 0:
            raise RuntimeUnavailableError(f"cudaMemGetInfo failed with status {status}")
        return total.value - free.value

    return used


def _cudart() -> Any:
    for name in ("libcudart.so.13", "libcudart.so.12", "libcudart.so", "cudart64_13.dll", "cudart64_12.dll"):
        try:
            return ctypes.CDLL(name)  # the provider has loaded it by now, so that its name alone finds it
        except OSError:
            continue
    raise RuntimeUnavailableError("the CUDA runtime library (cudart) is not found, which tells the device's memory")


def _resident() -> int:
    """Bytes of this process in memory."""
    return _status("VmRSS") or _peak_resident()


def _peak_resident() -> int:
    """The most bytes that this process ever had in memory."""
    found = _status("VmHWM")
    if found is not None:
        return found
    import resource

    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most


def _status(key: str) -> int | None:
    """A figure in kB of Linux' /proc/self/status, in bytes; None elsewhere."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), None)

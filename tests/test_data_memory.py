"""Iterating over data takes as much memory for 1,024 samples as for 64, whatever file they come in."""

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

SHAPE = (3, 112, 112)
FEW, MANY, HELD = 64, 1024, 64
ALLOWED = 3 << 20
"""Bytes that more samples may cost: 2 % of them, a third of what is held. Reading a file whole costs 138 MiB."""

# A process starts with the peak of the one that started it, here of pytest: only a child of a small one starts small.
MEASURE = f"""
import os, sys
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))

import resource
import numpy as np
from qdqtool.data.source import open_data
from qdqtool.graphs.model import InputInfo

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)

def peak_over(source, samples):
    with open_data(source, [InputInfo("x", np.dtype(np.float32), ("N", *{SHAPE}))]) as data:
        for _ in range(2):
            held = [feeds for i, feeds in enumerate(data) if feeds["x"].sum() == 0 and i < {HELD}]
            assert (len(data), len(held)) == (samples, {HELD})
    return peak()

def generate(samples, dtype):
    for _ in range(samples):
        yield {{"x": np.zeros((1, *{SHAPE}), dtype)}}

few, many = (
    generate(samples, source.split(":")[1]) if source.startswith("generator:") else source
    for samples, source in zip(({FEW}, {MANY}), sys.argv[1:], strict=True)
)
start = peak()
print(peak_over(few, {FEW}) - start, peak_over(many, {MANY}) - start)
"""


def peaks(few: str, many: str) -> tuple[int, int]:
    """Bytes of memory above what was there before, at the peak of reading either source in one process."""
    pytest.importorskip("resource", reason="the system does not tell the peak of a process's memory")
    command = [sys.executable, "-W", "error", "-c", MEASURE, few, many]
    found = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[1])
    assert found.returncode == 0, found.stderr
    first, second = map(int, found.stdout.split())
    return first, second


def save(path: Path, kind: str, samples: int, dtype: Any) -> None:
    values = np.zeros((samples, *SHAPE), dtype)
    if kind == "npy":
        np.save(path, values)
    elif kind == "fortran":
        np.lib.format.open_memmap(path, "w+", dtype, values.shape, fortran_order=True).flush()
    elif kind == "folder":
        path.mkdir()
        for i in range(0, samples, 32):
            np.savez(path / f"{i}.npz", x=values[i : i + 32])
    else:
        (np.savez_compressed if kind == "compressed" else np.savez)(path, x=values)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [
        *((kind, dtype) for kind in ("npz", "compressed", "npy") for dtype in (np.float32, np.float64)),
        ("fortran", np.float32),
        ("folder", np.float32),
    ],
)
def test_more_samples_in_a_file_take_no_more_memory(tmp_path: Path, kind: str, dtype: Any) -> None:
    suffix = {"npy": ".npy", "fortran": ".npy", "folder": ""}.get(kind, ".npz")
    few, many = (tmp_path / f"{samples}{suffix}" for samples in (FEW, MANY))
    try:
        save(few, kind, FEW, dtype)
        save(many, kind, MANY, dtype)
        first, second = peaks(str(few), str(many))
    finally:
        shutil.rmtree(tmp_path)  # pytest keeps the folders of three runs: gigabytes
    assert first > HELD * np.prod(SHAPE) * 4  # what is held is seen: the measure works
    assert second < first + ALLOWED


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_longer_generator_takes_no_more_memory(dtype: str) -> None:
    first, second = peaks(f"generator:{dtype}", f"generator:{dtype}")
    assert first > HELD * np.prod(SHAPE) * 4
    assert second < first + ALLOWED

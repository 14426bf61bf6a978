"""What runs in a worker process of Ray: values travel there and back, and what cannot work says why."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest

from qdqtool.observation.engine_ray_task import pack, serve, shipped, size, unpack, versions

ray = pytest.importorskip("ray", reason="Ray is not installed")


@pytest.mark.parametrize(
    "array",
    [np.arange(12).reshape(3, 4), np.arange(12).reshape(3, 4).T, np.arange(12)[::2], np.zeros((0, 3)), np.float32(1.5)],
    ids=["C", "Fortran", "strided", "empty", "scalar"],
)
def test_arrays_travel_unchanged(array: np.ndarray[tuple[int, ...], np.dtype[np.float64]]) -> None:
    packed = pack({"x": array})
    for own in (False, True):
        found = unpack(packed, own=own)["x"]
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)
    assert size(packed) >= array.nbytes


def test_own_memory_can_be_written_and_is_nobody_elses() -> None:
    array = np.zeros(1000)
    packed = pack(array)
    unpack(packed, own=True)[:] = 1
    assert not array.any()
    assert np.shares_memory(unpack(packed), array)


def test_a_machine_without_qdqtool_says_so() -> None:
    code = """
import pickle, sys
sys.modules["qdqtool"] = None
task = pickle.load(sys.stdin.buffer)
print(task(("run", [], {}), "take", []))
"""
    task = ray.cloudpickle.dumps(shipped())
    told = subprocess.run([sys.executable, "-c", code], input=task, capture_output=True, check=True, timeout=60)
    assert b"('refused'" in told.stdout
    assert b"install the same version of it on every node" in told.stdout


def test_only_the_versions_that_differ_are_named() -> None:
    (how, why, _), found = serve(("run", [], versions() | {"qdqtool": "0.0.1"}), "take", [])
    assert (how, found) == ("refused", None)
    assert f"qdqtool {versions()['qdqtool']} but 0.0.1 started the run" in why
    assert "onnxruntime" not in why

"""Peak memory, measured in a process of its own."""

from __future__ import annotations

import numpy as np
import pytest

from qdqtool.errors import ModelError, RuntimeUnavailableError
from qdqtool.verification import memory
from tests.builders import conv_chain, feeds, parse


def test_a_model_that_holds_more_takes_more() -> None:
    body = "a = Expand(x, shape) b = Mul(a, a) c = Add(b, a) y = ReduceMax <keepdims = 0> (c)"
    found = []
    for rows in (1, 16):
        values = {"shape": np.array([rows * 1024, 1024], np.int64)}
        proto = parse(body, "float[1] x", "float y", values)
        found.append(memory.peak(proto, {"x": np.ones(1, np.float32)}).peak)
    small, large = found
    assert 16 * 4 * 2**20 < large < 10 * 16 * 4 * 2**20  # two such tensors at once, and an arena that grows by doubling
    assert small < large / 3


def test_it_says_how_it_was_measured() -> None:
    proto = conv_chain(1)
    assert memory.peak(proto, feeds(proto, 1)).how == memory.HOW["cpu"]


def test_a_model_that_does_not_run_is_an_error() -> None:
    proto = conv_chain(1)
    with pytest.raises(ModelError, match=r"its memory cannot be measured: .*ONNX Runtime cannot run"):
        memory.peak(proto, {"x": np.ones((1, 3, 8, 8), np.float32)})


class _Device:
    """A device of 100 bytes, of which 30 are free."""

    status = 0

    def cudaMemGetInfo(self, free: object, total: object) -> int:
        free._obj.value, total._obj.value = 30, 100  # type: ignore[attr-defined]  # what ctypes.byref made
        return self.status


def test_what_is_in_use_on_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device()
    monkeypatch.setattr(memory, "_cudart", lambda: device)
    used = memory._device_memory()
    assert used() == 70
    device.status = 2
    with pytest.raises(RuntimeUnavailableError, match="cudaMemGetInfo failed with status 2"):
        used()

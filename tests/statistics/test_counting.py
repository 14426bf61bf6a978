"""Counting with and without the function that scipy keeps to itself."""

from __future__ import annotations

import numpy as np
import pytest

from qdqtool.statistics import counting


def test_scipy_has_the_fast_loop() -> None:
    assert counting._product is not None


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("size", [0, 1, counting._ONES.size, counting._ONES.size + 3])
def test_every_key_is_counted_once(fast: bool, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not fast:
        monkeypatch.setattr(counting, "_product", None)
    keys = np.random.default_rng(size).integers(0, 50, size).astype(np.int32)
    counters = np.arange(50, dtype=np.int32)
    counting.count(counters, keys)
    assert (counters == np.arange(50) + np.bincount(keys, minlength=50)).all()

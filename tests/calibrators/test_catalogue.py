from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from qdqtool.calibrator_api import Calibrator, Stat
from qdqtool.calibrators import BUILTIN
from qdqtool.registry import catalogue, make
from qdqtool.spec import FORMATS, QuantSpec
from qdqtool.statistics.tensor import TensorStatistics

Array = npt.NDArray[np.float32]
Observe = Callable[..., TensorStatistics]
NAMES = [entry.name for entry in BUILTIN]
SPECS = [QuantSpec(FORMATS[f], symmetric=s) for f in ("int8", "uint8", "uint4", "uint16") for s in (False, True)]
values = hnp.arrays(np.float32, st.integers(1, 60), elements=st.floats(width=32, allow_nan=False, allow_infinity=False))


def test_every_entry_is_a_frozen_calibrator_under_its_own_name() -> None:
    assert list(catalogue("calibrators"))[: len(NAMES)] == NAMES
    for entry in BUILTIN:
        built = make("calibrators", entry.name, {})
        assert isinstance(built, Calibrator)
        with pytest.raises(dataclasses.FrozenInstanceError):
            built.__setattr__("name", "other")


def seen(x: Array) -> TensorStatistics:
    stats = TensorStatistics()
    stats.observe(x, [(b"%015d" % i, i) for i in range(x.size)])
    return stats


@pytest.mark.parametrize("name", NAMES)
@given(x=values, spec=st.sampled_from(SPECS))
@settings(max_examples=40, deadline=None)
def test_range_is_pure_and_within_what_was_seen(name: str, x: Array, spec: QuantSpec) -> None:
    stats, calibrator = seen(x), make("calibrators", name, {})
    chosen, again = calibrator.choose(stats, spec), calibrator.choose(stats, spec)
    assert (chosen.lo, chosen.hi) == (again.lo, again.hi)
    # mse may widen a range by up to one and a half steps, to move values off the middle between two codes
    slack = 1.51 * (float(x.max()) - float(x.min())) / spec.steps if name in ("mse", "auto") else 0.0
    assert float(x.min()) - slack <= chosen.lo <= chosen.hi <= float(x.max()) + slack
    assert chosen.lo.shape == chosen.hi.shape == ()
    assert chosen.lo.dtype == np.float64


@pytest.mark.parametrize("name", [c.name for c in BUILTIN if Stat.SAMPLES not in c.needs])
@given(x=values, spec=st.sampled_from(SPECS), data=st.data())
@settings(max_examples=25, deadline=None)
def test_order_of_observation_does_not_matter(name: str, x: Array, spec: QuantSpec, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(x.size)))
    calibrator = make("calibrators", name, {})
    there, back = calibrator.choose(seen(x), spec), calibrator.choose(seen(x[order]), spec)
    assert (there.lo, there.hi) == (back.lo, back.hi)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("x", [np.zeros(0), np.zeros(5), np.full(3, np.nan)], ids=["empty", "zeros", "nan"])
def test_nothing_but_zeros_gives_an_empty_range(observe: Observe, name: str, x: Array) -> None:
    for spec in SPECS:
        chosen = make("calibrators", name, {}).choose(observe(x), spec)
        assert (chosen.lo, chosen.hi) == (0, 0)


@pytest.mark.parametrize("name", NAMES)
def test_subnormals_alone_are_as_good_as_zeros(observe: Observe, name: str) -> None:
    for spec in SPECS:
        chosen = make("calibrators", name, {}).choose(observe(np.array([1e-45, 3e-45], np.float32)), spec)
        assert 0 <= float(chosen.hi) <= 3e-45


@pytest.mark.parametrize("name", NAMES)
def test_one_value_alone_keeps_its_range(observe: Observe, name: str) -> None:
    for spec in SPECS:
        assert make("calibrators", name, {}).choose(observe([3.7] * 9), spec).hi == np.float32(3.7)

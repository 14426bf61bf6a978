"""What follows from another tensor's statistics is what observing it would have given, to within one bin."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import numpy_helper

from qdqtool.data.source import open_data
from qdqtool.graphs import model as models
from qdqtool.observation.collect import collect
from qdqtool.observation.derive import Derivation, derivations, derived
from qdqtool.observation.observe import observe
from qdqtool.statistics.tensor import Statistics, TensorStatistics

Array = npt.NDArray[np.float32]

NET = onnx.parser.parse_model("""
    <ir_version: 8, opset_import: ["": 17]>
    g (float[N, 4, 6] x) => (float[N, 24] y) <float third = {0.3333}, float[1] slope = {0.25}, float two = {2.0}> {
        a = LeakyRelu <alpha = 0.1> (x) b = Mul(a, third) c = Neg(b) d = Transpose <perm = [0, 2, 1]> (c)
        e = Flatten(d) f = PRelu(e, slope) g = Mul(f, two) h = Relu(g) y = Add(h, f) }""")
FOLLOWING = {"a": "x", "b": "a", "c": "b", "d": "c", "e": "d", "f": "e"}
EVERY = ["x", *"abcdefgh", "y"]


def samples(count: int, seed: int = 0) -> Array:
    values = np.random.default_rng(seed).standard_t(3, (count, 4, 6)).astype(np.float32)
    values[:, 0, 0] = 0
    return values


def assert_near(found: TensorStatistics, observed: TensorStatistics) -> None:
    """Same extremes to the bit, and each value in its own bin or a neighbour of it."""
    assert (found.lo, found.hi, found.count) == (observed.lo, observed.hi, observed.count)
    for field in ("sample", "position", "lo", "hi"):
        np.testing.assert_array_equal(found.records[field], observed.records[field])
    mine, theirs = (np.repeat(s.bins.center, s.bins.count) for s in (found, observed))
    np.testing.assert_allclose(mine, theirs, rtol=2.0**-9, atol=1e-38)


def test_what_follows_is_found_and_nothing_else() -> None:
    found = derivations(NET, EVERY)
    assert {name: step.source for name, step in found.items()} == FOLLOWING  # Mul by 2 might overflow, Relu loses -inf
    assert list(found) == list(FOLLOWING)


def test_a_source_that_nobody_wants_is_no_source() -> None:
    assert [*derivations(NET, ["x", "b", "c"])] == ["c"]


def test_what_must_be_observed_itself_is() -> None:
    assert "c" not in derivations(NET, EVERY, apart={"c"})


@pytest.mark.parametrize("name", FOLLOWING)
def test_derived_statistics_are_those_of_the_values(name: str) -> None:
    data = open_data({"x": samples(40)}, models.inputs(NET))
    observed = observe(NET, EVERY, data).statistics
    found = collect(NET, EVERY, data).calibration.statistics
    assert_near(found[name], observed[name])


def test_only_what_does_not_follow_is_observed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []
    count = TensorStatistics.observe

    def observed(stats: TensorStatistics, values: Array, keys: list[tuple[bytes, int]]) -> None:
        seen.append(str(values.shape))
        count(stats, values, keys)

    monkeypatch.setattr(TensorStatistics, "observe", observed)
    collect(NET, EVERY, open_data({"x": samples(3)}, models.inputs(NET)))
    assert len(seen) == len(EVERY) - len(FOLLOWING)


finite = st.floats(-(2.0**100), 2.0**100, width=32)


@given(
    x=hnp.arrays(np.float32, st.tuples(st.integers(1, 6), st.integers(1, 8)), elements=finite),
    factors=st.tuples(st.floats(2.0**-6, 1, width=32), st.floats(2.0**-6, 1, width=32), st.sampled_from([-1, 1])),
    cut=st.integers(0, 6),
)
@settings(deadline=None)
def test_deriving_and_merging_may_change_places(x: Array, factors: tuple[float, float, int], cut: int) -> None:
    step = Derivation("y", "x", factors[0] * factors[2], factors[1] * factors[2])

    def seen(rows: slice) -> TensorStatistics:
        stats = TensorStatistics()
        keys = [(bytes(15) + bytes([i + 1]), i) for i in range(len(x))][rows]
        stats.observe(x[rows], keys)
        return stats

    parts = [seen(slice(0, cut)), seen(slice(cut, None))] if 0 < cut < len(x) else [seen(slice(None))]
    merged = parts[0]
    apart = step.statistics(parts[0])
    for part in parts[1:]:
        merged, apart = merged | part, apart | step.statistics(part)
    assert step.statistics(merged) == apart
    observed = TensorStatistics()
    observed.observe(step(x), [(bytes(15) + bytes([i + 1]), i) for i in range(len(x))])
    assert_near(apart, observed)


def test_nan_and_inf_stay_what_they_are() -> None:
    stats = TensorStatistics()
    stats.observe(np.array([[1, np.nan], [-np.inf, 2]], np.float32), [(b"a", 0), (b"b", 1)])
    found = derived(Statistics({"x": stats}, 2), {"y": Derivation("y", "x", -0.5, -0.5)})["y"]
    assert (found.nan, found.inf, found.first_non_finite) == (1, 1, (0, b"a"))
    assert (found.lo, found.hi) == (-1, -0.5)


def test_scaling_below_the_least_float_counts_as_zero() -> None:
    stats = TensorStatistics()
    stats.observe(np.full((1, 4), 1e-39, np.float32), [(b"a", 0)])
    assert Derivation("y", "x", 1e-3, 1e-3).statistics(stats).bins.zeros == 4


def test_a_constant_of_another_type_or_shape_is_no_factor() -> None:
    text = '<ir_version: 8, opset_import: ["": 17]> g (float[N, 2] x) => (float[N, 2] y) { y = Mul(x, c) }'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.append(numpy_helper.from_array(np.array([0.5, 0.5], np.float32), "c"))
    assert derivations(proto, ["x", "y"]) == {}


def test_a_leaky_relu_that_the_runtime_fuses_is_observed_in_place_of_its_conv() -> None:
    text = """<ir_version: 8, opset_import: ["": 17]> g (float[N, 4, 6] x) => (float[N, 4, 6] y) {
        c = Conv (x, w) a = LeakyRelu <alpha = 0.1> (c) m = Neg(a) d = Conv (m, w) y = Add(d, d) }"""
    proto = onnx.parser.parse_model(text)
    w = np.random.default_rng(1).standard_normal((4, 4, 1)).astype(np.float32)
    proto.graph.initializer.append(numpy_helper.from_array(w, "w"))
    names = ["x", "c", "a", "m", "d"]
    found = derivations(proto, names)
    assert {name: (step.source, step.inverse) for name, step in found.items()} == {"c": ("a", True), "m": ("a", False)}
    data = open_data({"x": samples(40)}, models.inputs(proto))
    observed = observe(proto, names, data).statistics
    got = collect(proto, names, data).calibration.statistics["c"]
    np.testing.assert_allclose([got.lo, got.hi], [observed["c"].lo, observed["c"].hi], rtol=2e-7)
    mine, theirs = (np.repeat(s.bins.center, s.bins.count) for s in (got, observed["c"]))
    np.testing.assert_allclose(mine, theirs, rtol=2.0**-9)
    assert [*derivations(proto, names, apart={"c"})] == ["a", "m"]

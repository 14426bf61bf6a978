"""Statistics counted where the runtime leaves its outputs are those counted on the host, bit for bit.

The same code runs with numpy in CuPy's place, with PyTorch on the CPU and, where there is one, on a GPU.
"""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from qdqtool import runtime
from qdqtool.data.batching import Batch, Sample
from qdqtool.data.fit import Feeds
from qdqtool.errors import ModelError
from qdqtool.observation import collect as collecting
from qdqtool.observation import device
from qdqtool.observation.device import CuPy, DeviceStatistics, Library, Torch
from qdqtool.observation.engine import Local
from qdqtool.observation.observe import Observation, ObserveJob, Observing, observe, with_outputs
from qdqtool.statistics.tensor import TensorStatistics
from tests.observation.test_observe import CONV, NETS, assert_identical, build, computed, opened

Array = npt.NDArray[Any]


@dataclass(frozen=True)
class NumPy(CuPy):
    """What is written for CuPy, run with numpy, whose interface CuPy has."""

    module: ClassVar[str] = "numpy"

    def host(self, values: Any) -> Array:
        return np.array(values)

    def free_bytes(self) -> int:
        return 1 << 30


@dataclass(frozen=True)
class TorchOnCpu(Torch):
    def free_bytes(self) -> int:
        return 1 << 30


@pytest.fixture(params=[NumPy("cpu"), TorchOnCpu("cpu")], ids=["numpy", "torch"])
def library(request: pytest.FixtureRequest) -> Library:
    chosen: Library = request.param
    pytest.importorskip(chosen.module, reason=f"{chosen.module} is not installed")
    return chosen


@pytest.fixture
def bound(library: Library, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """Makes ``observe`` count with the library; holds where the outputs of each run were bound."""
    places: list[dict[str, str]] = []
    original = runtime.run_bound

    def run_bound(active: Any, where: dict[str, str], feeds: Feeds) -> list[Any]:
        places.append(where)
        return original(active, where, feeds)

    monkeypatch.setattr(runtime, "run_bound", run_bound)
    monkeypatch.setattr(device, "find", lambda provider: (library, None))
    return places


def batch(samples: int, rows: int | None = None, real_rows: int | None = None) -> Batch:
    keys = [Sample({}, bytes([i]) * 15 + b"\1", 7 * i + 3) for i in range(samples)]
    return Batch({}, tuple(keys), rows or samples, real_rows)


def handed(values: Array) -> Any:
    return onnxruntime.OrtValue.ortvalue_from_numpy(values)


def on_host(*batches: tuple[Array, Batch]) -> TensorStatistics:
    stats = TensorStatistics()
    for values, taken in batches:
        stats.observe(taken.real(values), taken.keys)
    return stats


def on_device(library: Library, *batches: tuple[Array, Batch]) -> TensorStatistics:
    stats = DeviceStatistics(library)
    with np.errstate(over="ignore", invalid="ignore"):  # numpy alone warns of what becomes infinite
        for values, taken in batches:
            stats.observe(handed(values), taken)
    return stats.result()


def assert_same(one: TensorStatistics, other: TensorStatistics) -> None:
    assert one == other
    assert one.first_non_finite == other.first_non_finite
    for part in ("lo", "hi", "count"):
        assert getattr(one.bins, part).tobytes() == getattr(other.bins, part).tobytes()


# One tensor

bit_patterns = arrays.arrays(np.uint32, st.tuples(st.integers(1, 5), st.integers(0, 40)))
KINDS = (0x00000000, 0x80000000, 0x7F800000, 0xFF800000, 0x7F800001, 0xFFC00000, 0x7F7FFFFF, 0x00010000, 0x0000FFFF)


@given(bits=bit_patterns, kind=st.sampled_from(KINDS), seed=st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_any_float32_is_counted_as_on_the_host(bits: npt.NDArray[np.uint32], kind: int, seed: int) -> None:
    bits[np.random.default_rng(seed).random(bits.shape) < seed / 10] = kind
    values = bits.view(np.float32)
    parts = [(values, batch(len(values))), (values[::-1].copy(), batch(len(values)))]
    assert_same(on_device(NumPy("cpu"), *parts), on_host(*parts))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("shape", [(6, 3, 40), (6,), (6, 0, 2), (6, 1), (3, 60_000)])
def test_any_type_and_shape(library: Library, dtype: Any, shape: tuple[int, ...]) -> None:
    values = np.random.default_rng(1).standard_normal(shape).astype(dtype)
    values = np.where(values > 1, 0, values).astype(dtype)
    assert_same(on_device(library, (values, batch(shape[0]))), on_host((values, batch(shape[0]))))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_nan_infinity_and_what_is_beyond_float32(library: Library, dtype: Any) -> None:
    values = np.ones((5, 4), dtype)
    values[1, 2], values[2, 0], values[2, 1], values[3] = np.nan, np.inf, -np.inf, np.nan
    if dtype == np.float64:
        values[4, 0] = 1e300
    found = on_device(library, (values, batch(5)))
    assert (found.nan, found.inf) == (5, 3 if dtype == np.float64 else 2)
    assert found.first_non_finite == (10, b"\1" * 16)
    assert_same(found, on_host((values, batch(5))))


def test_the_first_sample_with_nan_is_found_in_whatever_order(library: Library) -> None:
    early, late = batch(2), batch(4)
    late = dataclasses.replace(late, samples=late.samples[2:], rows=2)
    values = np.full((2, 3), np.nan, np.float32)
    found = on_device(library, (values, late), (values, early))
    assert found.first_non_finite == (3, b"\0" * 15 + b"\1")
    assert_same(found, on_host((values, late), (values, early)))


def test_a_negative_zero_is_no_extreme(library: Library) -> None:
    found = on_device(library, (np.array([[-0.0, -0.0]], np.float32), batch(1)))
    assert not np.signbit(found.records["lo"][0])
    assert not np.signbit(found.records["hi"][0])
    assert found.bins.zeros == 2


def test_a_sample_larger_than_what_is_counted_together(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_CHUNK", 100)
    values = np.random.default_rng(2).standard_normal((7, 333)).astype(np.float32)
    small = values[:, :30].copy()
    for part in (values, small):
        assert_same(on_device(library, (part, batch(7))), on_host((part, batch(7))))


def test_nothing_seen_is_nothing_found(library: Library) -> None:
    assert_same(on_device(library), TensorStatistics())


SHARES = [
    ((4, 3), batch(4)),
    ((4, 3), batch(2, 4)),  # the last sample was repeated twice
    ((2, 6), batch(2, 4)),  # so it was, in a tensor whose first axis is not the batch
    ((5, 2), batch(3, 4)),  # belongs to no sample: each saw all of it
    ((), batch(3, 4)),
    ((8, 2), batch(1, 8, 5)),  # one whole feed, of which five rows are no repeats
    ((3, 3), batch(1, 8, 5)),
    ((4, 0), batch(2, 4)),
]


@pytest.mark.parametrize(("shape", "taken"), SHARES, ids=str)
def test_repeats_are_not_counted(library: Library, shape: tuple[int, ...], taken: Batch) -> None:
    values = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    kept, times = taken.share(values.size)
    assert np.array_equal(np.tile(values.reshape(-1)[:kept], times), taken.real(values).reshape(-1))
    assert_same(on_device(library, (values, taken)), on_host((values, taken)))


# A model


def compare(proto: onnx.ModelProto, source: object, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Observation:
    """Observe as ``find`` says and on the host; both must find the same."""
    data = opened(proto, source)
    found = observe(proto, computed(proto), data, **options)
    with monkeypatch.context() as patch:
        patch.setattr(device, "find", lambda provider: (None, None))
        assert_identical(found, observe(proto, computed(proto), data, **options))
    return found


def assert_outputs_are_counted_alike(library: Library, provider: str) -> None:
    """What one run put out, counted where it lies and on the host: two runs need not give the same bits."""
    names = computed(CONV)[1:]
    session = runtime.session(with_outputs(CONV, names), provider=provider)
    x = np.random.default_rng(8).standard_normal((50, 3, 10, 10)).astype(np.float32)
    x[7, 0, 3] = np.nan
    nan = 0
    for value in runtime.run_bound(session, dict.fromkeys(names, library.device), {"x": x}):
        stats = DeviceStatistics(library)
        stats.observe(value, batch(50))
        assert_same(stats.result(), on_host((value.numpy(), batch(50))))
        nan += stats.result().nan
    assert nan > 0


def test_outputs_of_one_run(library: Library) -> None:
    assert_outputs_are_counted_alike(library, "cpu")


@pytest.mark.parametrize("net", NETS)
def test_a_net(bound: list[dict[str, str]], net: str, monkeypatch: pytest.MonkeyPatch) -> None:
    proto, shape = NETS[net]
    x = np.random.default_rng(3).standard_normal((150, *shape)).astype(np.float32)
    found = compare(proto, {"x": x}, monkeypatch, options=Observing(engine=Local(4)))
    assert bound
    assert all(places == dict.fromkeys(computed(proto)[1:], "cpu") for places in bound)
    assert found.sweeps.threads == device.AT_ONCE
    assert found.statistics["y"].records.size == 150


def test_a_fixed_batch_and_a_tensor_that_belongs_to_no_sample(
    bound: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = build(
        "float[4, 3] x", "float[4, 3] y", "m = ReduceMax <keepdims = 0> (w) h = MatMul(x, w) y = Mul(h, m)", w=np.eye(3)
    )
    x = np.random.default_rng(4).standard_normal((6, 3)).astype(np.float32)
    found = compare(proto, {"x": x}, monkeypatch)
    assert bound
    assert (found.statistics["m"].count, found.statistics["h"].count) == (6, 18)


def test_nan_float16_and_empty_tensors_of_a_model(bound: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    proto = build(
        "float[N, 4] x",
        "float[N, 4] y, float16[N, 4] h, double[N, 4] d, float[N, 0] e",
        "l = Log(x) h = Cast <to = 10> (l) d = Cast <to = 11> (x) e = Slice(x, b, b, a) y = Relu(l)",
    )
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(np.array([v]), n) for n, v in (("a", 1), ("b", 2)))
    x = np.random.default_rng(5).uniform(-0.5, 9, (40, 4)).astype(np.float32)
    found = compare(proto, {"x": x}, monkeypatch)
    assert bound
    assert found.statistics["h"].nan == found.statistics["l"].nan > 0
    assert found.statistics["e"].count == 0


def test_channels_are_counted_on_the_host(bound: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(6).standard_normal((30, 3, 10, 10)).astype(np.float32)
    found = compare(CONV, {"x": x}, monkeypatch, axes={"a": 1})
    assert bound
    channels = found.statistics["a"].channels
    assert channels is not None
    assert channels.channels == 8


def test_a_model_that_fails_on_the_data_names_the_shapes() -> None:
    proto = build("float[N, T] x", "float[N, T] y", "[sum] y = Add(x, k)", k=np.zeros(4))
    session = runtime.session(proto)
    with pytest.raises(ModelError, match=r"cannot run the model on inputs x float32\[1, 3\].*sum"):
        runtime.run_bound(session, {"y": "cpu"}, {"x": np.zeros((1, 3), np.float32)})


# How much at once, and what the user is told


def test_free_memory_of_the_device_is_the_budget(
    library: Library, bound: list[dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(type(library), "free_bytes", lambda self: 2 * 4 * 900 * 4)
    x = np.random.default_rng(7).standard_normal((20, 3, 10, 10)).astype(np.float32)
    assert len(compare(CONV, {"x": x}, monkeypatch).sweeps.groups) > 1
    assert bound
    assert len(observe(CONV, ["r", "y"], opened(CONV, {"x": x}), options=Observing(1 << 30)).sweeps.groups) == 1


@pytest.mark.parametrize("at_once", [1, 2])
def test_no_more_batches_at_once_than_are_wanted(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, now, most = threading.Lock(), 0, 0
    original = runtime.run

    def run(*given: Any) -> list[Array]:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1
        return original(*given)

    monkeypatch.setattr(runtime, "run", run)
    x = np.zeros((1, 3, 10, 10), np.float32)
    items: Iterator[Batch] = (dataclasses.replace(batch(1), feeds={"x": x}) for _ in range(12))
    list(Local(4).run(ObserveJob(CONV, ("y",), {}, at_once=at_once), items))
    assert most == at_once


class _Broken(NumPy):
    def add(self, table: Any, keys: Any) -> None:
        raise RuntimeError("no driver\nand more")


class _Absent(NumPy):
    module: ClassVar[str] = "no_such_library"


class _Wrong(NumPy):
    def add(self, table: Any, keys: Any) -> None:
        pass


def test_a_library_is_taken_only_if_it_counts(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    assert library.why_not() is None
    assert _Absent().why_not() == "no_such_library is not installed"
    assert _Broken().why_not() == "numpy: no driver"
    assert _Wrong().why_not() == "numpy counts wrongly"
    monkeypatch.setattr(device, "CuPy", _Absent)
    monkeypatch.setattr(device, "Torch", lambda: library)
    assert device.find("tensorrt") == (library, None)
    assert device.find("cpu") == (None, None)


def test_counting_on_the_host_for_want_of_a_library_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "CuPy", _Absent)
    monkeypatch.setattr(device, "Torch", _Broken)
    found, note = device.find("cuda")
    assert found is None
    assert note is not None
    assert "no_such_library is not installed; numpy: no driver" in note
    monkeypatch.setattr(device, "find", lambda provider: (None, note))
    data = opened(CONV, {"x": np.zeros((3, 3, 10, 10), np.float32)})
    assert collecting.collect(CONV, ["y"], data).notes == (note,)


def test_an_onnxruntime_that_hands_over_no_memory_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "_hands_out_memory", lambda: False)
    found, note = device.find("cuda")
    assert found is None
    assert note is not None
    assert "1.26" in note


# On a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("kind", [CuPy, Torch])
def test_on_a_gpu(kind: type[Library], monkeypatch: pytest.MonkeyPatch) -> None:
    provider, why = runtime.resolve_provider("auto")
    why = kind().why_not() if why is None else why
    if why is not None:
        pytest.skip(why)
    assert_outputs_are_counted_alike(kind(), provider)
    monkeypatch.setattr(device, "find", lambda provider: (kind(), None))
    x = np.random.default_rng(8).standard_normal((150, 3, 10, 10)).astype(np.float32)
    found = observe(CONV, computed(CONV), opened(CONV, {"x": x}), provider=provider)
    assert (found.statistics["r"].lo, found.statistics["r"].count) == (0, 150 * 8 * 100)

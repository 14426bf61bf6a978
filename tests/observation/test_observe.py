"""Statistics are of the samples: not of the batches they came in, nor of their order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

from qdqtool.data.fit import Feeds
from qdqtool.data.source import Data, open_data
from qdqtool.errors import DataError, ModelError
from qdqtool.graphs import model as models
from qdqtool.observation.observe import HELD, Observation, observe

Array = npt.NDArray[np.float32]
RNG = np.random.default_rng(7)


def build(inputs: str, outputs: str, body: str, opset: int = 17, **weights: npt.ArrayLike) -> onnx.ModelProto:
    head = f'<ir_version: 8, opset_import: ["": {opset}]>'
    proto = onnx.parser.parse_model(f"{head} g ({inputs}) => ({outputs}) {{ {body} }}")
    for name, value in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    return proto


CONV = build(
    "float[N, 3, 10, 10] x",
    "float[N, 5] y",
    """a = Conv <pads = [1, 1, 1, 1]> (x, w1, b1) r = Relu(a) c = Conv <group = 8> (r, w2)
       p = GlobalAveragePool(c) f = Flatten(p) y = Gemm <transB = 1> (f, w3, b3)""",
    w1=RNG.standard_normal((8, 3, 3, 3)),
    b1=RNG.standard_normal(8),
    w2=RNG.standard_normal((8, 1, 3, 3)),
    w3=RNG.standard_normal((5, 8)),
    b3=RNG.standard_normal(5),
)
MATMUL = build(
    "float[N, 6, 16] x",
    "float[N, 6, 16] y",
    """q = MatMul(x, wq) k = MatMul(x, wk) t = Transpose <perm = [0, 2, 1]> (k) s = MatMul(q, t)
       p = Softmax <axis = -1> (s) v = MatMul(p, x) n = LayerNormalization(v, gamma) h = MatMul(n, w1)
       e = Erf(h) y = MatMul(e, w2)""",
    wq=RNG.standard_normal((16, 16)) / 4,
    wk=RNG.standard_normal((16, 16)) / 4,
    gamma=RNG.uniform(0.5, 2, 16),
    w1=RNG.standard_normal((16, 24)) / 4,
    w2=RNG.standard_normal((24, 16)) / 5,
)
NETS = {"conv": (CONV, (3, 10, 10)), "matmul": (MATMUL, (6, 16))}


def computed(proto: onnx.ModelProto) -> list[str]:
    return ["x", *(name for node in proto.graph.node for name in node.output)]


def opened(proto: onnx.ModelProto, source: object) -> Data:
    return open_data(source, models.inputs(proto))


def seen(proto: onnx.ModelProto, source: object, **options: Any) -> Observation:
    return observe(proto, computed(proto), opened(proto, source), **options)


def feeds(x: Array, size: int) -> list[Feeds]:
    return [{"x": x[i : i + size]} for i in range(0, len(x), size)]


@pytest.fixture(scope="module", params=NETS)
def net(request: pytest.FixtureRequest) -> tuple[onnx.ModelProto, Array]:
    proto, shape = NETS[request.param]
    return proto, np.random.default_rng(1).standard_normal((150, *shape)).astype(np.float32)


@pytest.fixture(scope="module")
def whole(net: tuple[onnx.ModelProto, Array]) -> Observation:
    proto, x = net
    return seen(proto, {"x": x})


def assert_identical(one: Observation, other: Observation) -> None:
    assert one.statistics.samples == other.statistics.samples
    assert one.statistics.tensors.keys() == other.statistics.tensors.keys()
    for name, stats in one.statistics.tensors.items():
        assert stats == other.statistics[name], name
        for part in ("lo", "hi", "count"):
            assert getattr(stats.bins, part).tobytes() == getattr(other.statistics[name].bins, part).tobytes()
    assert [s.digest for s in one.held] == [s.digest for s in other.held]


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_users_batches_change_nothing(net: tuple[onnx.ModelProto, Array], whole: Observation, size: int) -> None:
    proto, x = net
    assert whole.batching.rows
    assert_identical(seen(proto, feeds(x, size)), whole)


def test_the_order_of_samples_changes_nothing(net: tuple[onnx.ModelProto, Array], whole: Observation) -> None:
    proto, x = net
    for seed in (0, 1):
        order = np.random.default_rng(seed).permutation(len(x))
        assert_identical(seen(proto, {"x": x[order]}), whole)
        assert_identical(seen(proto, feeds(x[order], 7)), whole)


def test_a_partition_merges_to_the_whole(net: tuple[onnx.ModelProto, Array], whole: Observation) -> None:
    proto, x = net
    parts = [seen(proto, {"x": part}).statistics for part in np.split(x, [40, 41, 110])]
    merged = (parts[3] | parts[0]) | (parts[2] | parts[1])
    assert merged.samples == len(x)
    for name, stats in whole.statistics.tensors.items():
        assert merged[name] == stats


def test_statistics_are_of_the_values_that_the_model_computes() -> None:
    x = np.random.default_rng(2).standard_normal((20, 3, 10, 10)).astype(np.float32)
    found = seen(CONV, {"x": x}).statistics
    assert (found["x"].lo, found["x"].hi, found["x"].count) == (x.min(), x.max(), x.size)
    assert found["r"].lo == 0
    assert found["r"].hi == found["a"].hi
    assert found["r"].bins.zeros > 0
    assert found["r"].bins.zeros == found["a"].count - found["a"].bins.count[found["a"].bins.lo > 0].sum()
    assert found["y"].count == 20 * 5


# Which samples


@pytest.mark.parametrize("count", [1, 10, 33])
def test_a_number_of_samples_is_chosen_by_content(net: tuple[onnx.ModelProto, Array], count: int) -> None:
    proto, x = net
    some = seen(proto, {"x": x}, samples=count)
    assert some.statistics.samples == count
    assert all(len(stats.records) == count for stats in some.statistics.tensors.values())
    assert_identical(seen(proto, feeds(x[::-1], 7), samples=count), some)


def test_fewer_samples_than_asked_for_are_all_taken(net: tuple[onnx.ModelProto, Array], whole: Observation) -> None:
    proto, x = net
    assert_identical(seen(proto, {"x": x}, samples=1000), whole)


def test_held_samples_are_those_of_least_hash(whole: Observation) -> None:
    assert len(whole.held) == HELD
    hashes = [sample.digest for sample in whole.held]
    assert hashes == sorted(hashes)
    records = whole.statistics["x"].records["sample"]
    assert hashes == sorted(bytes(key) for key in records)[:HELD]


# Where they come from


def test_a_generator_and_a_reader_give_what_a_list_gives(
    net: tuple[onnx.ModelProto, Array], whole: Observation
) -> None:
    proto, x = net

    def generator() -> Iterator[Feeds]:
        buffer = np.empty((1, *x.shape[1:]), np.float32)
        for row in x:
            buffer[0] = row
            yield {"x": buffer}

    class Reader:
        def __init__(self) -> None:
            self.items = iter(feeds(x, 7))

        def get_next(self) -> Feeds | None:
            return next(self.items, None)

    with opened(proto, generator()) as data:
        assert_identical(observe(proto, computed(proto), data), whole)
    with opened(proto, Reader()) as data:
        assert_identical(observe(proto, computed(proto), data, samples=150), whole)


def test_progress_counts_samples(net: tuple[onnx.ModelProto, Array]) -> None:
    proto, x = net
    told: list[tuple[str, int, int | None]] = []
    seen(proto, {"x": x}, progress=lambda *news: told.append(news))
    assert told[-1] == ("observe", len(x), len(x))
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)
    told.clear()
    seen(proto, {"x": x}, samples=10, progress=lambda *news: told.append(news))
    assert told[-1] == ("observe", 10, 10)


def test_only_inputs_can_be_observed_too() -> None:
    x = np.ones((3, 3, 10, 10), np.float32)
    assert observe(CONV, ["x"], opened(CONV, {"x": x})).statistics["x"].hi == 1


# Models that cannot be batched


def test_a_fixed_batch_counts_every_sample_once() -> None:
    body, weights = "h = MatMul(x, w) y = Relu(h)", np.eye(3)
    fixed = build("float[4, 3] x", "float[4, 3] y", body, w=weights)
    free = build("float[N, 3] x", "float[N, 3] y", body, w=weights)
    x = np.random.default_rng(3).standard_normal((10, 3)).astype(np.float32)
    one, other = seen(fixed, {"x": x}), seen(free, {"x": x})
    assert one.batching.fixed
    for name in ("x", "h", "y"):
        assert one.statistics[name].histogram == other.statistics[name].histogram
        assert one.statistics[name].count == 30


def test_a_fixed_batch_may_hold_tensors_that_belong_to_no_sample() -> None:
    proto = build(
        "float[4, 3] x", "float[4, 3] y", "m = ReduceMax <keepdims = 0> (w) h = MatMul(x, w) y = Mul(h, m)", w=np.eye(3)
    )
    x = np.random.default_rng(3).standard_normal((6, 3)).astype(np.float32)
    found = seen(proto, {"x": x}).statistics
    assert (found["m"].lo, found["m"].hi, found["m"].count) == (1, 1, 6)
    assert found["h"].count == 18


def test_a_softmax_over_the_first_axis_keeps_feeds_whole() -> None:
    proto = build("float[T, 3] x", "float[T, 3] y", "y = Softmax <axis = 0> (x)")
    x = np.random.default_rng(4).standard_normal((12, 3)).astype(np.float32)
    found = seen(proto, feeds(x, 4))
    assert not found.batching.rows
    assert found.statistics.samples == 3
    assert found.statistics["y"].hi < 1


def test_inputs_of_rank_0_and_states_with_another_axis() -> None:
    proto = build(
        "float[N, 3] x, float scale, float[2, N, 3] state, int64[N] ids",
        "float[N, 3] y, float[2, N, 3] next",
        """a = Mul(x, scale) i = Cast <to = 1> (ids) s = ReduceSum <keepdims = 0> (i) y = Add(a, s)
           next = Mul(state, scale)""",
    )
    rng = np.random.default_rng(5)
    given: list[Feeds] = [
        {
            "x": rng.standard_normal((1, 3)).astype(np.float32),
            "scale": np.array(i, np.float32),
            "state": np.full((2, 1, 3), i, np.float32),
            "ids": np.array([i]),
        }
        for i in range(5)
    ]
    found = observe(proto, ["scale", "a", "next"], opened(proto, given))
    assert not found.batching.rows
    assert found.statistics.samples == 5
    assert found.statistics["scale"].hi == 4
    assert found.statistics["next"].hi == 16
    assert found.statistics["scale"].count == 5


def test_sequences_of_differing_length() -> None:
    proto = build("float[N, T, 4] x", "float[N, T, 4] y", "y = Mul(x, k)", k=[2.0])
    rng = np.random.default_rng(6)
    given: list[Feeds] = [{"x": rng.standard_normal((1, n, 4)).astype(np.float32)} for n in (5, 3, 5, 3, 7)]
    found = seen(proto, given)
    assert found.batching.rows
    assert found.statistics["y"].count == 4 * (5 + 3 + 5 + 3 + 7)
    assert_identical(seen(proto, given[::-1]), found)


# What goes wrong


def test_nan_and_infinity_are_counted_and_located() -> None:
    proto = build("float[N, 2] x", "float[N, 2] y", "l = Log(x) y = Relu(l)")
    x = np.ones((40, 2), np.float32)
    x[:, 1] += np.arange(40)
    x[17, 0], x[29, 0] = -1.0, 0.0
    found = seen(proto, {"x": x}).statistics
    assert (found["l"].nan, found["l"].inf) == (1, 1)
    assert found["l"].first_non_finite is not None
    assert found["l"].first_non_finite[0] == 17
    assert found["l"].hi == pytest.approx(np.log(40.0))
    assert found["l"].count == 78
    assert found["x"].first_non_finite is None


def test_a_model_that_fails_on_the_data_names_node_and_shapes() -> None:
    proto = build("float[N, T] x", "float[N, T] y", "[sum] y = Add(x, k)", k=np.zeros(4))
    with pytest.raises(ModelError, match=r"cannot run the model on inputs x float32\[1, 3\].*sum"):
        seen(proto, [{"x": np.zeros((1, 3), np.float32)}])


def test_no_samples_is_an_error() -> None:
    empty = Data("nothing", lambda: iter(()))
    with pytest.raises(DataError, match="nothing holds no samples"):
        observe(CONV, ["y"], empty)

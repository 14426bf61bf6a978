"""What needs a CUDA device: real placement, latency with and without graphs, device memory, suggestions."""

from __future__ import annotations

import pytest

from qdqtool import runtime
from qdqtool.data.source import open_data
from qdqtool.graphs import model as models
from qdqtool.graphs.model import ModelSource
from qdqtool.verification import benchmark, comparison, latency, listing, memory, partition, placement
from qdqtool.verification.listing import Fate
from qdqtool.verification.suggestion import suggest
from qdqtool.verification.variants import WITHOUT_TF32
from tests.builders import conv_chain, feeds, normal, parse, quantized

pytestmark = pytest.mark.gpu
CHAIN = conv_chain(3)
PRODUCT = parse("[p] y = MatMul(x, m)", "float[N, 256] x", "float[N, 512] y", {"m": normal(256, 512)})


@pytest.fixture(scope="module", autouse=True)
def device() -> None:
    """Skip where CUDA does not load."""
    provider, reason = runtime.resolve_provider("auto")
    if provider != "cuda":
        pytest.skip(reason or "no CUDA device")


def test_a_file_for_cuda_stays_there_and_is_placed() -> None:
    done = quantized(CHAIN, target="cuda", bias_correction=False).model
    optimized, active = placement.load(done, provider="cuda", config=partition.RECORD)
    parted = partition.read(active, optimized, "cuda")
    rows = listing.listing(done, optimized, provider="cuda", partition=parted)
    assert parted.gpu
    assert not parted.fallen
    assert {row.state for row in rows if row.operator == "Conv"} == {Fate.FLOAT}
    assert not [row for row in rows if row.state == Fate.MOVED]


def test_weights_alone_are_kernels_on_cuda() -> None:
    done = quantized(PRODUCT, target="cuda", precision="w4a16").model
    optimized, active = placement.load(done, provider="cuda", config=partition.RECORD)
    rows = listing.listing(done, optimized, provider="cuda", partition=partition.read(active, optimized, "cuda"))
    assert next(row for row in rows if row.name == "p").kernel == "MatMulNBits"


@pytest.mark.parametrize("graphs", [False, True])
def test_latency_with_and_without_graphs(graphs: bool) -> None:
    sources: dict[str, ModelSource | latency.Variant] = {
        "float": CHAIN,
        "without TF32": latency.Variant(CHAIN, provider_options=WITHOUT_TF32),
    }
    found = latency.bench(sources, feeds(CHAIN, 8), provider="cuda", seconds=0.0, cuda_graph=graphs)
    assert found.batch == 8
    assert all(0 < one.p50 <= one.p99 for one in found.latency.values())
    assert not found.work["float"].fallen


def test_device_memory_grows_with_the_batch() -> None:
    proto = conv_chain(3, channels=32, size=64)
    small, large = (memory.peak(proto, feeds(proto, n, H=64, W=64), provider="cuda").peak for n in (1, 64))
    assert large > 64 * 32 * 64 * 64 * 4
    assert small < large


def test_accuracy_three_ways() -> None:
    done = quantized(CHAIN, target="cuda", bias_correction=False).model
    data = open_data(feeds(CHAIN, 16), models.inputs(CHAIN))
    found = comparison.compare(CHAIN, done, data, provider="cuda")
    assert min(*found.fused.values(), *found.emulated.values()) > 25


def test_a_benchmark_with_everything() -> None:
    done = quantized(CHAIN, target="cuda", bias_correction=False).model
    data = open_data(feeds(CHAIN, 8), models.inputs(CHAIN))
    sources = {"float": CHAIN, "w8a8": done}
    found = benchmark.benchmark(
        sources, data, batches=(1, 8), beside=("fp16",), provider="cuda", memory=True, suggestions=True, seconds=0.0
    )
    names = {"float", "w8a8", "float32, TF32 off", "fp16 of float"}
    assert [set(run.latency) for run in found.runs] == [names, names]
    assert set(found.memory[8]) == names


def test_what_else_to_try() -> None:
    slow = quantized(PRODUCT, target="cuda", bias_correction=False).model
    found = {one.name: one for one in suggest(PRODUCT, slow, feeds(PRODUCT, 1), provider="cuda", seconds=0.0)}
    assert all(found[name].ratio is not None for name in ("fp16", "w8a16", "w4a16"))
    assert "tensorrt" in found

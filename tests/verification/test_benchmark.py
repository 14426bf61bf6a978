"""Several batch sizes, memory and suggestions in one value, and the page that shows it."""

from __future__ import annotations

import io
from typing import Any

import pytest
from rich.console import Console

from qdqtool.data.source import open_data
from qdqtool.graphs import model as models
from qdqtool.graphs.model import ModelSource
from qdqtool.report.latency import table
from qdqtool.verification import benchmark, latency
from qdqtool.verification.benchmark import Benchmark
from qdqtool.verification.latency import Bench, Latency, Ratio, Variant
from qdqtool.verification.memory import Memory
from qdqtool.verification.running import Work
from qdqtool.verification.suggestion import Suggestion
from tests.builders import conv_chain, feeds

FLOAT = conv_chain(1)
TIMES = Latency(1.0, 2.0, 3.0, 1.0)


def fake(ratios: dict[str, Ratio]) -> Any:
    """Stands in for latency.bench: every model takes 1 ms, with these ratios."""

    def bench(sources: dict[str, ModelSource | Variant], fed: dict[str, Any], **options: Any) -> Bench:
        batch = next(iter(fed.values())).shape[0]
        return Bench(
            options["provider"], 0, batch, 100, dict.fromkeys(sources, TIMES), ratios, dict.fromkeys(sources, Work({}))
        )

    return bench


def measured(monkeypatch: pytest.MonkeyPatch, ratio: Ratio, **options: Any) -> Benchmark:
    monkeypatch.setattr(latency, "bench", fake({"int8": ratio}))
    data = open_data(feeds(FLOAT, 4), models.inputs(FLOAT))
    return benchmark.benchmark({"float": FLOAT, "int8": FLOAT}, data, **options)


def test_batches_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchmark, "peak", lambda source, fed, **_: Memory(len(fed["x"]) * 1000, "by counting"))
    found = measured(monkeypatch, Ratio(0.5, 0.4, 0.6), batches=(1, 4), memory=True)
    assert [run.batch for run in found.runs] == [1, 4]
    assert {size: taken["int8"].peak for size, taken in found.memory.items()} == {1: 1000, 4: 4000}
    assert found.broken(0.6) == []
    assert len(found.broken(0.45)) == 2


@pytest.mark.parametrize(("ratio", "asked"), [(Ratio(1.5, 1.4, 1.6), ["int8"]), (Ratio(1.1, 0.9, 1.3), [])])
def test_only_a_model_that_is_slower_for_sure_gets_suggestions(
    monkeypatch: pytest.MonkeyPatch, ratio: Ratio, asked: list[str]
) -> None:
    known = [Suggestion("fp16", "float16", Ratio(0.5, 0.4, 0.6)), Suggestion("tensorrt", "it", unmeasured="not here")]
    monkeypatch.setattr(benchmark, "suggest", lambda *_, **__: known)
    found = measured(monkeypatch, ratio, suggestions=True)
    assert list(found.suggestions) == asked


def test_on_cuda_the_float_model_runs_without_tf32_too(monkeypatch: pytest.MonkeyPatch) -> None:
    found = measured(monkeypatch, Ratio(0.5, 0.4, 0.6), provider="cuda", beside=("fp16",))
    assert list(found.runs[0].latency) == ["float", "int8", "float32, TF32 off", "fp16 of float"]


def test_the_page() -> None:
    both, work = dict.fromkeys(("float", "int8"), TIMES), {"int8": Work({"Conv": 1}, ("q",))}
    run = Bench("cpu", 2, 8, 100, both, {"int8": Ratio(1.5, 1.4, 1.6)}, work)
    faster = Suggestion("fp16", "float16: --precision fp16", Ratio(0.5, 0.4, 0.6))
    unmeasured = Suggestion("tensorrt", "the same file with --provider tensorrt", unmeasured="no driver")
    found = Benchmark(
        (run,), {8: {"int8": Memory(5_000_000, "by counting")}}, {"int8": (faster, unmeasured)}, {"w4a16": "no product"}
    )
    stream = io.StringIO()
    Console(file=stream, width=140).print(table(found))
    for part in (
        "CPU provider, 2 pinned threads, 100 runs each",
        "1.40 to 1.60       5.0 MB",
        "peak memory: by counting",
        "int8 is slower at batch 8",
        "1 Q or DQ node that fused into nothing: q",
        "float16: --precision fp16: 0.50 times the float model's time (0.40 to 0.60), faster",
        "with --provider tensorrt: not measured (no driver)",
        "not measured: w4a16: no product",
    ):
        assert part in stream.getvalue()

"""A network for the tests of calibration, and what is run of it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx
import pytest

import qdqtool
from qdqtool.data.batching import Batch
from qdqtool.observation.observe import ObserveJob
from qdqtool.pipeline import Result
from tests.builders import Arrays, conv, conv_values, feeds, normal, parse, weight


def network(seed: int = 0, opset: int = 17) -> onnx.ModelProto:
    """A residual block, whose Conv, Add and Relu the runtime would fuse where nobody looks, and a scaled branch."""
    body = f"""
        {conv("c0", "x", 0)} [r0] r0 = Relu(c0) {conv("c1", "r0", 1)} s = Add(c1, r0) r1 = Relu(s)
        {conv("c2", "r1", 2)} l = LeakyRelu <alpha = 0.1> (c2) p = GlobalAveragePool(l) f = Flatten(p)
        [head] y = Gemm <transB = 1> (f, w3, b3)"""
    values = conv_values(3) | {"w3": weight(5, 8, seed=seed), "b3": normal(5, seed=seed)}
    return parse(body, "float[N, 8, 6, 6] x", "float[N, 5] y", values, opset=opset)


NETWORK = network()


def data(count: int = 24, seed: int = 1) -> Arrays:
    """Samples for the network."""
    return feeds(NETWORK, count, seed)


def quantize(data: object = None, model: Any = NETWORK, **given: Any) -> Result:
    """Quantize for the CPU, measured on the CPU, by the quickest calibrator, without a cache: all unless given."""
    recipe = {"target": "cpu", "calibrator": "minmax", **given.pop("recipe", {})}
    return qdqtool.quantize(model, data, recipe=recipe, **{"provider": "cpu", "cache": False, **given})


def calibrate(data: object, model: Any = NETWORK, **fields: Any) -> qdqtool.Calibration:
    """Observe on the CPU, without a cache unless that is asked for."""
    return qdqtool.calibrate(model, data, **{"provider": "cpu", "cache": False, **fields})


def content(result: Result) -> bytes:
    """The quantized model's bytes."""
    return result.model.SerializeToString(deterministic=True)


@dataclass(frozen=True)
class Taken:
    """A batch that was run: which tensors were observed, at which positions in the data."""

    tensors: tuple[str, ...]
    positions: tuple[int, ...]


def watch(monkeypatch: pytest.MonkeyPatch, fail_after: int | None = None) -> list[Taken]:
    """A list that grows with every batch that is run; after so many of them the next one fails."""
    found: list[Taken] = []
    start = ObserveJob.start

    def started(job: ObserveJob) -> Any:
        worker = start(job)
        take = worker.take

        def watched(batch: Batch) -> None:
            if fail_after is not None and len(found) >= fail_after:
                raise InterruptedError("the power failed")
            take(batch)
            found.append(Taken(job.tensors, tuple(sample.position for sample in batch.samples)))

        monkeypatch.setattr(worker, "take", watched)
        return worker

    monkeypatch.setattr(ObserveJob, "start", started)
    return found


def observed(taken: list[Taken]) -> set[str]:
    """Every tensor that was observed."""
    return {name for batch in taken for name in batch.tensors}


def positions(taken: list[Taken]) -> list[int]:
    """The positions that were run, in order."""
    return sorted(position for batch in taken for position in batch.positions)

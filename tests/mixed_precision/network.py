"""A network whose layers differ in size and in what they cost the outputs, so that widths have something to gain."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx

from qdqtool.mixed_precision.results import SearchResult
from qdqtool.mixed_precision.search import search
from tests.builders import Arrays, feeds, normal, parse, run, weight

LAYERS = ("c0", "c1", "c2", "c3", "fc", "fc2")


def network(opset: int = 17) -> onnx.ModelProto:
    """Conv 3 -> 8 -> 32 -> 32 (depthwise), Gemm -> 6 classes; the largest layer is in a branch that adds little."""
    constants = {
        "w0": weight(8, 3, 3, 3),
        "w1": weight(32, 8, 3, 3, seed=1),
        "w2": weight(32, 1, 3, 3, seed=2),
        "w3": weight(96, 32, 1, 1, seed=3),
        "w4": 0.05 * weight(96, 6, seed=4, inputs=96),
        "w5": weight(32, 6, seed=5, inputs=32),
        "b0": normal(8, scale=0.1),
        "b4": normal(6, seed=4, scale=0.1),
    }
    body = """
        [c0] c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0) [r0] r0 = Relu(c0)
        [c1] c1 = Conv <pads = [1, 1, 1, 1]> (r0, w1) [r1] r1 = Relu(c1)
        [c2] c2 = Conv <pads = [1, 1, 1, 1], group = 32> (r1, w2) [r2] r2 = Relu(c2)
        [c3] c3 = Conv (r2, w3) [r3] r3 = Relu(c3)
        [gap] gap = GlobalAveragePool(r3) [flat] flat = Flatten(gap) [fc] small = Gemm(flat, w4, b4)
        [gap2] gap2 = GlobalAveragePool(r2) [flat2] flat2 = Flatten(gap2) [fc2] large = Gemm(flat2, w5, b4)
        [sum] y = Add(small, large)
    """
    return parse(body, "float[N, 3, 8, 8] x", "float[N, 6] y", constants, opset=opset)


def data(samples: int = 32, seed: int = 1) -> Arrays:
    """Random samples."""
    return feeds(network(), samples, seed)


def labelled(samples: int = 60) -> tuple[Arrays, Any]:
    """Samples to evaluate on, and the float model's own answers as labels."""
    fed = data(samples, 2)
    return fed, run(network(), fed)["y"].argmax(axis=1)


def searched(**options: Any) -> SearchResult:
    """A search on the network, judged on samples of its own."""
    fed, labels = labelled()
    given: dict[str, Any] = {"target": "cpu", "provider": "cpu", "evaluation": fed, "labels": labels, "cache": False}
    return search(network(), data(), **(given | options))


def sqnr_of(model: onnx.ModelProto, fed: Arrays) -> float:
    """SQNR of the quantized network in dB."""
    want, got = (run(proto, fed)["y"].astype(np.float64) for proto in (network(), model))
    return float(10 * np.log10((want**2).sum() / ((want - got) ** 2).sum()))

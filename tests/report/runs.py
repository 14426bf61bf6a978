"""Finished runs that the tests of reports look at."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx

from qdqtool.passes_api import State
from qdqtool.pipeline import quantize
from qdqtool.report import page_data
from qdqtool.report.page_data import Keeper, PageData
from qdqtool.report.values import Report
from tests.builders import feeds, parse, weight

EVIL = "<script>alert('x')</script>&\"quoted\""
"""A node's name that is markup, were it not escaped."""


@dataclass(frozen=True)
class Run:
    """A finished run: the quantized model, its report, the state it left, and what a page shows of it."""

    proto: onnx.ModelProto
    report: Report
    state: State
    data: PageData


def network(name: str = "first") -> onnx.ModelProto:
    """Three layers, a residual sum and an operator without an integer kernel; the first Conv is called ``name``."""
    body = """
        c1 = Conv<pads = [1, 1, 1, 1]>(x, w1, b1)
        r1 = Relu(c1)
        c2 = Conv<pads = [1, 1, 1, 1]>(r1, w2)
        s = Add(r1, c2)
        e = Erf(s)
        p = GlobalAveragePool(e)
        f = Flatten(p)
        y = Gemm(f, w3, b3)
    """
    constants = {
        "w1": weight(8, 3, 3, 3), "b1": np.zeros(8, np.float32), "w2": weight(8, 8, 3, 3, seed=2),
        "w3": weight(8, 4, inputs=8), "b3": np.ones(4, np.float32),
    }  # fmt: skip
    proto = parse(body, "float[N, 3, 8, 8] x", "float[N, 4] y", constants)
    names = (name, "relu", "second", "sum", "erf", "pool", "flat", "last")
    for node, called in zip(proto.graph.node, names, strict=True):
        node.name = called
    return proto


def run(proto: onnx.ModelProto, **fields: Any) -> Run:
    """Quantize on 24 samples, and collect what a page shows."""
    keeper = Keeper()
    given = {"target": "cpu", **fields}
    result = quantize(proto, feeds(proto, 24), callback=keeper, cache=False, **given)
    assert keeper.state is not None
    report = page_data.with_tensors(keeper.state, result.report, result.model)
    return Run(result.model, report, keeper.state, page_data.collect(keeper.state, report, result.model))


Again = Callable[..., Run]

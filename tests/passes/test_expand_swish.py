"""Swish is written as the product with a Sigmoid, which the runtime knows."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool import runtime
from qdqtool.graphs import model as models
from qdqtool.passes.expand_swish import ExpandSwish
from qdqtool.passes.infer_shapes import InferShapes
from qdqtool.passes_api import PassManager
from tests.builders import normal, ops, parse, quantized, weight

PASSES = (InferShapes(), ExpandSwish())


def source(swish: str, dtype: str = "float", opset: int = 24) -> str:
    head = f'<ir_version: 11, opset_import: ["" : {opset}]> g ({dtype}[N, 4] x0) => ({dtype}[N, 4] z)'
    return f"{head} {{ x = Abs(x0) [act] y = {swish} z = Neg(y) }}"


@pytest.mark.skipif(onnx.defs.onnx_opset_version() < 24, reason="this version of onnx has no Swish")
class TestSwish:
    @pytest.mark.parametrize("dtype", ["float", "float16", "double"])
    def test_plain(self, passes: Any, dtype: str) -> None:
        tolerance = {"float": 1e-6, "float16": 2e-3, "double": 1e-14}[dtype]
        proto, state = passes(source("Swish(x)", dtype), *PASSES, tolerance=tolerance)
        assert passes.ops(proto) == ["Abs", "Sigmoid", "Mul", "Neg"]
        assert proto.graph.node[2].name == "act"
        assert state.origins == {"act": ("act",), "act.sigmoid": ("act",)}

    def test_from_opset_25_on_the_runtime_knows_it_in_parts_alone(self, passes: Any) -> None:
        state = passes.state(passes.parse(source("Swish <alpha = 2.0> (x)", opset=25)))
        PassManager(PASSES).run(state)
        x = np.linspace(-3, 3, 8, dtype=np.float32).reshape(2, 4)
        found = passes.evaluate(models.to_proto(state.graph, state.header), {"x0": x})
        np.testing.assert_allclose(found["z"], -np.abs(x) / (1 + np.exp(-2 * np.abs(x))), rtol=1e-6)

    def test_alpha(self, passes: Any) -> None:
        proto, state = passes(source("Swish <alpha = 1.702> (x)"), *PASSES, tolerance=1e-6)
        assert passes.ops(proto) == ["Abs", "Mul", "Sigmoid", "Mul", "Neg"]
        assert set(state.origins) == {"act", "act.scale", "act.sigmoid"}

    @pytest.mark.parametrize("swish", ["Swish(x)", "Swish <alpha = 1.702> (x)"])
    def test_the_runtime_fuses_it(self, passes: Any, swish: str) -> None:
        before = passes.parse(source(swish))
        after, _ = passes(before, *PASSES, tolerance=1e-6)
        assert "Sigmoid" in ops(runtime.optimized(before))
        assert ops(runtime.optimized(after)) == ["Abs", "QuickGelu", "Neg"]

    def test_inside_a_body(self, passes: Any) -> None:
        proto, _ = passes(
            """<ir_version: 11, opset_import: ["" : 24]> g (bool f, float[N, 4] x) => (float[N, 4] z) {
                z = If (f) <then_branch = t () => (float[N, 4] p) { p = Swish(x) },
                            else_branch = e () => (float[N, 4] q) { q = Neg(x) }>
            }""",
            *PASSES,
            feeds={"f": np.array(True)},
        )
        branches = [[node.op_type for node in a.g.node] for a in proto.graph.node[0].attribute]
        assert branches == [["Sigmoid", "Mul"], ["Neg"]]

    def test_behind_a_convolution_it_runs_in_integers(self) -> None:
        values = {"w0": weight(8, 3, 3, 3), "w1": weight(8, 8, 3, 3), "b": normal(8)}
        body = "c = Conv(x, w0, b) a = Swish(c) y = Conv(a, w1, b)"
        model = parse(body, "float[N, 3, 8, 8] x", "float[N, 8, 4, 4] y", values, opset=24)
        model.ir_version = 11
        kernels = ops(runtime.optimized(quantized(model).model))
        assert "QLinearSigmoid" in kernels
        assert "QLinearMul" in kernels

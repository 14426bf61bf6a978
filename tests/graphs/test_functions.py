"""Local functions are inlined when a model is loaded."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qdqtool.errors import ModelError
from qdqtool.graphs import model as models
from tests.builders import Arrays, normal, run
from tests.test_control_flow import made, sqnr

HEAD = '<ir_version: 10, opset_import: ["" : 17, "own" : 1]>'
TOP = """
    g (float[N, 8] x, bool flag) => (float[N, 8] y) {
        a = own.layer <alpha = 0.2> (x, w, b)
        c = own.twice (a, w, b)
        y = If (flag) <
            then_branch = t () => (float[N, 8] p) { p = own.layer <alpha = 0.5> (c, w, b) },
            else_branch = e () => (float[N, 8] q) { q = Identity(c) }
        >
    }
"""
FUNCTIONS = """
    <domain: "own", opset_import: ["" : 17]>
    layer <alpha> (x, w, b) => (y) { m = MatMul(x, w) s = Add(m, b) y = LeakyRelu <alpha: float = @alpha> (s) }
    <domain: "own", opset_import: ["" : 17, "own" : 1]>
    twice (x, w, b) => (y) { m = own.layer <alpha = 0.1> (x, w, b) y = own.layer <alpha = 0.3> (m, w, b) }
"""


def model(text: str = TOP + FUNCTIONS) -> onnx.ModelProto:
    """A model with local functions."""
    proto = onnx.parser.parse_model(HEAD + text)
    values = {"w": normal(8, 8, scale=0.35), "b": normal(8, scale=0.1)}
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in values.items())
    return proto


def samples() -> list[Arrays]:
    """Feeds that take one branch and the other."""
    return [{"x": normal(2, 8, seed=i), "flag": np.array(i % 2 == 0)} for i in range(16)]


def test_calls_are_replaced_nested_ones_and_those_in_branches_too() -> None:
    proto = model()
    loaded = models.load(proto)
    assert not loaded.functions
    assert {node.op_type for node in loaded.graph.node} == {"MatMul", "Add", "LeakyRelu", "If"}
    assert len(proto.functions) == 2  # the caller's stays
    for one in samples()[:2]:
        np.testing.assert_array_equal(run(loaded, one)["y"], run(proto, one)["y"])


def test_overloads_are_told_apart() -> None:
    text = """
        g (float[N, 8] x) => (float[N, 8] y) { a = own.act(x) y = own.act(a) }
        <domain: "own", opset_import: ["" : 17]> act (x) => (y) { y = Neg(x) }
        <domain: "own", opset_import: ["" : 17]> act (x) => (y) { y = Exp(x) }
    """
    proto = model(text)
    proto.functions[1].overload = proto.graph.node[1].overload = "exp"
    x = normal(2, 8)
    np.testing.assert_allclose(run(models.load(proto), {"x": x})["y"], np.exp(-x), rtol=1e-6)


def test_layers_in_functions_are_quantized() -> None:
    proto = model()
    result = made(proto, samples())
    assert list(result.plan.kernels.values()).count("Gemm") == 4
    assert sqnr(proto, result, samples()) > 28


def test_a_function_that_calls_itself_is_refused() -> None:
    text = """
        g (float[N, 8] x) => (float[N, 8] y) { y = own.loop(x) }
        <domain: "own", opset_import: ["" : 17, "own" : 1]> loop (x) => (y) { a = Neg(x) y = own.loop(a) }
    """
    with pytest.raises(ModelError, match="cannot be inlined"):
        models.load(model(text))

"""Gemm by a constant becomes what fuses with its weight: the graph's outputs stay the same."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.lazy import Derived
from qdqtool.passes import GemmToMatmul
from qdqtool.passes.gemm_to_matmul import transposed
from qdqtool.passes_api import State
from qdqtool.planning.target import target
from qdqtool.recipe import Recipe
from tests.builders import Array, feeds, normal, ops, parse, run

VALUES = {
    "w": normal(16, 24),
    "wt": normal(24, 16),
    "b": normal(24),
    "bm": normal(3, 24),
    "zero": np.zeros(24, np.float32),
    "six": np.array(6, np.float32),
}
FLAT = ("float[3, 16] x", "float[3, 24] y")


def turned(body: str, x: str = FLAT[0], y: str = FLAT[1], **recipe: Any) -> tuple[onnx.ModelProto, State]:
    """The model after the pass; outputs before and after are compared."""
    used = {name: value for name, value in VALUES.items() if re.search(rf"[( ]{name}[,)]", body)}
    proto = parse(body, x, y, used, opset=17)
    graph, header = models.to_graph(models.load(proto))
    state = State(graph, header, Recipe.of({"target": "cpu", "precision": "w4a16", **recipe}), target("cpu"))
    GemmToMatmul().run(state)
    result = models.to_proto(state.graph, header)
    onnx.checker.check_model(result, full_check=True)
    fed = feeds(proto, samples=1)
    for name, wanted in run(proto, fed, optimize=False).items():
        np.testing.assert_allclose(run(result, fed, optimize=False)[name], wanted, atol=1e-5)
    return result, state


@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("[g] y = Gemm(x, w)", "MatMul"),
        ("[g] y = Gemm(x, w, b)", "MatMul Add"),
        ("[g] y = Gemm <transB = 1> (x, wt, b)", "MatMul Add"),
        ("[g] y = Gemm(x, w, zero)", "MatMul"),
        ("[g] y = Gemm(x, w, bm)", "MatMul Add Add"),
        ("[g] g = Gemm(x, w, b) [r] r = Relu(g) [e] y = Neg(r)", "MatMul Add Sub Relu Neg"),
        ("[g] g = Gemm(x, w) [c] c = Clip(g, , six) [e] y = Neg(c)", "MatMul Sub Clip Neg"),
        ("[g] g = Gemm(x, w, b) [r] r = Sigmoid(g) [e] y = Neg(r)", "MatMul Add Sigmoid Neg"),
        ("[g] g = MatMul(x, w) [n] n = Neg(g) [s] y = Add(g, n)", "MatMul Neg Add"),
        ("[g] g = MatMul(x, w) [a] y = Add(g, bm)", "MatMul Add Add"),
        ("[g] g = MatMul(x, w) [a] y = Add(b, g)", "MatMul Add"),
    ],
)
def test_forms(body: str, wanted: str) -> None:
    assert ops(turned(body)[0]) == wanted.split()


def test_products_of_rank_3_need_zeros_right_before_a_relu_alone() -> None:
    tokens = ("float[2, 3, 16] x", "float[2, 3, 24] y")
    assert ops(turned("[g] g = MatMul(x, w) [r] y = Relu(g)", *tokens)[0]) == ["MatMul", "Sub", "Relu"]
    assert ops(turned("[g] g = MatMul(x, w) [a] a = Add(g, b) [r] y = Relu(a)", *tokens)[0]) == [
        "MatMul",
        "Add",
        "Relu",
    ]
    residual = "[g] g = MatMul(x, w) [a] y = Add(g, z)"
    assert ops(turned(residual, f"{tokens[0]}, float[2, 3, 24] z", tokens[1])[0]) == ["MatMul", "Add"]


@pytest.mark.parametrize(
    ("body", "x", "reason"),
    [
        ("[g] y = Gemm <transA = 1> (x, w)", "float[16, 3] x", "it stays Gemm: its input is transposed"),
        ("[g] y = Gemm <alpha = 0.5> (x, w)", FLAT[0], "it stays Gemm: alpha = 0.5 could not be folded"),
        ("[g] y = Gemm <beta = 2.0> (x, w, z)", f"{FLAT[0]}, float[24] z", "it stays Gemm: beta = 2 multiplies a comp"),
    ],
)
def test_reasons(body: str, x: str, reason: str) -> None:
    result, state = turned(body, x)
    assert ops(result) == ["Gemm"]
    assert [skip.node for skip in state.skipped] == ["g"]
    assert state.skipped[0].reason.startswith(reason)


@pytest.mark.parametrize("body", ["[g] y = Gemm(x, z)", "[g] y = Gemm(d, e)"])
def test_computed_and_double_weights_are_left(body: str) -> None:
    x = f"{FLAT[0]}, float[16, 24] z, double[3, 16] d, double[16, 24] e"
    y = FLAT[1] if "x," in body else "double[3, 24] y"
    result, state = turned(body, x, y)
    assert ops(result) == ["Gemm"]
    assert not state.skipped


def test_what_the_user_leaves_out_is_left() -> None:
    result, _ = turned("[g] g = Gemm(x, w, b) [r] y = Relu(g)", nodes_to_exclude=["g"])
    assert ops(result) == ["Gemm", "Relu"]


def test_names_stay_and_new_nodes_answer_to_them() -> None:
    result, state = turned("[g] g = Gemm <transB = 1> (x, wt, b) [r] r = Relu(g) [e] y = Neg(r)")
    assert [node.name for node in result.graph.node] == ["g", "g.bias", "g.shield", "r", "e"]
    assert state.origins == {"g.bias": ("g",), "g.shield": ("g",)}
    assert {t.name: list(t.dims) for t in result.graph.initializer}["wt"] == [16, 24]


def test_a_shared_weight_is_transposed_once_and_only_where_it_is_asked_for() -> None:
    body = "[g] g = Gemm <transB = 1> (x, wt) [h] h = Gemm <transB = 1> (x, wt, b) [s] y = Add(g, h)"
    result, state = turned(body)
    assert sum(list(t.dims) == [16, 24] for t in result.graph.initializer) == 1
    weights = {id(node.inputs[1]) for node in state.graph.nodes if node.op == "MatMul"}
    assert len(weights) == 1
    both = "[g] g = Gemm <transB = 1> (x, wt) [t] t = Transpose(wt) [m] h = MatMul(x, t) [s] y = Add(g, h)"
    assert {t.name for t in turned(both)[0].graph.initializer if t.dims} >= {"wt", "wt_transposed"}


def test_a_transposed_weight_takes_no_memory() -> None:
    _, state = turned("[g] y = Gemm <transB = 1> (x, wt)")
    (weight,) = [node.inputs[1] for node in state.graph.nodes if node.op == "MatMul"]
    assert isinstance(weight._values, Derived)


def test_running_it_twice_changes_nothing() -> None:
    _, state = turned("[g] g = Gemm <transB = 1> (x, wt, bm) [r] r = Relu(g) [e] y = Neg(r)")
    before = models.to_proto(state.graph, state.header)
    assert GemmToMatmul().run(state) == 0
    assert models.to_proto(state.graph, state.header) == before


def test_a_bias_of_zeros_stays_for_bias_correction_where_there_are_data() -> None:
    proto = parse("[g] y = Gemm(x, w, zero)", *FLAT, {"w": VALUES["w"], "zero": VALUES["zero"]})
    for data, wanted in ((None, ["MatMul"]), (object(), ["MatMul", "Add"])):
        graph, header = models.to_graph(models.load(proto))
        state = State(graph, header, Recipe.of({"precision": "w4a16"}), target("cpu"))
        state.data = data  # type: ignore[assignment]  # only whether there are any counts
        GemmToMatmul().run(state)
        assert ops(models.to_proto(state.graph, header)) == wanted


def test_readers_in_control_flow_bodies_count() -> None:
    body = """[g] g = Gemm(x, w) [r] r = Relu(g) y = If (f) <then_branch = t () => (float[3, 24] p) { p = Neg(g) },
        else_branch = e () => (float[3, 24] q) { q = Add(r, g) }>"""
    result, state = turned(body, f"{FLAT[0]}, bool f")
    assert ops(result) == ["MatMul", "Relu", "If"]  # the product has three readers: nothing takes it for a layer's end
    assert len(graphs.uses(next(t for n, t in state.graph.tensors().items() if n == "g"))) == 3


@pytest.mark.parametrize("shape", [(1, 1), (3, 300), (256, 128), (129, 257)])
def test_transposing_by_tiles(shape: tuple[int, int]) -> None:
    values: Array = normal(*shape)
    found = transposed(values)
    np.testing.assert_array_equal(found, values.T)
    assert found.flags.c_contiguous

"""What does not depend on the inputs is computed once."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool.passes import fold_constants
from qdqtool.passes.fold_constants import FoldConstants
from qdqtool.passes.infer_shapes import InferShapes
from qdqtool.passes.lift_constants import LiftConstants

ALL = (LiftConstants(), InferShapes(), FoldConstants())


def test_a_chain_of_constants_is_one_constant(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[2, 2] x) => (float[2, 2] y)
                <float[2, 2] w = {1, 2, 3, 4}, float s = {2}> {
            a = Transpose(w) b = Mul(a, s) c = Sqrt(b) y = MatMul(x, c)
        }""",
        *ALL,
    )
    assert passes.ops(proto) == ["MatMul"]
    np.testing.assert_allclose(passes.constant(proto, "c"), np.sqrt(np.array([[1, 3], [2, 4]]) * 2), rtol=1e-6)
    assert [t.name for t in proto.graph.initializer] == ["c"]


def test_shape_arithmetic_folds_beside_a_symbolic_batch(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[N, 4, 6] x) => (float[N, T, K] y, int64[2] t)
        <int64 one = {1}, int64[1] two = {2}, int64[1] last = {-1}, int64[1] end = {3}, int64[1] zero = {0}> {
            s = Shape(x) d = Gather(s, one) e = Unsqueeze(d, zero)
            f = Slice(s, two, end) g1 = Mul(e, f) h = Concat <axis = 0> (last, g1)
            r = Reshape(x, h) q = Shape(r) b = Slice(s, zero, two) t = Identity(b)
            tail = Slice(s, last, end) w = Concat <axis = 0> (last, two, tail) y = Reshape(x, w)
        }""",
        *ALL,
    )
    assert passes.ops(proto) == ["Shape", "Slice", "Identity", "Reshape"]
    np.testing.assert_array_equal(passes.constant(proto, "w"), [-1, 2, 6])


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        ("Shape(x)", None),
        ("Shape <start = 1> (x)", [4, 6]),
        ("Shape <start = -2, end = -1> (x)", [4]),
        ("Shape <end = 1> (x)", None),
        ("Shape <start = 1, end = 1> (x)", []),
    ],
)
def test_shape_with_start_and_end(passes: Any, call: str, expected: list[int] | None) -> None:
    proto, _ = passes(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (float[N, 4, 6] x, int64[K] i) => (int64[M] y) {{
            s = {call} y = Concat <axis = 0> (s, i)
        }}""",
        *ALL,
    )
    if expected is None:
        assert passes.ops(proto) == ["Shape", "Concat"]
    else:
        assert passes.ops(proto) == ["Concat"]
        assert passes.constant(proto, "s").tolist() == expected


def test_size_and_gather_with_negative_index(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[2, 4] x, float[N, 5] z) => (int64[1] y)
                <int64[1] last = {-1}> {
            a = Size(x) b = Size(z) c = Mul(a, b) s = Shape(z) t = Gather(s, last) y = Mul(c, t)
        }""",
        *ALL,
    )
    assert passes.ops(proto) == ["Size", "Mul", "Mul"]
    assert passes.constant(proto, "a") == 8
    assert passes.constant(proto, "t").tolist() == [5]


def test_the_pads_of_an_exported_residual_block_fold(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[N, 4, 6] x) => (float[N, 8, 6] y)
        <int64[1] n = {3}, int64[6] p = {0, 0, 0, 2, 0, 0}, int64[2] m = {-1, 2}, int64[1] back = {-1},
            int64[1] first = {-9223372036854775807},
         int64[1] axis = {0}, int64[1] flat = {-1}, float f = {0}> {
            z = ConstantOfShape <value = int64[1] {0}> (n) c = Concat <axis = 0> (p) r = Reshape(c, m)
            s = Slice(r, back, first, axis, back) t = Transpose <perm = [1, 0]> (s) u = Reshape(t, flat)
                v = Cast <to = 7> (u)
            y = Pad(x, v, f)
        }""",
        *ALL,
    )
    assert passes.ops(proto) == ["Pad"]


def test_quantized_weights_and_random_values_are_left(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[2, 2] x) => (float[2, 2] y, float[N, M] r)
        <int8[2, 2] w = {1, 2, 3, 4}, float s = {2}, int8 z = {0}> {
            a = Transpose(w) d = DequantizeLinear(a, s, z) y = MatMul(x, d)
            k = RandomNormalLike <seed = 1.0> (d) l = Sub(k, k) r = Add(x, l)
        }""",
        *ALL,
    )
    assert passes.ops(proto) == ["DequantizeLinear", "MatMul", "RandomNormalLike", "Sub", "Add"]
    assert state.skipped == []


def test_small_constants_do_not_become_large_ones(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[256, 256] x, float[1, 256] u) => (float[256, 256] y,
                float[1, 256] v)
        <int64[2] n = {256, 256}, float[1, 1] one = {1}> {
            big = Expand(one, n) y = Add(x, big) w = Expand(one, n) t = Transpose(w) v = MatMul(u, t)
        }""",
        *ALL,
    )
    assert passes.ops(proto) == ["Expand", "Add", "MatMul"]
    assert passes.constant(proto, "t").shape == (256, 256)
    assert passes.reasons(state) == {"Expand_0": "its result of 262144 bytes is far larger than its inputs"}


def test_a_size_known_only_after_evaluation_counts_too(passes: Any) -> None:
    source = """<ir_version: 8, opset_import: ["" : 13]> g (float[256, 256] x) => (float[256, 256] y)
        <int64[2] n = {16, 16}, float[1, 1] one = {1}> { m = Mul(n, n) big = Expand(one, m) y = Add(x, big) }"""
    proto, state = passes(source, FoldConstants())
    assert passes.ops(proto) == ["Expand", "Add"]
    assert passes.constant(proto, "m").tolist() == [256, 256]
    assert list(passes.reasons(state)) == ["Expand_1"]


def test_a_node_that_fails_is_left_and_the_others_fold(passes: Any) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[2] x) => (float[2] y, float[N] z)
        <int64[1] bad = {7}, float[4] k = {1, 2, 3, 4}, float[2] l = {1, 2}> {
            a = Reshape(k, bad) b = Neg(a) c = Neg(l) d = Neg(c) y = Add(x, d) z = Add(b, x)
        }"""
    )
    state = passes.state(proto)
    FoldConstants().run(state)
    assert {node.name for node in state.graph.nodes} == {"Reshape_0", "Neg_1", "Add_4", "Add_5"}
    (skip,) = state.skipped
    assert skip.node == "Reshape_0"
    assert skip.reason.startswith("it cannot be evaluated: ")


def test_one_run_evaluates_many_nodes(passes: Any, monkeypatch: Any) -> None:
    runs = []
    evaluate = fold_constants._evaluate

    def counted(*args: Any, **options: Any) -> list[Any]:
        runs.append(1)
        return evaluate(*args, **options)

    monkeypatch.setattr(fold_constants, "_evaluate", counted)
    steps = "\n".join(f"a{i + 1} = Add(a{i}, k)" for i in range(200))
    proto, _ = passes(
        f"""<ir_version: 8, opset_import: ["" : 13]> g (float[1] x) => (float[1] y) <float[1] a0 = {{0}},
                float[1] k = {{1}}> {{
            {steps} y = Add(x, a200)
        }}""",
        *ALL,
    )
    assert passes.ops(proto) == ["Add"]
    assert len(runs) == 1
    assert passes.constant(proto, "a200") == [200]


def test_control_flow_bodies_fold_with_constants_from_outside(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (bool c, float[2] x) => (float[2] y) <float[2] k = {1, 2}> {
            a = Neg(k)
            y = If (c) <then_branch = t () => (float[2] p) { h = Exp(a) p = Add(x, h) },
                        else_branch = e () => (float[2] q) { q = Exp(a) }>
        }""",
        *ALL,
    )
    assert passes.ops(proto) == ["If"]
    bodies = {a.name: [node.op_type for node in a.g.node] for a in proto.graph.node[0].attribute}
    assert bodies == {"then_branch": ["Add"], "else_branch": ["Exp"]}


def test_a_graph_output_is_not_folded_away(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[2] x) => (float[2] y, float[2] a) <float[2] k = {1, 2}> {
            a = Neg(k) y = Add(x, a)
        }""",
        *ALL,
    )
    assert passes.ops(proto) == ["Neg", "Add"]


def test_text_is_left(passes: Any) -> None:
    proto = onnx.helper.make_model(
        onnx.helper.make_graph(
            [
                onnx.helper.make_node("Cast", ["k"], ["s"], "cast", to=onnx.TensorProto.STRING),
                onnx.helper.make_node("StringConcat", ["s", "x"], ["y"], "join"),
            ],
            "g",
            [onnx.helper.make_tensor_value_info("x", onnx.TensorProto.STRING, [1])],
            [onnx.helper.make_tensor_value_info("y", onnx.TensorProto.STRING, [1])],
            [onnx.helper.make_tensor("k", onnx.TensorProto.INT64, [1], [3])],
        ),
        opset_imports=[onnx.helper.make_opsetid("", 20)],
        ir_version=9,
    )
    state = passes.state(proto)
    FoldConstants().run(state)
    assert passes.reasons(state) == {"cast": "its result is text"}

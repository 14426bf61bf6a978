"""float16 and bfloat16 become float32 between the model's inputs and outputs."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from qdqtool.passes.fold_constants import FoldConstants
from qdqtool.passes.infer_shapes import InferShapes
from qdqtool.passes.lift_constants import LiftConstants
from qdqtool.passes.widen_float16 import WidenFloat16

WIDEN = (LiftConstants(), InferShapes(), WidenFloat16())
HALF = onnx.TensorProto.FLOAT16
X = "float16[N, 4] x"
Y = "float16[N, 4] y"
W = np.random.default_rng(0).normal(size=(4, 4)).astype(np.float16)
TOLERANCE = 2e-3
"""Two units in the last place of float16, in which the model itself rounds more often."""


def source(body: str, x: str = X, y: str = Y, *, opset: int = 17, others: str = "") -> str:
    return f'<ir_version: 8, opset_import: ["": {opset}{others}]> g ({x}) => ({y}) {{ {body} }}'


def halves(proto: onnx.ModelProto) -> list[str]:
    """Names of the float16 tensors, apart from the model's inputs and outputs."""
    inferred = onnx.shape_inference.infer_shapes(proto).graph
    inner = [a.g for node in inferred.node for a in node.attribute if a.HasField("g")]
    values = [*inferred.value_info, *(v for g in inner for v in (*g.input, *g.output, *g.value_info))]
    found = [value.name for value in values if value.type.tensor_type.elem_type == HALF]
    graphs = [inferred, *inner]
    return sorted({*found, *(t.name for g in graphs for t in g.initializer if t.data_type == HALF)})


BODIES = {
    "layer": "h = MatMul(x, w) y = Relu(h)",
    "shared": "a = MatMul(x, w) b = MatMul(a, w) y = Add(b, x)",
    "cast": "a = Cast <to = 1> (x) b = Exp(a) c = Cast <to = 10> (b) y = Mul(c, x)",
    "filled": "s = Shape(x) f = ConstantOfShape <value = float16[1] {2}> (s) y = Mul(f, x)",
    "constant": "c = Constant <value = float16[1] {2}> () y = Mul(c, x)",
    "norm": "v = ReduceMean <axes = [1], keepdims = 0> (w) h = LayerNormalization(x, v) y = Add(h, v)",
}


@pytest.mark.parametrize("body", BODIES)
def test_everything_between_two_casts_is_float32(passes: Any, body: str) -> None:
    proto, state = passes(source(BODIES[body]), *WIDEN, weights={"w": W}, tolerance=TOLERANCE)
    assert halves(proto) == []
    assert (proto.graph.node[0].op_type, proto.graph.node[-1].op_type) == ("Cast", "Cast")
    given = [*proto.graph.input, *proto.graph.output]
    assert {value.type.tensor_type.elem_type for value in given} == {HALF}
    assert not state.skipped
    assert "compute in float32" in state.notes[0]


def test_values_between_are_those_of_float32(passes: Any) -> None:
    """8 * 10000 overflows in float16, and 80000 / 100 = 800 does not."""
    text = source("a = Mul(x, big) y = Div(a, hundred)")
    state = passes.state(passes.parse(text, big=np.array([10000], np.float16), hundred=np.array([100], np.float16)))
    for step in WIDEN:
        step.run(state)
    from qdqtool.graphs import model

    result = model.to_proto(state.graph, state.header)
    assert passes.evaluate(result, {"x": np.full((1, 4), 8, np.float16)})["y"].tolist() == [[800.0] * 4]


def test_a_constant_keeps_its_name_and_its_values(passes: Any) -> None:
    proto, _ = passes(source("y = MatMul(x, w)"), *WIDEN, weights={"w": W}, tolerance=TOLERANCE)
    np.testing.assert_array_equal(passes.constant(proto, "w"), W.astype(np.float32))
    assert len(proto.graph.initializer) == 1


def test_a_float32_model_stays_as_it_is(passes: Any) -> None:
    proto, state = passes(
        source("y = MatMul(x, w)", "float[N, 4] x", "float[N, 4] y"), *WIDEN, weights={"w": W.astype(np.float32)}
    )
    assert passes.ops(proto) == ["MatMul"]
    assert not state.notes


def test_running_twice_changes_nothing(passes: Any) -> None:
    once, state = passes(source(BODIES["layer"]), *WIDEN, weights={"w": W}, tolerance=TOLERANCE)
    InferShapes().run(state)
    names = [node.name for node in state.graph.nodes]
    WidenFloat16().run(state)
    assert [node.name for node in state.graph.nodes] == names == [node.name for node in once.graph.node]


KEPT = [
    ("[own] a = RandomNormalLike <seed = 1.0, dtype = 10> (x) b = Sub(a, a) y = Add(b, x)", "own",
     "gives RandomNormalLike its type"),
    ("[table] a = Gather(w, ids) y = Mul(a, x)", "table", "a table in float32 would be twice as large"),
    ("[own] s = SequenceConstruct(x, x) [at] a = SequenceAt(s, i) y = Mul(a, a)", "at", "gives SequenceAt its type"),
]  # fmt: skip


@pytest.mark.parametrize(("body", "node", "reason"), KEPT)
def test_what_cannot_be_widened_stands_between_casts(passes: Any, body: str, node: str, reason: str) -> None:
    proto, state = passes(
        source(body), *WIDEN, weights={"i": np.array(1), "ids": np.array([1, 3]), "w": W}, tolerance=TOLERANCE
    )
    assert reason in passes.reasons(state)[node]
    types = {v.name: v.type.tensor_type.elem_type for v in onnx.shape_inference.infer_shapes(proto).graph.value_info}
    last = next(n for n in proto.graph.node if n.output[0].startswith("y"))
    assert {types[name] for name in last.input} == {onnx.TensorProto.FLOAT}


def test_another_domains_operator_keeps_its_types_and_what_follows_is_widened(passes: Any) -> None:
    """Shape inference knows nothing of what Gelu puts out; that the other operand of the Mul is float16 tells."""
    body = "[own] a = com.microsoft.Gelu(x) [mul] b = Mul(a, x) [fc] h = MatMul(b, w) y = Neg(h)"
    proto, state = passes(source(body, others=', "com.microsoft": 1'), *WIDEN, weights={"w": W}, tolerance=TOLERANCE)
    reasons = passes.reasons(state)
    assert reasons == {"own": "it keeps its types: Gelu of domain 'com.microsoft' says nothing of float32"}
    assert passes.constant(proto, "w").dtype == np.float32
    assert passes.ops(proto) == ["Cast", "Cast", "Gelu", "Cast", "Mul", "MatMul", "Neg", "Cast"]


def test_what_nothing_tells_the_type_of_keeps_it(passes: Any) -> None:
    body = "[own] a = com.microsoft.Gelu(x) [cast] b = Cast <to = 10> (a) y = Neg(b)"
    proto, state = passes(source(body, others=', "com.microsoft": 1'), *WIDEN)
    assert passes.reasons(state)["cast"] == "it keeps its types: the type of 'a' is not known"
    assert passes.ops(proto) == ["Cast", "Cast", "Gelu", "Cast", "Cast", "Neg", "Cast"]


def test_the_models_own_quantization_keeps_its_scales(passes: Any) -> None:
    body = "q = QuantizeLinear(x, s, z) [dq] d = DequantizeLinear(q, s, z) y = MatMul(d, w)"
    constants = {"w": W, "s": np.float16(0.02), "z": np.uint8(128)}
    proto, state = passes(source(body, opset=19), *WIDEN, weights=constants, tolerance=TOLERANCE)
    assert passes.constant(proto, "s").dtype == np.float16
    assert passes.constant(proto, "w").dtype == np.float32
    assert passes.reasons(state)["dq"] == "it keeps its types: it is part of the model's own quantization"


IF = """y = If (c) <then_branch = t () => (float16[N, 4] p) { p = MatMul(x, w) },
    else_branch = e () => (float16[N, 4] q) { q = Mul(h, w1) }>"""
LOOP = """y, z = Loop (n, c, x) <body = b (int64 i, bool go, float16[N, 4] s)
    => (bool on, float16[N, 4] t, float16[N, 4] o) { on = Identity(go) t = MatMul(s, w) o = Add(t, h) }>"""


@pytest.mark.parametrize("flag", [True, False])
def test_branches(passes: Any, flag: bool) -> None:
    text = source(f"h = Neg(x) {IF}", f"bool c, {X}")
    values = {"w": W, "w1": W[:1]}
    proto, _ = passes(text, *WIDEN, weights=values, feeds={"c": np.array(flag)}, tolerance=TOLERANCE)
    assert halves(proto) == []
    assert passes.ops(proto).count("Cast") == 2


def test_loops(passes: Any) -> None:
    text = source(f"h = Neg(x) {LOOP}", f"int64 n, bool c, {X}", f"{Y}, float16[K, N, 4] z")
    feeds = {"n": np.array(3), "c": np.array(True)}
    proto, _ = passes(text, *WIDEN, weights={"w": W}, feeds=feeds, tolerance=4e-3)
    assert halves(proto) == []
    assert passes.ops(proto).count("Cast") == 3


def test_an_input_that_is_an_output_and_an_output_that_is_read(passes: Any) -> None:
    text = source("[n] y = Neg(x) [a] z = Abs(y)", y=f"{Y}, float16[N, 4] z, {X}")
    proto, _ = passes(text, *WIDEN)
    assert [output.name for output in proto.graph.output] == ["y", "z", "x"]
    assert halves(proto) == []


def test_bfloat16_weights_and_casts(passes: Any) -> None:
    text = source(
        "h = Cast <to = 16> (x) i = Cast <to = 1> (h) v = Cast <to = 1> (w) y = MatMul(i, v)",
        "float[N, 4] x",
        "float[N, 4] y",
    )
    proto, _ = passes(text, *WIDEN, FoldConstants(), weights={"w": W.astype(ml_dtypes.bfloat16)}, tolerance=2e-2)
    kinds = {t.data_type for t in proto.graph.initializer}
    assert kinds == {onnx.TensorProto.FLOAT}
    assert not [n for n in proto.graph.node for a in n.attribute if a.name == "to" and a.i == onnx.TensorProto.BFLOAT16]

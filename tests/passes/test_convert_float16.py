"""A model in float16 gives the outputs of the float32 one to within float16's own precision."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest

import qdqtool
from qdqtool.errors import RecipeError
from qdqtool.pipeline import Result
from tests.builders import Array, conv, conv_chain, conv_values, feeds, normal, ops, parse, run, sqnr, weight

FLOAT, FLOAT16 = onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16
LEAST = 50.0
VALUES: dict[str, Array] = conv_values(2) | {
    "w": normal(16, 16, scale=0.25),
    "b": normal(16, scale=0.1),
    "one": np.ones(16, np.float32),
    "huge": normal(16, 16, scale=1e5),
    "tiny": normal(16, 16, scale=1e-9),
    "mask": np.array(-3.4e38, np.float32),
    "most": np.array(3.4e38, np.float32),
    "none": np.array(0, np.float32),
    "two": np.array(2, np.float32),
    "eps": np.array(1e-12, np.float32),
    "scales": np.array([1, 1, 2, 2], np.float32),
    "freq": np.geomspace(1, 1e-4, 8).astype(np.float32).reshape(1, 8),
    "axis": np.array([-1]),
    "shape": np.array([0, -1]),
    "limit": np.array(3),
    "yes": np.array(True),
}
FLAT = ("float[N, 16] x", "float[N, 16] y")


def model(body: str, x: str = FLAT[0], y: str = FLAT[1], *, opset: int = 17) -> onnx.ModelProto:
    used = {name: value for name, value in VALUES.items() if re.search(rf"[( ]{name}[,)]", body)}
    return parse(body, x, y, used, opset=opset)


def half(proto: onnx.ModelProto, data: object = None, **fields: Any) -> Result:
    return qdqtool.quantize(proto, data, provider="cpu", **{"target": "cpu", "precision": "fp16", **fields})


def kept(result: Result) -> dict[str, str]:
    """Why nodes stay float32, by node."""
    prefix = "stays float32: "
    return {s.node: s.reason.removeprefix(prefix) for s in result.report.skipped if s.reason.startswith(prefix)}


def compare(
    proto: onnx.ModelProto, result: Result, fed: Mapping[str, Array] | None = None, least: float = LEAST
) -> None:
    """Hold the result to the checker, its outputs' types, and the float model's values, fused and as written."""
    onnx.checker.check_model(result.model, full_check=True)
    fed = feeds(proto) if fed is None else fed
    wanted = run(proto, fed)
    for optimize in (True, False):
        for name, found in run(result.model, fed, optimize=optimize).items():
            assert found.dtype == wanted[name].dtype
            assert sqnr(wanted[name], found) > least, (name, optimize)


def types(result: Result) -> Counter[int]:
    """Element types of constants."""
    return Counter(tensor.data_type for tensor in result.model.graph.initializer)


BODIES = {
    "convolutions": (f"{conv('a', 'x')} [r] r = Relu(a) {conv('y', 'r', 1)}", "float[N, 8, 8, 8]"),
    "attention": (
        """[q] q = MatMul(x, w) [t] t = Transpose <perm = [0, 2, 1]> (x) [s] s = MatMul(q, t) [d] d = Div(s, two)
        [p] p = Softmax <axis = -1> (d) [o] o = MatMul(p, x) [n] y = LayerNormalization <axis = -1> (o, one, b)""",
        "float[N, 5, 16]",
    ),
    "gemm": ("[g] g = Gemm(x, w, b) [t] t = Tanh(g) [c] y = Concat <axis = -1> (t)", "float[N, 16]"),
    "pooling": (
        "[p] p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (x) [r] y = Resize(p, , scales)",
        "float[N, 8, 8, 8]",
    ),
}


@pytest.mark.parametrize("body", BODIES)
def test_values_and_types(body: str) -> None:
    text, shape = BODIES[body]
    proto = model(text, f"{shape} x", f"{shape} y")
    result = half(proto)
    compare(proto, result)
    assert not kept(result)
    given = [*result.model.graph.input, *result.model.graph.output]
    assert {value.type.tensor_type.elem_type for value in given} == {FLOAT}
    assert ops(result.model)[0] == ops(result.model)[-1] == "Cast"
    assert ops(result.model).count("Cast") == 2
    assert types(result)[FLOAT] == int("Resize" in text)  # the scales of a Resize are float32 by definition


def test_half_the_size() -> None:
    proto = conv_chain(4, channels=32)
    sizes = half(proto).report.sizes
    assert sizes.quantized_bytes < 0.52 * sizes.float_bytes


def test_inputs_and_outputs_in_float16_where_asked_for() -> None:
    proto = model(BODIES["gemm"][0])
    result = half(proto, feeds(proto), keep_io_types=False)
    given = [*result.model.graph.input, *result.model.graph.output]
    assert {value.type.tensor_type.elem_type for value in given} == {FLOAT16}
    assert "Cast" not in ops(result.model)
    assert result.report.verification is not None
    assert result.report.verification.worst_db > LEAST
    found = qdqtool.compare(proto, result.model, feeds(proto), provider="cpu")
    assert found.worst_db > LEAST


def test_outputs_of_float32_nodes_in_float16_where_asked_for() -> None:
    proto = model("[a] y = MatMul(x, huge) [b] z = Neg(x)", y=f"{FLAT[1]}, float[N, 16] z")
    result = half(proto, keep_io_types=False)
    assert {value.type.tensor_type.elem_type for value in result.model.graph.output} == {FLOAT16}
    assert {node.name: node.op_type for node in result.model.graph.node}["a"] == "MatMul"
    onnx.checker.check_model(result.model, full_check=True)


@pytest.mark.parametrize(
    ("body", "reasons"),
    [
        ("[a] y = MatMul(x, huge)", {"a": "its constant 'huge' reaches "}),
        ("[a] y = MatMul(x, tiny)", {"a": "its constant 'tiny' loses 100 % of its values"}),
        ("[a] t = Mul(x, x) [b] u = Add(t, eps) [c] y = Sqrt(u)", {"b": "its constant 'eps' loses 100 %"}),
        ("[a] y = Clip(x, none, most)", {}),
        ("[a] y = Min(x, most)", {}),
        (
            "[c] c = Greater(x, none) [a] t = Where(c, x, mask) [b] u = Add(t, x) [s] v = Softmax(u) [d] y = Mul(v, x)",
            {
                "a": "its constant 'mask' reaches -3.4e+38",
                "b": "'t' may hold a constant beyond float16, as masks do",
                "s": "'u' may hold a constant beyond float16, as masks do",
            },
        ),
    ],
)
def test_what_does_not_fit_stays_and_is_named(body: str, reasons: dict[str, str]) -> None:
    proto = model(body)
    result = half(proto)
    compare(proto, result)
    found = kept(result)
    assert found.keys() == reasons.keys()
    assert all(found[node].startswith(reason) for node, reason in reasons.items())


def test_masks_made_of_integers_stay_until_the_softmax() -> None:
    """As transformers are exported: (1 - mask) * -3.4e38, added to the scores."""
    body = """[c] m = Cast <to = 1> (i) [s] n = Sub(one, m) [m] k = Mul(n, mask) [q] q = MatMul(x, w) [a] a = Add(q, k)
        [p] p = Softmax(a) [o] y = MatMul(p, w)"""
    proto = model(body, "float[N, 16] x, int64[16] i")
    result = half(proto)
    assert kept(result).keys() == {"a", "p"}
    fed = {"x": normal(8, 16), "i": np.array([1] * 10 + [0] * 6)}
    compare(proto, result, fed)
    assert {node.op_type for node in result.model.graph.node if FLOAT16 in _types_of(result, node)} >= {"MatMul"}


def _types_of(result: Result, node: onnx.NodeProto) -> set[int]:
    inferred = onnx.shape_inference.infer_shapes(result.model).graph
    known = {v.name: v.type.tensor_type.elem_type for v in (*inferred.value_info, *inferred.input, *inferred.output)}
    return {known.get(name, 0) for name in node.output}


class TestObserved:
    BODY = (
        "[a] t = MatMul(x, w) [b] u = Mul(t, t) [c] v = Mul(u, u) [d] s = ReduceMean <axes = [1]> (v) [e] y = Div(t, s)"
    )

    def test_activations_that_overflow_stay(self) -> None:
        proto = model(self.BODY)
        fed = {"x": normal(64, 16, scale=20)}
        result = half(proto, fed)
        assert result.report.verification is not None
        assert result.report.verification.worst_db > LEAST
        assert kept(result).keys() == {"c", "d"} | (kept(result).keys() & {"e"})
        assert re.fullmatch(r"'v' reaches .*; float16 ends at 65504", kept(result)["c"])
        assert not any("constants alone" in note for note in result.report.notes)

    def test_without_data_only_constants_are_checked_and_that_is_said(self) -> None:
        result = half(model(self.BODY))
        assert not kept(result)
        assert (
            "constants alone were checked to fit into float16: for activations that needs data" in result.report.notes
        )
        assert result.report.verification is None

    def test_activations_too_small_for_float16_stay(self) -> None:
        proto = model("[a] t = Mul(x, x) [b] u = Mul(t, t) [c] y = Sqrt(u)")
        result = half(proto, {"x": normal(64, 16, scale=1e-3)})
        assert all("where float16 is coarse" in kept(result)[node] for node in "bc")
        assert result.report.verification is not None
        assert result.report.verification.worst_db > 40

    def test_a_mask_whose_sum_was_seen_to_fit_is_no_obstacle(self) -> None:
        proto = model("[c] c = Less(x, none) [a] t = Where(c, x, mask) [b] u = Max(t, none) [s] y = Add(u, x)")
        fed = {"x": -np.abs(normal(64, 16))}
        assert kept(half(proto, fed)).keys() == {"a"}
        assert kept(half(proto)).keys() == {"a", "b", "s"}

    def test_statistics_serve_instead_of_data(self) -> None:
        proto = model(self.BODY)
        made = qdqtool.calibrate(proto, {"x": normal(64, 16, scale=20)}, precision="fp16", provider="cpu", cache=False)
        assert "c" in kept(half(proto, statistics=made))


class TestIntegers:
    """Positions and sizes are exact; float16 has eleven bits."""

    def test_rotary_embeddings(self) -> None:
        body = """[p] p = Cast <to = 1> (i) [u] u = Unsqueeze(p, axis) [m] m = MatMul(u, freq)
            [c] c = Concat <axis = -1> (m, m) [s] s = Sin(c) [o] o = Cos(c) [a] a = Mul(x, s)
            [b] b2 = Mul(x, o) [z] y = Add(a, b2)"""
        proto = model(body, "float[N, 16] x, int64[N] i")
        result = half(proto)
        compare(proto, result, {"x": normal(64, 16), "i": np.arange(3000, 3064)}, least=60)
        assert not kept(result)

    def test_sizes(self) -> None:
        body = """[s] s = Shape(x) [f] f = Cast <to = 1> (s) [m] m = Mul(f, two) [g] g = Floor(m)
            [i] i = Cast <to = 7> (g) [e] y = Expand(x, i)"""
        proto = model(body, "float[1, 1] x", "float[A, B] y")
        fed = {"x": np.ones((1, 1), np.float32)}
        assert run(half(proto).model, fed)["y"].shape == (2, 2)
        assert onnx.TensorProto.FLOAT16 not in [
            a.i for n in half(proto).model.graph.node if n.name in ("f", "i") for a in n.attribute
        ]

    def test_an_image_of_integers_is_scaled_in_float32_and_its_layers_are_not(self) -> None:
        body = f"[c] f = Cast <to = 1> (i) [d] x = Div(f, two) {conv('y', 'x')}"
        proto = model(body, "uint8[N, 8, 8, 8] i", "float[N, 8, 8, 8] y")
        result = half(proto)
        compare(proto, result, {"i": np.random.default_rng(0).integers(0, 255, (2, 8, 8, 8)).astype(np.uint8)})
        assert [n.op_type for n in result.model.graph.node if FLOAT16 in _types_of(result, n)] == ["Cast", "Conv"]


def test_operators_without_kernels_on_the_target_stay() -> None:
    proto = model("[g] y = GridSample(x, z)", "float[N, 8, 8, 8] x, float[N, 8, 8, 2] z", "float[N, 8, 8, 8] y")
    assert kept(half(proto, target="cuda")) == {"g": "GridSample has no float16 kernel on target cuda"}
    assert not kept(half(proto, target="cpu"))
    compare(proto, half(proto, target="cpu"), feeds(proto, samples=2))


def test_what_the_user_leaves_out_stays() -> None:
    proto = model("[a] t = MatMul(x, w) [b] u = Tanh(t) [c] y = MatMul(u, w)")
    assert kept(half(proto, nodes_to_exclude=["a"])) == {"a": "excluded by name (a)"}
    assert kept(half(proto, nodes_to_quantize=["a"])).keys() == {"b", "c"}
    assert kept(half(proto, op_types_to_quantize=["MatMul"])).keys() == {"b"}
    with pytest.raises(RecipeError, match="nodes_to_exclude 'd' matches no name"):
        half(proto, nodes_to_exclude=["d"])
    shared = half(proto, nodes_to_exclude=["a"])
    compare(proto, shared)
    assert types(shared) == {FLOAT: 1, FLOAT16: 1}  # the weight in both forms, each for one reader


class TestCasts:
    def test_readers_of_one_graph_share_a_cast(self) -> None:
        result = half(model("[a] t = MatMul(x, huge) [b] u = Neg(t) [c] v = Abs(t) [d] y = Add(u, v)"))
        assert ops(result.model).count("Cast") == 2  # behind the product, and before the output

    def test_what_moves_values_between_float32_nodes_stays(self) -> None:
        proto = model("[a] t = MatMul(x, huge) [b] u = Reshape(t, shape) [c] v = Transpose(u) [d] y = MatMul(v, huge)")
        fed = {"x": normal(16, 16)}
        result = half(proto)
        assert "Cast" not in ops(result.model)
        compare(proto, result, fed, least=100)

    def test_the_model_s_own_casts_are_gone_where_they_do_nothing_now(self) -> None:
        body = "[a] t = MatMul(x, w) [b] u = Cast <to = 10> (t) [c] v = Cast <to = 1> (u) [d] y = Tanh(v)"
        proto = model(body)
        result = half(proto)
        assert ops(result.model) == ["Cast", "MatMul", "Tanh", "Cast"]
        compare(proto, result)

    def test_casts_to_integers_read_what_is_there(self) -> None:
        body = "[a] t = MatMul(x, w) [b] y = Cast <to = 6> (t) [c] z = Cast <to = 6> (x)"
        proto = model(body, y="int32[N, 16] y, int32[N, 16] z")
        result = half(proto)
        assert ops(result.model) == ["Cast", "MatMul", "Cast", "Cast"]
        fed = {"x": normal(8, 16, scale=100)}
        np.testing.assert_array_equal(run(result.model, fed)["z"], run(proto, fed)["z"])

    def test_an_output_that_is_read_keeps_its_name(self) -> None:
        proto = model("[a] y = MatMul(x, w) [b] z = Tanh(y)", y=f"{FLAT[1]}, float[N, 16] z")
        result = half(proto)
        compare(proto, result)
        assert [value.name for value in result.model.graph.output] == ["y", "z"]
        assert ops(result.model).count("Cast") == 3


def test_a_filled_tensor_has_the_type_of_its_readers() -> None:
    body = "[s] s = Shape(x) [f] f = ConstantOfShape <value = float[1] {0.5}> (s) [a] y = Add(x, f)"
    proto = model(body)
    result = half(proto)
    compare(proto, result)
    (filled,) = [node for node in result.model.graph.node if node.op_type == "ConstantOfShape"]
    assert filled.attribute[0].t.data_type == FLOAT16
    assert ops(result.model).count("Cast") == 2


def test_old_opsets_with_values_in_attributes() -> None:
    proto = model("[a] t = Clip <min = -0.5, max = 0.5> (x) [b] y = MatMul(t, w)", opset=9)
    result = half(proto)
    compare(proto, result)
    assert not kept(result)


@pytest.mark.parametrize("flag", [True, False])
def test_branches_are_converted_and_read_outer_tensors(flag: bool) -> None:
    body = """[a] t = MatMul(x, w) y = If (f) <
        then_branch = t () => (float[N, 16] p) { [m] u = MatMul(t, w) [n] p = Add(u, x) },
        else_branch = e () => (float[N, 16] q) { [k] v = MatMul(t, huge) [l] q = Neg(v) }>"""
    proto = model(body, f"{FLAT[0]}, bool f")
    result = half(proto)
    assert kept(result).keys() == {"k"}
    compare(proto, result, {"x": normal(4, 16), "f": np.array(flag)})
    bodies = [a.g for n in result.model.graph.node if n.op_type == "If" for a in n.attribute]
    assert [output.type.tensor_type.elem_type for g in bodies for output in g.output] == [FLOAT, FLOAT]
    assert types(result)[FLOAT16] == 1  # one copy for the graph and the branch


def test_a_branch_that_hands_an_outer_tensor_through() -> None:
    body = """[a] t = MatMul(x, w) y = If (f) <then_branch = t () => (float[N, 16] p) { [m] p = Tanh(t) },
        else_branch = e () => (float[N, 16] q) { [k] q = Identity(t) }>"""
    proto = model(body, f"{FLAT[0]}, bool f")
    compare(proto, half(proto), {"x": normal(4, 16), "f": np.array(False)})


def test_a_loop_carries_float32() -> None:
    body = """y = Loop (limit, yes, x) <body = l (int64 i, bool c, float[N, 16] s) => (bool d, float[N, 16] r)
        { [m] u = MatMul(s, w) [t] r = Tanh(u) d = Identity(c) }>"""
    proto = model(body)
    result = half(proto)
    compare(proto, result, {"x": normal(4, 16)})
    (loop,) = [node for node in result.model.graph.node if node.op_type == "Loop"]
    inner = [node.op_type for node in loop.attribute[0].g.node]
    assert Counter(inner) == {"Cast": 2, "MatMul": 1, "Tanh": 1, "Identity": 1}


def test_the_same_model_gives_the_same_bytes() -> None:
    proto = conv_chain(2)
    first, second = (half(proto).model.SerializeToString(deterministic=True) for _ in range(2))
    assert first == second


def test_float32_layers_of_a_model_in_two_precisions() -> None:
    body = "[a] t = Cast <to = 10> (x) [b] u = MatMul(t, h) [c] v = Cast <to = 1> (u) [d] y = MatMul(v, w)"
    proto = model(body)
    proto.graph.initializer.append(onnx.numpy_helper.from_array(VALUES["w"].astype(np.float16), "h"))
    result = half(proto)
    compare(proto, result)
    assert ops(result.model) == ["Cast", "MatMul", "MatMul", "Cast"]


def test_a_wide_net_of_everything() -> None:
    """Weights that a body of its own reads, several outputs, and a branch that stays float32."""
    proto = parse(
        f"{conv('a', 'x')} [p] p = GlobalAveragePool(a) [f] f = Flatten(p) [g] y = Gemm(f, h) [s] z = Sigmoid(a)",
        "float[N, 8, 8, 8] x",
        "float[N, 4] y, float[N, 8, 8, 8] z",
        conv_values(1) | {"h": weight(8, 4)},
    )
    result = half(proto, feeds(proto))
    compare(proto, result)
    assert result.report.notes[-1] == "5 of 5 nodes with floats compute in float16"

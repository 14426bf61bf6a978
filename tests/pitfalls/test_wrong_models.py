"""Models that other quantizers get wrong: every one is checked, loaded, and compared with float."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool import runtime
from qdqtool.errors import DataError, RecipeError
from qdqtool.pipeline import Result, quantize
from qdqtool.verification import placement
from tests.builders import (
    TARGETS,
    Array,
    constants,
    conv,
    conv_chain,
    conv_values,
    feeds,
    normal,
    ops,
    parse,
    quality,
    quantized,
    reasons,
    run,
    single,
    sqnr,
    weight,
)

IMAGE = "float[N, 8, 8, 8]"
GOOD = 35.0
"""dB that 8 bits reach on these small random nets; 36 to 46 is normal."""
DEEP = 33.0
"""The same where three or more quantized activations and their weights lie in a row."""


def worst(proto: onnx.ModelProto, result: Result, fed: Any = None) -> float:
    return min(quality(proto, result.model, feeds(proto, 8, seed=7) if fed is None else fed).values())


def kernels(result: Result) -> dict[str, int]:
    found, _ = placement.load_and_count(result.model)
    return {op: count for op, count in found.items() if placement.is_integer_kernel(op)}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("factors", ["alpha = 0.25", "beta = 4.0", "alpha = 0.25, beta = 4.0", "beta = 0.0"])
def test_gemm_with_factors(factors: str, target: str) -> None:
    body = f"[fc] h = Gemm <{factors}> (x, w, b) r = Relu(h) [head] y = Gemm <transB = 1> (r, v, c)"
    values = {"w": weight(64, 32, inputs=64), "b": normal(32), "v": weight(10, 32), "c": normal(10)}
    proto = parse(body, "float[N, 64] x", "float[N, 10] y", values)
    assert worst(proto, quantized(proto, target=target)) >= GOOD


@pytest.mark.parametrize("target", TARGETS)
def test_a_convolution_behind_a_relu_that_is_a_graph_output_too(target: str) -> None:
    body = f"{conv('c', 'x')} r = Relu(c) {conv('y', 'r', 1)}"
    proto = parse(body, f"{IMAGE} x", f"{IMAGE} c, {IMAGE} y", conv_values(2))
    result = quantized(proto, target=target)
    assert worst(proto, result) >= DEEP
    assert [output.name for output in result.model.graph.output] == ["c", "y"]
    assert run(result.model, feeds(proto))["c"].min() < -0.5


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("flag", [True, False])
def test_a_convolution_behind_a_relu_that_an_if_body_reads(target: str, flag: bool) -> None:
    branches = (
        f"then_branch = t () => ({IMAGE} p) {{ [neg] p = Neg(c) }}, else_branch = e () => ({IMAGE} q) {{ q = Abs(c) }}"
    )
    body = f"{conv('c', 'x')} r = Relu(c) {conv('y', 'r', 1)} z = If (f) <{branches}>"
    proto = parse(body, f"{IMAGE} x, bool f", f"{IMAGE} y, {IMAGE} z", conv_values(2))
    data = [{"x": x[None], "f": np.array(i % 2 == 0)} for i, x in enumerate(feeds(conv_chain(1))["x"])]
    fed = {"x": feeds(conv_chain(1), 4, seed=7)["x"], "f": np.array(flag)}
    result = quantized(proto, data, target=target)
    assert worst(proto, result, fed) >= DEEP
    assert run(result.model, fed)["z"].max() > 0.5


def test_a_relu_under_a_symmetric_range_is_kept() -> None:
    proto = conv_chain(2)
    overrides: Any = {"r0": {"dtype": "int8", "symmetric": True}, "r1": {"dtype": "int8", "symmetric": True}}
    symmetric = quantized(proto, tensors=overrides)
    assert worst(proto, symmetric) >= GOOD
    assert run(symmetric.model, feeds(proto))["r1"].min() == 0


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("opset", [10, 11, 12])
def test_per_channel_weights_raise_the_opset(opset: int, target: str) -> None:
    body = f"{conv('c', 'x')} r = Relu(c) {conv('y', 'r', 1)}"
    proto = parse(body, f"{IMAGE} x", f"{IMAGE} y", conv_values(2), opset=opset)
    result = quantized(proto, target=target)
    assert result.report.opset == 13
    assert any(np.ndim(a) == 1 for n, a in constants(result.model).items() if n.startswith("w0_scale"))
    assert worst(proto, result) >= GOOD


def test_16_bits_in_an_old_model_raise_the_opset() -> None:
    body = f"{conv('c', 'x')} r = Relu(c) {conv('y', 'r', 1)}"
    proto = parse(body, f"{IMAGE} x", f"{IMAGE} y", conv_values(2), opset=11)
    result = quantized(proto, target="tensorrt", tensors={"r": {"dtype": "int16"}})
    assert result.report.opset >= 21
    assert worst(proto, result) >= GOOD


@pytest.mark.parametrize("target", TARGETS)
def test_a_contrib_operator_without_types_stays_float_and_is_named(target: str) -> None:
    body = f"{conv('c', 'x')} [gelu] g = com.microsoft.Gelu(c) {conv('d', 'g', 1)} r = Relu(d) {conv('y', 'r', 2)}"
    proto = parse(body, f"{IMAGE} x", f"{IMAGE} y", conv_values(3), domain="com.microsoft")
    result = quantized(proto, target=target)
    assert worst(proto, result) >= DEEP
    assert reasons(result)["gelu"] == f"Gelu has no integer kernel on target {target}"
    assert set(result.report.layers) == {"c", "d", "y"}  # a float32 weight tells the type of what the Gelu puts out


@pytest.mark.parametrize(
    ("x", "shape", "expected"),
    [
        ("float[N, 64] x", (64, 64), {"QGemm": 2}),
        ("float[2, 64] x", (2, 64), {"QGemm": 2}),
        ("float[2, 6, 64] x", (2, 6, 64), {"QGemm": 2}),
        ("float[N, 6, 64] x", (32, 6, 64), {"MatMulIntegerToFloat": 2}),
        ("float[N, T, 64] x", (32, 6, 64), {"MatMulIntegerToFloat": 2}),
    ],
)
def test_a_product_and_its_bias_are_one_layer(x: str, shape: tuple[int, ...], expected: dict[str, int]) -> None:
    body = "m = MatMul(x, w) a = Add(m, b) r = Relu(a) n = MatMul(r, v) y = Add(c, n)"
    values = {"w": weight(64, 64), "b": normal(64), "v": weight(64, 32, inputs=64), "c": normal(32)}
    proto = parse(body, x, x.replace("64] x", "32] y"), values)
    result = quantized(proto, [{"x": normal(*shape, seed=i)} for i in range(16)])
    assert worst(proto, result, {"x": normal(*shape, seed=99)}) >= GOOD
    assert kernels(result) == expected
    before_add = {node.output[0] for node in result.model.graph.node if node.op_type == "MatMul"}
    assert not [n for n in result.model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] in before_add]
    biases = [a for name, a in constants(result.model).items() if a.dtype == np.int32 and "zero_point" not in name]
    assert sorted(len(b) for b in biases) == [32, 64]


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_of_rank_3_has_one_scale(target: str) -> None:
    proto = parse("y = MatMul(x, w)", "float[4, 6, 64] x", "float[4, 6, 32] y", {"w": weight(4, 64, 32, inputs=64)})
    result = quantized(proto, [{"x": normal(4, 6, 64, seed=i)} for i in range(16)], target=target)
    assert worst(proto, result, {"x": normal(4, 6, 64, seed=99)}) >= GOOD
    assert constants(result.model)["w_scale"].shape == ()


@pytest.mark.parametrize("groups", [1, 2])
def test_a_layer_without_integer_kernel_stores_its_weight_in_integers(groups: int) -> None:
    body = f"[up] u = ConvTranspose <group = {groups}, strides = [2, 2]> (x, w, b) r = Relu(u) {conv('y', 'r')}"
    values = conv_values(1, 16) | {"w": weight(16, 16 // groups, 2, 2, seed=5), "b": normal(16, scale=0.1)}
    proto = parse(body, "float[N, 16, 8, 8] x", "float[N, 16, 16, 16] y", values)
    result = quantized(proto)
    assert worst(proto, result) >= GOOD
    assert constants(result.model)["w_quantized"].dtype == np.int8
    assert "w" not in constants(result.model)
    assert result.report.weight_only == ("up",)
    assert "its weight alone is stored in integers" in reasons(result)["up"]
    readers = {name: node for node in result.model.graph.node for name in node.input}
    assert readers["x"].op_type == "ConvTranspose"


@pytest.mark.parametrize("target", TARGETS)
def test_weights_in_constant_nodes(target: str) -> None:
    proto = conv_chain(2, 32)
    nodes = [onnx.helper.make_node("Constant", [], [t.name], value=t) for t in proto.graph.initializer]
    nodes += proto.graph.node
    del proto.graph.initializer[:], proto.graph.node[:]
    proto.graph.node.extend(nodes)
    result = quantized(proto, target=target)
    assert worst(proto, result) >= GOOD
    assert "Constant" not in ops(result.model)
    assert constants(result.model)["w0_quantized"].dtype == np.int8
    assert result.report.sizes.quantized_bytes < 0.4 * result.report.sizes.float_bytes


@pytest.mark.parametrize("target", TARGETS)
def test_batchnorm_is_folded_before_anything_is_quantized(target: str) -> None:
    body = f"{conv('c', 'x')} n = BatchNormalization(c, gamma, beta, mean, var) r = Relu(n) {conv('y', 'r', 1)}"
    values = conv_values(2) | {
        "gamma": np.exp(normal(8, scale=0.3)),
        "beta": normal(8, seed=3, scale=0.3),
        "mean": normal(8, seed=4, scale=0.3),
        "var": np.exp(normal(8, seed=6, scale=0.3)),
    }
    proto = parse(body, f"{IMAGE} x", f"{IMAGE} y", values)
    result = quantized(proto, target=target)
    assert worst(proto, result) >= GOOD
    wanted, got = (run(model, feeds(proto))["y"] for model in (proto, result.model))
    assert min(sqnr(wanted[:, c], got[:, c]) for c in range(8)) >= 30
    assert "BatchNormalization" not in ops(result.model)


def test_softmax_uses_all_codes_from_0_to_the_observed_maximum() -> None:
    body = f"{conv('c', 'x')} [sm] s = Softmax <axis = -1> (c) {conv('y', 's', 1)}"
    proto = parse(body, f"{IMAGE} x", f"{IMAGE} y", conv_values(2))
    result = quantized(proto, calibrator="minmax")
    assert worst(proto, result) >= GOOD
    (found,) = (t for t in result.report.tensors if t.tensor == "s")
    assert found.observed is not None
    assert found.lo == 0
    assert found.hi == pytest.approx(found.observed[1])
    assert found.hi < 1


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize(("weights", "inputs"), [(1e-8, 1.0), (1.0, 1e-9), (1e-38, 1.0)])
def test_tiny_weights_with_a_large_bias(weights: float, inputs: float, target: str) -> None:
    values = conv_values(2)
    values |= {"w0": values["w0"] * np.float32(weights), "b0": normal(8)}
    proto = parse(f"{conv('c', 'x')} r = Relu(c) {conv('y', 'r', 1)}", f"{IMAGE} x", f"{IMAGE} y", values)
    data = {"x": feeds(proto)["x"] * np.float32(inputs)}
    result = quantized(proto, data, target=target)
    assert worst(proto, result, data) >= GOOD
    assert any("weight scales of 'c' were widened in 8 channels" in note for note in result.report.notes)


@pytest.mark.parametrize("target", TARGETS)
def test_a_channel_of_zeros_keeps_its_bias(target: str) -> None:
    values = {"w": weight(64, 4, inputs=64), "b": np.array([0.37, 0.2, -0.1, 0.0], np.float32)}
    values["w"][:, 0] = 0
    proto = parse("y = Gemm(x, w, b)", "float[N, 64] x", "float[N, 4] y", values)
    result = quantized(proto, {"x": feeds(proto)["x"] * np.float32(255)}, target=target)
    for optimize in (True, False):
        got = run(result.model, feeds(proto), optimize=optimize)["y"]
        np.testing.assert_allclose(got[:, 0], 0.37, rtol=1e-5)
    assert not any("widened" in note for note in result.report.notes)


@pytest.mark.parametrize("target", TARGETS)
def test_a_bias_and_a_weight_that_several_layers_share(target: str) -> None:
    body = f"{conv('a', 'x')} r = Relu(a) {conv('c', 'r')} s = Relu(c) {conv('d', 's')} y = Add(d, a)"
    proto = parse(body, f"{IMAGE} x", f"{IMAGE} y", conv_values(1))
    result = quantized(proto, target=target, bias_correction=False)
    assert worst(proto, result) >= DEEP
    stored = [name for name, a in constants(result.model).items() if a.dtype == np.int8 and a.ndim == 4]
    assert len(stored) == 1  # equal parameters: one copy of the weight
    biases = [n for n, a in constants(result.model).items() if a.dtype == np.int32 and "zero_point" not in n]
    assert len(biases) == (3 if target == "cpu" else 0)  # three inputs, three scales


@pytest.mark.parametrize("target", TARGETS)
def test_a_weight_read_along_two_axes_is_stored_for_either(target: str) -> None:
    body = "[one] c = Gemm(x, w) [two] d = Gemm <transB = 1> (x, w) y = Sub(c, d)"
    proto = parse(body, "float[N, 64] x", "float[N, 64] y", {"w": weight(64, 64)})
    result = quantized(proto, target=target)
    assert worst(proto, result) >= GOOD
    stored = [n for n in result.model.graph.node if n.op_type == "DequantizeLinear" and n.input[0].startswith("w_")]
    assert sorted(n.attribute[0].i for n in stored) == [0, 1]


@pytest.mark.parametrize("target", [*TARGETS, "cuda"])
def test_no_float_weight_is_left_behind(target: str) -> None:
    proto = conv_chain(3, 32)
    sizes = quantized(proto, target=target).report.sizes
    assert sizes.quantized_bytes < 0.35 * sizes.float_bytes
    assert sum(sizes.parts.values()) == sizes.quantized_bytes
    assert sizes.parts["int8 constants"] >= 3 * 32 * 32 * 9
    assert sizes.parts["float constants"] < 6000


@pytest.mark.parametrize(
    ("target", "activation", "bias"),
    [("cpu", np.uint8, np.int32), ("tensorrt", np.int8, np.float32), ("cuda", np.int8, np.float32)],
)
def test_default_types_are_the_targets(target: str, activation: type, bias: type) -> None:
    result = quantized(conv_chain(2), target=target)
    found = constants(result.model)
    zeros = {found[n.input[2]].dtype for n in result.model.graph.node if n.op_type == "QuantizeLinear"}
    assert zeros == {np.dtype(activation)}
    assert found["w0_quantized"].dtype == np.int8
    assert any(a.dtype == bias and a.shape == (8,) and "b0" in name for name, a in found.items())
    if target == "cpu":
        assert kernels(result) == {"QLinearConv": 2}
    else:
        assert all(not found[n.input[2]].any() for n in result.model.graph.node if n.op_type == "QuantizeLinear")


def test_reduce_range_leaves_the_accumulator_room(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "saturates_u8s8", lambda: True)
    proto = conv_chain(2)
    warned, reduced = quantized(proto), quantized(proto, reduce_range=True)
    assert any("no VNNI" in note and "reduce_range" in note for note in warned.report.notes)
    assert not any("VNNI" in note for note in reduced.report.notes)
    assert np.abs(constants(warned.model)["w0_quantized"]).max() == 127
    assert np.abs(constants(reduced.model)["w0_quantized"]).max() == 63
    assert worst(proto, reduced) >= GOOD - 3  # a bit less in the weights, not in the activations


MASKS = [np.float32(-3.4028235e38), np.float32(-np.inf), np.float32(-1e9), np.float32(-1e4)]
CAUSAL = np.triu(np.ones((6, 6), bool), 1)


def attention(mask: str, values: dict[str, Array]) -> onnx.ModelProto:
    body = f"""q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) t = Transpose <perm = [0, 2, 1]> (k)
        p = MatMul(q, t) s = Mul(p, scale) {mask} a = Softmax <axis = -1> (m) o = MatMul(a, v) y = MatMul(o, wo)"""
    weights = {f"w{n}": weight(32, 32, seed=i) for i, n in enumerate("qkvo")}
    return parse(
        body, "float[N, 6, 32] x", "float[N, 6, 32] y", {"scale": np.array([0.18], np.float32), **weights, **values}
    )


@pytest.mark.parametrize("target", TARGETS)
def test_masks_in_an_attention_stay_exact(target: str) -> None:
    plain = attention("m = Identity(s)", {})
    unmasked = worst(plain, quantized(plain, target=target))
    for value in MASKS:
        added = np.where(CAUSAL, value, np.float32(0)).astype(np.float32)
        for proto in (
            attention("m = Add(s, f)", {"f": added}),
            attention("m = Where(f, g, s)", {"f": CAUSAL, "g": np.array([value])}),
        ):
            result = quantized(proto, target=target)
            assert worst(proto, result) >= unmasked - 1
            assert all(abs(t.lo) < 100 and abs(t.hi) < 100 for t in result.report.tensors)


@pytest.mark.parametrize("value", MASKS)
@pytest.mark.parametrize(
    ("form", "size"), [("Add(c, f)", 8), ("Where(g, c, v)", 8), ("Where(h, v, c)", 8), ("Concat <axis = 3> (c, k)", 9)]
)
def test_masks_between_integer_layers_stay_exact(form: str, size: int, value: np.float32) -> None:
    hidden = np.random.default_rng(0).random((1, 1, 8, 8)) < 0.5
    values = conv_values(2) | {
        "f": np.where(hidden, value, np.float32(0)).astype(np.float32),
        "g": ~hidden,
        "h": hidden,
        "v": np.array(value),
        "k": np.full((4, 8, 8, 1), value, np.float32),
    }
    body = f"{conv('c', 'x')} [mask] m = {form} s = Softmax <axis = -1> (m) {conv('y', 's', 1)}"
    proto = parse(body, "float[4, 8, 8, 8] x", f"float[4, 8, 8, {size}] y", values)
    used = {name for node in proto.graph.node for name in node.input}
    kept = [t for t in proto.graph.initializer if t.name in used]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    result = quantized(proto, list(single(feeds(conv_chain(1)), 4)))
    assert worst(proto, result, {"x": feeds(conv_chain(1), 4, seed=7)["x"]}) >= GOOD
    assert "its constant" in reasons(result)["mask"]


def test_where_runs_in_integers() -> None:
    body = f"{conv('a', 'x')} {conv('b', 'x', 1)} [pick] m = Where(f, a, b) {conv('y', 'm', 2)}"
    values = conv_values(3) | {"f": np.random.default_rng(0).random((1, 1, 8, 8)) < 0.5}
    proto = parse(body, f"{IMAGE} x", f"{IMAGE} y", values)
    result = quantized(proto)
    assert kernels(result) == {"QLinearConv": 3, "QLinearWhere": 1}
    assert worst(proto, result) >= DEEP


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_stays_float_and_is_named(value: float) -> None:
    values = conv_values(2)
    values["w0"][0, 0, 0, 0] = value
    proto = parse(f"{conv('c', 'x')} r = Relu(c) {conv('y', 'r', 1)}", f"{IMAGE} x", f"{IMAGE} y", values)
    result = quantize(proto, feeds(proto), target="cpu", provider="cpu")
    assert reasons(result)["c"] == "its constant 'w0' holds NaN or infinite values"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"calibratr": "mse"}, "unknown recipe field 'calibratr'. Did you mean 'calibrator'?"),
        ({"calibrator": "precentile"}, "Did you mean 'percentile'?"),
        ({"calibrator": {"name": "percentile", "percentil": 99}}, "no option 'percentil'.*Did you mean 'percentile'?"),
        ({"target": "tensort"}, "unknown target 'tensort'.*Did you mean 'tensorrt'?"),
        ({"nodes_to_exclude": ["c2"]}, "nodes_to_exclude 'c2' matches no name. Did you mean 'c[01]'?"),
        ({"nodes_to_quantize": ["cc0"]}, "nodes_to_quantize 'cc0' matches no name. Did you mean 'c0'?"),
        ({"op_types_to_quantize": ["Cnv"]}, "'Cnv' is no operator .* Did you mean 'Conv'?"),
        ({"tensors": {"r00": {"dtype": "int16"}}}, "'r00' matches no tensor. Did you mean 'r0'?"),
        ({"nodes": {"c00": {"dtype": "int16"}}}, "'c00' matches no name. Did you mean 'c0'?"),
        ({"nodes": {"c0": {"dtyp": "int16"}}}, "unknown recipe field 'nodes.c0.dtyp'. Did you mean 'dtype'?"),
        ({"nodes": {"c0": {"dtype": "in16"}}}, "unknown number format 'in16'.*Did you mean 'int16'?"),
    ],
)
def test_a_name_that_matches_nothing_is_an_error_with_the_nearest(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quantized(conv_chain(2), **{"target": "cpu", **fields})


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "needs calibration data"),
        ([], "no samples"),
        (np.zeros((0, 8, 8, 8), np.float32), "no samples"),
        ({}, "x: missing"),
        ({"y": np.zeros((1, 8, 8, 8), np.float32)}, "no such input"),
    ],
)
def test_no_data_is_an_error(data: object, message: str) -> None:
    with pytest.raises(DataError, match=message):
        quantize(conv_chain(1), data, target="cpu", provider="cpu")


def test_synthetic_data_are_marked() -> None:
    result = quantized(conv_chain(1), "synthetic:4")
    assert result.report.synthetic
    assert "qdqtool.synthetic_data" in {entry.key for entry in result.model.metadata_props}
    assert not quantized(conv_chain(1)).report.synthetic


def test_both_accuracies_are_measured() -> None:
    proto = conv_chain(3, 16)
    data = feeds(proto, 16)
    result = quantized(proto, data)
    found = result.report.verification
    assert found is not None
    wanted = run(proto, data)["r2"]
    for optimize, measured in ((True, found.fused), (False, found.emulated)):
        assert measured["r2"] == pytest.approx(sqnr(wanted, run(result.model, data, optimize=optimize)["r2"]), abs=0.01)
        assert measured["r2"] >= GOOD
    assert result.report.integer_kernels == 3

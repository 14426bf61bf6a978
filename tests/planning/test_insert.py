"""Insertion of Q/DQ nodes: a pure function of graph, plan and parameters."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool.arithmetic import affine
from qdqtool.arithmetic.blockwise import pack
from qdqtool.errors import PipelineError
from qdqtool.graphs import model as models
from qdqtool.planning.insert import derived_bias, insert
from qdqtool.planning.plan import DerivedFrom, Key, Output, Plan, SharedWith, Use
from qdqtool.spec import FORMATS, PER_TENSOR, QuantizedWeight, QuantParams, QuantSpec, per_channel
from tests.builders import Array, constants, normal, parse, quantized, run, weight

WEIGHT = QuantSpec(FORMATS["int8"], symmetric=True, narrow=True)
ACTIVATION = QuantSpec(FORMATS["uint8"])
GEMM = "[one] y = Gemm(x, w, b)"


def params(scale: float = 0.02, zero_point: int = 128) -> QuantParams:
    return QuantParams(ACTIVATION, np.array(scale, np.float32), np.array(zero_point, np.int64))


def stored(values: Array, spec: QuantSpec = WEIGHT) -> QuantizedWeight:
    chosen = affine.params_from_range(affine.tensor_range(values, spec), spec)
    return QuantizedWeight(affine.quantize(values, chosen), chosen)


def model(body: str, y: str = "float[N, 5] y", opset: int = 21, **values: Array) -> onnx.ModelProto:
    return parse(body, "float[N, 4] x", y, {"w": normal(4, 5), "b": normal(5), **values}, opset=opset)


def inserted(proto: onnx.ModelProto, numbers: dict[Key, Any], entries: dict[Key, Any] | None = None) -> onnx.ModelProto:
    """The model with the keys in ``numbers`` quantized, and those in ``entries`` derived or shared."""
    graph, header = models.to_graph(models.load(proto))
    given = {key: (n.params if isinstance(n, QuantizedWeight) else n).spec for key, n in numbers.items()}
    plan = Plan({**given, **(entries or {})})
    result = models.to_proto(insert(graph, plan, numbers), header)
    onnx.checker.check_model(result, full_check=True)
    return result


def count(proto: onnx.ModelProto) -> tuple[int, int]:
    found = Counter(node.op_type for node in proto.graph.node)
    return found["QuantizeLinear"], found["DequantizeLinear"]


TWO = "[one] c = Gemm(x, w) [two] d = Gemm(x, w) y = Add(c, d)"


def test_uses_of_a_tensor_that_agree_share_a_pair() -> None:
    assert count(inserted(model(TWO), {Use("one", 0): params(), Use("two", 0): params()})) == (1, 1)
    assert count(inserted(model(TWO), {Use("one", 0): params(), Use("two", 0): params(0.03)})) == (2, 2)
    assert count(inserted(model(TWO), {Use("one", 0): params()})) == (1, 1)


def test_a_constant_is_stored_once_where_its_codes_agree() -> None:
    whole, channels = stored(normal(4, 5)), stored(normal(4, 5), QuantSpec(FORMATS["int8"], True, per_channel(1)))
    agree = inserted(model(TWO), {Use("one", 1): whole, Use("two", 1): stored(normal(4, 5))})
    differ = inserted(model(TWO), {Use("one", 1): whole, Use("two", 1): channels})
    assert (count(agree), count(differ)) == ((0, 1), (0, 2))
    assert [a.shape for a in constants(agree).values() if a.dtype == np.int8 and a.ndim] == [(4, 5)]
    assert sum(a.shape == (4, 5) for a in constants(differ).values()) == 2
    assert "w" not in constants(agree)


def test_values_are_those_of_the_parameters() -> None:
    proto = model("[one] y = Gemm(x, w)")
    weight = stored(normal(4, 5), QuantSpec(FORMATS["int8"], True, per_channel(1)))
    result = inserted(proto, {Use("one", 0): params(), Use("one", 1): weight, Output("y"): params(0.1)})
    x = normal(3, 4, seed=2)
    product = affine.fake_quantize(x, params()) @ affine.dequantize(weight.codes, weight.params)
    wanted = affine.fake_quantize(product, params(0.1))
    np.testing.assert_allclose(run(result, {"x": x}, optimize=False)["y"], wanted, atol=1e-6)


def test_graph_outputs_keep_names_and_order() -> None:
    body = "[one] a = Gemm(x, w) [two] y = Relu(a) [three] z = Neg(a)"
    proto = model(body, "float[N, 5] z, float[N, 5] a, float[N, 5] y")
    result = inserted(proto, {Output("a"): params(), Output("y"): params(0.02, 0)})
    assert [output.name for output in result.graph.output] == ["z", "a", "y"]
    got = run(result, {"x": normal(3, 4)}, optimize=False)
    np.testing.assert_array_equal(got["z"], -got["a"])  # every reader sees the quantized tensor, the output too
    steps = got["a"] / np.float32(0.02)
    np.testing.assert_allclose(steps, np.rint(steps), atol=1e-4)


def test_a_use_of_its_own_leaves_the_others_to_the_output() -> None:
    body = "[one] a = Gemm(x, w) [two] c = Relu(a) [three] d = Neg(a) y = Add(c, d)"
    result = inserted(model(body), {Output("a"): params(0.1), Use("three", 0): params(0.01)})
    made = {name: node for node in result.graph.node for name in node.output}
    sources = {n.name: made[made[n.input[0]].input[0]] for n in result.graph.node if n.name in ("two", "three")}
    scales = {name: float(constants(result)[node.input[1]]) for name, node in sources.items()}
    assert scales == {"two": pytest.approx(0.1), "three": pytest.approx(0.01)}
    assert {node.input[0] for node in sources.values()} == {"a"}  # both from the float tensor: nothing rounded twice


def test_shared_keys_use_the_same_parameters() -> None:
    body = "[one] a = Gemm(x, w) [two] t = Transpose(a) [three] y = Transpose(t)"
    entries: dict[Key, Any] = {Output("t"): SharedWith(Output("a")), Output("y"): SharedWith(Output("t"))}
    result = inserted(model(body), {Output("a"): params(0.0371, 77)}, entries)
    quantizers = [n for n in result.graph.node if n.op_type == "QuantizeLinear"]
    assert {float(constants(result)[n.input[1]]) for n in quantizers} == {np.float32(0.0371)}
    assert {int(constants(result)[n.input[2]]) for n in quantizers} == {77}
    assert len(quantizers) == 3


@pytest.mark.parametrize("granularity", [PER_TENSOR, per_channel(1)])
def test_codes_of_a_derived_bias(granularity: Any) -> None:
    weight = stored(normal(4, 5), QuantSpec(FORMATS["int8"], True, granularity))
    numbers: dict[Key, Any] = {Use("one", 0): params(0.02), Use("one", 1): weight}
    result = inserted(model(GEMM), numbers, {Use("one", 2): DerivedFrom(Use("one", 0), Use("one", 1))})
    scale = (np.float32(0.02) * weight.params.scale).astype(np.float32)
    found = constants(result)
    assert found["b_quantized"].dtype == np.int32
    np.testing.assert_array_equal(found["b_quantized"], np.rint(normal(5).astype(np.float64) / scale))
    np.testing.assert_array_equal(found["b_scale"], scale)
    assert not found["b_zero_point"].any()


def test_a_bias_at_the_edge_of_int32() -> None:
    one = QuantParams(WEIGHT, np.array(1, np.float32), np.array(0, np.int64))
    edge = derived_bias(np.array([2.0**31 - 1, -(2.0**31 - 1)]), params(1.0), one)
    assert edge is not None
    assert edge.codes.tolist() == [2**31 - 1, -(2**31 - 1)]
    assert derived_bias(np.array([2.0**31]), params(1.0), one) is None
    huge = stored(normal(4, 5) * np.float32(1e-12))
    entries: dict[Key, Any] = {Use("one", 2): DerivedFrom(Use("one", 0), Use("one", 1))}
    with pytest.raises(PipelineError, match="the bias 'b' of 'one' overflows int32"):
        inserted(model(GEMM), {Use("one", 0): params(), Use("one", 1): huge}, entries)


def test_a_bias_that_two_layers_share_gets_a_copy_for_each_scale() -> None:
    body = "[one] c = Gemm(x, w, b) [two] d = Gemm(x, w, b) y = Add(c, d)"
    bias: dict[Key, Any] = {Use(n, 2): DerivedFrom(Use(n, 0), Use(n, 1)) for n in ("one", "two")}
    weights: dict[Key, Any] = {Use(n, 1): stored(normal(4, 5)) for n in ("one", "two")}
    same = inserted(model(body), {Use("one", 0): params(), Use("two", 0): params(), **weights}, bias)
    apart = inserted(model(body), {Use("one", 0): params(), Use("two", 0): params(0.5), **weights}, bias)
    assert [sum(n.startswith("b_quantized") for n in constants(m)) for m in (same, apart)] == [1, 2]


@pytest.mark.parametrize("bits", [2, 4])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(1,), (7,), (8,), (3, 5), (2, 3, 4)])
def test_packing_is_that_of_onnx(bits: int, signed: bool, shape: tuple[int, ...]) -> None:
    name = f"{'INT' if signed else 'UINT'}{bits}"
    spec = FORMATS[name.lower()]
    codes = np.random.default_rng(0).integers(spec.qmin, spec.qmax + 1, shape)
    wanted = onnx.helper.make_tensor("t", getattr(onnx.TensorProto, name), shape, codes.reshape(-1).tolist())
    packed = np.array(wanted.int32_data).astype(np.uint8).tobytes() if wanted.int32_data else wanted.raw_data
    assert pack(codes, bits) == packed
    raw = onnx.helper.make_tensor("t", getattr(onnx.TensorProto, name), shape, pack(codes, bits), raw=True)
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(raw).astype(np.int64), codes)


@pytest.mark.parametrize("name", ["int4", "uint4"])
def test_a_4_bit_weight_in_a_model(name: str) -> None:
    weight = stored(normal(4, 5), QuantSpec(FORMATS[name], symmetric=name == "int4", granularity=per_channel(1)))
    result = inserted(model("[one] y = Gemm(x, w)"), {Use("one", 1): weight})
    (tensor,) = (t for t in result.graph.initializer if t.name == "w_quantized")
    assert (tensor.data_type, len(tensor.raw_data)) == (getattr(onnx.TensorProto, name.upper()), 10)
    x = normal(3, 4)
    wanted = x @ affine.dequantize(weight.codes, weight.params)
    np.testing.assert_allclose(run(result, {"x": x}, optimize=False)["y"], wanted, atol=1e-6)


def test_the_graph_given_stays_as_it_is() -> None:
    graph, header = models.to_graph(models.load(model(GEMM)))
    before = models.to_proto(graph, header)
    plan = Plan({Use("one", 0): ACTIVATION, Use("one", 1): WEIGHT, Output("y"): ACTIVATION})
    numbers: dict[Key, Any] = {Use("one", 0): params(), Use("one", 1): stored(normal(4, 5)), Output("y"): params()}
    first = models.to_proto(insert(graph, plan, numbers), header)
    assert models.to_proto(graph, header) == before
    assert models.to_proto(insert(graph, plan, numbers), header) == first


def test_a_key_without_numbers_is_an_error() -> None:
    graph, _ = models.to_graph(models.load(model(GEMM)))
    with pytest.raises(
        PipelineError, match="::one::0 is planned but has no scale and zero point; choose ranges before"
    ):
        insert(graph, Plan({Use("one", 0): ACTIVATION}), {})
    with pytest.raises(PipelineError, match="::one::1 is planned but has no scale"):
        insert(graph, Plan({Use("one", 1): WEIGHT, Output("y"): SharedWith(Use("one", 1))}), {})


def test_names_that_are_taken_are_avoided() -> None:
    body = "[x_QuantizeLinear] x_quantized = Relu(x) [one] y = Gemm(x_quantized, w, x_scale)"
    result = inserted(model(body, x_scale=normal(5)), {Use("x_QuantizeLinear", 0): params(), Use("one", 0): params()})
    names = [name for node in result.graph.node for name in node.output] + list(constants(result))
    assert len(names) == len(set(names))
    assert len({node.name for node in result.graph.node}) == len(result.graph.node)


def test_a_reader_in_a_control_flow_body_reads_the_quantized_tensor() -> None:
    body = """[one] a = Gemm(x, w) y = If (f) <then_branch = t () => (float[N, 5] p) { p = Neg(a) },
        else_branch = e () => (float[N, 5] q) { q = Abs(a) }>"""
    proto = parse(body, "float[N, 4] x, bool f", "float[N, 5] y", {"w": normal(4, 5)})
    result = inserted(proto, {Output("a"): params(0.5)})
    got = run(result, {"x": normal(3, 4), "f": np.array(True)}, optimize=False)["y"]
    np.testing.assert_array_equal(got * 2, np.rint(got * 2))


@pytest.mark.parametrize("fields", [{}, {"precision": "w8a4", "first_last_8bit": False}])
def test_a_matmul_reads_channels_with_scales_of_their_own(fields: dict[str, Any]) -> None:
    """The runtime would make of it a kernel that refuses such scales when it runs."""
    values = {"m": weight(16, 16), "k": weight(16, 8, seed=1)}
    proto = parse("a = MatMul(x, m) b = Relu(a) y = MatMul(b, k)", "float[N, 5, 16] x", "float[N, 5, 8] y", values)
    x = normal(16, 5, 16) * np.geomspace(1, 100, 16).astype(np.float32)
    one, each = (
        quantized(proto, {"x": x}, smoothing="off", activation_per_channel=on, **fields) for on in (False, True)
    )
    assert one.report.verification is not None
    assert each.report.verification is not None
    assert each.report.verification.worst_db > one.report.verification.worst_db + 2

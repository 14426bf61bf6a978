"""What float models may look like: versions, names, shapes, types, and parts that are quantized already."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest

from qdqtool import runtime
from qdqtool.errors import DataError, ModelError
from qdqtool.graphs.model import MAX_IR, MAX_OPSET, MIN_OPSET
from qdqtool.pipeline import Result, quantize
from tests.builders import (
    TARGETS,
    Array,
    Arrays,
    constants,
    conv,
    conv_values,
    feeds,
    ops,
    parse,
    quality,
    quantized,
    reasons,
    run,
    sqnr,
    weight,
)

IMAGE = "float[N, 8, 8, 8]"
BODY = f"{conv('c', 'x')} r = Relu(c) {conv('y', 'r', 1)}"
GOOD = 35.0
"""dB that 8 bits reach on these small random nets."""
DEEP = 33.0
"""The same where three or more quantized activations lie in a row."""


def layers(**changes: Any) -> onnx.ModelProto:
    return parse(BODY, f"{IMAGE} x", f"{IMAGE} y", conv_values(2), **changes)


def worst(proto: onnx.ModelProto, result: Result, fed: Arrays | None = None) -> float:
    return min(quality(proto, result.model, feeds(proto, 8, seed=7) if fed is None else fed).values())


# Versions


@pytest.mark.parametrize("opset", range(MIN_OPSET, MAX_OPSET + 1))
def test_every_opset(opset: int) -> None:
    proto = layers(opset=opset)
    result = quantized(proto)
    assert result.report.opset == max(opset, 13)
    assert set(result.report.layers) == {"c", "y"}
    assert worst(proto, result) >= GOOD


@pytest.mark.parametrize(
    ("opset", "message"), [(MAX_OPSET + 1, "the newest .* is 26"), (MIN_OPSET - 1, "oldest .* is 7")]
)
def test_other_opsets_are_refused_by_name(opset: int, message: str) -> None:
    with pytest.raises(ModelError, match=f"uses opset {opset}; .*{message}"):
        quantized(layers(opset=opset), feeds(layers()))


def test_a_newer_format_version_with_a_known_opset() -> None:
    proto = layers()
    fed = feeds(proto)
    reference = run(proto, fed)["y"]
    proto.ir_version = MAX_IR + 1
    result = quantized(proto, fed)
    assert sqnr(reference, run(result.model, fed)["y"]) >= GOOD


# Names


def test_initializers_listed_as_inputs() -> None:
    proto = layers()
    proto.ir_version = 3
    for tensor in proto.graph.initializer:
        proto.graph.input.append(onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims)))
    result = quantized(proto, feeds(layers()))
    assert [value.name for value in result.model.graph.input] == ["x"]
    assert worst(layers(), result) >= GOOD


@pytest.mark.parametrize("names", [("", "", ""), ("same", "same", "same"), ("Relu_1", "", "Relu_1")])
def test_node_names_that_are_missing_or_not_unique(names: tuple[str, ...]) -> None:
    proto = layers()
    for node, name in zip(proto.graph.node, names, strict=True):
        node.name = name
    result = quantized(proto)
    found = [node.name for node in result.model.graph.node]
    assert len(set(found)) == len(found)
    assert len(result.report.layers) == 2
    assert worst(layers(), result) >= GOOD  # the runtime refuses a model whose nodes share a name


def test_operators_of_a_domain_that_the_runtime_lacks_are_named() -> None:
    body = f"{conv('c', 'x')} [own] o = org.example.Own(c) {conv('y', 'o', 1)}"
    proto = parse(body, f"{IMAGE} x", f"{IMAGE} y", conv_values(2), domain="org.example")
    with pytest.raises(ModelError, match=r"org\.example:Own"):
        quantized(proto)


# Shapes


@pytest.mark.parametrize("shape", ["[N, 8, H, W]", "[?, 8, ?, ?]", "[1, 8, H, 8]", "[N, C, H, W]"])
def test_free_dimensions(shape: str) -> None:
    proto = parse(BODY, f"float{shape} x", f"float{shape} y", conv_values(2))
    fed = feeds(layers())
    result = quantized(proto, fed)
    assert set(result.report.layers) == {"c", "y"}
    assert worst(proto, result, {"x": fed["x"][:1]}) >= GOOD


def test_an_input_of_unknown_rank() -> None:
    proto, fed = layers(), feeds(layers())
    for value in (*proto.graph.input, *proto.graph.output):
        value.type.tensor_type.ClearField("shape")
    result = quantize(proto, [{"x": x[None]} for x in fed["x"]], target="cpu", provider="cpu")
    assert set(result.report.layers) == {"c", "y"}
    assert worst(proto, result, fed) >= GOOD
    with pytest.raises(DataError, match="leaves its rank open; give a list of whole feeds"):
        quantize(proto, fed, target="cpu", provider="cpu")


def test_shapes_that_cannot_be_inferred(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("no such shape")

    proto = layers()
    with monkeypatch.context() as patch:
        patch.setattr(onnx.shape_inference, "infer_shapes", fail)
        result = quantize(proto, feeds(proto), target="cpu", provider="cpu")
    assert any("shape inference failed" in note for note in result.report.notes)
    assert worst(proto, result) >= GOOD


def test_wrong_shapes_in_the_file() -> None:
    proto = layers()
    proto.graph.value_info.append(onnx.helper.make_tensor_value_info("c", onnx.TensorProto.FLOAT, [1, 3]))
    result = quantized(proto, feeds(layers()))
    assert worst(layers(), result) >= GOOD


# Types


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("scale", [1.0, 1e-3, 1e-5])
def test_float16_with_weights_whose_scales_float16_does_not_hold(scale: float, target: str) -> None:
    values = {name: (value * np.float32(scale)).astype(np.float16) for name, value in conv_values(2).items()}
    proto = parse(BODY, "float16[N, 8, 8, 8] x", "float16[N, 8, 8, 8] y", values)
    result = quantized(proto, target=target)
    assert set(result.report.layers) == {"c", "y"}
    types = [value.type.tensor_type.elem_type for value in (result.model.graph.input[0], result.model.graph.output[0])]
    assert types == [onnx.TensorProto.FLOAT16] * 2
    assert worst(proto, result) >= GOOD
    assert any("compute in float32" in note for note in result.report.notes)
    if scale < 1e-4:
        assert max(a.max() for n, a in constants(result.model).items() if n.startswith("w0_scale")) < 2**-24


def test_bfloat16_that_the_runtime_has_no_kernels_for() -> None:
    values = {name: value.astype(ml_dtypes.bfloat16) for name, value in conv_values(2).items()}
    proto = parse(BODY, "bfloat16[N, 8, 8, 8] x", "bfloat16[N, 8, 8, 8] y", values)
    fed = {"x": feeds(layers())["x"].astype(ml_dtypes.bfloat16)}
    result = quantize(proto, fed, target="cpu", provider="cpu")
    (got,) = runtime.run(runtime.session(result.model), None, fed)
    assert got.dtype == ml_dtypes.bfloat16
    wide = parse(BODY, f"{IMAGE} x", f"{IMAGE} y", {name: value.astype(np.float32) for name, value in values.items()})
    assert sqnr(run(wide, {"x": fed["x"].astype(np.float32)})["y"], got) >= GOOD
    assert "the result is compared with its float32 form" in " ".join(result.report.notes)


def test_weights_alone_leave_float16_as_it_is() -> None:
    values = {"w": weight(64, 64, inputs=64).astype(np.float16)}
    proto = parse("[fc] y = MatMul(x, w)", "float16[N, 64] x", "float16[N, 64] y", values)
    result = quantize(proto, precision="w8a16", provider="cpu")
    assert "Cast" not in ops(result.model)
    assert constants(result.model)["w_scale"].dtype == np.float16


# Parts that are quantized already


MIDDLE = {name: np.array(128, np.uint8) for name in ("az", "bz")}


def scalars(**values: float) -> Arrays:
    return {name: np.array(value, np.float32) for name, value in values.items()}


def codes(values: Array) -> Arrays:
    """Codes and scales of a weight, per channel."""
    scale = np.abs(values).max(axis=(1, 2, 3)) / 127
    return {"q": np.round(values / scale[:, None, None, None]).astype(np.int8), "s": scale.astype(np.float32)}


@pytest.mark.parametrize("target", TARGETS)
def test_a_layer_that_is_quantized_already_stays_and_the_others_are_quantized(target: str) -> None:
    """x -> Q -> DQ -> Conv (weight in codes) -> Q -> DQ -> Relu -> Conv in float."""
    values = conv_values(2)
    fixed = codes(values.pop("w0")) | scalars(a=2 / 255, b=8 / 255) | MIDDLE
    body = f"""[xq] xq = QuantizeLinear(x, a, az) [xd] xd = DequantizeLinear(xq, a, az)
        [wd] w0 = DequantizeLinear <axis = 0> (q, s) {conv("c", "xd")}
        [cq] cq = QuantizeLinear(c, b, bz) [cd] cd = DequantizeLinear(cq, b, bz)
        r = Relu(cd) {conv("y", "r", 1)}"""
    proto = parse(body, f"{IMAGE} x", f"{IMAGE} y", values | fixed)
    result = quantized(proto, target=target)
    found = {node.name: node for node in result.model.graph.node}
    assert {"xq", "xd", "wd", "cq", "cd"} <= found.keys()
    kept = constants(result.model)
    for name, value in fixed.items():
        np.testing.assert_array_equal(kept[name], value)
    assert set(result.report.layers) == {"y"}
    assert reasons(result)["c"] == "its weight is quantized already"
    quantizers = {node.input[0] for node in result.model.graph.node if node.op_type == "QuantizeLinear"}
    assert quantizers == {"x", "c", "r", "y_float"} - ({"y_float"} if target == "tensorrt" else set())
    assert worst(proto, result) >= GOOD


def test_integer_operators_stay_as_they_are() -> None:
    q = np.random.default_rng(0).integers(-127, 128, (16, 16), np.int8)
    values: Arrays = {"q": q, "z": np.array(0, np.int8), "v": weight(16, 16, inputs=16)}
    values |= scalars(a=2 / 255, s=0.01, b=0.1) | MIDDLE
    body = """[xq] xq = QuantizeLinear(x, a, az) [m] mq = QLinearMatMul(xq, a, az, q, s, z, b, bz)
        [md] md = DequantizeLinear(mq, b, bz) [y] y = MatMul(md, v)"""
    proto = parse(body, "float[N, 16] x", "float[N, 16] y", values)
    result = quantized(proto)
    assert "QLinearMatMul" in ops(result.model)
    assert set(result.report.layers) == {"y"}
    assert worst(proto, result) >= GOOD


def test_a_max_pool_and_an_add_between_conversions_of_the_models_own() -> None:
    """Q of the model behind what hands codes on, and DQ before an Add: nothing is rounded twice."""
    body = f"""{conv("c", "x")} m = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (c)
        [mq] mq = QuantizeLinear(m, b, bz) [md] md = DequantizeLinear(mq, b, bz)
        [a] a = Add(md, c) {conv("y", "a", 1)}"""
    values = conv_values(2) | {"b": np.array(4 / 255, np.float32), "bz": np.array(64, np.uint8)}
    proto = parse(body, f"{IMAGE} x", f"{IMAGE} y", values)
    result = quantized(proto)
    assert {"c", "y"} <= set(result.report.layers)
    quantizers = [node.input[0] for node in result.model.graph.node if node.op_type == "QuantizeLinear"]
    assert "md" not in quantizers
    assert sorted(quantizers) == ["a", "c", "m", "x", "y_float"]
    assert worst(proto, result) >= DEEP

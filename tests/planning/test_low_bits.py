"""Precisions with few bits: what is stored, what stays in 8 bits, and that every file loads and runs as written."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool.errors import RecipeError
from qdqtool.graphs.model import opset
from qdqtool.recipe import Recipe
from tests.builders import constants, conv_chain, feeds, normal, parse, quality, quantized, reasons, run, sqnr, weight

FORMS = {
    "chain": """[a] a = Conv <pads = [1, 1, 1, 1]> (x, w, b) [r] r = Relu(a)
        [c] y = Conv <pads = [1, 1, 1, 1]> (r, v, b)""",
    "nothing between": "[a] a = Conv <pads = [1, 1, 1, 1]> (x, w, b) [c] y = Conv <pads = [1, 1, 1, 1]> (a, v, b)",
    "pooled": """[a] a = Conv <pads = [1, 1, 1, 1]> (x, w, b) [r] r = Relu(a) [s] s = Sigmoid(r)
        [p] p = MaxPool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (r)
        [c] y = Conv <pads = [1, 1, 1, 1]> (p, v, b)""",
    "residual": """[a] a = Conv <pads = [1, 1, 1, 1]> (x, w, b) [r] r = Relu(a)
        [c] c = Conv <pads = [1, 1, 1, 1]> (r, v, b) [s] s = Add(c, r) [t] t = Clip(s, zero, six)
        [e] y = Conv <pads = [1, 1, 1, 1]> (t, w, b)""",
}
VALUES = {
    "w": weight(8, 8, 3, 3),
    "v": weight(8, 8, 3, 3, seed=1),
    "b": normal(8, scale=0.1),
    "zero": np.array(0, np.float32),
    "six": np.array(6, np.float32),
}
PRODUCTS = """[g] g = Gemm <transB = 1> (x, w, b) [r] r = Relu(g) [m] m = MatMul(r, v) [h] y = Gemm(m, u, b)"""
PRECISIONS = ("w4a8", "w4a4", "w8a4", "w2a8")


def model(form: str) -> onnx.ModelProto:
    if form == "products":
        values = {"w": weight(32, 32), "v": weight(32, 32, seed=1), "u": weight(32, 32, seed=2), "b": normal(32)}
        return parse(PRODUCTS, "float[N, 32] x", "float[N, 32] y", values)
    return parse(FORMS[form], "float[N, 8, 8, 8] x", "float[N, 8, 8, 8] y", VALUES)


@pytest.mark.parametrize("storage", ["packed", "int8"])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", [*FORMS, "products"])
def test_every_form_loads_and_runs_as_it_is_written(form: str, precision: str, target: str, storage: str) -> None:
    proto = model(form)
    fed = feeds(proto, 16)
    result = quantized(proto, fed, target=target, precision=precision, storage=storage)
    assert quality(proto, result.model, fed)["y"] > {"w2a8": 1}.get(precision, 9)
    emulated, fused = (run(result.model, fed, optimize=optimize)["y"] for optimize in (False, True))
    assert sqnr(emulated, fused) > 25
    assert opset(result.model) <= 26


@pytest.mark.parametrize("precision", PRECISIONS)
def test_activations_with_a_scale_for_each_channel(precision: str) -> None:
    proto = model("residual")
    fed = feeds(proto, 16)
    whole = quantized(proto, fed, precision=precision, calibrator="minmax")
    each = quantized(proto, fed, precision=precision, calibrator="minmax", activation_per_channel=True)
    assert sqnr(run(each.model, fed, optimize=False)["y"], run(each.model, fed)["y"]) > 25
    assert quality(proto, each.model, fed)["y"] > quality(proto, whole.model, fed)["y"] - 1
    assert max(value.size for name, value in constants(each.model).items() if name == "r_scale") == 8


def test_channels_that_are_moved_and_added_to_keep_their_scales() -> None:
    """Codes cannot be handed through a Pad of channels or a Transpose where each channel has a scale."""
    body = """[a] a = Conv(x, w, b) [r] r = Relu(a) [p] p = Pad(r, pads) [t] t = Transpose <perm = [0, 1, 3, 2]> (p)
        [c] y = Conv(t, v, b)"""
    values = {"w": weight(8, 8, 3, 3), "v": weight(8, 12, 3, 3), "b": normal(8, scale=0.1)}
    pads = {"pads": np.array([0, 2, 0, 0, 0, 2, 0, 0])}
    proto = parse(body, "float[N, 8, 8, 8] x", "float[N, 8, 4, 4] y", {**values, **pads})
    result = quantized(proto, precision="w8a8", activation_per_channel=True, calibrator="minmax")
    assert quality(proto, result.model, feeds(proto))["y"] > 30


def test_an_activation_of_four_bits_has_sixteen_values() -> None:
    proto = parse("[a] y = MatMul(x, w)", "float[N, 1] x", "float[N, 1] y", {"w": np.ones((1, 1), np.float32)})
    fed = {"x": np.linspace(-1, 2, 500, dtype=np.float32)[:, None]}
    result = quantized(proto, fed, precision="w8a4", bias_correction=False)
    assert len(np.unique(run(result.model, {"x": fed["x"] * 3})["y"])) == 16


def test_integer_kernels_where_codes_are_stored_in_eight_bits() -> None:
    proto = conv_chain(4)
    assert quantized(proto, precision="w4a8", storage="int8").report.integer_kernels == 4
    packed = quantized(proto, precision="w4a8")
    assert packed.report.integer_kernels == 0
    assert packed.plan.kernels == {}
    assert "its weight is stored as int4 (storage int8: the same codes in 8 bits)" in reasons(packed)["c1"]
    assert packed.report.sizes.quantized_bytes < quantized(proto, precision="w8a8").report.sizes.quantized_bytes


class TestEnds:
    def bits(self, form: str = "residual", **fields: Any) -> dict[str, int]:
        """Bits of each layer's weight, by layer."""
        result = quantized(model(form), feeds(model(form), 8), **fields)
        widths = {str(key): spec.bits or spec.format.bits for key, spec in result.plan.specs()}
        return {key.split("::")[1]: bits for key, bits in widths.items() if key.endswith("::1") and "::s::" not in key}

    def test_have_eight_bits_with_w4a4(self) -> None:
        assert self.bits(precision="w4a4") == {"a": 8, "c": 4, "e": 8}

    def test_have_those_of_all_layers_with_other_precisions_or_where_that_is_wanted(self) -> None:
        assert self.bits(precision="w4a8") == {"a": 4, "c": 4, "e": 4}
        assert self.bits(precision="w4a8", first_last_8bit=True) == {"a": 8, "c": 4, "e": 8}
        assert self.bits(precision="w4a4", first_last_8bit=False) == {"a": 4, "c": 4, "e": 4}

    def test_a_user_s_word_for_a_node_counts_first(self) -> None:
        found = self.bits(precision="w4a4", nodes={"a": {"precision": "w2a8"}, "c": {"precision": "w8a8"}})
        assert found == {"a": 2, "c": 8, "e": 8}

    def test_every_input_and_output_has_ends_of_its_own(self) -> None:
        body = """[a] a = MatMul(x, w) [b] b = MatMul(z, w) [s] s = Add(a, b) [c] c = MatMul(s, w)
            [d] y = MatMul(c, w) [e] v = MatMul(c, w)"""
        proto = parse(body, "float[N, 8] x, float[N, 8] z", "float[N, 8] y, float[N, 8] v", {"w": weight(8, 8)})
        result = quantized(proto, precision="w4a4")
        widths = {key.node: spec.bits or spec.format.bits for key, spec in result.plan.specs() if "::1" in str(key)}  # type: ignore[union-attr]  # uses
        assert {name: bits for name, bits in widths.items() if name != "s"} == {"a": 8, "b": 8, "c": 4, "d": 8, "e": 8}


def test_one_layer_in_more_bits_beside_others() -> None:
    proto = conv_chain(4)
    plain = quantized(proto, precision="w2a8")
    helped = quantized(proto, precision="w2a8", nodes={"c[01]": {"precision": "w8a8"}})
    fed = feeds(proto)
    assert quality(proto, helped.model, fed)["r3"] > quality(proto, plain.model, fed)["r3"] + 1


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"precision": "w4a4", "target": "tensorrt"}, "TensorRT takes symmetric activations of 8 bits alone"),
        ({"precision": "w4a16", "storage": "int8"}, "storage has no use with precision w4a16"),
        ({"precision": "w4a16", "weight_rounding": "gptq"}, "weight_rounding has no use with precision w4a16"),
        ({"precision": "w4a16", "nodes": {"a": {"precision": "w8a8"}}}, "precision has no use with w4a16"),
        ({"tensors": {"x": {"precision": "w8a8"}}}, "override of tensor 'x': precision is of a node"),
        ({"precision": "fp16", "first_last_8bit": True}, "first_last_8bit has no use"),
    ],
)
def test_what_does_not_go_together(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.of({"target": "cpu", **fields})


@pytest.mark.parametrize(
    ("fields", "least", "few"),
    [
        ({"precision": "w4a8"}, 21, True),
        ({"precision": "w4a8", "storage": "int8"}, 13, True),
        ({"precision": "w8a4"}, 13, False),
        ({"precision": "w8a8", "nodes": {"a": {"precision": "w4a8"}}}, 21, True),
        ({"precision": "w8a8"}, 13, False),
    ],
)
def test_the_opset_follows_from_the_types(fields: dict[str, Any], least: int, few: bool) -> None:
    recipe = Recipe.of({"target": "cpu", **fields})
    assert (recipe.min_opset, recipe.few_bits) == (least, few)


def test_without_data_weights_are_rounded_to_nearest_and_that_is_said() -> None:
    import qdqtool

    proto = conv_chain(2)
    made = qdqtool.calibrate(proto, feeds(proto), targets=["cpu"], provider="cpu")
    result = qdqtool.quantize(proto, statistics=made, precision="w4a8", target="cpu", provider="cpu")
    assert "weights were rounded to nearest: gptq needs data beside the statistics" in result.report.notes

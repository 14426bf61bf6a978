"""Weights alone in integers: what the runtime makes of the file, and what the file costs in accuracy and size."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest

import qdqtool
from qdqtool import chains, pipeline, runtime
from qdqtool.arithmetic.blockwise import quantize as codes_of
from qdqtool.errors import DataError, GateError, RecipeError
from qdqtool.graphs import model as models
from qdqtool.passes_api import PassManager
from qdqtool.pipeline import Result
from tests.builders import Array, conv_chain, feeds, normal, parse, run, sqnr
from tests.cuda_stub import CudaStub

PRECISIONS = ("w8a16", "w4a16", "w2a16")
LEAST = {"w8a16": 40, "w4a16": 18, "w2a16": 5}
"""SQNR in dB of one product of normal weights, at least."""


def weights(*shape: int, seed: int = 0) -> Array:
    return normal(*shape, seed=seed, scale=shape[0] ** -0.5)


VALUES = {
    "w": weights(64, 64),
    "v": weights(64, 64, seed=1),
    "wt": weights(64, 64, seed=2),
    "b": normal(64, scale=0.1),
    "row": normal(1, 64, scale=0.1),
    "zero": np.array(0, np.float32),
    "six": np.array(6, np.float32),
    "table": normal(1000, 64),
    "c": normal(40, 64, 3, 3, scale=0.05),
}


def model(body: str, x: str = "float[N, 64] x", y: str = "float[N, 64] y", **values: Array) -> onnx.ModelProto:
    used = {**VALUES, **values}
    return parse(body, x, y, {name: used[name] for name in used if f"{name})" in body or f"{name}," in body}, opset=17)


def quantized(proto: onnx.ModelProto, data: object = None, **fields: Any) -> Result:
    """Weights alone in integers for the CPU, without data; checked and loaded."""
    return qdqtool.quantize(proto, data, provider="cpu", **{"target": "cpu", "precision": "w4a16", **fields})


def kernels(proto: onnx.ModelProto) -> Counter[str]:
    """Operators of the graph that the runtime makes of a model."""
    return Counter(node.op_type for node in runtime.optimized(proto).graph.node)


def quality(proto: onnx.ModelProto, result: Result) -> float:
    """SQNR of the outputs in dB, of the fused and the emulated model the lower one."""
    fed = feeds(proto, samples=1 if isinstance(models.inputs(proto)[0].shape[0], int) else 32)
    wanted = run(proto, fed)
    found = [run(result.model, fed, optimize=optimize) for optimize in (True, False)]
    return min(sqnr(value, other[name]) for name, value in wanted.items() for other in found)


def fused(proto: onnx.ModelProto, result: Result) -> bool:
    """Whether every product by a constant is one node, and no weight is dequantized at run time."""
    found = kernels(result.model)
    state, _ = pipeline.dry_run(proto, target="cpu", precision="w4a16")
    assert state.plan is not None
    return found["MatMulNBits"] == len(state.plan.kernels) and found["DequantizeLinear"] == 0


FORMS = {
    "product": "[a] y = MatMul(x, w)",
    "bias": "[a] t = MatMul(x, w) [b] y = Add(t, b)",
    "gemm": "[a] y = Gemm <transB = 1, alpha = 0.5, beta = 2.0> (x, wt, b)",
    "gemm with a row": "[a] y = Gemm(x, w, row)",
    "relu": "[a] t = MatMul(x, w) [r] r = Relu(t) [s] y = Sin(r)",
    "bias and relu": "[a] t = Gemm(x, w, b) [r] r = Relu(t) [c] y = MatMul(r, v)",
    "bias and clip": "[a] t = Gemm(x, w, b) [r] r = Clip(t, zero, six) [c] y = MatMul(r, v)",
    "bias and tanh": "[a] t = Gemm(x, w, b) [r] r = Tanh(t) [c] y = MatMul(r, v)",
    "residual": "[a] t = MatMul(x, w) [s] y = Add(t, x)",
    "bias and residual": "[a] t = Gemm(x, w, b) [s] y = Add(x, t)",
    "two readers": "[a] t = MatMul(x, w) [r] r = Relu(t) [s] y = Sub(t, r)",
    "one weight, two products": "[a] t = MatMul(x, w) [c] u = MatMul(t, w) [s] y = Add(t, u)",
    "scaled": "[p] p = Mul(x, six) [a] y = MatMul(p, w)",
    "output": "[a] t = MatMul(x, w) [r] y = Relu(t)",
}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("form", FORMS)
def test_every_product_is_one_kernel(form: str, precision: str) -> None:
    for shape in ("N, 64", "N, T, 64", "2, 3, 64"):
        if "Gemm" in FORMS[form] and shape != "N, 64":
            continue
        proto = model(FORMS[form], f"float[{shape}] x", f"float[{shape}] y")
        result = quantized(proto, precision=precision)
        assert fused(proto, result), shape
        assert quality(proto, result) > LEAST[precision] - 6, shape


@pytest.mark.parametrize("form", ["relu", "bias and relu", "bias and clip", "residual"])
def test_without_zeros_in_between_the_runtime_does_not_fuse(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reason for what gemm-to-matmul does; once this fails, the runtime has learnt it."""
    monkeypatch.setattr("qdqtool.passes.gemm_to_matmul._shield", lambda *_: False)
    proto = model(FORMS[form])
    assert not fused(proto, quantized(proto))


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize(("inputs", "outputs"), [(64, 64), (33, 5), (100, 48), (31, 4), (1, 7), (16, 1), (65, 2)])
def test_any_size_of_a_weight(inputs: int, outputs: int, precision: str, symmetric: bool) -> None:
    proto = model("[a] y = MatMul(x, w)", f"float[N, {inputs}] x", f"float[N, {outputs}] y", w=weights(inputs, outputs))
    result = quantized(proto, precision=precision, weight_symmetric=symmetric)
    assert kernels(result.model) == {"MatMulNBits": 1}
    assert quality(proto, result) > LEAST[precision] - (7 if symmetric and precision == "w2a16" else 4)


def test_two_bits_go_wrong_in_the_runtime_where_outputs_are_no_multiple_of_four(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The reason why such weights get 4 bits; once this fails, the runtime is right."""
    monkeypatch.setattr("qdqtool.passes.plan_weights._WIDTH_OF_2_BITS", 1)
    proto = model("[a] y = MatMul(x, w)", y="float[N, 50] y", w=weights(64, 50))
    result = quantized(proto, precision="w2a16")
    fed = feeds(proto)
    emulated, as_fused = (run(result.model, fed, optimize=optimize)["y"] for optimize in (False, True))
    assert sqnr(emulated, as_fused) < 0


@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
@pytest.mark.parametrize("precision", ["w8a16", "w4a16"])
def test_block_sizes(precision: str, block: int) -> None:
    proto = model("[a] y = MatMul(x, w)", "float[N, 512] x", "float[N, 64] y", w=weights(512, 64))
    result = quantized(proto, precision=precision, block_size=block)
    assert kernels(result.model) == {"MatMulNBits": 1}
    (kernel,) = runtime.optimized(result.model).graph.node
    assert {a.name: a.i for a in kernel.attribute}["block_size"] == block
    assert quality(proto, result) > LEAST[precision] - 3


def test_smaller_blocks_are_nearer_and_zero_points_too() -> None:
    proto = model("[a] y = MatMul(x, w)", "float[N, 512] x", "float[N, 64] y", w=weights(512, 64))
    found = [quality(proto, quantized(proto, block_size=size)) for size in (16, 64, 256)]
    assert found == sorted(found, reverse=True)
    assert quality(proto, quantized(proto, weight_symmetric=False)) > quality(proto, quantized(proto)) + 0.5


@pytest.mark.parametrize(
    ("fields", "inputs"),
    [({}, 2), ({"weight_symmetric": False}, 3), ({"precision": "w8a16"}, 2), ({"precision": "w2a16"}, 3)],
)
def test_a_signed_weight_has_no_zero_point(fields: dict[str, Any], inputs: int) -> None:
    result = quantized(model("[a] y = MatMul(x, w)"), **fields)
    (node,) = [node for node in result.model.graph.node if node.op_type == "DequantizeLinear"]
    assert len(node.input) == inputs


@pytest.mark.parametrize(("precision", "opset"), [("w8a16", 21), ("w4a16", 21), ("w2a16", 25)])
def test_the_least_opset_that_has_the_types(precision: str, opset: int) -> None:
    result = quantized(model("[a] y = MatMul(x, w)"), precision=precision)
    assert models.opset(result.model) == opset
    assert result.report.sizes.quantized_bytes < (0.45, 0.3, 0.25)[PRECISIONS.index(precision)] * 64 * 64 * 4


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_table_is_gathered_in_integers(precision: str) -> None:
    proto = model("[e] e = Gather(table, i) [a] y = MatMul(e, w)", "int64[N, T] i", "float[N, T, 64] y")
    result = quantized(proto, precision=precision)
    assert kernels(result.model) == {"Gather": 2, "Cast": 1, "Mul": 1, "MatMulNBits": 1}
    assert quality(proto, result) > LEAST[precision] - 3
    stored = {t.name: t.data_type for t in result.model.graph.initializer}
    assert stored["table_quantized"] == onnx.TensorProto.INT8
    assert "table" not in stored


def test_what_was_found_in_a_table_is_within_half_a_step_of_its_row() -> None:
    uneven = VALUES["table"] * np.geomspace(1e-6, 1e3, 1000, dtype=np.float32)[:, None]
    uneven[7] = 0
    body = "[e] y = Gather(table, i) [f] z = Gather(table, j)"
    proto = model(body, "int64[N] i, int64 j", "float[N, 64] y, float[64] z", table=uneven)
    result = quantized(proto)
    fed = {"i": np.arange(1000), "j": np.array(-3)}
    found = run(result.model, fed)
    step = np.maximum(uneven.max(1) / 127, uneven.min(1) / -128)[:, None]
    assert (np.abs(found["y"] - uneven) <= 0.501 * step).all()
    np.testing.assert_array_equal(found["z"], found["y"][-3])
    assert sum(t.name.startswith("table") for t in result.model.graph.initializer) == 2  # once for both readers


def test_a_convolution_in_integers_is_smaller_and_as_near() -> None:
    proto = model("[a] y = Conv(x, c)", "float[1, 64, 9, 9] x", "float[1, 40, 7, 7] y")
    whole = quantized(proto)
    assert not whole.plan.entries
    small = quantized(proto, precision="w8a16", op_types_to_quantize=["Conv"])
    assert small.report.sizes.quantized_bytes < 0.35 * whole.report.sizes.quantized_bytes
    assert quality(proto, small) > 40
    assert small.report.weight_only == ("a",)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_float16_around_weights_in_integers(precision: str) -> None:
    body = "[e] e = Gather(table, i) [a] t = MatMul(e, w) [b] t2 = Add(t, b) [r] r = Relu(t2) [c] y = MatMul(r, v)"
    proto = model(body, "int64[N, T] i", "float[N, T, 64] y")
    result = quantized(proto, precision=precision, float16=True)
    assert kernels(result.model)["MatMulNBits"] == 2
    types = {t.name: t.data_type for t in result.model.graph.initializer}
    assert {types[name] for name in ("table_scale", "w_scale", "v_scale", "b")} == {onnx.TensorProto.FLOAT16}
    assert onnx.TensorProto.FLOAT not in types.values()
    assert [value.type.tensor_type.elem_type for value in result.model.graph.output] == [onnx.TensorProto.FLOAT]
    assert quality(proto, result) > LEAST[precision] - 6


def test_a_model_in_float16_needs_no_conversion() -> None:
    proto = model("[a] y = MatMul(x, w)", "float16[N, 64] x", "float16[N, 64] y", w=VALUES["w"].astype(np.float16))
    result = quantized(proto)
    assert kernels(result.model)["MatMulNBits"] == 1
    assert quality(proto, result) > LEAST["w4a16"]


class TestData:
    def test_without_data_the_report_says_what_was_left_out(self) -> None:
        report = quantized(model(FORMS["bias"])).report
        assert report.verification is None
        assert report.samples == 0
        assert list(report.notes[:2]) == [
            "not compared with the float model: that needs data; it was checked and loaded",
            "biases were not corrected: that needs data",
        ]

    def test_with_data_the_result_is_compared(self) -> None:
        proto = model(FORMS["bias"])
        report = quantized(proto, feeds(proto)).report
        assert report.verification is not None
        assert report.samples == 32
        assert min(report.verification.fused["y"], report.verification.emulated["y"]) > LEAST["w4a16"]
        assert not any("data" in note for note in report.notes)

    def test_a_gate_needs_data_and_holds(self) -> None:
        proto = model(FORMS["bias"])
        with pytest.raises(DataError, match="--min-sqnr compares on data"):
            quantized(proto, min_sqnr=10.0)
        with pytest.raises(GateError, match=r"is below --min-sqnr 60 dB"):
            quantized(proto, feeds(proto), min_sqnr=60.0)

    def test_statistics_are_refused_where_nothing_was_to_be_observed(self) -> None:
        proto = model(FORMS["bias"])
        with pytest.raises(RecipeError, match="precision w4a16 needs no range of an activation: leave statistics out"):
            qdqtool.calibrate(proto, feeds(proto), precision="w4a16", provider="cpu")
        made = qdqtool.calibrate(proto, feeds(proto), targets=["cpu"], provider="cpu")
        with pytest.raises(RecipeError, match="leave statistics out"):
            quantized(proto, statistics=made)

    def test_biases_are_corrected_where_that_helps(self) -> None:
        """Behind a Relu inputs have a mean, and rounding shifts the sums of weights: a bias makes up for it."""
        steps = [f"[a{i}] t{i} = Gemm(x{i}, w{i}, b) [r{i}] x{i + 1} = Relu(t{i})" for i in range(6)]
        deep = {f"w{i}": weights(64, 64, seed=i) * np.float32(1.4) for i in range(6)}
        proto = model(" ".join(steps), "float[N, 64] x0", "float[N, 64] x6", **deep)
        fed = {"x0": np.abs(normal(64, 64))}
        found = []
        for corrected in (True, False):
            result = quantized(proto, fed, precision="w2a16", bias_correction=corrected)
            found.append(sqnr(run(proto, fed)["x6"], run(result.model, fed)["x6"]))
        assert found[0] > found[1] + 1

    def test_biases_are_left_where_that_harms(self, monkeypatch: pytest.MonkeyPatch) -> None:
        proto = model(FORMS["bias"])
        monkeypatch.setattr("qdqtool.passes.correct_bias.shrunk", lambda found: found.mean(0) + 1)
        result = quantized(proto, feeds(proto))
        assert (
            "biases were not corrected: on the calibration samples the outputs are nearer without"
            in result.report.notes
        )
        (bias,) = [onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer if list(t.dims) == [64]]
        np.testing.assert_array_equal(bias, VALUES["b"])


def test_a_weight_that_is_not_finite_stays_float() -> None:
    bad = VALUES["w"].copy()
    bad[3, 3] = np.inf
    result = quantized(model("[a] t = MatMul(x, w) [c] y = MatMul(t, v)", w=bad))
    assert [str(key) for key in result.plan.entries] == ["::c::1"]
    assert {skip.node: skip.reason for skip in result.report.skipped} == {
        "a": "its weight 'w' holds NaN or infinite values"
    }
    assert result.report.layers == {"c": "MatMul"}


def test_the_same_model_gives_the_same_bytes_and_the_recipe_comes_back() -> None:
    proto = model(FORMS["bias and relu"])
    first = quantized(proto, block_size=64, weight_symmetric=False)
    assert first.model.SerializeToString(deterministic=True) == quantized(
        proto, block_size=64, weight_symmetric=False
    ).model.SerializeToString(deterministic=True)
    stored = json.loads(models.metadata(first.model)[pipeline.RECIPE_KEY])
    assert pipeline.make_recipe(stored, {}) == first.recipe


def test_codes_are_made_with_the_scales_that_are_stored() -> None:
    for half in (False, True):
        result = quantized(model("[a] y = MatMul(x, w)"), precision="w8a16", float16=half)
        stored = {t.name: onnx.numpy_helper.to_array(t) for t in result.model.graph.initializer}
        back = stored["w_quantized"].astype(np.float32) * np.repeat(stored["w_scale"].astype(np.float32), 32, 0)
        error = np.abs(back - VALUES["w"])
        assert (error <= 0.502 * np.repeat(stored["w_scale"], 32, 0) + 1e-4 * half).all()


def test_the_float_model_is_let_go_of_where_there_are_no_data() -> None:
    seen = {}

    def look(step: Any, state: Any, _: object) -> None:
        if step.name == "insert-qdq":
            seen["floats"] = sum(t.dtype == np.float32 and len(t.shape) == 2 for t in state.graph.tensors().values())
            seen["original"] = len(state.original.graph.initializer)

    proto = model("[a] y = MatMul(x, w)")
    qdqtool.quantize(proto, precision="w4a16", target="cpu", provider="cpu", callback=look)
    assert seen["original"] == 0
    assert len(proto.graph.initializer) == 1  # the caller's own stays as it is


def test_refining_may_store_codes_of_its_own() -> None:
    """A step between scales and insertion that chooses codes itself is heard."""
    proto = model("[a] y = MatMul(x, w)")
    recipe = pipeline.make_recipe(None, {"target": "cpu", "precision": "w4a16"})
    state, facts = pipeline.load(proto, recipe, "cpu")
    steps = chains.quantization(recipe, data=False)
    PassManager([*chains.preparation(), *steps[:-2]]).run(state, facts)
    assert state.params is not None
    (key,) = state.params
    params: Any = state.params[key]
    chosen = qdqtool.spec.QuantizedWeight(np.ones_like(codes_of(VALUES["w"], params)), params)
    state.params = {key: chosen}
    steps[-2].run(state)
    assert state.quantized is not None
    found = models.to_proto(state.quantized, state.header)
    stored = {t.name: onnx.numpy_helper.to_array(t) for t in found.graph.initializer}
    assert (stored["w_quantized"].astype(np.int8) == 1).all()


@pytest.mark.parametrize("float16", [False, True])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_all_of_it_runs_on_cuda(cuda_stub: CudaStub, precision: str, float16: bool) -> None:
    body = """[e] e = Gather(table, i) [a] t = MatMul(e, w) [r] r = Relu(t) [b] u = MatMul(r, v) [c] u2 = Add(u, b)
        [p] p = ReduceMean <axes = [1], keepdims = 0> (u2) [g] g = Gemm <transB = 1> (p, wt, b) [s] y = Add(g, p)"""
    proto = model(body, "int64[N, T] i", "float[N, 64] y")
    result = quantized(proto, target="cuda", precision=precision, float16=float16)
    seen = cuda_stub(result.model)
    assert seen.operators["MatMulNBits"] == 3
    assert "DequantizeLinear" not in seen.operators
    assert seen.copies == ()


def test_convolutions_are_named_with_the_way_to_have_them() -> None:
    skipped = quantized(conv_chain(2)).report.skipped
    assert {skip.node for skip in skipped} >= {"c0", "c1"}
    assert all("name Conv in op_types_to_quantize" in skip.reason for skip in skipped if skip.node in ("c0", "c1"))

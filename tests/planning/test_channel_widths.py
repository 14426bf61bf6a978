"""Channels of unequal bits: what they save, how they are stored, and what cannot have them."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool.errors import RecipeError
from qdqtool.graphs.model import opset
from qdqtool.pipeline import Result
from qdqtool.recipe import Recipe
from tests.builders import (
    Array,
    constants,
    conv_chain,
    feeds,
    normal,
    ops,
    parse,
    quality,
    quantized,
    reasons,
    run,
    weight,
)
from tests.builders import sqnr as db

SPREAD = np.geomspace(0.02, 2, 16).astype(np.float32)
STORAGES = ("packed", "int8", "split")
BODY = """[a] a = Conv <pads = [1, 1, 1, 1]> (x, w, b) [r] r = Relu(a) [c] c = Conv <pads = [1, 1, 1, 1]> (r, v, b)
    [s] s = Relu(c) [e] y = Conv(s, u)"""


def model() -> onnx.ModelProto:
    """Convolutions whose output channels differ by a factor of 100, in no order."""
    spread = np.random.default_rng(0).permutation(SPREAD)
    values = {
        "w": weight(16, 8, 3, 3) * spread[:, None, None, None],
        "v": weight(16, 16, 3, 3, seed=1) * spread[::-1, None, None, None],
        "u": weight(8, 16, 1, 1, seed=2),
        "b": normal(16, scale=0.01),
    }
    return parse(BODY, "float[N, 8, 8, 8] x", "float[N, 8, 8, 8] y", values)


FED = feeds(model(), 32)


def allocated(which: str = "both", precision: str = "w4a4", **fields: Any) -> Result:
    given = {"target": "cpu", "first_last_8bit": False, "weight_rounding": "nearest", **fields}
    return quantized(model(), FED, precision=precision, bits_per_channel=which, **given)


def widths(result: Result, kind: str = "constant") -> dict[str, tuple[int, ...]]:
    return {t.tensor: t.channel_bits for t in result.report.tensors if t.kind == kind and t.channel_bits}


@pytest.mark.parametrize("allocation", ["mean_width", "published"])
@pytest.mark.parametrize("calibrator", ["minmax", "mse", "aciq"])
def test_bits_where_they_are_needed_beat_the_same_bits_everywhere(calibrator: str, allocation: str) -> None:
    fields: dict[str, Any] = {"calibrator": calibrator, "bias_correction": False}
    alike = allocated("off", activation_per_channel=True, **fields)
    shared = allocated(bit_allocation=allocation, **fields)
    gained = quality(model(), shared.model, FED)["y"] - quality(model(), alike.model, FED)["y"]
    assert gained > 2
    for found in (widths(shared), widths(shared, "activation")):
        assert found
        assert all(sum(each) == 4 * len(each) for each in found.values())
        assert all(0 <= min(each) < 4 < max(each) <= 8 for each in found.values() if len(each) == 16)


@pytest.mark.parametrize("which", ["weights", "activations", "both"])
@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_the_runtime_gives_what_is_written(target: str, which: str) -> None:
    result = allocated(which, target=target, calibrator="aciq")
    emulated, fused = (run(result.model, FED, optimize=optimize)["y"] for optimize in (False, True))
    assert db(emulated, fused) > 60


@pytest.mark.parametrize("allocation", ["mean_width", "published"])
def test_all_storages_load_and_give_the_same_outputs(allocation: str) -> None:
    results = {s: allocated("weights", "w4a8", storage=s, bit_allocation=allocation) for s in STORAGES}
    wanted = run(results["int8"].model, FED, optimize=False)["y"]
    for result in results.values():
        np.testing.assert_allclose(run(result.model, FED, optimize=False)["y"], wanted, rtol=0, atol=1e-6)
        assert db(wanted, run(result.model, FED)["y"]) > 25
        assert opset(result.model) <= 23
        assert widths(result) == widths(results["int8"])
    kernels = {storage: result.report.integer_kernels for storage, result in results.items()}
    assert kernels == {"packed": 2, "int8": 3, "split": 0}  # the last layer's channels are alike: four bits hold them
    assert "groups of channels at every run" in reasons(results["split"])["c"]
    sizes = {storage: result.report.sizes.parts for storage, result in results.items()}
    assert sizes["split"]["int4 constants"] > 0
    codes = {s: parts.get("int4 constants", 0) + parts["int8 constants"] for s, parts in sizes.items()}
    assert codes["split"] < codes["int8"]


def test_groups_are_put_back_in_order_only_where_they_are_out_of_it() -> None:
    values = {"w": SPREAD[:, None] * np.sign(normal(16, 32)) * (1 + np.abs(normal(1, 32))), "v": normal(8, 16)}
    for backwards, gathers in ((False, 0), (True, 1)):
        given = {**values, "w": values["w"][::-1]} if backwards else values
        body = "[a] a = Gemm <transB = 1> (x, w) [b] y = Gemm <transB = 1> (a, v)"
        proto = parse(body, "float[N, 32] x", "float[N, 8] y", given)
        fields = {"storage": "split", "bits_per_channel": "weights", "precision": "w4a8"}
        first = quantized(proto, nodes={"b": {"precision": "w8a8"}}, **fields)
        assert ops(first.model).count("Concat") == 1
        assert ops(first.model).count("Gather") == gathers
        assert quality(proto, first.model, feeds(proto))["y"] > 15


def test_a_weight_that_needs_no_wide_channel_is_packed_and_named() -> None:
    """Equal channels get equal bits: four, which the type of four bits holds."""
    one = weight(1, 8, 3, 3)
    values = {"w": np.concatenate([one] * 8), "b": normal(8)}
    proto = parse("[a] y = Conv <pads = [1, 1, 1, 1]> (x, w, b)", "float[N, 8, 8, 8] x", "float[N, 8, 8, 8] y", values)
    result = quantized(proto, precision="w4a8", bits_per_channel="weights")
    assert widths(result)["w"] == (4,) * 8
    assert constants(result.model)["w_quantized"].dtype.name == "int4"
    assert result.plan.kernels == {}
    assert "stored as int4" in reasons(result)["a"]


def test_codes_of_a_channel_lie_in_its_bits_and_no_kernel_sees_a_zero_point() -> None:
    result = allocated("weights", "w4a8", storage="int8")
    found = widths(result)
    stored = constants(result.model)
    for name, each in found.items():
        codes: Array = stored[f"{name}_quantized"]
        assert not stored[f"{name}_zero_point"].any()
        for bits, channel in zip(each, codes.reshape(len(codes), -1), strict=True):
            assert int(channel.max()) - int(channel.min()) < 1 << bits


@pytest.mark.parametrize("rounding", ["nearest", "stochastic", "gptq"])
def test_every_way_of_rounding_keeps_the_bits_of_a_channel(rounding: str) -> None:
    result = allocated("weights", "w4a8", storage="int8", weight_rounding=rounding)
    for name, each in widths(result).items():
        codes = constants(result.model)[f"{name}_quantized"]
        spans = np.ptp(codes.reshape(len(codes), -1).astype(np.int64), axis=1)
        assert (spans < 1 << np.array(each)).all()


def test_dead_channels_cost_nothing_and_stay_zero() -> None:
    proto = model()
    for tensor in proto.graph.initializer:
        if tensor.name in ("w", "b"):
            array = onnx.numpy_helper.to_array(tensor).copy()
            array[3:6] = 0
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for allocation in ("mean_width", "published"):
        result = quantized(
            proto, FED, precision="w4a4", bits_per_channel="both", bit_allocation=allocation, first_last_8bit=False
        )
        for found in (widths(result)["w"], widths(result, "activation")["r"]):
            assert found[3:6] == (0, 0, 0)
            assert sum(found) == 64


def test_reduced_range_leaves_room_for_sums_of_sixteen_bits() -> None:
    result = allocated("weights", "w4a8", storage="int8", reduce_range=True)
    for name in widths(result):
        assert np.abs(constants(result.model)[f"{name}_quantized"].astype(np.int64)).max() <= 63


def test_the_report_says_what_is_emulated_and_which_bits_each_channel_has() -> None:
    result = allocated()
    assert any("an emulation in float that no kernel fuses" in note for note in result.report.notes)
    tensor = next(t for t in result.report.tensors if t.tensor == "w")
    assert tensor.bits == 4
    assert tensor.codes.endswith(f"4 bits on average ({min(tensor.channel_bits)} to {max(tensor.channel_bits)})")
    assert '"channel_bits"' in result.report.to_json()


def test_what_keeps_equal_bits_is_named() -> None:
    result = allocated(tensors={"v": {"dtype": "int4"}, "r": {"range": [0.0, 2.0]}})
    said = [skip.reason for skip in result.report.skipped if skip.pass_name == "choose-ranges"]
    assert "weights: the type is the user's, so every channel has the same bits" in said
    assert "activations: the range is the user's, so every channel has the same bits" in said


def test_the_same_recipe_gives_the_same_file() -> None:
    first, second = (allocated(calibrator="aciq", storage="split") for _ in range(2))
    assert first.model.SerializeToString() == second.model.SerializeToString()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"bits_per_channel": "both"}, "weights and activations have 8 bits with w8a8"),
        ({"bits_per_channel": "activations", "precision": "w4a8"}, "activations have 8 bits with w4a8"),
        ({"bits_per_channel": "weights", "precision": "w4a8", "per_channel": False}, "one scale without per_channel"),
        ({"storage": "split", "precision": "w4a8"}, "for channels of unequal bits"),
        ({"storage": "split", "precision": "w4a4", "bits_per_channel": "activations"}, "for weights of unequal bits"),
        ({"bit_allocation": "published", "precision": "w4a8"}, "give bits_per_channel too"),
        ({"bits_per_channel": "weights", "precision": "w4a16"}, "bits_per_channel has no use with precision w4a16"),
    ],
)
def test_what_leaves_nothing_to_share_out_is_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        Recipe.of({"target": "cpu", **fields})


def test_a_chain_without_spread_loses_nothing() -> None:
    proto = conv_chain(3)
    alike = quantized(proto, precision="w4a8", weight_rounding="nearest")
    shared = quantized(proto, precision="w4a8", weight_rounding="nearest", bits_per_channel="weights")
    assert quality(proto, shared.model, feeds(proto))["r2"] > quality(proto, alike.model, feeds(proto))["r2"] - 0.5

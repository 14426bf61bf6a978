"""Rounding of weights: the same scales whatever the method, less error of outputs, none in the mean by chance."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool import pipeline
from qdqtool.arithmetic.second_moments import columns
from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.linear import LinearLayer
from qdqtool.passes import RoundWeights
from qdqtool.passes_api import State
from qdqtool.planning.plan import Use
from qdqtool.spec import QuantizedWeight
from tests.builders import Array, Arrays, constants, conv_chain, normal, parse, quantized, reasons, run, sqnr, weight

NETWORK = """
    [a] a = Conv <pads = [1, 1, 1, 1]> (x, wa, b) [ar] ar = Relu(a)
    [d] d = Conv <pads = [1, 1, 1, 1], group = 16> (ar, wd, b) [dr] dr = Relu(d)
    [g] g = Conv <strides = [2, 2], dilations = [2, 2], group = 4> (dr, wg, b) [gr] gr = Relu(g)
    [p] p = GlobalAveragePool(gr) [f] f = Flatten(p) [l] l = Gemm <transB = 1> (f, wl, b) [lr] lr = Relu(l)
    [m] y = MatMul(lr, wm)
"""
WEIGHTS = {
    "wa": weight(16, 3, 3, 3),
    "wd": weight(16, 1, 3, 3, seed=1),
    "wg": weight(16, 4, 3, 3, seed=2),
    "wl": weight(16, 16, seed=3),
    "wm": weight(16, 10, seed=4, inputs=16),
    "b": normal(16, scale=0.1),
}
LAYERS = ("a", "d", "g", "l", "m")


def network() -> onnx.ModelProto:
    return parse(NETWORK, "float[N, 3, 16, 16] x", "float[N, 10] y", WEIGHTS)


def images(count: int, seed: int) -> Arrays:
    """Smooth images of a few colours, whose neighbouring values are alike as those of photographs are."""
    rng = np.random.default_rng(seed)
    coarse = rng.standard_normal((count, 3, 4, 4)) + rng.standard_normal((count, 1, 4, 4))
    smooth = np.kron(coarse, np.ones((1, 1, 4, 4)))
    return {"x": (smooth + 0.1 * rng.standard_normal(smooth.shape)).astype(np.float32)}


def chosen(proto: onnx.ModelProto, fed: Arrays, **fields: Any) -> State:
    """The state behind a run with weights in 4 bits."""
    found: list[State] = []
    recipe = {"precision": "w4a8", "target": "cpu", "bias_correction": False, **fields}
    pipeline.quantize(
        proto, fed, recipe=recipe, provider="cpu", cache=False, callback=lambda step, state, _: found.append(state)
    )
    return found[-1]


def weights(state: State) -> dict[str, QuantizedWeight]:
    assert state.params is not None
    found = {key.node: value for key, value in state.params.items() if isinstance(key, Use) and key.index == 1}
    return {name: value for name, value in found.items() if isinstance(value, QuantizedWeight)}


def inputs_of(state: State, fed: Arrays) -> Arrays:
    """What each layer of the float model reads, by layer."""
    assert state.original is not None
    layers = {node.name: node.inputs[0].name for node in state.graph.nodes if node.name in weights(state)}
    proto = models.to_proto(state.graph, state.header)
    del proto.graph.output[:]
    names = [name for name in dict.fromkeys(layers.values()) if name not in fed]
    proto.graph.output.extend(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names)
    known = {**fed, **run(proto, fed)}
    return {layer: known[name] for layer, name in layers.items()}


def output_db(state: State, name: str, quantized_weight: QuantizedWeight, given: Array) -> float:
    """SQNR of a layer's output where its weight alone is quantized."""
    node = next(node for node in state.graph.nodes if node.name == name)
    layer = LinearLayer(node)
    values, shape = graphs.constant(layer.weight), layer.weight.shape
    assert values is not None
    axis = layer.weight_axis
    assert axis is not None
    scale = quantized_weight.params.scale.reshape([-1 if i == axis else 1 for i in range(len(shape))])
    rounded = quantized_weight.codes * scale
    seen = columns(layer, given)
    exact, approximate = (
        np.moveaxis(w.astype(np.float64), axis, 0).reshape(seen.shape[0], -1, seen.shape[1]) @ seen
        for w in (values, rounded)
    )
    return sqnr(exact, approximate)


def gains(near: State, best: State, fed: Arrays) -> dict[str, float]:
    """By how many dB each layer's output errs less, with the inputs of the float model."""
    given = inputs_of(best, fed)
    return {
        name: output_db(best, name, weights(best)[name], given[name])
        - output_db(near, name, weights(near)[name], given[name])
        for name in given
    }


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_outputs_err_less_than_by_nearest_on_samples_not_seen(method: str) -> None:
    proto, held_out = network(), images(64, seed=7)
    near, best = (chosen(proto, images(64, seed=1), weight_rounding=each) for each in ("nearest", method))
    found = gains(near, best, held_out)
    assert min(found.values()) > -0.05, found
    assert max(found.values()) > 2
    results = [run(models.to_proto(s.quantized, s.header), held_out)["y"] for s in (near, best) if s.quantized]
    reference = run(proto, held_out)["y"]
    assert sqnr(reference, results[1]) > sqnr(reference, results[0]) + 0.5


@pytest.mark.zoo
@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_layers_of_a_real_network_err_less_than_by_nearest(zoo: Any, method: str) -> None:
    case = zoo.load("resnet8_cifar10")
    seen = {name: values[:64] for name, values in case.calibration.items()}
    held_out = {name: values[:100] for name, values in case.evaluation.items()}
    near, best = (chosen(onnx.load(case.model), seen, weight_rounding=each) for each in ("nearest", method))
    found = gains(near, best, held_out)
    assert len(found) > 5
    assert min(found.values()) > -0.05, found
    assert np.mean(list(found.values())) > 1


def test_few_samples_do_no_harm() -> None:
    """As many samples as a Gemm has inputs, or fewer, tell hardly anything of their correlations."""
    proto, held_out = network(), images(64, seed=7)
    for count in (1, 4, 16):
        near, best = (chosen(proto, images(count, seed=1), weight_rounding=method) for method in ("nearest", "gptq"))
        found = gains(near, best, held_out)
        assert min(found.values()) > -0.5, (count, found)


@pytest.mark.parametrize("storage", ["packed", "int8"])
@pytest.mark.parametrize(("precision", "least", "greatest"), [("w4a8", -7, 7), ("w2a8", -2, 1)])
def test_codes_stay_inside_their_bits_and_scales_stay(precision: str, least: int, greatest: int, storage: str) -> None:
    found = []
    for method in ("nearest", "stochastic", "gptq", "adaround"):
        recipe: dict[str, Any] = {
            "precision": precision,
            "storage": storage,
            "weight_rounding": method,
            "bias_correction": False,
        }
        stored = constants(quantized(network(), images(16, seed=1), **recipe).model)
        every = {name: value.astype(np.int64) for name, value in stored.items() if name.endswith("_quantized")}
        weights_alone = {name: every[f"{name}_quantized"] for name in ("wa", "wd", "wg", "wl", "wm")}
        assert min(value.min() for value in weights_alone.values()) >= least
        assert max(value.max() for value in weights_alone.values()) <= greatest
        found.append((weights_alone, {name: stored[f"{name}_scale"] for name in weights_alone}))
    for codes, scales in found[1:]:
        for name in scales:
            np.testing.assert_array_equal(found[0][1][name], scales[name])
        assert any((found[0][0][name] != codes[name]).any() for name in codes)


def test_storage_changes_the_container_alone() -> None:
    fed = images(16, seed=1)
    packed, wide = (quantized(network(), fed, precision="w4a8", storage=storage) for storage in ("packed", "int8"))
    for name in ("wa", "wd", "wg", "wl", "wm"):
        codes = [constants(one.model)[f"{name}_quantized"].astype(np.int64) for one in (packed, wide)]
        np.testing.assert_array_equal(codes[0], codes[1])
    assert wide.report.integer_kernels > packed.report.integer_kernels
    assert packed.report.sizes.quantized_bytes < wide.report.sizes.quantized_bytes
    one, other = (run(result.model, fed, optimize=False)["y"] for result in (packed, wide))
    np.testing.assert_allclose(one, other, atol=1e-5)


def test_stochastic_rounding_repeats_with_its_seed_and_errs_by_nothing_in_the_mean() -> None:
    proto, fed = network(), images(8, seed=1)
    codes = [
        np.concatenate([value.codes.reshape(-1) for value in weights(state).values()])
        for state in (chosen(proto, fed, weight_rounding="stochastic", seed=seed) for seed in (0, 0, *range(1, 16)))
    ]
    np.testing.assert_array_equal(codes[0], codes[1])
    assert (codes[0] != codes[2]).any()
    state = chosen(proto, fed, weight_rounding="nearest")
    exact = []
    for name, value in weights(state).items():
        node = next(node for node in state.graph.nodes if node.name == name)
        floats, axis = node.inputs[1].values, value.params.spec.granularity.axis
        shape = [-1 if i == axis else 1 for i in range(floats.ndim)]
        exact.append((floats / value.params.scale.reshape(shape)).reshape(-1))
    errors = np.mean(codes[1:], axis=0) - np.concatenate(exact)
    assert np.abs(errors).max() < 0.6  # one draw errs by up to 1
    assert abs(errors.mean()) < 4 * 0.5 / math.sqrt(errors.size * 16)


def test_a_weight_that_two_layers_share_has_the_codes_for_both() -> None:
    body = "[a] a = Conv <pads = [1, 1]> (x, w, b) [r] r = Relu(a) [c] y = Conv <pads = [1, 1]> (r, w, b)"
    proto = parse(body, "float[N, 8, 32] x", "float[N, 8, 32] y", {"w": weight(8, 8, 3), "b": np.zeros(8, np.float32)})
    fed = {"x": normal(32, 8, 32)}
    found = weights(chosen(proto, fed))
    np.testing.assert_array_equal(found["a"].params.scale, found["c"].params.scale)
    np.testing.assert_array_equal(found["a"].codes, found["c"].codes)
    assert sqnr(run(proto, fed)["y"], run(quantized(proto, fed, precision="w4a8").model, fed)["y"]) > 12


def test_samples_with_nan_are_left_out() -> None:
    fed = images(16, seed=1)
    spoilt = {"x": np.concatenate([fed["x"], np.full((1, 3, 16, 16), np.nan, np.float32)])}
    clean, other = (chosen(network(), each, tensors={"x": {"range": [-3.0, 3.0]}}) for each in (fed, spoilt))
    np.testing.assert_array_equal(weights(clean)["a"].codes, weights(other)["a"].codes)


def test_what_is_not_rounded_anew_has_a_reason() -> None:
    body = "[t] t = ConvTranspose(x, w) [r] y = Relu(t)"
    proto = parse(body, "float[N, 4, 8] x", "float[N, 4, 10] y", {"w": weight(4, 4, 3)})
    found = reasons(quantized(proto, {"x": normal(8, 4, 8)}, precision="w4a8", target="cuda"))
    assert "which has no columns to take moments of: rounded to nearest" in found["t"]


def test_weights_of_eight_bits_are_rounded_where_that_is_asked_for() -> None:
    names = {"weight_rounding": "gptq", "precision": "w8a8"}
    proto, fed = network(), images(32, seed=1)
    near, best = chosen(proto, fed, precision="w8a8"), chosen(proto, fed, **names)
    assert any((weights(near)[name].codes != weights(best)[name].codes).any() for name in LAYERS)


def test_twice_is_as_once() -> None:
    state = chosen(conv_chain(2), {"x": normal(8, 8, 8, 8)})
    first = weights(state)
    assert RoundWeights().run(state) == 2
    for name, value in weights(state).items():
        np.testing.assert_array_equal(value.codes, first[name].codes)

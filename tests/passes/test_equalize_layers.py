"""Consecutive layers are balanced by factors that leave the model's outputs as they are."""

from __future__ import annotations

from typing import Any, cast

import numpy as np
import pytest

from qdqtool.passes.equalize_layers import EqualizeLayers
from qdqtool.passes.infer_shapes import InferShapes
from tests.builders import constants, normal, parse, quality, quantized, run, weight

PASSES = (InferShapes(), EqualizeLayers())
SPREAD = np.array([4.0, 0.25, 1.0, 2.0, 0.5, 1.0, 3.0, 0.3], np.float32)


def source(body: str, *, shape: str = "[N, 3, 6, 6]", outputs: str = "y", opset: int = 17) -> str:
    given = ", ".join(f"float{'[N, 8, 4, 4]' if name in ('c1', 'h') else ''} {name}" for name in outputs.split())
    return f'<ir_version: 8, opset_import: ["" : {opset}]> g (float{shape} x) => ({given}) {{ {body} }}'


def values() -> dict[str, Any]:
    """A first layer w, b of 8 badly scaled output channels, and second layers v."""
    return {
        "w": normal(8, 3, 3, 3) * SPREAD[:, None, None, None],
        "b": normal(8) * SPREAD,
        "v": normal(5, 8, 3, 3),
        "vg": normal(6, 4, 3, 3),
        "vd": normal(8, 1, 3, 3),
        "vt": normal(8, 5, 2, 2),
        "vf": normal(8, 5),
        "vn": normal(5, 8),
        "slope": np.linspace(0.1, 0.8, 8, dtype=np.float32).reshape(8, 1, 1),
        "one": np.array([1], np.int64),
        "c": normal(8, 1, 1),
    }


def balance(proto: Any, first: str, second: str, axis: int = 1) -> Any:
    """Ratio of the largest magnitudes in output channels of ``first`` and input channels of ``second``."""
    w, v = (constants(proto)[name] for name in (first, second))
    return np.abs(w).reshape(len(w), -1).max(1) / np.abs(np.moveaxis(v, axis, 0)).reshape(v.shape[axis], -1).max(1)


@pytest.mark.parametrize(
    "between",
    [
        "h = Relu(c1)",
        "h = LeakyRelu <alpha = 0.2> (c1)",
        "h = PRelu(c1, slope)",
        "r = Relu(c1) h = MaxPool <kernel_shape = [2, 2]> (r)",
        "r = AveragePool <kernel_shape = [2, 2], pads = [1, 1, 0, 0]> (c1) h = Relu(r)",
        "h = Identity(c1)",
        "h = Mul(c1, c)",
    ],
)
def test_operators_between(passes: Any, between: str) -> None:
    body = f"[first] c1 = Conv(x, w, b) {between} [second] y = Conv(h, v)"
    proto, state = passes(source(body), *PASSES, weights=values())
    np.testing.assert_allclose(balance(proto, "w", "v"), 1, rtol=1e-2)
    assert set(passes.reasons(state)) == {"second"}


@pytest.mark.parametrize(
    ("second", "name"),
    [
        ("Conv <group = 2> (h, vg)", "vg"),
        ("Conv <group = 8, pads = [1, 1, 1, 1]> (h, vd)", "vd"),
        ("ConvTranspose(h, vt)", "vt"),
    ],
)
def test_convolutions_as_second_layer(passes: Any, second: str, name: str) -> None:
    body = f"[first] c1 = Conv(x, w, b) h = Relu(c1) [second] y = {second}"
    before = values()
    proto, _ = passes(source(body), *PASSES, weights=before)
    assert not np.allclose(constants(proto)[name], before[name])
    largest = np.abs(constants(proto)["w"]).reshape(8, -1).max(1)
    assert largest.max() / largest.min() < SPREAD.max() / SPREAD.min() / 2


def test_the_way_to_a_product_behind_global_pooling(passes: Any) -> None:
    body = """[first] c1 = Conv(x, w, b) r = Relu(c1) p = GlobalAveragePool(r) h = Flatten(p)
        [second] y = Gemm <transB = 1> (h, vn)"""
    proto, _ = passes(source(body), *PASSES, weights=values())
    np.testing.assert_allclose(balance(proto, "w", "vn"), 1, rtol=1e-2)


@pytest.mark.parametrize("reduce", ["ReduceMean <axes = [2, 3], keepdims = 0> (r)", "Squeeze(r, s)"])
def test_axes_that_go(passes: Any, reduce: str) -> None:
    body = f"[first] c1 = Conv(x, w, b) r = Relu(c1) h = {reduce} [second] y = MatMul(h, vf)"
    shape = "[N, 3, 3, 3]"
    weights = values() | {"s": np.array([2, 3], np.int64)}
    proto, _ = passes(source(body, shape=shape), *PASSES, weights=weights)
    np.testing.assert_allclose(balance(proto, "w", "vf", 0), 1, rtol=1e-2)


def test_a_transpose_takes_the_channels_along(passes: Any) -> None:
    body = """[first] c1 = Conv(x, w, b) r = Relu(c1) h = Transpose <perm = [0, 2, 3, 1]> (r)
        [second] y = MatMul(h, vf)"""
    proto, _ = passes(source(body), *PASSES, weights=values())
    np.testing.assert_allclose(balance(proto, "w", "vf", 0), 1, rtol=1e-2)


def test_a_matmul_with_the_bias_behind_it(passes: Any) -> None:
    weights = {"w": normal(4, 8) * SPREAD, "b": normal(8) * SPREAD, "v": normal(8, 5)}
    body = "[first] p = MatMul(x, w) [add] c1 = Add(p, b) h = Relu(c1) [second] y = MatMul(h, v)"
    proto, _ = passes(source(body, shape="[N, 7, 4]"), *PASSES, weights=weights)
    after = constants(proto)
    np.testing.assert_allclose(np.abs(after["w"]).max(0), np.abs(after["v"]).max(1), rtol=1e-2)
    np.testing.assert_allclose(after["b"] / weights["b"], after["w"][0] / weights["w"][0], rtol=1e-5)


@pytest.mark.parametrize("attributes", ["", "<alpha = 0.5, beta = 3.0>"])
def test_gemm_and_its_factors(passes: Any, attributes: str) -> None:
    weights = {"w": normal(4, 8) * SPREAD, "b": normal(8) * SPREAD, "v": normal(8, 5)}
    body = f"[first] p = Gemm {attributes} (x, w, b) h = Relu(p) [second] y = Gemm {attributes} (h, v)"
    proto, _ = passes(source(body, shape="[N, 4]"), *PASSES, weights=weights)
    assert not np.allclose(constants(proto)["v"], weights["v"])


def test_a_chain_is_balanced_as_a_whole_and_stays_so(passes: Any) -> None:
    orders = [np.random.default_rng(i).permutation(8) for i in range(4)]
    weights = {
        f"w{i}": weight(8, 8 if i else 3, 3, 3, seed=i) * SPREAD[order, None, None, None]
        for i, order in enumerate(orders)
    }
    layers = [f"[l{i}] c{i} = Conv(h{i}, w{i}) h{i + 1} = Relu(c{i})" for i in range(4)]
    body = "h0 = Identity(x) " + " ".join(layers) + " y = Identity(h4)"
    proto, _ = passes(source(body, shape="[N, 3, 12, 12]"), *PASSES, weights=weights)
    for i in range(3):
        np.testing.assert_allclose(balance(proto, f"w{i}", f"w{i + 1}"), 1, rtol=0.05)
    again, _ = passes(proto, *PASSES)
    for name in weights:
        np.testing.assert_allclose(constants(again)[name], constants(proto)[name], rtol=0.05)


def test_several_readers_all_take_the_factors(passes: Any) -> None:
    body = """[first] c1 = Conv(x, w, b) h = Relu(c1) [second] y = Conv(h, v)
        [third] z = Conv <group = 2> (h, vg)"""
    before = values()
    proto, _ = passes(source(body, outputs="y z"), *PASSES, weights=before)
    after = constants(proto)
    assert not np.allclose(after["v"], before["v"])
    assert not np.allclose(after["vg"], before["vg"])


def test_channels_of_zeros(passes: Any) -> None:
    weights = values()
    weights["w"][2] = 0
    weights["v"][:, 5] = 0
    weights["w"][7], weights["v"][:, 7] = 0, 0
    body = "[first] c1 = Conv(x, w, b) h = Relu(c1) [second] y = Conv(h, v)"
    proto, _ = passes(source(body), *PASSES, weights=weights)
    for channel in (2, 5, 7):
        np.testing.assert_array_equal(constants(proto)["w"][channel], weights["w"][channel])
        np.testing.assert_array_equal(constants(proto)["v"][:, channel], weights["v"][:, channel])


def test_factors_have_a_limit_so_that_biases_do_not_take_the_range(passes: Any) -> None:
    weights = values()
    weights["w"][3] *= 1e-6
    body = "[first] c1 = Conv(x, w, b) h = Relu(c1) [second] y = Conv(h, v)"
    proto, _ = passes(source(body), *PASSES, weights=weights)
    assert constants(proto)["b"][3] / weights["b"][3] == pytest.approx(8)


BOUNDS = "the bounds of Clip would differ from channel to channel"
GIVEN = "its result, or what is made of it, is a graph output"


@pytest.mark.parametrize(
    ("between", "outputs", "reason"),
    [
        ("lo = Constant <value_float = 0.0> () hi = Constant <value_float = 6.0> () h = Clip(c1, lo, hi)", "y", BOUNDS),
        ("h = Relu(c1)", "y h", GIVEN),
        ("h = Relu(c1)", "y c1", GIVEN),
        ("h = Sigmoid(c1)", "y", "Sigmoid does not commute with a factor for each channel"),
        ("h = Add(c1, c1)", "y", "Add does not commute with a factor for each channel"),
        ("h = Mul(c1, c1)", "y", "Mul reads it twice"),
        ("h = Reshape(c1, spread)", "y", "Reshape does not keep its channels apart, or together"),
    ],
)  # fmt: skip
def test_left_alone(passes: Any, between: str, outputs: str, reason: str) -> None:
    weights = values() | {"spread": np.array([0, 4, 8, 4], np.int64), "v4": normal(5, 4, 3, 3)}
    name = "v4" if "Reshape" in between else "v"
    body = f"[first] c1 = Conv(x, w, b) {between} [second] y = Conv(h, {name})"
    proto, state = passes(source(body, outputs=outputs), *PASSES, weights=weights)
    assert passes.reasons(state)["first"] == reason
    np.testing.assert_array_equal(constants(proto)["w"], weights["w"])


def test_shared_weights_are_left_alone(passes: Any) -> None:
    weights = values() | {"s": normal(8, 8, 3, 3)}
    body = """[first] c1 = Conv(x, w, b) h = Relu(c1) [second] c2 = Conv(h, s) g = Relu(c2) [third] c3 = Conv(g, s)
        [fourth] y = Conv(c3, v)"""
    proto, state = passes(source(body, shape="[N, 3, 12, 12]"), *PASSES, weights=weights)
    found = passes.reasons(state)
    assert found["first"] == "a Conv that reads it shares its weight with another node"
    assert found["second"] == found["third"] == "it shares its weight or bias with another node"
    for name in weights:
        if name in constants(proto):
            np.testing.assert_array_equal(constants(proto)[name], weights[name])


def test_a_control_flow_body_that_reads_it(passes: Any) -> None:
    body = """[first] c1 = Conv(x, w, b) h = Relu(c1) [second] z = Conv(h, v) yes = Constant <value_int = 1> ()
        flag = Cast <to = 9> (yes) [if] y = If(flag) <
            then_branch = t () => (float[N, 8, 4, 4] a) { a = Neg(h) },
            else_branch = e () => (float[N, 8, 4, 4] d) { d = Abs(h) } >"""
    _, state = passes(source(body, outputs="y z"), *PASSES, weights=values())
    assert passes.reasons(state)["first"] == "a control-flow body reads it"


def test_what_is_known_of_a_batchnorm_is_scaled_alike(passes: Any) -> None:
    body = "[first] c1 = Conv(x, w, b) h = Relu(c1) [second] y = Conv(h, v)"
    before = values()
    state = passes.state(passes.parse(source(body), **before))
    state.batchnorms["c1"] = (np.arange(8.0), np.ones(8))
    for step in PASSES:
        step.run(state)
    factors = state.graph.tensors()["b"].values / before["b"]
    beta, gamma = cast(Any, state.batchnorms["c1"])
    np.testing.assert_allclose(beta, np.arange(8.0) * factors, rtol=1e-5)
    np.testing.assert_allclose(gamma, factors, rtol=1e-5)


def badly_scaled() -> tuple[Any, dict[str, Any]]:
    """Three convolutions whose weights' output channels differ by up to 50, undone by the next one's inputs."""
    rng = np.random.default_rng(3)
    spread = np.exp(rng.uniform(-2, 2, (2, 16))).astype(np.float32)
    constants = {
        "w0": weight(16, 3, 3, 3, seed=0) * spread[0][:, None, None, None],
        "w1": weight(16, 16, 3, 3, seed=1) * (spread[1][:, None] / spread[0])[:, :, None, None],
        "w2": weight(8, 16, 3, 3, seed=2) / spread[1][:, None, None],
    }
    body = "a = Conv(x, w0) b = Relu(a) c = Conv(b, w1) d = Relu(c) y = Conv(d, w2)"
    return parse(body, "float[N, 3, 12, 12] x", "float[N, 8, 6, 6] y", constants), {"x": normal(16, 3, 12, 12, seed=5)}


def test_per_tensor_weights_gain_by_default() -> None:
    proto, fed = badly_scaled()
    plain = quantized(proto, fed, per_channel=False, equalization=False).model
    balanced = quantized(proto, fed, per_channel=False).model
    assert quality(proto, balanced, fed)["y"] > quality(proto, plain, fed)["y"] + 6


def test_per_channel_weights_are_equalized_on_request() -> None:
    proto, fed = badly_scaled()
    plain, balanced = (quantized(proto, fed, equalization=on).model for on in (None, True))
    assert quality(proto, balanced, fed)["y"] > quality(proto, plain, fed)["y"] + 3
    assert run(proto, fed)["y"].shape == run(balanced, fed)["y"].shape

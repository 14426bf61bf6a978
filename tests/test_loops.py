"""Loop and Scan: their bodies are observed over all iterations, and quantized as any graph."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qdqtool.observation.observe import with_outputs
from tests.builders import Array, Arrays, normal, parse, run
from tests.test_control_flow import in_bodies, made, reasons, sqnr

CONSTANTS: dict[str, Array] = {
    "w": normal(8, 8, scale=0.35),
    "v": normal(16, 8, scale=0.25),
    "b": normal(8, scale=0.1),
}
LOOP = """
    yes = Constant <value = bool {1}> ()
    y, all = Loop (count, yes, x) <
        body = step (int64 i, bool go, float[N, 8] s) => (bool more, float[N, 8] next, float[N, 8] out) {
            more = Identity(go)
            [product] p = MatMul(s, w)
            q = Add(p, b)
            next = Relu(q)
            [other] out = MatMul(next, w)
        }
    >
"""
SCAN = """
    y, all = Scan <num_scan_inputs = 1, scan_output_axes = [1],
        body = step (float[2, 8] s, float[2, 8] e) => (float[2, 8] next, float[2, 8] out) {
            sum = Add(s, e)
            [product] p = MatMul(sum, w)
            next = Tanh(p)
            [other] out = MatMul(next, w)
        }
    > (x, steps)
"""
GROWING = """
    yes = Constant <value = bool {1}> ()
    y = Loop (count, yes, x) <
        body = step (int64 i, bool go, float[M, 8] s) => (bool more, float[K, 8] next) {
            more = Identity(go)
            [product] p = MatMul(s, w)
            r = Relu(p)
            next = Concat <axis = 0> (r, x)
        }
    >
"""
BRANCH_IN_LOOP = """
    yes = Constant <value = bool {1}> ()
    two = Constant <value = int64 {2}> ()
    y = Loop (count, yes, x) <
        body = step (int64 i, bool go, float[N, 8] s) => (bool more, float[N, 8] next) {
            more = Identity(go)
            early = Less(i, two)
            [inner] next = If (early) <
                then_branch = first () => (float[N, 8] t) { [product] p = MatMul(s, w) t = Relu(p) },
                else_branch = later () => (float[N, 8] t) { n = Neg(s) [other] p = MatMul(n, w) t = Tanh(p) }
            >
        }
    >
"""
X = "float[N, 8] x, int64 count"


def samples(steps: int = 4) -> list[Arrays]:
    """Feeds of two rows and a number of iterations."""
    return [{"x": normal(2, 8, seed=i), "count": np.array(steps, np.int64)} for i in range(12)]


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_the_body_of_a_loop_is_quantized(target: str) -> None:
    proto = parse(LOOP, X, "float[N, 8] y, float[M, N, 8] all", CONSTANTS)
    result = made(proto, samples(), target=target)
    assert set(result.plan.kernels) == {"product", "other"}
    assert sqnr(proto, result, samples()) > 28
    assert sqnr(proto, result, samples(), "all") > 28
    assert in_bodies(result.model, "DequantizeLinear") >= 3
    if target == "cpu":
        assert result.report.placement is not None
        assert set(result.report.placement.kernels) == {"product", "other"}


def test_a_loop_without_an_iteration_stays_float() -> None:
    proto = parse(LOOP, X, "float[N, 8] y, float[M, N, 8] all", CONSTANTS)
    result = made(proto, samples(0))
    assert not result.plan.kernels
    assert reasons(result)["product"] == "its loop's body never ran on the calibration data"


def test_a_tensor_whose_shape_changes_from_iteration_to_iteration() -> None:
    proto = parse(GROWING, X, "float[M, 8] y", CONSTANTS)
    result = made(proto, samples())
    assert set(result.plan.kernels) == {"product"}
    assert sqnr(proto, result, samples()) > 28


def test_a_branch_inside_a_loop() -> None:
    proto = parse(BRANCH_IN_LOOP, X, "float[N, 8] y", CONSTANTS)
    result = made(proto, samples())
    assert set(result.plan.kernels) == {"product", "other"}
    assert sqnr(proto, result, samples()) > 28
    once = made(proto, samples(1))
    assert set(once.plan.kernels) == {"product"}
    assert reasons(once)["other"] == "its branch never ran on the calibration data"


def test_the_body_of_a_scan_is_quantized() -> None:
    proto = parse(SCAN, "float[2, 8] x, float[T, 2, 8] steps", "float[2, 8] y, float[2, T, 8] all", CONSTANTS)
    fed = [{"x": normal(2, 8, seed=i), "steps": normal(3 + i % 2, 2, 8, seed=i)} for i in range(12)]
    result = made(proto, fed)
    assert set(result.plan.kernels) == {"product", "other"}
    assert sqnr(proto, result, fed) > 28
    assert sqnr(proto, result, fed, "all") > 28


def test_a_branch_inside_a_scan_cannot_be_observed() -> None:
    body = """
        y, all = Scan <num_scan_inputs = 1,
            body = step (float[2, 8] s, float[2, 8] e) => (float[2, 8] next, float[2, 8] out) {
                zero = Constant <value = float {0}> ()
                m = ReduceMean <keepdims = 0> (e)
                big = Greater(m, zero)
                [inner] next = If (big) <
                    then_branch = first () => (float[2, 8] t) { [product] p = MatMul(s, w) t = Relu(p) },
                    else_branch = later () => (float[2, 8] u) { u = Add(s, e) }
                >
                [other] out = MatMul(next, w)
            }
        > (x, steps)
    """
    proto = parse(body, "float[2, 8] x, float[T, 2, 8] steps", "float[2, 8] y, float[T, 2, 8] all", CONSTANTS)
    fed = [{"x": normal(2, 8, seed=i), "steps": normal(3, 2, 8, seed=i)} for i in range(12)]
    result = made(proto, fed)
    assert set(result.plan.kernels) == {"other"}
    assert "cannot be observed" in reasons(result)["product"]
    assert sqnr(proto, result, fed, "all") > 28


@pytest.mark.parametrize("known", [True, False], ids=["known shape", "unknown shape"])
def test_every_iteration_is_handed_out(known: bool) -> None:
    text = LOOP if not known else LOOP.replace("[N, 8]", "[2, 8]")
    proto = parse(text, X.replace("N", "2"), "float[2, 8] y, float[M, 2, 8] all", CONSTANTS)
    if known:
        step = next(a.g for a in proto.graph.node[1].attribute if a.name == "body")
        step.value_info.append(onnx.helper.make_tensor_value_info("p", 1, [2, 8]))
    for one in samples(3)[:2]:
        found = run(with_outputs(proto, ["p", "s", "next"]), one)
        state, states, products = one["x"], [], []
        for _ in range(3):
            states.append(state)
            products.append(state @ CONSTANTS["w"])
            state = np.maximum(products[-1] + CONSTANTS["b"], 0)
        assert found["p"].shape == ((3, 2, 8) if known else (48,))
        np.testing.assert_allclose(found["p"].ravel(), np.ravel(products), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found["s"].ravel(), np.ravel(states), rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(found["next"].ravel()[-16:], state.ravel(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["MatMul", "Gemm"])
def test_weights_alone_of_a_body(op: str) -> None:
    big = {"w": normal(64, 64, scale=0.12), "b": normal(64, scale=0.1)}
    product = "[product] q = Gemm(s, w, b)" if op == "Gemm" else "[product] p = MatMul(s, w) q = Add(p, b)"
    body = f"""
        yes = Constant <value = bool {{1}}> ()
        y = Loop (count, yes, x) <
            body = step (int64 i, bool go, float[2, 64] s) => (bool more, float[2, 64] next) {{
                more = Identity(go)
                {product}
                next = Relu(q)
            }}
        >
    """
    proto = parse(body, "float[2, 64] x, int64 count", "float[2, 64] y", big)
    fed = [{"x": normal(2, 64, seed=i), "count": np.array(4, np.int64)} for i in range(8)]
    result = made(proto, fed, precision="w8a16")
    assert set(result.plan.kernels) == {"product"}
    assert result.report.kernels["MatMulNBits"] == 1
    assert sqnr(proto, result, fed) > 35

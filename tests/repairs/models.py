"""Small models of which one layer quantizes badly, each for another reason."""

from __future__ import annotations

import numpy as np
import onnx

from tests.builders import Arrays, conv, conv_chain, conv_values, feeds, normal, parse, weight

SAMPLES = 96
"""More than bias correction holds, so that there are others to measure on."""
GOOD = conv_chain(4)


def data(proto: onnx.ModelProto, seed: int = 1) -> Arrays:
    """Samples of a model."""
    return feeds(proto, SAMPLES, seed)


def outlier_channel() -> onnx.ModelProto:
    """Conv ``c1`` reads a channel that is 300 times larger than the others, and weighs it accordingly less."""
    values = conv_values(4)
    values["w0"], values["b0"] = values["w0"].copy(), values["b0"].copy()
    values["w0"][0] *= 300
    values["b0"][0] *= 300
    values["w1"] = values["w1"].copy()
    values["w1"][:, 0] /= 300
    return _chain(values)


def idle_channel() -> onnx.ModelProto:
    """Conv ``c1`` reads a channel that is 1000 times larger than the others, and does nothing with it."""
    values = conv_values(4)
    values["w0"], values["w1"] = values["w0"].copy(), values["w1"].copy()
    values["w0"][0] *= 1000
    values["w1"][:, 0] = 0
    return _chain(values)


def large_weights() -> onnx.ModelProto:
    """Conv ``c1`` has an output channel whose weights are 1000 times larger, on an input that is nearly nothing."""
    values = conv_values(4)
    values["w0"], values["b0"] = values["w0"].copy(), values["b0"].copy()
    values["w0"][0] /= 1e5
    values["b0"][0] = 1e-5
    values["w1"] = values["w1"].copy()
    values["w1"][0] = 0
    values["w1"][0, 0] = 1000 * np.abs(values["w1"][1:]).max()
    return _chain(values)


def biased_rounding() -> onnx.ModelProto:
    """Gemm ``fc`` has weights that are all rounded the same way, and inputs that are all positive: its mean shifts."""
    inputs, outputs = 64, 8
    values = {"w0": weight(inputs, 16), "b0": normal(inputs, scale=0.1) + 2, "w2": weight(4, outputs), "b2": normal(4)}
    step = np.float32(1 / 127)
    odd = (np.random.default_rng(0).integers(-60, 60, (outputs, inputs)) + 0.45).astype(np.float32) * step
    odd[:, 0] = 1.0
    values |= {"w1": odd, "b1": -odd.sum(1) * np.float32(2)}
    body = """
        [first] h = Gemm <transB = 1> (x, w0, b0) [relu] r = Relu(h)
        [fc] g = Gemm <transB = 1> (r, w1, b1) [last] y = Gemm <transB = 1> (g, w2, b2)"""
    return parse(body, "float[N, 16] x", "float[N, 4] y", values)


def _chain(values: Arrays) -> onnx.ModelProto:
    steps = [f"{conv(f'c{i}', f'r{i - 1}' if i else 'x', i)} [r{i}] r{i} = Relu(c{i})" for i in range(4)]
    return parse(" ".join(steps), "float[N, 8, 8, 8] x", "float[N, 8, 8, 8] r3", values)

"""What the tool itself makes is clean for its target, with every operator the targets know."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool.lint import baseline, linting, subject
from tests.builders import conv, conv_chain, conv_values, feeds, normal, parse, quantized, weight


def residual() -> onnx.ModelProto:
    body = f"""{conv("c0", "x", 0)} r0 = Relu(c0) {conv("c1", "r0", 1)} s = Add(c1, r0) r1 = Relu(s)
    p = MaxPool <kernel_shape = [2, 2], strides = [2, 2]> (r1) {conv("c2", "p", 2)} k = Clip(c2, lo, hi)
    g = GlobalAveragePool(k) f = Flatten(g) [fc] h = Gemm(f, wf, bf) y = Softmax(h)"""
    more = {"wf": weight(8, 5, inputs=8), "bf": normal(5, scale=0.1), "lo": np.float32(0), "hi": np.float32(6)}
    constants = conv_values(3) | {name: np.asarray(value) for name, value in more.items()}
    return parse(body, "float[N, 8, 8, 8] x", "float[N, 5] y", constants)


def joined() -> onnx.ModelProto:
    body = f"""{conv("c0", "x", 0)} r0 = Relu(c0) {conv("c1", "x", 1)} a = Sigmoid(c1) m = Mul(c1, a)
    [cat] j = Concat <axis = 1> (r0, m) t = Transpose <perm = [0, 2, 3, 1]> (j) u = Reshape(t, shape)
    z = MatMul(u, wz) q = Add(z, bz) y = Tanh(q)"""
    more = {"wz": weight(16, 32, inputs=16), "bz": normal(32, scale=0.1), "shape": np.array([0, -1, 16])}
    return parse(body, "float[N, 8, 8, 8] x", "float[N, 64, 32] y", conv_values(2) | more)


def attention() -> onnx.ModelProto:
    body = """q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv) kt = Transpose <perm = [0, 2, 1]> (k)
    s = MatMul(q, kt) d = Mul(s, c) p = Softmax <axis = -1> (d) o = MatMul(p, v) r = Add(o, x)
    n = LayerNormalization <axis = -1> (r, g, b) h = MatMul(n, w1) e = Add(h, b1) a = Relu(e) y = MatMul(a, w2)"""
    names = {name: weight(32, 32, seed=i, inputs=32) for i, name in enumerate(("wq", "wk", "wv", "w1", "w2"))}
    more = {"c": np.array(0.2, np.float32), "g": np.ones(32, np.float32), "b": np.zeros(32, np.float32)}
    constants = names | more | {"b1": normal(32, scale=0.1)}
    return parse(body, "float[N, 6, 32] x", "float[N, 6, 32] y", constants)


def upsampled() -> onnx.ModelProto:
    body = f"""{conv("c0", "x", 0)} r0 = LeakyRelu(c0) t = ConvTranspose <strides = [2, 2]> (r0, wt, bt)
    p = Pad(t, pads) y = AveragePool <kernel_shape = [2, 2]> (p)"""
    more = {"wt": normal(8, 4, 2, 2, scale=0.2), "bt": normal(4, scale=0.1), "pads": np.array([0, 0, 1, 1, 0, 0, 1, 1])}
    return parse(body, "float[N, 8, 8, 8] x", "float[N, 4, 17, 17] y", conv_values(1) | more)


MODELS = {
    "chain": lambda: conv_chain(3),
    "residual": residual,
    "joined": joined,
    "attention": attention,
    "upsampled": upsampled,
}


@pytest.mark.parametrize("precision", ["w8a8", "w4a16"])
@pytest.mark.parametrize("target", ["cpu", "cuda", "tensorrt"])
@pytest.mark.parametrize("name", MODELS)
def test_it_is_clean(name: str, target: str, precision: str) -> None:
    proto = MODELS[name]()
    result = quantized(proto, feeds(proto, 8), target=target, precision=precision)
    loaded = subject.load(result.model)
    found = linting.target_of(loaded)
    assert found is not None
    assert found.name == target
    checked = linting.check(loaded, found)
    assert checked.findings == ()
    assert checked.conversions or precision == "w4a16"
    assert checked.notes == ()
    assert linting.fix(loaded, found) == {}


@pytest.mark.zoo
@pytest.mark.slow
def test_real_models_are_clean(real_model: Path, any_data: Callable[[Path], Any]) -> None:
    result = quantized(onnx.load(real_model), any_data(real_model), target="cpu", bias_correction=False)
    loaded = subject.load(result.model)
    target = linting.target_of(loaded)
    assert target is not None
    assert linting.check(loaded, target).findings == ()
    places = baseline.of(loaded, target).placement
    assert "float" not in places.values()

"""The preparation passes on random chains of what exporters write: the same results, at every opset."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qdqtool import chains
from qdqtool.passes.infer_shapes import InferShapes

PREPARATION = tuple(chains.preparation())
BLOCKS = {
    "conv": "{y} = Conv <pads = [1, 1, 1, 1]> ({x}, w, b)",
    "pointwise": "{y} = Conv({x}, v)",
    "relu": "{y} = Relu({x})",
    "batchnorm": "{y} = BatchNormalization({x}, gamma, beta, mean, var)",
    "scale": "{y} = Mul({x}, k)",
    "shift": "{y} = Add(k, {x})",
    "erf": "{y}d = Mul({x}, rroot2) {y}e = Erf({y}d) {y}a = Add({y}e, one) {y}m = Mul({x}, {y}a) {y} = Mul({y}m, half)",
    "tanh": "{y}s = Mul({x}, {x}) {y}p = Mul({y}s, {x}) {y}q = Mul({y}p, c) {y}r = Add({x}, {y}q)"
    " {y}u = Mul({y}r, root) {y}t = Tanh({y}u) {y}a = Add({y}t, one) {y}h = Mul({x}, half) {y} = Mul({y}h, {y}a)",
    "swish": "{y}a = Add({x}, three) {y}c = Clip({y}a, zero, six) {y}m = Mul({x}, {y}c) {y} = Div({y}m, six)",
    "gate": "{y}a = Add({x}, three) {y}c = Clip({y}a, zero, six) {y}g = Div({y}c, six) {y} = Mul({first}, {y}g)",
    "square": "{y}p = Pow({x}, two) {y}v = {mean}({y}p{axes}) {y}w = Add({y}v, one) {y}s = Sqrt({y}w)"
    " {y} = Div({x}, {y}s)",
    "layer": "{y}u = {mean}({x}{axes}) {y}d = Sub({x}, {y}u) {y}p = Mul({y}d, {y}d) {y}v = {mean}({y}p{axes})"
    " {y}w = Add({y}v, one) {y}r = Sqrt({y}w) {y}n = Div({y}d, {y}r) {y}g = Mul({y}n, six) {y} = Add({y}g, one)",
    "pad": "{y}p = Pad({x}, pads) {y} = Conv({y}p, w, b)",
    "pool": "{y}p = Pad({x}, pads) {y} = MaxPool <kernel_shape = [3, 3]> ({y}p)",
    "turned": "{y}t = Transpose({x}) {y}f = Transpose <perm = [0, 1, 3, 2]> ({y}t)"
    " {y} = Transpose <perm = [2, 3, 0, 1]> ({y}f)",
    "shaped": "{y}f = Flatten({x}) {y} = Reshape({y}f, shape)",
    "nothing": "{y}o = Mul({x}, one) {y}z = Add(zero, {y}o) {y} = Slice({y}z, start, end)",
}
SCALARS = {"rroot2": math.sqrt(0.5), "one": 1, "half": 0.5, "two": 2, "three": 3, "six": 6, "zero": 0, "c": 0.044715}
INTEGERS = {
    "pads": [0, 0, 1, 1, 0, 0, 1, 1],
    "shape": [-1, 4, 5, 5],
    "start": [0, 0],
    "end": [2**31 - 1, 4],
    "last": [-1],
}


def values() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    floats = {
        **SCALARS,
        "root": math.sqrt(2 / math.pi),
        "w": rng.standard_normal((4, 4, 3, 3)) / 6,
        "v": rng.standard_normal((4, 4, 1, 1)) / 2,
        "k": rng.uniform(0.7, 1.3, (4, 1, 1)),
        **{name: rng.standard_normal(4) / 2 for name in ("b", "beta", "mean")},
        **{name: rng.uniform(0.7, 1.3, 4) for name in ("gamma", "var")},
    }
    found = {name: np.asarray(value, np.float32) for name, value in floats.items()}
    return found | {name: np.array(value, np.int64) for name, value in INTEGERS.items()}


def model(blocks: list[str], opset: int, given_out: set[int]) -> str:
    old = opset < 18
    names = {
        "mean": "ReduceMean <axes = [-1]> " if old else "ReduceMean",
        "axes": "" if old else ", last",
        "first": "t0",
    }
    body = " ".join(BLOCKS[block].format(x=f"t{i}", y=f"t{i + 1}", **names) for i, block in enumerate(blocks))
    outputs = sorted({len(blocks), *(i for i in given_out if 0 < i < len(blocks))})
    given_names = ", ".join(f"float[N, 4, 5, 5] t{i}" for i in outputs)
    return f'<ir_version: 8, opset_import: ["" : {opset}]> g (float[N, 4, 5, 5] t0) => ({given_names}) {{ {body} }}'


@settings(max_examples=80, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    opset=st.sampled_from([13, 17, 18, 20, 23, 25]),
    blocks=st.lists(st.sampled_from(sorted(BLOCKS)), min_size=1, max_size=7),
    given_out=st.sets(st.integers(1, 6), max_size=2),
)
def test_random_chains_compute_the_same(passes: Any, opset: int, blocks: list[str], given_out: set[int]) -> None:
    text = model(blocks, opset, given_out)
    proto, state = passes(text, *PREPARATION, weights=values(), tolerance=5e-5)
    names = {node.name for node in passes.state(passes.parse(text)).graph.nodes}
    assert {name for parts in state.origins.values() for name in parts} <= names
    inferred = passes.state(proto)
    InferShapes().run(inferred)
    assert all(t.shape is not None and t.dtype is not None for t in inferred.graph.tensors().values() if t.name)


@pytest.mark.parametrize("block", sorted(BLOCKS))
def test_nodes_are_not_compared_with_each_other(passes: Any, monkeypatch: Any, block: str) -> None:
    """The library finds a node among the readers of a tensor with ``==``: with shared constants that is quadratic."""
    compared = []
    equal = gs.Node.__eq__
    state = passes.state(passes.parse(model(["relu", block] * 20, 17, set()), **values()))

    def counted(one: Any, other: Any) -> bool:
        compared.append(1)
        return bool(equal(one, other))

    InferShapes().run(state)
    monkeypatch.setattr(gs.Node, "__eq__", counted)
    for step in PREPARATION:
        if not isinstance(step, InferShapes):
            step.run(state)
    assert not compared

"""The preparation passes together: on random chains of layers, and on real models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qdqtool import chains

PREPARATION = tuple(chains.preparation())
CHANNELS = 4
CONVS = ("Conv({x}, w)", "Conv <group = 2> ({x}, wg, b)", "ConvTranspose <group = 2> ({x}, wt, b)", "Conv({x}, w, b)")
PRODUCTS = ("MatMul({x}, v)", "Gemm <alpha = 0.5, beta = 2.0> ({x}, v, b)", "Gemm <transB = 1> ({x}, v)")
STEPS = (
    "BatchNormalization({x}, gamma, beta, mean, var)",
    "Mul({x}, k)",
    "Div({x}, k)",
    "Add(k, {x})",
    "Sub({x}, s)",
    "Sub(s, {x})",
    "Identity({x})",
    "Dropout({x})",
    "Relu({x})",
)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    family=st.sampled_from([CONVS, PRODUCTS]),
    opset=st.sampled_from([9, 13, 17]),
    plan=st.lists(st.tuples(st.integers(0, 3), st.lists(st.integers(0, 8), max_size=5)), min_size=1, max_size=4),
    given_out=st.sets(st.integers(0, 12), max_size=2),
)
def test_random_chains_compute_the_same(
    passes: Any, family: tuple[str, ...], opset: int, plan: list[tuple[int, list[int]]], given_out: set[int]
) -> None:
    calls = [call for layer, steps in plan for call in (family[layer % len(family)], *(STEPS[i] for i in steps))]
    body = " ".join(f"t{i + 1} = {call.format(x=f't{i}')}" for i, call in enumerate(calls))
    wide = family is CONVS
    shape = "[N, 4, 5, 5]" if wide else "[N, 4]"
    outputs = {len(calls), *(i for i in given_out if 0 < i <= len(calls))}
    given_names = ", ".join(f"float{shape} t{i}" for i in sorted(outputs))
    rng = np.random.default_rng(len(calls))
    extents = (CHANNELS, 1, 1) if wide else (CHANNELS,)
    weights = {
        "w": rng.standard_normal((4, 4, 1, 1)),
        "wg": rng.standard_normal((4, 2, 1, 1)),
        "wt": rng.standard_normal((4, 2, 1, 1)),
        "v": rng.standard_normal((4, 4)),
        "k": rng.uniform(0.5, 2, extents),
        "s": rng.standard_normal(()),
        **{name: rng.standard_normal(CHANNELS) for name in ("b", "gamma", "beta", "mean")},
        "var": rng.uniform(0.5, 2, CHANNELS),
    }
    source = f'<ir_version: 7, opset_import: ["" : {opset}]> g (float{shape} t0) => ({given_names}) {{ {body} }}'
    proto, state = passes(
        source, *PREPARATION, weights={name: np.asarray(w, np.float32) for name, w in weights.items()}, tolerance=1e-4
    )
    assert sum(op == "BatchNormalization" for op in passes.ops(proto)) <= len(state.skipped)
    if not given_out & set(range(1, len(calls))) and not any(8 in steps for _, steps in plan):
        assert set(passes.ops(proto)) <= {"Conv", "ConvTranspose", "Gemm", "MatMul"}


LEFT = {
    "resnet20_cifar10": {"Conv": 19, "Relu": 19, "Add": 9, "Slice": 4, "Pad": 2, "ReduceMean": 1, "Gemm": 1},
    "mobilenetv2_small_cifar10": {"Conv": 38, "Gemm": 1, "Clip": 26, "Add": 7, "GlobalAveragePool": 1, "Flatten": 1},
    "tiny_darknet_imagenet": {"Conv": 16, "LeakyRelu": 15, "MaxPool": 4, "GlobalAveragePool": 1, "Flatten": 1},
}


@pytest.mark.zoo
def test_real_models_compute_the_same(passes: Any, real_model: Path) -> None:
    name, feeds = real_model.stem, {}
    if name == "silero_vad":
        samples = np.random.default_rng(0).standard_normal((1, 576)).astype(np.float32)
        feeds = {"input": samples, "state": np.zeros((2, 1, 128), np.float32), "sr": np.array(16000)}
    proto, state = passes(onnx.load(real_model), *PREPARATION, feeds=feeds)
    operators = passes.ops(proto)
    assert "BatchNormalization" not in operators
    if name in LEFT:
        assert {op: operators.count(op) for op in operators} == LEFT[name]
    if name != "kwt1_kws":  # a class token is repeated along the symbolic batch
        assert "Shape" not in operators
    assert all(tensor.shape is not None for tensor in state.graph.tensors().values())

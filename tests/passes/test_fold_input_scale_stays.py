"""Per-channel arithmetic that stays in front of linear layers, and why."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from qdqtool import runtime
from qdqtool.passes.fold_input_scale import FoldInputScale
from qdqtool.passes.fuse_gelu import FuseGelu
from qdqtool.passes.infer_shapes import InferShapes
from tests.passes.scaled_layers import BATCHNORM, PADDED, normal, source, values

PASSES = (InferShapes(), FoldInputScale())


def test_channels_that_the_chain_balances_keep_it(passes: Any) -> None:
    weights = {**values((4, 6)), "k": np.array([1, 1, 1, 20], np.float32)}
    body = "r = Relu(x0) [s] x = {op}(r, k) [layer] y = MatMul(x, w)"
    proto, state = passes(source(body.format(op="Mul"), shape="[N, 3, 4]"), *PASSES, weights=weights)
    assert passes.ops(proto) == ["Relu", "Mul", "MatMul"]
    reason = "its channels are better balanced than its input's: folded, quantization noise would grow 101 times"
    assert passes.reasons(state) == {"s": reason}
    weights["k"][3] = 2.2  # mean(s^2) / min(s^2) = 1.96
    proto, _ = passes(source(body.format(op="Div"), shape="[N, 3, 4]"), *PASSES, weights=weights)
    assert passes.ops(proto) == ["Relu", "MatMul"]


def test_a_batchnorm_tells_how_balanced_its_input_is(passes: Any) -> None:
    weights = values((6, 4, 3, 3))
    body = f"r = Relu(x0) [bn] x = {BATCHNORM.format(x='r')} [layer] y = Conv(x, w, b)"
    weights |= {"var": np.array([1, 1, 1, 400], np.float32), "mean": np.zeros(4, np.float32)}
    proto, state = passes(source(body), *PASSES, weights=weights)
    assert passes.ops(proto) == ["Relu", "BatchNormalization", "Conv"]
    assert "quantization noise would grow" in passes.reasons(state)["bn"]
    weights["gamma"] = np.array([1, 1, 1, 20], np.float32)  # equally unbalanced behind it
    proto, _ = passes(source(body), *PASSES, weights=weights)
    assert passes.ops(proto) == ["Relu", "Conv"]


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("[s] x = Mul(x0, kc) y = Conv(x, w) z = Neg(x)", "y z", "'x' is read elsewhere too, or is a graph output"),
        ("[s] x = Mul(x0, kc) y = Conv(x, w)", "y x", "'x' is read elsewhere too, or is a graph output"),
        ("[s] x = Mul(x0, kc) y = Conv(w1, x)", "y", None),
        ("[s] x = Mul(x0, kc) y = Conv(x, x)", "y", None),
        ("[s] x = Mul(x0, map) y = Conv(x, w)", "y", "its constant of shape (6, 6) is not one value for each of the 4"),
        ("[s] x = Div(two, x0) y = Conv(x, w)", "y", "it divides a constant by the result"),
        ("[s] x = Add(x0, tc) [layer] y = Conv <pads = [1, 1, 1, 1]> (x, w)", "y", PADDED),
        ("q = Shape(x0) p = Cast <to = 1> (q) [s] x = Add(x0, tc) y = Conv(x, w, p)", "y", "the bias of 'Conv_3' is"),
        ("[s] x = Mul(x0, huge) y = Conv(x, w)", "y", "would not be finite"),
        (
            "[s] x, m, v = BatchNormalization <training_mode = 1> (x0, gamma, beta, mean, var) y = Conv(x, w)",
            "y",
            "it is in training mode",
        ),
        ("[s] x = Mul(x0, kc) m = MatMul(x, w6) y = Conv(x, w)", "y m", "read its result along other channels"),
    ],
)
def test_reasons(passes: Any, body: str, outputs: str, reason: str | None) -> None:
    weights = values((6, 4, 3, 3)) | {"map": normal(6, 6), "huge": np.array(3e38, np.float32), "w1": normal(1, 4, 6, 6)}
    weights |= {"w6": normal(6, 6)}
    weights["w"][0] = 4
    state = passes.state(passes.parse(source(body, opset=14, outputs=outputs), **weights))
    InferShapes().run(state)
    assert FoldInputScale().run(state) == 0
    assert reason in passes.reasons(state)["s"] if reason else not state.skipped


@pytest.mark.parametrize(
    ("layer", "shape", "reason"),
    [
        ("Gemm <transA = 1> (x, w)", "[5, 4]", "'layer' has transA = 1"),
        ("MatMul(x, deep)", "[2, 5, 4]", "the weight of 'layer' is not of rank 2"),
    ],
)
def test_layers_that_read_otherwise(passes: Any, layer: str, shape: str, reason: str) -> None:
    weights = {**values((5, 6)), "deep": normal(2, 4, 6)}
    _, state = passes(source(f"[s] x = Mul(x0, two) [layer] y = {layer}", shape=shape), *PASSES, weights=weights)
    assert passes.reasons(state) == {"s": reason}


def test_batchnorm_normalizes_other_channels_than_a_product_of_rank_3_reads(passes: Any) -> None:
    body = f"[bn] x = {BATCHNORM.format(x='x0')} [layer] y = MatMul(x, w)"
    _, state = passes(source(body, shape="[N, 4, 4]"), *PASSES, weights=values((4, 6)))
    assert passes.reasons(state) == {
        "bn": "its channels are axis 1, those of 'layer' the last of an input not of rank 2"
    }


def test_a_constant_that_makes_channels_stays(passes: Any) -> None:
    for shape in ("[N, 1, 6, 6]", "[N, C, 6, 6]", "[1, 6, 6]"):
        _, state = passes(
            source("[s] x = Mul(x0, c4) y = Conv(x, w)", shape=shape),
            *PASSES,
            weights={**values((6, 4, 3, 3)), "c4": normal(1, 4, 1, 1)},
            feeds={"x0": normal(*(1, 1, 6, 6)[4 - shape.count(",") - 1 :])},
        )
        assert passes.reasons(state) == {"s": "'x0' is not known to have the 4 channels of the result"}


def test_what_the_runtime_fuses_with_a_gelu_or_normalization_stays(passes: Any) -> None:
    gelu = "h = Mul(r, rs) e = Erf(h) a = Add(e, one) m = Mul(r, a) [s] x = Mul(m, half) [layer] y = MatMul(x, w)"
    weights = {
        **values((4, 6)),
        "one": np.array(1, "f4"),
        "half": np.array(0.5, "f4"),
        "rs": np.sqrt(np.array(0.5, "f4")),
    }
    text = source(f"r = Relu(x0) {gelu}", shape="[N, 3, 4]")
    proto, state = passes(text, InferShapes(), FuseGelu(), FoldInputScale(), weights=weights)
    assert passes.ops(runtime.optimized(proto)) == ["Relu", "Gelu", "MatMul"]
    reason = "the runtime fuses it with the parts of a normalization or Gelu in front of it"
    assert passes.reasons(state) == {"s": reason}
    layer = """u = ReduceMean <axes = [-1]> (r) d = Sub(r, u) p = Pow(d, two) v = ReduceMean <axes = [-1]> (p)
        q = Add(v, half) sd = Sqrt(q) n = Div(d, sd) g = Mul(n, k) [s] x = Add(g, t) [layer] m = MatMul(x, w)
        y = Add(m, b)"""
    proto, state = passes(source(f"r = Relu(x0) {layer}", shape="[N, 3, 4]"), *PASSES, weights=weights)
    assert "LayerNormalization" in passes.ops(runtime.optimized(proto))
    assert passes.reasons(state) == {"s": reason}


def test_nodes_that_share_constants_are_not_compared_with_each_other(passes: Any, monkeypatch: Any) -> None:
    compared = []
    equal = gs.Node.__eq__
    body = "\n".join(f"r{i} = Relu(x{i}) m{i} = Mul(r{i}, kc) x{i + 1} = Conv(m{i}, w, b)" for i in range(400))
    state = passes.state(
        passes.parse(
            source(f"x0c = Neg(x0) {body.replace('(x0)', '(x0c)')}", outputs="x400"), **values((4, 4, 1, 1), 4)
        )
    )

    def counted(one: Any, other: Any) -> bool:
        compared.append(1)
        return bool(equal(one, other))

    monkeypatch.setattr(gs.Node, "__eq__", counted)
    InferShapes().run(state)
    assert FoldInputScale().run(state) == 400
    assert len(compared) < 1200

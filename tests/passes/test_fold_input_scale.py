"""Per-channel arithmetic in front of linear layers becomes part of their parameters."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from qdqtool import model as models
from qdqtool import pipeline, runtime
from qdqtool.passes.fold_batchnorm import FoldBatchnorm
from qdqtool.passes.fold_input_scale import FoldInputScale
from qdqtool.passes.fuse_gelu import FuseGelu
from qdqtool.passes.infer_shapes import InferShapes

PASSES = (InferShapes(), FoldInputScale())
BATCHNORM = "BatchNormalization <epsilon = 0.01> ({x}, gamma, beta, mean, var)"
PADDED = "'layer' pads with 0, which the shift would move"
CONVOLUTIONS: dict[str, tuple[int, ...]] = {
    "Conv(x, w, b)": (6, 4, 3, 3),
    "Conv <group = 2> (x, w, b)": (6, 2, 3, 3),
    "Conv <group = 4> (x, w, b)": (8, 1, 3, 3),
    'Conv <auto_pad = "VALID", dilations = [2, 2]> (x, w)': (6, 4, 2, 2),
    'Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)': (6, 4, 1, 1),
    "ConvTranspose(x, w, b)": (4, 6, 1, 1),
    "ConvTranspose <group = 2> (x, w, b)": (4, 3, 1, 1),
}
PRODUCTS: dict[str, tuple[int, ...]] = {
    "Gemm(x, w, b)": (4, 6),
    "Gemm <alpha = 0.5, beta = 3.0> (x, w, b)": (4, 6),
    "Gemm <transB = 1> (x, w)": (6, 4),
    "MatMul(x, w)": (4, 6),
}


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> Any:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) / 2).astype(dtype)


def values(weight: tuple[int, ...], outputs: int = 6, dtype: str = "float32") -> dict[str, Any]:
    """Weights, a BatchNormalization and factors whose channels are about alike."""
    rng = np.random.default_rng(1)
    vectors = {
        name: rng.uniform(0.8, 1.2, 4) * np.array([1, -1, 1, -1]) for name in ("gamma", "beta", "mean", "k", "t")
    }
    known = {**vectors, "var": rng.uniform(0.8, 1.2, 4), "two": np.array(2.0), "four": np.array(0.25)}
    return {
        **{name: value.astype(dtype) for name, value in known.items()},
        "w": normal(*weight, dtype=dtype),
        "b": normal(outputs, dtype=dtype),
        "kc": known["k"].reshape(4, 1, 1).astype(dtype),
        "tc": known["t"].reshape(1, 4, 1, 1).astype(dtype),
    }


def source(body: str, *, opset: int = 13, shape: str = "[N, 4, 6, 6]", dtype: str = "float", outputs: str = "y") -> str:
    given = ", ".join(f"{dtype} {name}" for name in outputs.split())
    return f'<ir_version: 8, opset_import: ["" : {opset}]> g ({dtype}{shape} x0) => ({given}) {{ {body} }}'


@pytest.mark.parametrize("opset", [9, 13, 17])
@pytest.mark.parametrize("layer", CONVOLUTIONS)
def test_batchnorm_in_front_of_convolutions(passes: Any, layer: str, opset: int) -> None:
    weight = CONVOLUTIONS[layer]
    body = f"r = Relu(x0) [bn] x = {BATCHNORM.format(x='r')} [layer] y = {layer}"
    outputs = weight[1] * (2 if "group = 2" in layer else 1) if "Transpose" in layer else weight[0]
    proto, state = passes(source(body, opset=opset), *PASSES, weights=values(weight, outputs))
    assert passes.ops(proto) == ["Relu", layer.partition("(")[0].split()[0]]
    assert state.origins == {"layer": ("layer", "bn")}
    assert not state.skipped


@pytest.mark.parametrize(("opset", "layer"), [(13, name) for name in PRODUCTS])
def test_batchnorm_in_front_of_products(passes: Any, layer: str, opset: int) -> None:
    body = f"r = Relu(x0) [bn] x = {BATCHNORM.format(x='r')} [layer] y = {layer}"
    proto, _ = passes(source(body, opset=opset, shape="[N, 4]"), *PASSES, weights=values(PRODUCTS[layer]))
    assert passes.ops(proto) == ["Relu", "Gemm"]
    assert {a.name for a in proto.graph.node[1].attribute} <= {"alpha", "transB"}


@pytest.mark.parametrize("rank", [1, 3])
def test_convolutions_along_one_and_three_axes(passes: Any, rank: int) -> None:
    body = f"r = Relu(x0) x = {BATCHNORM.format(x='r')} [layer] y = Conv(x, w, b)"
    shape = f"[N, 4{', 5' * rank}]"
    proto, _ = passes(source(body, shape=shape), *PASSES, weights=values((6, 4, *(2,) * rank)))
    assert passes.ops(proto) == ["Relu", "Conv"]


@pytest.mark.parametrize("step", ["Mul(r, kc)", "Div(r, kc)", "Add(tc, r)", "Sub(r, tc)", "Sub(tc, r)", "Mul(two, r)"])
def test_arithmetic(passes: Any, step: str) -> None:
    body = f"r = Relu(x0) [step] x = {step} [layer] y = Conv(x, w, b)"
    proto, state = passes(source(body), *PASSES, weights=values((6, 4, 3, 3)))
    assert passes.ops(proto) == ["Relu", "Conv"]
    assert state.origins == {"layer": ("layer", "step")}


def test_a_chain_folds_completely(passes: Any) -> None:
    body = f"""[a] c = Mul(x0, kc) [b] d = Add(c, tc) [bn] e = {BATCHNORM.format(x="d")} [s] f = Sub(two, e)
        [d] x = Div(f, kc) [layer] y = Conv(x, w, b)"""
    proto, state = passes(source(body), *PASSES, weights=values((6, 4, 3, 3)))
    assert passes.ops(proto) == ["Conv"]
    assert state.origins == {"layer": ("layer", "a", "b", "bn", "s", "d")}


def test_a_padded_convolution_takes_the_scale_and_leaves_one_add(passes: Any) -> None:
    body = f"""r = Relu(x0) [m] d = Mul(r, kc) [bn] x = {BATCHNORM.format(x="d")}
        [layer] y = Conv <pads = [1, 1, 1, 1]> (x, w, b)"""
    proto, state = passes(source(body), *PASSES, weights=values((6, 4, 3, 3)))
    assert passes.ops(proto) == ["Relu", "Add", "Conv"]
    assert proto.graph.node[1].name == "bn"
    assert passes.constant(proto, proto.graph.node[1].input[1]).shape == (4, 1, 1)
    assert state.origins == {"bn": ("bn", "m")}
    assert passes.reasons(state) == {"bn": f"its shift stays: {PADDED}"}
    InferShapes().run(state)
    state.skipped.clear()
    assert FoldInputScale().run(state) == 0
    assert passes.reasons(state) == {"bn": PADDED}


def test_a_padded_convolution_takes_a_scale_without_shift(passes: Any) -> None:
    body = "r = Relu(x0) c = Mul(r, kc) x = Div(c, two) [layer] y = Conv <pads = [1, 1, 1, 1]> (x, w, b)"
    proto, state = passes(source(body), *PASSES, weights=values((6, 4, 3, 3)))
    assert passes.ops(proto) == ["Relu", "Conv"]
    assert not state.skipped


@pytest.mark.parametrize(
    ("layer", "weight"),
    [
        ('Conv <auto_pad = "SAME_LOWER"> (x, w, b)', (6, 4, 3, 3)),
        ("ConvTranspose(x, w, b)", (4, 6, 3, 3)),
        ("ConvTranspose <strides = [2, 2]> (x, w, b)", (4, 6, 1, 1)),
        ("ConvTranspose <strides = [2, 2], output_padding = [1, 1]> (x, w, b)", (4, 6, 2, 2)),
    ],
)
def test_layers_whose_border_sees_less(passes: Any, layer: str, weight: tuple[int, ...]) -> None:
    body = f"r = Relu(x0) [bn] x = {BATCHNORM.format(x='r')} [layer] y = {layer}"
    proto, state = passes(source(body), *PASSES, weights=values(weight))
    assert passes.ops(proto) == ["Relu", "Add", layer.partition("(")[0].split()[0]]
    assert passes.reasons(state) == {"bn": f"its shift stays: {PADDED}"}


def test_a_scale_of_zero_leaves_nothing_to_add_the_shift_to(passes: Any) -> None:
    body = f"r = Relu(x0) [bn] x = {BATCHNORM.format(x='r')} [layer] y = Conv{{pads}}(x, w, b)"
    weights = values((6, 4, 3, 3))
    weights["gamma"][1] = 0
    proto, _ = passes(source(body.format(pads="")), *PASSES, weights=weights)
    assert passes.ops(proto) == ["Relu", "Conv"]
    proto, state = passes(source(body.format(pads=" <pads = [1, 1, 1, 1]> ")), *PASSES, weights=weights)
    assert "BatchNormalization" in passes.ops(proto)
    assert passes.reasons(state) == {"bn": PADDED}


def test_several_layers_read_the_result(passes: Any) -> None:
    body = f"""r = Relu(x0) [bn] x = {BATCHNORM.format(x="r")} [one] y = Conv(x, w, b)
        [two] z = Conv <strides = [2, 2]> (x, w) [three] u = Conv(r, w, b)"""
    proto, state = passes(source(body, outputs="y z u"), *PASSES, weights=values((6, 4, 3, 3)))
    assert passes.ops(proto) == ["Relu", "Conv", "Conv", "Conv"]
    assert state.origins == {"one": ("one", "bn"), "two": ("two", "bn")}
    inputs = {node.name: list(node.input[1:]) for node in proto.graph.node[1:]}
    assert inputs == {"one": ["one.weight", "one.bias"], "two": ["two.weight", "two.bias"], "three": ["w", "b"]}


def test_one_of_several_layers_pads(passes: Any) -> None:
    body = f"""r = Relu(x0) [bn] x = {BATCHNORM.format(x="r")} [plain] y = Conv(x, w, b)
        [layer] z = Conv <pads = [1, 1, 1, 1]> (x, w)"""
    proto, state = passes(source(body, outputs="y z"), *PASSES, weights=values((6, 4, 3, 3)))
    assert passes.ops(proto) == ["Relu", "Add", "Conv", "Conv"]
    assert passes.reasons(state) == {"bn": f"its shift stays: {PADDED}"}


@pytest.mark.parametrize("behind", ["[add] y = Add(m, b)", "[add] y = Add(b, m)"])
def test_a_product_of_rank_3_hands_the_shift_to_its_add(passes: Any, behind: str) -> None:
    body = f"r = Relu(x0) [s] c = Mul(r, k) [t] x = Add(c, t) [layer] m = MatMul(x, w) {behind}"
    proto, state = passes(source(body, shape="[N, 3, 4]"), *PASSES, weights=values((4, 6)))
    assert passes.ops(proto) == ["Relu", "MatMul", "Add"]
    assert state.origins == {"layer": ("layer", "s", "t")}


def test_a_product_of_rank_3_without_bias_keeps_the_add_in_front(passes: Any) -> None:
    body = "r = Relu(x0) [s] c = Mul(r, k) [t] x = Add(c, t) [layer] y = MatMul(x, w)"
    proto, state = passes(source(body, shape="[N, 3, 4]"), *PASSES, weights=values((4, 6)))
    assert passes.ops(proto) == ["Relu", "Add", "MatMul"]
    assert passes.constant(proto, proto.graph.node[1].input[1]).shape == (4,)
    assert passes.reasons(state) == {"t": "its shift stays: 'layer' has no bias that could take up the shift"}


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


def test_what_was_said_of_a_folded_batchnorm_is_forgotten(passes: Any) -> None:
    body = f"""r = Relu(x0) [bn] x = {BATCHNORM.format(x="r")} [layer] y = Conv(x, w, b)
        [late] z = {BATCHNORM.format(x="r")}"""
    proto, state = passes(
        source(body, outputs="y z"), InferShapes(), FoldBatchnorm(), FoldInputScale(), weights=values((6, 4, 3, 3))
    )
    assert sorted(passes.ops(proto)) == ["BatchNormalization", "Conv", "Relu"]
    assert list(passes.reasons(state)) == ["late"]
    assert not state.batchnorms


def test_the_record_of_a_batchnorm_before_it_stays(passes: Any) -> None:
    body = f"""c = Conv(x0, v) n = {BATCHNORM.format(x="c")} r = Relu(n) s = Mul(r, kc) [layer] y = Conv(s, w, b)"""
    weights = {**values((6, 4, 1, 1)), "v": normal(4, 4, 1, 1)}
    proto, state = passes(source(body), InferShapes(), FoldBatchnorm(), FoldInputScale(), weights=weights)
    assert passes.ops(proto) == ["Conv", "Relu", "Conv"]
    assert list(state.batchnorms) == ["n"]


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


def test_a_scalar_needs_no_shape(passes: Any) -> None:
    proto, _ = passes(
        source("x = Mul(x0, two) y = Conv(x, w)", shape="[N, C, H, W]"),
        *PASSES,
        weights=values((6, 4, 3, 3)),
        feeds={"x0": normal(2, 4, 6, 6)},
    )
    assert passes.ops(proto) == ["Conv"]


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


def test_bodies(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (bool f, float[N, 4, 6, 6] x0) => (float[N, 6, 4, 4] z) {
            [out] x = Mul(x0, kc) [read] u = Mul(x0, two)
            z = If (f) <then_branch = t () => (float[N, 6, 4, 4] p) { [one] p = Conv(x, w) },
                        else_branch = e () => (float[N, 6, 4, 4] q) { [in] v = Add(u, tc) [two] c = Conv(v, w)
                            [other] h = Conv(u, w) q = Add(c, h) }>
        }""",
        *PASSES,
        weights=values((6, 4, 3, 3)),
        feeds={"f": np.array(False)},
    )
    branch = next(node for node in proto.graph.node if node.op_type == "If")
    assert [[node.op_type for node in a.g.node] for a in branch.attribute] == [["Conv"], ["Conv", "Conv", "Add"]]
    assert passes.reasons(state) == {"read": "'u' is read elsewhere too, or is a graph output"}


def test_float16_is_rounded_once(passes: Any) -> None:
    weights = values((6, 4, 1, 1), dtype="float16")
    body = "a = Mul(x0, kc) b1 = Div(a, tc) x = Mul(b1, kc) y = Conv(x, w)"
    proto, _ = passes(source(body, dtype="float16"), *PASSES, weights=weights, tolerance=4e-3)
    exact = weights["k"].astype(np.float64) ** 2 / weights["t"].astype(np.float64)
    expected = (weights["w"].astype(np.float64) * exact[:, None, None]).astype(np.float16)
    np.testing.assert_array_equal(passes.constant(proto, "w"), expected)


def test_float64(passes: Any) -> None:
    text = source("c = Mul(x0, k) x = Sub(t, c) y = Gemm(x, w, b)", dtype="double", shape="[N, 4]")
    proto, _ = passes(text, *PASSES, weights=values((4, 6), dtype="float64"), tolerance=1e-14)
    assert passes.ops(proto) == ["Gemm"]


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


def test_running_the_preparation_twice_changes_nothing_more(passes: Any) -> None:
    body = f"r = Relu(x0) [bn] x = {BATCHNORM.format(x='r')} [layer] y = Conv(x, w, b)"
    proto, _ = passes(source(body), *pipeline.preparation(), weights=values((6, 4, 3, 3)))
    again = passes.state(proto)
    InferShapes().run(again)
    assert FoldInputScale().run(again) == 0
    assert models.to_proto(again.graph, again.header) == models.to_proto(*models.to_graph(proto))

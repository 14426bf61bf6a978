"""A Pad becomes part of the convolution or pooling that reads it, where that pads alike."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qdqtool.graphs import model as models
from qdqtool.passes.fold_pad import FoldPad
from qdqtool.passes.infer_shapes import InferShapes
from tests.builders import normal, ops, parse, quantized, weight

PASSES = (InferShapes(), FoldPad())
SIDES = [0, 0, 1, 2, 0, 0, 2, 1]


def source(body: str, *, opset: int = 13, outputs: str = "y", shape: str = "[N, 4, 7, 7]", dtype: str = "float") -> str:
    given = ", ".join(f"{dtype} {name}" for name in outputs.split())
    return f'<ir_version: 8, opset_import: ["" : {opset}]> g ({dtype}{shape} x0) => ({given}) {{ {body} }}'


def values(sides: list[int] | None = None, value: float = 0.0, dtype: str = "float32") -> dict[str, Any]:
    pads = np.array(SIDES if sides is None else sides, np.int64)
    return {"pads": pads, "value": np.array(value, dtype), "w": normal(6, 4, 3, 3).astype(dtype), "b": normal(6)}


def pads_of(node: Any) -> list[int]:
    return next(list(a.ints) for a in node.attribute if a.name == "pads")


@pytest.mark.parametrize("opset", [13, 18, 21])
@pytest.mark.parametrize("pad", ["Pad(r, pads)", "Pad(r, pads, value)", 'Pad <mode = "constant"> (r, pads)'])
@pytest.mark.parametrize(
    ("layer", "total"),
    [
        ("Conv(x, w, b)", [1, 2, 2, 1]),
        ("Conv <pads = [1, 1, 0, 0], strides = [2, 2]> (x, w)", [2, 3, 2, 1]),
        ('Conv <auto_pad = "VALID", dilations = [2, 2]> (x, w)', [1, 2, 2, 1]),
    ],
)
def test_convolutions(passes: Any, layer: str, total: list[int], pad: str, opset: int) -> None:
    body = f"r = Neg(x0) [pad] x = {pad} [layer] y = {layer}"
    proto, state = passes(source(body, opset=opset), *PASSES, weights=values())
    assert passes.ops(proto) == ["Neg", "Conv"]
    assert pads_of(proto.graph.node[1]) == total
    assert state.origins == {"layer": ("layer", "pad")}
    assert not state.skipped


@pytest.mark.parametrize("opset", [7, 10])
def test_attributes_of_older_models(passes: Any, opset: int) -> None:
    body = "x = Pad <pads = [0, 0, 1, 2, 0, 0, 2, 1]> (x0) [layer] y = Conv(x, w, b)"
    proto, _ = passes(source(body, opset=opset), *PASSES, weights=values())
    assert pads_of(proto.graph.node[0]) == [1, 2, 2, 1]
    body = "[pad] x = Pad <pads = [0, 0, 1, 2, 0, 0, 2, 1], value = 1.0> (x0) [layer] y = Conv(x, w, b)"
    _, state = passes(source(body, opset=opset), *PASSES, weights=values())
    assert passes.reasons(state) == {"pad": "it pads with 1, 'layer' with 0"}


@pytest.mark.parametrize(("axes", "sides"), [([2, 3], [1, 2, 2, 1]), ([-1, -2], [2, 1, 1, 2]), ([-1], [2, 1])])
def test_axes_of_newer_models(passes: Any, axes: list[int], sides: list[int]) -> None:
    weights = {**values(sides), "axes": np.array(axes, np.int64)}
    body = "[pad] x = Pad(x0, pads, value, axes) [layer] y = Conv(x, w, b)"
    proto, _ = passes(source(body, opset=18), *PASSES, weights=weights)
    assert passes.ops(proto) == ["Conv"]
    assert pads_of(proto.graph.node[0]) == ([0, 2, 0, 1] if len(axes) == 1 else [1, 2, 2, 1])
    weights["axes"] = np.array([1, *axes[1:]], np.int64)
    _, state = passes(
        source("[pad] x = Pad(x0, pads, value, axes) y = MaxPool <kernel_shape = [3, 3]> (x)", opset=18),
        *PASSES,
        weights=weights,
    )
    assert passes.reasons(state) == {"pad": "it pads other axes than the spatial ones"}


@pytest.mark.parametrize("rank", [1, 3])
def test_one_and_three_axes(passes: Any, rank: int) -> None:
    sides = [0, 0, *(1,) * rank, 0, 0, *(2,) * rank]
    weights = {**values(sides), "w": normal(6, 4, *(3,) * rank)}
    text = source("x = Pad(x0, pads) y = Conv(x, w, b)", shape=f"[N, 4{', 5' * rank}]")
    proto, _ = passes(text, *PASSES, weights=weights)
    assert pads_of(proto.graph.node[0]) == [1] * rank + [2] * rank


@pytest.mark.parametrize(
    ("before", "value"),
    [
        ("Relu(x0)", 0.0),
        ("Abs(x0)", -1.0),
        ("Tanh(x0)", -1.0),
        ("Clip(x0, low)", -2.0),
        ("Neg(x0)", -np.inf),
        ("Neg(x0)", float(np.finfo(np.float32).min)),
        ("Transpose <perm = [0, 1, 3, 2]> (s) s = Sigmoid(x0)", 0.0),
        ("MaxPool <kernel_shape = [1, 1]> (s) s = Relu(x0)", 0.0),
    ],
)
def test_max_pools_that_pad_alike(passes: Any, before: str, value: float) -> None:
    first, _, second = before.partition(") ")
    body = f"{second} r = {first}{')' if second else ''}" if second else f"r = {before}"
    weights = {**values(value=value), "low": np.array(-2, np.float32)}
    body += " [pad] x = Pad(r, pads, value) [layer] y = MaxPool <kernel_shape = [3, 3], strides = [2, 2]> (x)"
    proto, state = passes(source(body), *PASSES, weights=weights)
    assert "Pad" not in passes.ops(proto)
    assert pads_of(proto.graph.node[-1]) == [1, 2, 2, 1]
    assert not state.skipped


@pytest.mark.parametrize(
    ("before", "value"),
    [
        ("Neg(x0)", 0.0),
        ("LeakyRelu(x0)", 0.0),
        ("Clip(x0, low)", 0.0),
        ("Relu(x0)", 1.0),
        ("Tanh(x0)", 0.0),
    ],
)
def test_max_pools_that_would_put_out_less(passes: Any, before: str, value: float) -> None:
    weights = {**values(value=value), "low": np.array(-2, np.float32)}
    body = f"r = {before} [pad] x = Pad(r, pads, value) [layer] y = MaxPool <kernel_shape = [3, 3]> (x)"
    proto, state = passes(source(body), *PASSES, weights=weights)
    assert "Pad" in passes.ops(proto)
    assert passes.reasons(state)["pad"].startswith(f"it pads with {value:g}, and 'r' may be less")


@pytest.mark.parametrize("attributes", ["", ", count_include_pad = 1", ", pads = [0, 1, 0, 1], count_include_pad = 1"])
def test_average_pools(passes: Any, attributes: str) -> None:
    body = f"[pad] x = Pad(x0, pads) [layer] y = AveragePool <kernel_shape = [3, 3]{attributes}> (x)"
    proto, _ = passes(source(body), *PASSES, weights=values([0, 0, 2, 1, 0, 0, 2, 1]))
    (node,) = proto.graph.node
    assert pads_of(node) == ([2, 2, 2, 2] if "pads" in attributes else [2, 1, 2, 1])
    assert next(a.i for a in node.attribute if a.name == "count_include_pad") == 1


def test_pads_in_a_row(passes: Any) -> None:
    body = "[a] p = Pad(x0, pads) [b] q = Pad(p, more) [layer] y = Conv(q, w, b)"
    weights = {**values(), "more": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64)}
    proto, state = passes(source(body), *PASSES, weights=weights)
    assert passes.ops(proto) == ["Conv"]
    assert pads_of(proto.graph.node[0]) == [2, 3, 3, 2]
    assert sorted(state.origins["layer"]) == ["a", "b", "layer"]


def test_several_readers_that_all_take_it(passes: Any) -> None:
    body = "r = Relu(x0) [a] p = Pad(r, pads) [pad] x = Pad(p, pads) [one] y = Conv(x, w, b) [two] z = Conv(x, w)"
    proto, state = passes(source(body, outputs="y z"), *PASSES, weights=values([0, 0, 1, 1, 0, 0, 1, 1]))
    assert passes.ops(proto) == ["Relu", "Conv", "Conv"]
    assert {name: set(parts) for name, parts in state.origins.items()} == {
        "one": {"one", "pad", "a"},
        "two": {"two", "pad", "a"},
    }


@pytest.mark.parametrize(
    ("pad", "layer", "reason"),
    [
        ('Pad <mode = "reflect"> (x0, pads)', "Conv(x, w)", "it pads in mode 'reflect'"),
        ('Pad <mode = "edge"> (x0, pads)', "Conv(x, w)", "it pads in mode 'edge'"),
        ("Pad(x0, pads, one)", "Conv(x, w)", "it pads with 1, 'layer' with 0"),
        ("Pad(x0, crop)", "Conv(x, w)", "it crops: a pad is negative"),
        ("Pad(x0, batch)", "Conv(x, w)", "it pads other axes than the spatial ones"),
        ("Pad(x0, channels)", "Conv(x, w5)", "it pads other axes than the spatial ones"),
        ("Pad(x0, s)", "Conv(x, w)", "its pads are computed at run time"),
        ("Pad(x0, pads, v)", "Conv(x, w)", "what it pads with is computed at run time"),
        ("Pad(x0, pads)", 'Conv <auto_pad = "SAME_UPPER"> (x, w)', "'layer' pads by its output's size (auto_pad)"),
        (
            "Pad(x0, pads)",
            "MaxPool <kernel_shape = [2, 3]> (x)",
            "it pads as much as the kernel of 'layer' covers",
        ),
        (
            "Pad(x0, pads, low)",
            "MaxPool <kernel_shape = [3, 3], ceil_mode = 1> (x)",
            "'layer' rounds its output size up",
        ),
        ("Pad(x0, pads, low)", "MaxPool <kernel_shape = [3, 3], dilations = [2, 2]> (x)", "'layer' is dilated"),
        (
            "Pad(x0, pads)",
            "AveragePool <kernel_shape = [3, 3]> (x)",
            "averages over asymmetric pads are wrong in older",
        ),
        ("Pad(x0, even)", "AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x)", "'layer' does not count the"),
        ("Pad(x0, even, one)", "AveragePool <kernel_shape = [3, 3]> (x)", "it pads with 1, 'layer' with 0"),
    ],
)
def test_reasons(passes: Any, pad: str, layer: str, reason: str) -> None:
    weights = {
        **values(),
        "one": np.array(1, np.float32),
        "low": np.array(-np.inf, np.float32),
        "even": np.array([0, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "crop": np.array([0, 0, 1, -1, 0, 0, 1, 1], np.int64),
        "batch": np.array([1, 0, 1, 1, 0, 0, 1, 1], np.int64),
        "channels": np.array([0, 0, 1, 1, 0, 1, 1, 1], np.int64),
        "w5": normal(6, 5, 3, 3),
        "i": np.array(2, np.int64),
    }
    body = f"s = Mul(pads, i) v = Cast <to = 1> (i) [pad] x = {pad} [layer] y = {layer}"
    proto, state = passes(source(body, shape="[2, 4, 7, 7]"), *PASSES, weights=weights)
    assert "Pad" in passes.ops(proto)
    assert list(passes.reasons(state)) == ["pad"]
    assert passes.reasons(state)["pad"].startswith(reason)


def test_a_padded_weight_stays(passes: Any) -> None:
    text = source("[pad] x = Pad(w, pads) [layer] y = Conv(x0, x)", shape="[N, 4, 9, 9]")
    state = passes.state(passes.parse(text, **values()))
    InferShapes().run(state)
    assert FoldPad().run(state) == 0
    assert passes.reasons(state) == {"pad": "'layer' reads it as its weight"}


def test_indices_count_the_padding(passes: Any) -> None:
    body = "[pad] x = Pad(x0, pads, value) [layer] y, i = MaxPool <kernel_shape = [3, 3]> (x) z = Cast <to = 1> (i)"
    _, state = passes(source(body, outputs="y z"), *PASSES, weights=values(value=-np.inf))
    assert passes.reasons(state) == {"pad": "'layer' puts out indices, which count the padding"}


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("[pad] x = Pad(x0, pads) y = Conv(x, w) [n] z = Neg(x)", "y z", "Neg 'n' reads it too"),
        ("[pad] x = Pad(x0, pads) y = Conv(x, w)", "y x", "its result is a graph output"),
        ("[pad] x = Pad(x0, pads) y = Neg(x)", "y", None),
        ("[pad] x = Pad(x0, pads) y = ConvTranspose(x, wt)", "y", None),
    ],
)
def test_other_readers(passes: Any, body: str, outputs: str, reason: str | None) -> None:
    weights = {**values(), "wt": normal(4, 6, 3, 3)}
    proto, state = passes(source(body, outputs=outputs), *PASSES, weights=weights)
    assert "Pad" in passes.ops(proto)
    assert passes.reasons(state) == ({"pad": reason} if reason else {})


def test_bodies(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (bool f, float[N, 4, 7, 7] x0) => (float[N, 6, H, W] z) {
            [out] x = Pad(x0, pads) [both] u = Pad(x0, pads)
            z = If (f) <then_branch = t () => (float[N, 6, H, W] p) { [one] p = Conv(x, w) },
                        else_branch = e () => (float[N, 6, H, W] q) { [in] v = Pad(x0, pads) [two] c = Conv(v, w)
                            d = Conv(u, w) [neg] n = Neg(u) h = Conv(n, w) k = Add(d, h) q = Add(c, k) }>
        }""",
        *PASSES,
        weights=values(),
        feeds={"f": np.array(False)},
    )
    branch = next(node for node in proto.graph.node if node.op_type == "If")
    inner = [sorted(node.op_type for node in a.g.node) for a in branch.attribute]
    assert inner == [["Conv"], ["Add", "Add", "Conv", "Conv", "Conv", "Neg"]]
    assert list(passes.reasons(state)) == ["both"]


def test_running_it_twice_changes_nothing_more(passes: Any) -> None:
    proto, _ = passes(source("x = Pad(x0, pads) y = Conv(x, w, b)"), *PASSES, weights=values())
    again = passes.state(proto)
    assert FoldPad().run(again) == 0
    assert models.to_proto(again.graph, again.header) == models.to_proto(*models.to_graph(proto))


def test_float16(passes: Any) -> None:
    text = source("r = Relu(x0) x = Pad(r, pads, value) y = MaxPool <kernel_shape = [3, 3]> (x)", dtype="float16")
    proto, _ = passes(text, *PASSES, weights=values(dtype="float16"), tolerance=0)
    assert passes.ops(proto) == ["Relu", "MaxPool"]


def test_no_float_operator_is_left_between_integer_kernels() -> None:
    body = """c = Conv(x0, w0) r = Relu(c) p = Pad(r, pads) q = Conv(p, w1, b) s = Relu(q) t = Pad(s, pads)
        y = Conv(t, w1, b)"""
    weights = {"w0": weight(8, 3, 3, 3), "w1": weight(8, 8, 3, 3), "b": normal(8, scale=0.1), "pads": values()["pads"]}
    result = quantized(parse(body, "float[N, 3, 8, 8] x0", "float[N, 8, H, W] y", weights))
    assert "Pad" not in ops(result.model)
    assert result.report.integer_kernels == 3

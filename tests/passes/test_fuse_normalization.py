"""Layer and RMS normalization in parts become one operator, or the order of parts that the runtime fuses."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qdqtool import runtime
from qdqtool.graphs import model as models
from qdqtool.passes.fuse_normalization import FuseNormalization
from qdqtool.passes.infer_shapes import InferShapes

PASSES = (InferShapes(), FuseNormalization())
MEAN = "u = {mean}(x) d = Sub(x, u)"
LAYER = {
    "Pow, Div": f"{MEAN} p = Pow(d, two) [v] v = {{mean}}(p) w = Add(v, eps) s = Sqrt(w) n = Div(d, s)"
    " g = Mul(n, gamma) [last] y = Add(g, beta)",
    "Mul, Div": f"{MEAN} p = Mul(d, d) [v] v = {{mean}}(p) w = Add(eps, v) s = Sqrt(w) n = Div(d, s)"
    " g = Mul(gamma, n) [last] y = Add(beta, g)",
    "Reciprocal": f"{MEAN} p = Pow(d, two) [v] v = {{mean}}(p) w = Add(v, eps) s = Sqrt(w) r = Reciprocal(s)"
    " n = Mul(d, r) g = Mul(n, gamma) [last] y = Add(g, beta)",
    "one divided": f"{MEAN} p = Mul(d, d) [v] v = {{mean}}(p) w = Add(v, eps) s = Sqrt(w) r = Div(one, s)"
    " n = Mul(r, d) g = Mul(n, gamma) [last] y = Add(g, beta)",
    "Pow as root": f"{MEAN} p = Mul(d, d) [v] v = {{mean}}(p) w = Add(v, eps) s = Pow(w, half) n = Div(d, s)"
    " g = Mul(n, gamma) [last] y = Add(g, beta)",
    "Pow as inverse root": f"{MEAN} p = Mul(d, d) [v] v = {{mean}}(p) w = Add(v, eps) r = Pow(w, mhalf)"
    " n = Mul(d, r) g = Mul(n, gamma) [last] y = Add(g, beta)",
    "centred twice": f"{MEAN} u2 = {{mean}}(x) d2 = Sub(x, u2) p = Pow(d, two) [v] v = {{mean}}(p) w = Add(v, eps)"
    " s = Sqrt(w) n = Div(d2, s) g = Mul(n, gamma) [last] y = Add(g, beta)",
    "gamma first": f"{MEAN} p = Mul(d, d) [v] v = {{mean}}(p) w = Add(v, eps) s = Sqrt(w) r = Reciprocal(s)"
    " q = Mul(r, gamma) xq = Mul(x, q) uq = Mul(q, u) b = Sub(beta, uq) [last] y = Add(b, xq)",
    "plain": f"{MEAN} p = Mul(d, d) [v] v = {{mean}}(p) w = Add(v, eps) s = Sqrt(w) [last] y = Div(d, s)",
    "beta alone": f"{MEAN} p = Mul(d, d) [v] v = {{mean}}(p) w = Add(v, eps) s = Sqrt(w) n = Div(d, s)"
    " [last] y = Add(n, beta)",
    "gamma alone": f"{MEAN} p = Mul(d, d) [v] v = {{mean}}(p) w = Add(v, eps) s = Sqrt(w) n = Div(d, s)"
    " [last] y = Mul(n, wide)",
}
SQUARE = {
    "Pow, Div": "p = Pow(x, two) [v] v = {mean}(p) w = Add(v, eps) s = Sqrt(w) n = Div(x, s) [last] y = Mul(n, gamma)",
    "Reciprocal": "p = Mul(x, x) [v] v = {mean}(p) w = Add(v, eps) s = Sqrt(w) r = Reciprocal(s) n = Mul(x, r)"
    " [last] y = Mul(gamma, n)",
    "gamma first": "p = Mul(x, x) [v] v = {mean}(p) w = Add(v, eps) r = Pow(w, mhalf) q = Mul(gamma, r)"
    " [last] y = Mul(q, x)",
    "plain": "p = Pow(x, two) [v] v = {mean}(p) w = Add(v, eps) s = Sqrt(w) [last] y = Div(x, s)",
}
FUSED_ORDER = {
    "LayerNormalization": ["ReduceMean", "Sub", "Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul", "Add"],
    "RMSNormalization": ["Pow", "ReduceMean", "Add", "Sqrt", "Div", "Mul"],
}
FORMS = [("LayerNormalization", form) for form in LAYER.values()] + [
    ("RMSNormalization", form) for form in SQUARE.values()
]
OPSETS = {"LayerNormalization": 17, "RMSNormalization": 23}


def source(body: str, opset: int = 17, dtype: str = "float", outputs: str = "z", axes: str = "-1") -> str:
    given = ", ".join(f"{dtype}[N, T, C] {name}" for name in outputs.split())
    mean = f"ReduceMean <axes = [{axes}]>" if opset < 18 else "ReduceMean"
    text = body.replace("{mean}", mean)
    if opset >= 18:
        text = text.replace("ReduceMean(x)", "ReduceMean(x, axes)").replace("ReduceMean(p)", "ReduceMean(p, axes)")
    head = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({dtype}[N, T, 8] x0) => ({given})'
    return f"{head} <int64[1] axes = {{{axes}}}> {{ [before] x = Sin(x0) {text} [after] z = Abs(y) }}"


def constants(dtype: str = "float32", epsilon: float = 1e-3) -> dict[str, Any]:
    rng = np.random.default_rng(0)
    values = {"two": 2, "half": 0.5, "mhalf": -0.5, "one": 1, "eps": epsilon, "wide": rng.standard_normal((1, 1, 8))}
    values |= {"gamma": rng.standard_normal(8), "beta": rng.standard_normal(8)}
    return {name: np.asarray(value, dtype) for name, value in values.items()}


@pytest.mark.parametrize(("op", "form"), FORMS)
@pytest.mark.parametrize("opset", [13, 17, 18, 23, 25])
def test_every_order_becomes_one_kernel(passes: Any, op: str, form: str, opset: int) -> None:
    proto, state = passes(source(form, opset), *PASSES, weights=constants(), tolerance=2e-6)
    if opset >= OPSETS[op]:
        (node,) = (node for node in proto.graph.node if node.name not in ("before", "after"))
        assert (node.name, node.op_type, list(node.output)) == ("last", op, ["y"])
        assert {a.name: a.i or pytest.approx(a.f) for a in node.attribute} == {"axis": -1, "epsilon": 1e-3}
        assert len(state.origins["last"]) == form.count("=")
    else:
        assert sorted(passes.ops(proto)) == sorted(["Sin", *FUSED_ORDER[op], "Abs"])
    kernel = op if op == "LayerNormalization" or opset >= OPSETS[op] else "SimplifiedLayerNormalization"
    assert passes.ops(runtime.optimized(proto)) == ["Sin", kernel, "Abs"]


@pytest.mark.parametrize(("op", "form"), FORMS)
def test_running_it_twice_changes_nothing_more(passes: Any, op: str, form: str) -> None:
    for opset in (13, 23):
        proto, _ = passes(source(form, opset), *PASSES, weights=constants())
        again = passes.state(proto)
        InferShapes().run(again)
        assert FuseNormalization().run(again) == 0
        assert models.to_proto(again.graph, again.header) == models.to_proto(*models.to_graph(proto))


@pytest.mark.parametrize("opset", [13, 16])
def test_what_the_runtime_fuses_stays_as_it_is(passes: Any, opset: int) -> None:
    for op, form in (("LayerNormalization", LAYER["Pow, Div"]), ("RMSNormalization", SQUARE["Pow, Div"])):
        proto, state = passes(source(form, opset), *PASSES, weights=constants())
        assert len(proto.graph.node) == 2 + form.count("=")
        assert passes.reasons(state) == {"v": f"opset {opset} has no {op}, and the runtime fuses these parts itself"}


@pytest.mark.parametrize(("op", "form"), FORMS)
@pytest.mark.parametrize("opset", [13, 23])
def test_float16(passes: Any, op: str, form: str, opset: int) -> None:
    proto, _ = passes(source(form, opset, "float16"), *PASSES, weights=constants("float16"), tolerance=8e-3)
    assert sorted(passes.ops(proto)) == sorted(["Sin", "Abs", *([op] if opset == 23 else FUSED_ORDER[op])])
    assert {tensor.data_type for tensor in proto.graph.initializer} <= {7, 10}


def test_values_far_from_zero_are_as_exact_as_before(passes: Any) -> None:
    x = (np.random.default_rng(0).standard_normal((2, 5, 8)) + 3000).astype(np.float32)
    text, weights = source(LAYER["Mul, Div"]).replace("Sin(x0)", "Relu(x0)"), constants()
    proto, _ = passes(text, *PASSES, weights=weights, feeds={"x0": x}, tolerance=1e-2)
    assert passes.ops(proto) == ["Relu", "LayerNormalization", "Abs"]
    deviation = x - x.mean(axis=-1, keepdims=True, dtype=np.float64)
    normal = deviation / np.sqrt((deviation**2).mean(axis=-1, keepdims=True) + float(weights["eps"]))
    exact = np.abs(normal * weights["gamma"] + weights["beta"])
    before, after = (
        np.abs(passes.evaluate(model, {"x0": x})["z"] - exact).max() for model in (passes.parse(text, **weights), proto)
    )
    assert after <= 1.1 * before


def test_several_axes(passes: Any) -> None:
    model = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3, 4, 5] x) => (float[N, 3, 4, 5] z)
        {{ {LAYER["Mul, Div"].replace("{mean}", "ReduceMean <axes = [3, 2]>")} z = Abs(y) }}"""
    weights = {**constants(), "gamma": np.full((1, 4, 5), 2, np.float32), "beta": np.array([[1], [2], [3], [4]], "f4")}
    proto, _ = passes(model, *PASSES, weights=weights, tolerance=2e-6)
    node, _ = proto.graph.node
    assert (node.op_type, node.attribute[0].i) == ("LayerNormalization", -2)
    assert [passes.constant(proto, name).shape for name in node.input[1:]] == [(4, 5), (4, 5)]
    assert passes.ops(runtime.optimized(proto)) == ["LayerNormalization", "Abs"]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"axes = [-1]": "axes = [1]"}, "its mean is not known to be over the last axes"),
        (
            {"d = Sub(x, u)": "e = Exp(x) d = Sub(e, u)"},
            "opset 17 has no RMSNormalization, and the runtime fuses these",
        ),
        ({"n = Div(d, s)": "n = Div(x, s)"}, "its root does not divide what was squared"),
        ({"n = Div(d, s)": "n = Div(s, d)"}, "its root does not divide what was squared"),
        ({"z = Abs(y)": "z0 = Abs(y) z = Add(z0, s)"}, "'s' inside it is read elsewhere too, or is a graph output"),
        ({"z = Abs(y)": "z0 = Abs(y) z = Add(z0, d)"}, "'d' inside it is read elsewhere too, or is a graph output"),
        ({"float[N, T, 8] x0": "float[N, T, C] x0"}, "the sizes of the normalized axes of 'x' are not known"),
    ],
)
def test_reasons(passes: Any, changes: dict[str, str], reason: str) -> None:
    text = source(LAYER["Pow, Div"])
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    proto, state = passes(text, *PASSES, weights=constants(), feeds={"x0": np.ones((2, 8, 8), np.float32)})
    assert "LayerNormalization" not in passes.ops(proto)
    assert list(passes.reasons(state)) == ["v"]
    assert passes.reasons(state)["v"].startswith(reason)


def test_a_mean_that_is_no_last_axis_or_drops_it(passes: Any) -> None:
    for attributes in ("axes = [-1], keepdims = 0", "axes = [0, 1, 2]"):
        body = (
            f"p = Mul(x, x) [v] v = ReduceMean <{attributes}> (p) w = Add(v, eps) s = Sqrt(w) n = Div(x, s) y = Neg(n)"
        )
        text = source(body).replace("[N, T, 8] x0", "[8, 8, 8] x0")
        proto, state = passes(text, *PASSES, weights=constants())
        assert "Sqrt" in passes.ops(proto)
        assert len(state.skipped) == 1


def test_without_gamma_no_large_constant_is_made(passes: Any) -> None:
    model = f"""<ir_version: 8, opset_import: ["" : 17]> g (float[N, 3, 64, 64] x) => (float[N, 3, 64, 64] z)
        {{ {LAYER["plain"].replace("{mean}", "ReduceMean <axes = [2, 3]>")} z = Abs(y) }}"""
    proto, state = passes(model, *PASSES, weights=constants())
    assert "Sqrt" in passes.ops(proto)
    assert passes.reasons(state) == {"v": "without gamma it would need a constant as large as its last 2 axes"}


def test_several_axes_in_an_older_model_stay(passes: Any) -> None:
    model = f"""<ir_version: 8, opset_import: ["" : 13]> g (float[N, 3, 4, 8] x) => (float[N, 3, 4, 8] z)
        {{ {LAYER["gamma alone"].replace("{mean}", "ReduceMean <axes = [2, 3]>")} z = Abs(y) }}"""
    _, state = passes(model, *PASSES, weights=constants())
    assert passes.reasons(state) == {"v": "opset 13 has no LayerNormalization, and the runtime fuses one axis alone"}


def test_float64_stays(passes: Any) -> None:
    proto, state = passes(source(LAYER["Mul, Div"], dtype="double"), *PASSES, weights=constants("float64"))
    assert "Sqrt" in passes.ops(proto)
    assert passes.reasons(state) == {"v": "'x' is float64; LayerNormalization computes in float32"}


def test_gamma_that_varies_along_other_axes_stays_behind(passes: Any) -> None:
    weights = {**constants(), "gamma": np.arange(1.0, 6.0, dtype=np.float32).reshape(5, 1)}
    proto, _ = passes(source(LAYER["Mul, Div"]), *PASSES, weights=weights)
    assert passes.ops(proto) == ["Sin", "LayerNormalization", "Mul", "Add", "Abs"]
    proto, state = passes(source(LAYER["gamma first"]), *PASSES, weights=weights)
    assert "Sqrt" in passes.ops(proto)
    assert passes.reasons(state) == {"v": "its root does not divide what was squared"}


def test_a_difference_the_other_way_round_is_no_normalization(passes: Any) -> None:
    text = source(LAYER["gamma first"].replace("Sub(beta, uq)", "Sub(uq, beta)"))
    proto, state = passes(text, *PASSES, weights=constants())
    assert "Sqrt" in passes.ops(proto)
    assert passes.reasons(state) == {"v": "its root does not divide what was squared"}


def test_an_inner_graph_output_ends_it(passes: Any) -> None:
    proto, state = passes(source(LAYER["Mul, Div"], outputs="z n"), *PASSES, weights=constants())
    assert passes.ops(proto) == ["Sin", "LayerNormalization", "Mul", "Add", "Abs"]
    assert [node.output[0] for node in proto.graph.node][1] == "n"
    assert not state.skipped
    proto, state = passes(source(LAYER["Mul, Div"], outputs="z d"), *PASSES, weights=constants())
    assert passes.reasons(state) == {"v": "'d' inside it is read elsewhere too, or is a graph output"}


def test_bodies_read_and_hold_normalizations(passes: Any) -> None:
    outer = SQUARE["Pow, Div"].replace("{mean}", "ReduceMean").replace("(p)", "(p, axes)")
    inner = "".join(
        f"{name}2 = {rest} "
        for name, rest in (
            part.split(" = ")
            for part in (
                "p = Mul(x, x)",
                "v = ReduceMean(p2, axes)",
                "w = Add(v2, eps)",
                "s = Sqrt(w2)",
                "n = Div(x, s2)",
                "y = Mul(n2, gamma)",
            )
        )
    )
    proto, state = passes(
        f"""<ir_version: 8, opset_import: ["" : 23]> g (bool b, float[N, 5, 8] x) => (float[N, 5, 8] z,
                float[N, 5, 8] y) <int64[1] axes = {{-1}}> {{
            {outer}
            z = If (b) <then_branch = g1 () => (float[N, 5, 8] y2) {{ {inner} }},
                        else_branch = g2 () => (float[N, 5, 1] q) {{ q = Neg(s) }}>
        }}""",
        *PASSES,
        weights=constants(),
        feeds={"b": np.array(True)},
    )
    branch = next(node for node in proto.graph.node if node.op_type == "If")
    assert [[node.op_type for node in a.g.node] for a in branch.attribute] == [["RMSNormalization"], ["Neg"]]
    assert passes.reasons(state) == {"v": "'s' inside it is read elsewhere too, or is a graph output"}


@pytest.mark.parametrize("body", ["p = Mul(x, x) v = {mean}(p) y = Add(x, v)", "v = {mean}(x) y = Sub(x, v)"])
def test_other_means_are_no_candidates(passes: Any, body: str) -> None:
    _, state = passes(source(body), *PASSES, weights=constants())
    assert not state.skipped

"""Gelu in parts becomes one operator, or the order of parts that the runtime fuses."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from qdqtool import runtime
from qdqtool.graphs import model as models
from qdqtool.passes.fuse_gelu import FuseGelu
from qdqtool.passes.infer_shapes import InferShapes

PASSES = (InferShapes(), FuseGelu())
CONSTANTS = {
    "root2": math.sqrt(2),
    "rroot2": math.sqrt(0.5),
    "one": 1,
    "half": 0.5,
    "two": 2,
    "three": 3,
    "c": 0.044715,
    "k": math.sqrt(2 / math.pi),
    "ck": 0.044715 * math.sqrt(2 / math.pi),
    "mhalf": -0.5,
    "minus": -1,
}
ERF = {
    "late half": "d = Div(x, root2) [f] e = Erf(d) a = Add(e, one) m = Mul(x, a) [last] y = Mul(m, half)",
    "by reciprocal": "d = Mul(rroot2, x) [f] e = Erf(d) a = Add(one, e) m = Mul(a, x) [last] y = Mul(half, m)",
    "half x first": "h = Mul(x, half) d = Div(x, root2) [f] e = Erf(d) a = Add(e, one) [last] y = Mul(h, a)",
    "x / 2 first": "h = Div(x, two) d = Div(x, root2) [f] e = Erf(d) a = Add(e, one) [last] y = Mul(a, h)",
    "half before x": "d = Div(x, root2) [f] e = Erf(d) a = Add(e, one) h = Mul(a, half) [last] y = Mul(x, h)",
    "half inside": "d = Mul(x, rroot2) [f] e = Erf(d) h = Mul(e, half) a = Add(h, half) [last] y = Mul(a, x)",
    "divided by 2": "d = Div(x, root2) [f] e = Erf(d) a = Add(e, one) m = Mul(x, a) [last] y = Div(m, two)",
    "with signs": "d = Div(x, root2) [f] e = Erf(d) n = Neg(e) s = Sub(n, one) h = Mul(x, mhalf) [last] y = Mul(s, h)",
}
CUBE = "p = Pow(x, three) q = Mul(p, c) r = Add(x, q) u = Mul(r, k) [f] t = Tanh(u)"
TANH = {
    "late half": f"{CUBE} a = Add(t, one) m = Mul(x, a) [last] y = Mul(m, half)",
    "half x first": f"h = Mul(x, half) {CUBE} a = Add(t, one) [last] y = Mul(h, a)",
    "half before x": f"{CUBE} a = Add(one, t) h = Mul(half, a) [last] y = Mul(h, x)",
    "products": "s = Mul(x, x) p = Mul(x, s) q = Mul(c, p) r = Add(q, x) u = Mul(k, r) [f] t = Tanh(u) a = Add(t, one)"
    " m = Mul(x, a) [last] y = Mul(half, m)",
    "factored": "s = Mul(x, x) q = Mul(s, c) o = Add(one, q) w = Mul(x, k) u = Mul(o, w) [f] t = Tanh(u)"
    " a = Add(t, one) h = Mul(x, half) [last] y = Mul(h, a)",
    "spread": "w = Mul(x, k) p = Pow(x, three) q = Mul(p, ck) u = Add(w, q) [f] t = Tanh(u) a = Add(t, one)"
    " h = Mul(x, half) [last] y = Mul(h, a)",
}
FUSED_ORDER = {
    "none": ["Div", "Erf", "Add", "Mul", "Mul"],
    "tanh": ["Mul", "Pow", "Mul", "Add", "Mul", "Tanh", "Add", "Mul"],
}
FORMS = [("none", form) for form in ERF.values()] + [("tanh", form) for form in TANH.values()]


def source(body: str, opset: int = 17, dtype: str = "float", outputs: str = "z") -> str:
    given = ", ".join(f"{dtype}[N, 3, 8] {name}" for name in outputs.split())
    head = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({dtype}[N, 3, 8] x0) => ({given})'
    return f"{head} {{ [before] x = Exp(x0) {body} [after] z = Abs(y) }}"


def constants(dtype: str = "float32") -> dict[str, Any]:
    return {name: np.array(value, dtype) for name, value in CONSTANTS.items()}


@pytest.mark.parametrize("opset", [13, 17, 18])
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_an_older_model_gets_the_order_that_the_runtime_fuses(passes: Any, kind: str, form: str, opset: int) -> None:
    proto, state = passes(source(form, opset), *PASSES, weights=constants(), tolerance=1e-6)
    assert sorted(passes.ops(proto)) == sorted(["Exp", *FUSED_ORDER[kind], "Abs"])
    fused = passes.ops(runtime.optimized(proto))  # tanh: not from a graph input, nor to an output
    assert fused == ["Exp", "Gelu" if kind == "none" else "FastGelu", "Abs"]
    if list(passes.reasons(state).values()) != [f"opset {opset} has no Gelu, and the runtime fuses these parts itself"]:
        names = set(state.origins["last"])
        assert {"last", "f"} <= names
        assert all(set(state.origins[node.name]) == names for node in proto.graph.node[1:] if node.name != "after")


@pytest.mark.parametrize("opset", [20, 23, 25])
@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_a_newer_model_gets_the_operator(passes: Any, kind: str, form: str, opset: int) -> None:
    proto, state = passes(source(form, opset), *PASSES, weights=constants(), tolerance=1e-6)
    _, node, _ = proto.graph.node
    assert (node.name, node.op_type, list(node.input), list(node.output)) == ("last", "Gelu", ["x"], ["y"])
    assert [a.s for a in node.attribute] == ([b"tanh"] if kind == "tanh" else [])
    assert not proto.graph.initializer
    assert len(state.origins["last"]) == form.count("=")
    assert not state.skipped


@pytest.mark.parametrize(("kind", "form"), FORMS)
def test_running_it_twice_changes_nothing_more(passes: Any, kind: str, form: str) -> None:
    proto, _ = passes(source(form), *PASSES, weights=constants())
    again = passes.state(proto)
    InferShapes().run(again)
    assert FuseGelu().run(again) == 0
    assert models.to_proto(again.graph, again.header) == models.to_proto(*models.to_graph(proto))


def test_what_the_runtime_fuses_and_quantization_leaves_alone_stays_as_it_is(passes: Any) -> None:
    for form in (ERF["late half"], TANH["half x first"]):
        proto, state = passes(source(form), *PASSES, weights=constants())
        assert len(proto.graph.node) == 2 + form.count("=")
        assert passes.reasons(state) == {"f": "opset 17 has no Gelu, and the runtime fuses these parts itself"}
        assert not state.origins


@pytest.mark.parametrize(("kind", "form"), [("none", ERF["by reciprocal"]), ("tanh", TANH["products"])])
@pytest.mark.parametrize("opset", [17, 20])
def test_float16(passes: Any, kind: str, form: str, opset: int) -> None:
    proto, _ = passes(source(form, opset, "float16"), *PASSES, weights=constants("float16"), tolerance=2e-3)
    assert sorted(passes.ops(proto)) == sorted(["Exp", "Abs", *(["Gelu"] if opset == 20 else FUSED_ORDER[kind])])
    assert {tensor.data_type for tensor in proto.graph.initializer} <= {10}


def test_float64_stays(passes: Any) -> None:
    proto, state = passes(source(TANH["products"], 20, "double"), *PASSES, weights=constants("float64"))
    assert "Gelu" not in passes.ops(proto)
    assert passes.reasons(state) == {"f": "the runtime has no Gelu for type float64 on every provider"}


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("d = Div(x, root2) [f] e = Erf(d) y = Add(e, x)", "what follows is not the rest of a Gelu"),
        ("d = Div(x, two) [f] e = Erf(d) a = Add(e, one) m = Mul(x, a) [p] y = Mul(m, half)", "the rest of a Gelu"),
        ("d = Div(x, root2) [f] e = Erf(d) a = Add(e, one) m = Mul(x, a) [p] y = Mul(m, two)", "the rest of a Gelu"),
        ("d = Div(x, root2) [f] e = Erf(d) a = Add(e, half) m = Mul(x, a) [p] y = Mul(m, half)", "the rest of a Gelu"),
        ("n = Neg(x) d = Div(n, root2) [f] e = Erf(d) a = Add(e, one) m = Mul(x, a) y = Mul(m, half)", "the rest of a"),
        ("d = Div(x, root2) [f] e = Erf(d) a = Add(e, one) b = Mul(a, a) y = Mul(b, x)", "'a' is read elsewhere"),
        ("d = Div(x, root2) [f] y = Erf(d)", "the rest of a Gelu"),
        (f"{CUBE} a = Add(t, one) b = Exp(a) y = Mul(b, x)", "the rest of a Gelu"),
        (f"{ERF['half x first']} y2 = Neg(h)", "'h' inside it is read elsewhere too"),
        (f"{ERF['half x first']} y2 = Neg(d)", "'d' inside it is read elsewhere too"),
        (f"{ERF['late half']} y2 = Neg(m)", "'m' is read elsewhere too"),
        (f"{TANH['products']} y2 = Neg(s)", "'s' inside it is read elsewhere too"),
    ],
)
@pytest.mark.parametrize("opset", [17, 20])
def test_reasons(passes: Any, body: str, reason: str, opset: int) -> None:
    outputs = "z y2" if "y2" in body else "z"
    proto, state = passes(source(body, opset, outputs=outputs), *PASSES, weights=constants())
    assert len(proto.graph.node) == 2 + body.count("=")
    assert list(passes.reasons(state)) == ["f"]
    assert reason in passes.reasons(state)["f"]


@pytest.mark.parametrize(
    "body",
    [
        "t = Tanh(x) y = Mul(t, x)",
        "t = Tanh(x) a = Add(t, half) m = Mul(x, a) y = Mul(m, half)",
        "h = Mul(x, half) t = Tanh(h) y = Add(t, t)",
    ],
)
def test_other_uses_of_tanh_are_no_candidates(passes: Any, body: str) -> None:
    proto, state = passes(source(body), *PASSES, weights=constants())
    assert len(proto.graph.node) == 2 + body.count("=")
    assert not state.skipped


def test_an_inner_graph_output_is_kept(passes: Any) -> None:
    proto, state = passes(source(ERF["half before x"], 20, outputs="z a"), *PASSES, weights=constants())
    assert passes.ops(proto) == ["Exp", "Div", "Erf", "Add", "Mul", "Mul", "Abs"]
    assert passes.reasons(state) == {"f": "'a' is read elsewhere too, or is a graph output"}


@pytest.mark.parametrize("opset", [17, 20])
def test_bodies_read_and_hold_gelus(passes: Any, opset: int) -> None:
    form = ERF["by reciprocal"]
    inner = form.replace("[f]", "[f2]").replace("[last]", "[last2]")
    for name in ("d", "e", "a", "m", "y"):
        inner = inner.replace(f"{name} =", f"{name}2 =").replace(f"({name})", f"({name}2)")
    inner = inner.replace("(one, e)", "(one, e2)").replace("(a, x)", "(a2, x)").replace("(half, m)", "(half, m2)")
    proto, state = passes(
        f"""<ir_version: 8, opset_import: ["" : {opset}]> g (bool b, float[N, 3, 8] x) => (float[N, 3, 8] z,
                float[N, 3, 8] y) {{
            {form}
            z = If (b) <then_branch = g1 () => (float[N, 3, 8] y2) {{ {inner} }},
                        else_branch = g2 () => (float[N, 3, 8] q) {{ q = Neg(a) }}>
        }}""",
        *PASSES,
        weights=constants(),
        feeds={"b": np.array(True)},
    )
    branch = next(node for node in proto.graph.node if node.op_type == "If")
    wanted = ["Gelu"] if opset == 20 else FUSED_ORDER["none"]
    assert [[node.op_type for node in a.g.node] for a in branch.attribute] == [wanted, ["Neg"]]
    assert passes.reasons(state) == {"f": "'a' is read elsewhere too, or is a graph output"}


def test_several_gelus_share_their_constants(passes: Any) -> None:
    body = " ".join(
        f"d{i} = Mul(x{i}, rroot2) e{i} = Erf(d{i}) a{i} = Add(e{i}, one) m{i} = Mul(x{i}, a{i})"
        f" x{i + 1} = Mul(m{i}, half)"
        for i in range(3)
    )
    proto, state = passes(
        source(f"x0b = Exp(x) {body.replace('x0', 'x0b')} y = Neg(x3)", 20), *PASSES, weights=constants()
    )
    assert passes.ops(proto) == ["Exp", "Exp", *["Gelu"] * 3, "Neg", "Abs"]
    assert not state.skipped

"""Hard swish and hard sigmoid end up as integer kernels behind a convolution, elsewhere as one operator."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qdqtool import chains, runtime
from qdqtool.graphs import model as models
from qdqtool.passes.fuse_hard_swish import FuseHardSwish
from qdqtool.passes.infer_shapes import InferShapes
from tests.builders import normal, ops, parse, quantized, weight

PASSES = (InferShapes(), FuseHardSwish())
CONSTANTS = {"zero": 0, "half": 0.5, "one": 1, "three": 3, "mthree": -3, "six": 6, "sixth": 1 / 6, "two": 2}
SWISH = {
    "divided last": "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) [last] y = Div(m, six)",
    "divided before": "a = Add(three, x) c = Clip(a, zero, six) d = Div(c, six) [last] y = Mul(d, x)",
    "times a sixth": "a = Sub(x, mthree) c = Clip(a, zero, six) m = Mul(c, x) [last] y = Mul(sixth, m)",
    "x divided": "d = Div(x, six) a = Add(x, three) c = Clip(a, zero, six) [last] y = Mul(d, c)",
    "unit clip": "d = Mul(x, sixth) a = Add(d, half) c = Clip(a, zero, one) [last] y = Mul(x, c)",
    "Min of Relu": "a = Add(x, three) r = Relu(a) c = Min(r, six) m = Mul(x, c) [last] y = Div(m, six)",
    "HardSigmoid": "c = HardSigmoid <alpha = 0.16666667, beta = 0.5> (x) [last] y = Mul(x, c)",
}
GATE = {
    "parts": "a = Add(x, three) c = Clip(a, zero, six) [last] y = Div(c, six)",
    "unit clip": "d = Div(x, six) a = Add(half, d) [last] y = Clip(a, zero, one)",
    "Min of Relu": "a = Add(x, three) r = Relu(a) c = Min(six, r) [last] y = Mul(c, sixth)",
}


def source(body: str, opset: int = 17, *, dtype: str = "float", outputs: str = "z", conv: bool = False) -> str:
    given = ", ".join(f"{dtype}[N, 4, H, W] {name}" for name in outputs.split())
    head = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({dtype}[N, 4, 6, 6] x0) => ({given})'
    before = "Conv(x0, w, b)" if conv else "Sin(x0)"
    return f"{head} {{ [before] x = {before} {body} [after] z = Neg(y) }}"


def constants(dtype: str = "float32") -> dict[str, Any]:
    values = {name: np.array(value, dtype) for name, value in CONSTANTS.items()}
    return {**values, "w": 8 * normal(4, 4, 1, 1).astype(dtype), "b": normal(4).astype(dtype)}


def wide(dtype: str = "float32") -> dict[str, Any]:
    """Values beyond both ends of the clip."""
    return {"x0": np.linspace(-5, 5, 2 * 4 * 36, dtype=dtype).reshape(2, 4, 6, 6)}


def test_hard_swish_becomes_the_operator(passes: Any) -> None:
    for form in SWISH.values():
        text = source(form).replace("Sin(x0)", "Abs(x0)").replace("Abs(x0)", "Sub(x0, half)")
        proto, state = passes(text, *PASSES, weights=constants(), feeds=wide(), tolerance=1e-6)
        assert passes.ops(proto) == ["Sub", "HardSwish", "Neg"], form
        assert proto.graph.node[1].name == "last"
        assert len(state.origins["last"]) == form.count("=") - form.count("alpha") - form.count("beta")
        assert not state.skipped


@pytest.mark.parametrize("form", SWISH.values())
def test_before_opset_14_it_becomes_hard_sigmoid_and_product(passes: Any, form: str) -> None:
    proto, state = passes(source(form, 13), *PASSES, weights=constants(), feeds=wide(), tolerance=1e-6)
    assert passes.ops(proto) == ["Sin", "HardSigmoid", "Mul", "Neg"]
    names = set(state.origins.get("last", ()))
    assert all(set(state.origins.get(node.name, names)) == names for node in proto.graph.node)


@pytest.mark.parametrize("form", GATE.values())
@pytest.mark.parametrize("opset", [13, 22])
def test_hard_sigmoid_becomes_the_operator(passes: Any, form: str, opset: int) -> None:
    proto, state = passes(source(form, opset), *PASSES, weights=constants(), feeds=wide(), tolerance=1e-6)
    _, node, _ = proto.graph.node
    assert (node.name, node.op_type) == ("last", "HardSigmoid")
    assert {a.name: a.f for a in node.attribute} == {"alpha": pytest.approx(1 / 6), "beta": pytest.approx(0.5)}
    assert len(state.origins["last"]) == form.count("=")


@pytest.mark.parametrize("form", [*SWISH.values(), "[last] y = HardSwish(x)"])
def test_behind_a_convolution_integer_kernels_are_kept(passes: Any, form: str) -> None:
    proto, state = passes(source(form, conv=True), *PASSES, weights=constants(), tolerance=1e-6)
    assert passes.ops(proto) == ["Conv", "Add", "Clip", "Mul", "Mul", "Neg"]
    assert proto.graph.node[4].name == "last"
    assert passes.constant(proto, proto.graph.node[4].input[1]) == np.float32(1 / 6)
    names = {name for node in proto.graph.node for name in state.origins.get(node.name, ())}
    assert "last" in names
    assert all(set(state.origins[node.name]) == names for node in proto.graph.node[1:-1])
    assert not state.skipped


@pytest.mark.parametrize("form", [*GATE.values(), "[last] y = HardSigmoid <alpha = 0.16666667> (x)"])
def test_a_gate_folds_into_its_layer(passes: Any, form: str) -> None:
    proto, _ = passes(source(form, conv=True), *chains.preparation(), weights=constants(), tolerance=2e-6)
    assert passes.ops(proto) == ["Conv", "Clip", "Neg"]
    ends = [passes.constant(proto, name) for name in proto.graph.node[1].input[1:]]
    assert ends == [0, 1]


@pytest.mark.parametrize("form", [*SWISH.values(), *GATE.values()])
@pytest.mark.parametrize("conv", [False, True])
def test_running_it_twice_changes_nothing_more(passes: Any, form: str, conv: bool) -> None:
    proto, _ = passes(source(form, conv=conv), *PASSES, weights=constants())
    again = passes.state(proto)
    InferShapes().run(again)
    assert FuseHardSwish().run(again) == 0
    assert models.to_proto(again.graph, again.header) == models.to_proto(*models.to_graph(proto))


@pytest.mark.parametrize("form", [SWISH["divided last"], GATE["parts"]])
@pytest.mark.parametrize("conv", [False, True])
def test_float16(passes: Any, form: str, conv: bool) -> None:
    values = {**constants("float16"), "w": normal(4, 4, 1, 1).astype(np.float16)}
    text = source(form, dtype="float16", conv=conv)
    proto, _ = passes(text, *PASSES, weights=values, feeds=wide("float16"), tolerance=3e-3)
    wanted = ["HardSwish"] if form == SWISH["divided last"] else ["Mul", "Add", "Clip"] if conv else ["HardSigmoid"]
    assert passes.ops(proto)[1:-1] == wanted  # integer kernels take float32 alone
    assert {tensor.data_type for tensor in proto.graph.initializer} <= {10}


def test_float64_stays(passes: Any) -> None:
    proto, state = passes(source(SWISH["divided last"], dtype="double"), *PASSES, weights=constants("float64"))
    assert "HardSwish" not in passes.ops(proto)
    assert passes.reasons(state) == {"Clip_2": "the runtime has no HardSigmoid for type float64 on every provider"}


@pytest.mark.parametrize(
    "body",
    [
        "a = Add(x, three) y = Clip(a, zero, six)",
        "a = Add(x, three) c = Clip(a, one, six) m = Mul(x, c) y = Div(m, six)",
        "a = Add(x, three) c = Clip(a, zero, six) m = Mul(x, c) y = Div(m, two)",
        "a = Sub(three, x) c = Clip(a, zero, six) y = Div(c, six)",
        "y = Clip(x, zero, one)",
        "d = Mul(x, two) y = Clip(d, zero, one)",
        "r = Relu(x) y = Min(r, x)",
        "y = HardSigmoid(x)",
        "c = HardSigmoid(x) m = Mul(c, x) y = Mul(m, two)",
    ],
)
def test_other_clips_are_no_candidates(passes: Any, body: str) -> None:
    proto, state = passes(source(body), *PASSES, weights=constants())
    assert len(proto.graph.node) == 2 + body.count("=")
    assert not state.skipped


@pytest.mark.parametrize("inner", ["a", "c", "m"])
def test_an_inner_graph_output_is_kept(passes: Any, inner: str) -> None:
    text = source(SWISH["divided last"], outputs=f"z {inner}")
    proto, state = passes(text, *PASSES, weights=constants(), feeds=wide())
    assert passes.ops(proto) == ["Sin", "Add", "Clip", "Mul", "Div", "Neg"]
    wanted = {"Clip_2": "'a' inside it is read elsewhere too, or is a graph output"} if inner == "a" else {}
    assert passes.reasons(state) == wanted  # of the others nothing tells that they belong together


def test_a_factor_in_front_belongs_to_the_formula_only_where_nothing_else_reads_it(passes: Any) -> None:
    body = "d = Mul(x, sixth) a = Add(d, half) y = Clip(a, zero, one)"
    proto, _ = passes(source(body, outputs="z d"), *PASSES, weights=constants(), feeds=wide())
    assert passes.ops(proto) == ["Sin", "Mul", "HardSigmoid", "Neg"]
    assert [a.f for a in proto.graph.node[2].attribute] == [1, 0.5]


def test_bodies_read_and_hold_them(passes: Any) -> None:
    proto, state = passes(
        f"""<ir_version: 8, opset_import: ["" : 17]> g (bool f, float[N, 4, 6, 6] x, float[N, 4, 6, 6] v)
                => (float[N, 4, 6, 6] z, float[N, 4, 6, 6] y) {{
            {GATE["parts"]} [across] g = HardSigmoid <alpha = 0.125> (v)
            z = If (f) <then_branch = g1 () => (float[N, 4, 6, 6] p)
                            {{ a2 = Add(x, three) c2 = Clip(a2, zero, six) m2 = Mul(x, c2) p = Div(m2, six) }},
                        else_branch = g2 () => (float[N, 4, 6, 6] q) {{ n = Neg(a) q = Mul(n, g) }}>
        }}""",
        *PASSES,
        weights=constants(),
        feeds={"f": np.array(True)},
    )
    branch = next(node for node in proto.graph.node if node.op_type == "If")
    assert [[node.op_type for node in a.g.node] for a in branch.attribute] == [["HardSwish"], ["Neg", "Mul"]]
    assert passes.reasons(state) == {"Clip_1": "'a' inside it is read elsewhere too, or is a graph output"}


def test_a_product_inside_a_body_takes_its_gate_there(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 17]> g (bool f, float[N, 4, 6, 6] x0) => (float[N, 4, 6, 6] z) {
            x = Conv(x0, w, b) [gate] g = HardSigmoid <alpha = 0.125> (x)
            z = If (f) <then_branch = g1 () => (float[N, 4, 6, 6] p) { p = Neg(x) },
                        else_branch = g2 () => (float[N, 4, 6, 6] q) { n = Exp(x0) [product] q = Mul(n, g) }>
        }""",
        *PASSES,
        weights=constants(),
        feeds={"f": np.array(False)},
        tolerance=1e-6,
    )
    assert passes.ops(proto) == ["Conv", "If"]
    branch = [[node.op_type for node in a.g.node] for a in proto.graph.node[1].attribute]
    assert branch == [["Neg"], ["Exp", "Add", "Clip", "Mul", "Mul"]]
    assert set(state.origins["product"]) == {"gate", "product"}


BLOCK = """c0 = Conv(x0, w0, b0) a0 = HardSwish(c0) c1 = Conv <group = 8, pads = [1, 1, 1, 1]> (a0, w1, b1)
    p = GlobalAveragePool(c1) s0 = Conv(p, w2, b2) r = Relu(s0) s1 = Conv(r, w3, b3)
    g = HardSigmoid <alpha = 0.16666667> (s1) m = Mul(c1, g) [act] a1 = HardSwish(m) [project] y = Conv(a1, w4, b4)"""


def test_a_block_of_mobilenet_v3_runs_in_integers_throughout() -> None:
    values = {f"b{i}": normal(8 if i != 2 else 2, seed=i, scale=0.3) for i in range(5)}
    shapes = [(8, 3, 1, 1), (8, 1, 3, 3), (2, 8, 1, 1), (8, 2, 1, 1), (8, 8, 1, 1)]
    values |= {f"w{i}": 2 * weight(*shape, seed=i) for i, shape in enumerate(shapes)}
    result = quantized(parse(BLOCK, "float[N, 3, 8, 8] x0", "float[N, 8, 8, 8] y", values))
    assert result.report.verification is not None
    assert result.report.verification.worst_db > 28
    kernels = ops(runtime.optimized(result.model))
    others = [op for op in kernels if not op.startswith("QLinear") and op != "Transpose"]
    assert others == ["QuantizeLinear", "DequantizeLinear"]
    assert kernels.count("QLinearAdd") == 2
    assert kernels.count("QLinearMul") == 3  # two for hard swish, one for the gate


def test_a_part_excluded_by_name_keeps_the_whole_in_float() -> None:
    values = {f"b{i}": normal(8 if i != 2 else 2, seed=i, scale=0.3) for i in range(5)}
    shapes = [(8, 3, 1, 1), (8, 1, 3, 3), (2, 8, 1, 1), (8, 2, 1, 1), (8, 8, 1, 1)]
    values |= {f"w{i}": 2 * weight(*shape, seed=i) for i, shape in enumerate(shapes)}
    model = parse(BLOCK, "float[N, 3, 8, 8] x0", "float[N, 8, 8, 8] y", values)
    result = quantized(model, nodes_to_exclude=["act"])
    left = {skip.node for skip in result.report.skipped if skip.reason == "excluded by name (act)"}
    assert {"act.add", "act.product", "project"} <= left  # whose factor is in the weights of the last

"""Consecutive nodes that only move values, or only change shape, become one or none."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import pytest

from qdqtool.graphs import model as models
from qdqtool.passes.infer_shapes import InferShapes
from qdqtool.passes.merge_moves import MergeMoves

PASSES = (InferShapes(), MergeMoves())


def source(body: str, *, opset: int = 13, shape: str = "[2, 3, 4]", outputs: str = "z", dtype: str = "float") -> str:
    given = ", ".join(f"{dtype} {name}" for name in outputs.split())
    head = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({dtype}{shape} x0) => ({given})'
    return f"{head} {{ [before] x = Abs(x0) {body} [after] z = Neg(y) }}"


def targets(**shapes: list[int]) -> dict[str, Any]:
    return {name: np.array(shape, np.int64) for name, shape in shapes.items()}


def attribute(node: Any, name: str) -> list[int]:
    return next(list(a.ints) for a in node.attribute if a.name == name)


def test_transposes_are_composed(passes: Any) -> None:
    body = "[one] t = Transpose <perm = [1, 2, 0]> (x) [two] y = Transpose <perm = [0, 2, 1]> (t)"
    proto, state = passes(source(body), *PASSES, tolerance=0)
    assert passes.ops(proto) == ["Abs", "Transpose", "Neg"]
    assert attribute(proto.graph.node[1], "perm") == [1, 0, 2]
    assert state.origins == {"two": ("two", "one")}


@pytest.mark.parametrize(
    ("first", "second", "perm"),
    [
        (" <perm = [2, 0, 1]> ", " <perm = [1, 2, 0]> ", None),
        ("", "", None),
        (" <perm = [0, 2, 1]> ", "", [1, 2, 0]),
        ("", " <perm = [0, 2, 1]> ", [2, 0, 1]),
    ],
)
def test_default_orders_and_inverses(passes: Any, first: str, second: str, perm: list[int] | None) -> None:
    proto, _ = passes(source(f"t = Transpose{first}(x) y = Transpose{second}(t)"), *PASSES, tolerance=0)
    assert passes.ops(proto) == (["Abs", "Neg"] if perm is None else ["Abs", "Transpose", "Neg"])
    assert perm is None or attribute(proto.graph.node[1], "perm") == perm


def test_a_long_chain_becomes_one(passes: Any) -> None:
    steps = " ".join(f"t{i + 1} = Transpose <perm = [1, 2, 0]> (t{i})" for i in range(4))
    proto, _ = passes(source(steps.replace("(t0)", "(x)").replace("t4 =", "y =")), *PASSES, tolerance=0)
    assert passes.ops(proto) == ["Abs", "Transpose", "Neg"]
    steps = " ".join(f"t{i + 1} = Transpose <perm = [1, 2, 0]> (t{i})" for i in range(6))
    proto, _ = passes(source(steps.replace("(t0)", "(x)").replace("t6 =", "y =")), *PASSES, tolerance=0)
    assert passes.ops(proto) == ["Abs", "Neg"]


def test_a_transpose_with_other_readers(passes: Any) -> None:
    body = "t = Transpose <perm = [0, 2, 1]> (x) [two] y = Transpose <perm = [1, 0, 2]> (t) u = Exp(t)"
    proto, state = passes(source(body, outputs="z u"), *PASSES, tolerance=0)
    assert passes.ops(proto).count("Transpose") == 2
    assert passes.reasons(state) == {"two": "'t' is read elsewhere too, or is a graph output"}
    body = "t = Transpose <perm = [0, 2, 1]> (x) y = Transpose <perm = [0, 2, 1]> (t) u = Exp(t)"
    proto, state = passes(source(body, outputs="z u"), *PASSES, tolerance=0)
    assert passes.ops(proto).count("Transpose") == 1  # the second still returns what the first read
    assert not state.skipped


def test_a_transpose_of_unknown_rank_stays(passes: Any) -> None:
    state = passes.state(passes.parse(source("t = Transpose(x) [two] y = Transpose(t)", shape="")))
    assert MergeMoves().run(state) == 0
    assert passes.reasons(state) == {"two": "the rank of 't' is not known"}


@pytest.mark.parametrize("opset", [13, 14, 21, 25])
@pytest.mark.parametrize(
    ("body", "wanted"),
    [
        ("t = Reshape(x, a) y = Reshape(t, b)", [4, 6]),
        ("t = Reshape(x, a) y = Reshape(t, c)", [4, 6]),
        ("t = Flatten <axis = 2> (x) y = Reshape(t, c)", [4, 6]),
        ("t = Reshape(x, a) y = Flatten(t)", [2, 12]),
        ("t = Unsqueeze(x, one) y = Reshape(t, b)", [4, 6]),
        ("t = Unsqueeze(x, one) y = Unsqueeze(t, one)", [2, 1, 1, 3, 4]),
        ("t = Unsqueeze(x, one) s = Unsqueeze(t, one) y = Flatten(s)", [2, 12]),
        ("t = Reshape(x, a) s = Reshape(t, b) y = Unsqueeze(s, one)", [4, 1, 6]),
    ],
)
def test_the_last_shape_wins(passes: Any, body: str, wanted: list[int], opset: int) -> None:
    weights = targets(a=[2, -1], b=[4, 6], c=[4, -1], one=[1])
    proto, state = passes(source(body, opset=opset), *PASSES, weights=weights, tolerance=0)
    assert passes.ops(proto) == ["Abs", "Reshape", "Neg"]
    assert list(passes.constant(proto, proto.graph.node[1].input[1])) == wanted
    assert not state.skipped


@pytest.mark.parametrize(
    ("body", "shape", "wanted"),
    [
        ("t = Reshape(x, a) y = Reshape(t, b)", "[N, 3, 4]", [-1, 6]),
        ("t = Reshape(x, a) y = Reshape(t, zero)", "[N, 3, 4]", [-1, 2, 6]),
        ("t = Flatten(x) y = Reshape(t, d)", "[N, 3, 4]", [-1, 6, 2]),
        ("t = Unsqueeze(x, one) y = Squeeze(t, last)", "[N, 3, 1]", [-1, 1, 3]),
        ("t = Unsqueeze(x, end) y = Reshape(t, keep)", "[N, T, 4]", [0, 0, 2, 2]),
    ],
)
def test_sizes_that_are_not_known(passes: Any, body: str, shape: str, wanted: list[int]) -> None:
    weights = targets(a=[-1, 12], b=[-1, 6], zero=[0, 2, 6], d=[0, 6, 2], one=[1], last=[3], end=[3], keep=[0, 0, 2, 2])
    proto, _ = passes(source(body, shape=shape), *PASSES, weights=weights, tolerance=0)
    assert passes.ops(proto) == ["Abs", "Reshape", "Neg"]
    assert list(passes.constant(proto, proto.graph.node[1].input[1])) == wanted


@pytest.mark.parametrize(
    ("body", "shape"),
    [
        ("t = Reshape(x, a) y = Reshape(t, back)", "[2, 3, 4]"),
        ("t = Flatten(x) y = Reshape(t, back)", "[N, 3, 4]"),
        ("t = Reshape(x, flat) y = Reshape(t, back)", "[N, 3, 4]"),
        ("t = Unsqueeze(x, one) y = Squeeze(t, one)", "[N, T, C]"),
        ("t = Unsqueeze(x, two) y = Squeeze(t, minus)", "[N, T, C]"),
        ("t = Squeeze(x, one) y = Unsqueeze(t, one)", "[N, 1, C]"),
        ("t = Unsqueeze(x, two) s = Unsqueeze(t, one) r = Squeeze(s, one) y = Squeeze(r, two)", "[2, 3, 4]"),
    ],
)
def test_what_comes_back_to_where_it_began_disappears(passes: Any, body: str, shape: str) -> None:
    weights = targets(a=[-1], back=[-1, 3, 4], flat=[-1, 12], one=[1], two=[0, 2], minus=[-5, -3])
    proto, state = passes(source(body, shape=shape), *PASSES, weights=weights, tolerance=0)
    assert passes.ops(proto) == ["Abs", "Neg"]
    assert not state.skipped


def test_an_attribute_holds_the_axes_of_older_models(passes: Any) -> None:
    body = "t = Unsqueeze <axes = [1]> (x) y = Squeeze <axes = [1]> (t)"
    proto, _ = passes(source(body, opset=11, shape="[N, T, C]"), *PASSES, tolerance=0)
    assert passes.ops(proto) == ["Abs", "Neg"]


@pytest.mark.parametrize(
    ("body", "outputs", "reason"),
    [
        ("t = Reshape(x, a) [two] y = Reshape(t, b) u = Exp(t)", "z u", "'t' is read elsewhere too, or is a graph"),
        ("t = Reshape(x, a) [two] y = Reshape(t, b)", "z t", "'t' is read elsewhere too, or is a graph output"),
        ("t = Unsqueeze(x, one) [two] y = Unsqueeze(t, one)", "z", "more than one size of 'y' is not known"),
        ("s = Shape(x) t = Unsqueeze(x, one) [two] y = Reshape(t, s)", "z", None),
    ],
)
def test_reasons(passes: Any, body: str, outputs: str, reason: str | None) -> None:
    text = source(body, shape="[?, ?, 4]", outputs=outputs)
    feeds = {"x0": np.ones((3, 4, 4), np.float32)}
    proto, state = passes(text, *PASSES, weights=targets(a=[-1, 8], b=[4, -1], one=[1]), feeds=feeds, tolerance=0)
    assert len(proto.graph.node) == 2 + body.count("=")
    assert list(passes.reasons(state)) == ["two"]
    assert passes.reasons(state)["two"].startswith(reason or "more than one size of 'y' is not known")


def test_tensors_without_elements_stay(passes: Any) -> None:
    body = "t = Reshape <allowzero = 1> (x, a) [two] y = Reshape <allowzero = 1> (t, b)"
    text = source(body, shape="[0, 3]", opset=14)
    proto, state = passes(
        text, *PASSES, weights=targets(a=[3, 0], b=[1, 0, 2]), feeds={"x0": np.ones((0, 3), np.float32)}
    )
    assert passes.ops(proto).count("Reshape") == 2
    assert list(passes.reasons(state)) == ["two"]


def test_an_axis_is_no_rest_of_nothing(passes: Any) -> None:
    body = "t = Reshape <allowzero = 1> (x, a) [two] y = Reshape <allowzero = 1> (t, b)"
    text, feeds = source(body, shape="[N, 0]", opset=14), {"x0": np.ones((2, 0), np.float32)}
    proto, _ = passes(text, *PASSES, weights=targets(a=[5, 0], b=[3, 0]), feeds=feeds)
    assert passes.ops(proto).count("Reshape") == 2


def test_an_axis_that_moved_is_not_copied(passes: Any) -> None:
    text = source("t = Unsqueeze(x, first) [two] y = Unsqueeze(t, first)", shape="[N, T, 4]")
    proto, state = passes(text, *PASSES, weights=targets(first=[0]))
    assert passes.ops(proto).count("Unsqueeze") == 2
    assert passes.reasons(state) == {"two": "more than one size of 'y' is not known"}


def test_both_ends_are_known_outside(passes: Any) -> None:
    body = "t = Transpose(x) [two] y = Transpose(t)"
    proto, _ = passes(source(body, outputs="x y z"), *PASSES, tolerance=0)
    assert passes.ops(proto) == ["Abs", "Identity", "Neg"]
    body = "t = Unsqueeze(x, one) [two] y = Squeeze(t, one)"
    proto, _ = passes(source(body, outputs="x y z"), *PASSES, weights=targets(one=[1]), tolerance=0)
    assert passes.ops(proto) == ["Abs", "Identity", "Neg"]
    assert len(proto.graph.node[1].input) == 1
    proto, _ = passes(source("t = Transpose(x) y = Transpose(t)", outputs="y z"), *PASSES, tolerance=0)
    assert passes.ops(proto) == ["Abs", "Neg"]
    assert proto.graph.node[0].output[0] == "y"


def test_bodies(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (bool f, float[2, 3] x) => (float[A, B] z) {
            t = Transpose(x) u = Transpose(x)
            z = If (f) <then_branch = g1 () => (float[A, B] p) { s = Transpose(t) p = Neg(s) },
                        else_branch = g2 () => (float[A, B] q) { a = Transpose(u) b = Transpose(a) c = Transpose(b)
                            [last] q = Neg(c) }>
        }""",
        *PASSES,
        feeds={"f": np.array(False)},
        tolerance=0,
    )
    branch = next(node for node in proto.graph.node if node.op_type == "If")
    assert [[node.op_type for node in a.g.node] for a in branch.attribute] == [["Neg"], ["Neg"]]
    assert passes.ops(proto) == ["If"]
    assert not state.skipped


def test_running_it_twice_changes_nothing_more(passes: Any) -> None:
    body = "t = Reshape(x, a) s = Reshape(t, b) r = Transpose(s) y = Transpose <perm = [0, 1]> (r)"
    proto, _ = passes(source(body), *PASSES, weights=targets(a=[2, -1], b=[4, 6]), tolerance=0)
    again = passes.state(proto)
    InferShapes().run(again)
    assert MergeMoves().run(again) == 0
    assert models.to_proto(again.graph, again.header) == models.to_proto(*models.to_graph(proto))


def test_nodes_that_share_constants_are_not_compared_with_each_other(passes: Any, monkeypatch: Any) -> None:
    compared = []
    equal = gs.Node.__eq__
    body = " ".join(f"t{i} = Reshape(x{i}, a) s{i} = Reshape(t{i}, b) x{i + 1} = Abs(s{i})" for i in range(400))
    text = source(f"x0b = Abs(x) {body.replace('(x0,', '(x0b,')} y = Neg(x400)", shape="[2, 12]")
    state = passes.state(passes.parse(text, **targets(a=[6, 4], b=[2, -1])))

    def counted(one: Any, other: Any) -> bool:
        compared.append(1)
        return bool(equal(one, other))

    monkeypatch.setattr(gs.Node, "__eq__", counted)
    InferShapes().run(state)
    assert MergeMoves().run(state) == 400
    assert len(compared) < 1200

"""Nodes that change nothing go, and names known outside stay."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qdqtool.passes.infer_shapes import InferShapes
from qdqtool.passes.remove_identity import RemoveIdentity


def test_identity_dropout_and_cast_to_the_same_type_go(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[2] x) => (float[2] y) <float r = {0.5}, bool t = {0}> {
            a = Relu(x) b = Identity(a) c = Dropout(b) d, m = Dropout(c, r, t) e = Cast <to = 1> (d) y = Neg(e)
        }""",
        InferShapes(),
        RemoveIdentity(),
    )
    assert passes.ops(proto) == ["Relu", "Neg"]
    assert not state.skipped


def test_a_graph_output_keeps_its_name(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[2] x) => (float[2] y, float[2] z) {
            a = Relu(x) y = Identity(a) z = Neg(a)
        }""",
        RemoveIdentity(),
    )
    assert passes.ops(proto) == ["Relu", "Neg"]
    assert proto.graph.node[0].output[0] == "y"
    assert proto.graph.node[1].input[0] == "y"


def test_an_input_handed_to_an_output_stays(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[2] x) => (float[2] y, float[2] a, float[2] b) {
            y = Identity(x) a = Relu(x) b = Identity(a)
        }""",
        RemoveIdentity(),
    )
    assert passes.ops(proto) == ["Identity", "Relu", "Identity"]
    assert [skip.node for skip in state.skipped] == ["Identity_0", "Identity_2"]


def test_a_dropout_that_is_more_than_an_identity_stays(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[2] x, bool t) => (float[2] y, bool[2] n)
                <float r = {0.0}> {
            a, m = Dropout(x) n = Not(m) b = Dropout(a, r, t) y = Relu(b)
        }""",
        RemoveIdentity(),
        feeds={"t": np.array(False)},
    )
    assert passes.ops(proto) == ["Dropout", "Not", "Dropout", "Relu"]
    assert passes.reasons(state) == {
        "Dropout_0": "its mask is read",
        "Dropout_2": "whether it is in training mode is decided at run time",
    }


def test_a_cast_that_converts_stays_without_remark(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float[2] x) => (float[2] y) {
            a = Cast <to = 7> (x) y = Cast <to = 1> (a)
        }""",
        InferShapes(),
        RemoveIdentity(),
    )
    assert passes.ops(proto) == ["Cast", "Cast"]
    assert not state.skipped


def test_identities_around_and_inside_bodies(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (bool c, float[2] x) => (float[2] y) {
            a = Identity(x)
            y = If (c) <then_branch = t () => (float[2] p) { h = Identity(a) p = Relu(h) },
                        else_branch = e () => (float[2] q) { q = Identity(x) }>
        }""",
        RemoveIdentity(),
    )
    assert passes.ops(proto) == ["If"]
    bodies = [[node.op_type for node in a.g.node] for a in proto.graph.node[0].attribute]
    assert bodies == [["Relu"], ["Identity"]]


VALUES = {
    "zero": np.zeros((), np.float32),
    "zeros": np.zeros((3, 1), np.float32),
    "ones": np.ones((1, 1, 4), np.float32),
    "nearly": np.array([1, 1, 1, 1.0000001], np.float32),
    "wide": np.ones((1, 1, 1, 1), np.float32),
    "many": np.ones((3, 4), np.float32),
    "izero": np.array(0, np.int64),
    "same": np.array([2, 3, 4], np.int64),
    "rest": np.array([0, -1, 4], np.int64),
    "less": np.array([3, 4], np.int64),
    "turned": np.array([-1, 4, 3], np.int64),
    "unit": np.array([1, 1, 1], np.int64),
    "start": np.array([0, 0], np.int64),
    "one": np.array([1, 1], np.int64),
    "two": np.array([2, 1], np.int64),
    "end": np.array([2**63 - 1, 4], np.int64),
    "short": np.array([2**63 - 1, 3], np.int64),
    "axes": np.array([0, 2], np.int64),
    "minus": np.array([-1, 1], np.int64),
    "nopads": np.zeros(6, np.int64),
    "pads": np.array([0, 0, 0, 0, 0, 1], np.int64),
}


def around(body: str, shape: str = "[2, 3, 4]", opset: int = 13, dtype: str = "float") -> str:
    head = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({dtype}{shape} x0) => ({dtype} z)'
    return f"{head} {{ x = Abs(x0) {body} z = Neg(y) }}"


def operator(node: str) -> str:
    return node.partition("(")[0].partition(" ")[0]


def removed(passes: Any, text: str, **fields: Any) -> list[str]:
    """Operators between the first node and the last, after the pass; nothing is said about those that stay."""
    proto, state = passes(text, InferShapes(), RemoveIdentity(), weights=VALUES, tolerance=0, **fields)
    assert not state.skipped
    return list(passes.ops(proto)[1:-1])


@pytest.mark.parametrize(
    "node",
    [
        "Reshape(x, same)",
        "Reshape(x, rest)",
        "Transpose <perm = [0, 1, 2]> (x)",
        "Expand(x, unit)",
        "Expand(x, less)",
        "Tile(x, unit)",
        "Slice(x, start, end, axes)",
        "Slice(x, start, end, axes, one)",
        "Pad(x, nopads)",
        'Pad <mode = "reflect"> (x, nopads)',
        "Concat <axis = 1> (x)",
        "Sum(x)",
        "Max(x)",
        "Min(x)",
        "Mean(x)",
        "Add(x, zero)",
        "Add(zeros, x)",
        "Sub(x, zeros)",
        "Mul(ones, x)",
        "Mul(x, many)",
        "Div(x, ones)",
        "Pow(x, ones)",
    ],
)
def test_what_leaves_everything_in_place_goes(passes: Any, node: str) -> None:
    assert removed(passes, around(f"y = {node}")) == []
    assert "same" in node or removed(passes, around(f"y = {node}", "[N, 3, 4]")) == []


@pytest.mark.parametrize(
    "node",
    [
        "Reshape(x, turned)",
        "Transpose <perm = [0, 2, 1]> (x)",
        "Transpose(x)",
        "Flatten(x)",
        "Tile(x, same)",
        "Slice(x, start, short, axes)",
        "Slice(x, one, end, axes)",
        "Slice(x, minus, end, axes, minus)",
        "Slice(x, start, end, axes, two)",
        "Pad(x, pads)",
        "Concat <axis = 1> (x, x)",
        "Sum(x, x)",
        "Add(x, ones)",
        "Sub(zero, x)",
        "Mul(x, nearly)",
        "Mul(x, wide)",
        "Div(ones, x)",
        "Pow(ones, x)",
        "Add(x, x)",
    ],
)
def test_what_does_something_stays_without_remark(passes: Any, node: str) -> None:
    assert removed(passes, around(f"y = {node}")) == [operator(node)]


@pytest.mark.parametrize(
    ("node", "shape", "stays"),
    [
        ("Reshape(x, same)", "[N, T, 4]", True),
        ("Reshape(x, rest)", "[N, T, C]", True),
        ("Reshape(x, rest)", "[N, T, 4]", False),
        ("Slice(x, start, end, axes)", "[N, T, C]", True),
        ("Slice(x, start, end)", "[N, 4, C]", False),
        ("Expand(x, less)", "[N, T, 4]", True),
        ("Mul(x, many)", "[N, T, 4]", True),
        ("Mul(x, ones)", "[N, T, C]", True),
        ("Mul(x, zeros)", "[N, 3, C]", True),
        ("Add(x, zero)", "[N, T, C]", False),
        ("Flatten(x)", "[N, T]", False),
        ("Flatten <axis = -1> (x)", "[N, T]", False),
        ("Flatten <axis = 0> (x)", "[N, T]", True),
    ],
)
def test_sizes_that_are_not_known(passes: Any, node: str, shape: str, stays: bool) -> None:
    sizes = {"[N, T]": (2, 4), "[N, 4, C]": (2, 4, 5)}.get(shape, (2, 3, 4))
    found = removed(passes, around(f"y = {node}", shape), feeds={"x0": np.ones(sizes, np.float32)})
    assert found == ([operator(node)] if stays else [])


def test_without_a_rank_a_constant_of_rank_0_alone_is_neutral(passes: Any) -> None:
    text = around("a = Add(x, zero) y = Mul(a, ones)", "")
    state = passes.state(passes.parse(text, **VALUES))
    assert RemoveIdentity().run(state) == 1
    assert [node.op for node in state.graph.nodes] == ["Abs", "Mul", "Neg"]


def test_attributes_of_older_models(passes: Any) -> None:
    whole = "y = Slice <starts = [0], ends = [2147483647], axes = [1]> (x)"
    assert removed(passes, around(whole, opset=9)) == []
    assert removed(passes, around(whole.replace("2147483647", "2"), opset=9)) == ["Slice"]
    assert removed(passes, around("y = Pad <pads = [0, 0, 0, 0, 0, 0]> (x)", opset=9)) == []


def test_a_zero_may_mean_no_elements(passes: Any) -> None:
    for allowzero, stays in ((0, []), (1, ["Reshape"])):
        text = around(f"y = Reshape <allowzero = {allowzero}> (x, empty)", "[N, 3]", opset=14)
        feeds = {"x0": np.ones((0, 3), np.float32)}
        proto, _ = passes(text, InferShapes(), RemoveIdentity(), weights={"empty": np.array([0, 3])}, feeds=feeds)
        assert passes.ops(proto)[1:-1] == stays


@pytest.mark.parametrize(
    ("types", "goes"),
    [
        ("float16 float", True),
        ("float double", True),
        ("int32 int64", True),
        ("int8 float16", True),
        ("uint8 int16", True),
        ("int32 double", True),
        ("bool float", True),
        ("float float16", False),
        ("int64 int32", False),
        ("int32 float", False),
        ("int64 double", False),
        ("uint8 int8", False),
    ],
)
def test_a_cast_there_and_back_goes_where_nothing_is_lost(passes: Any, types: str, goes: bool) -> None:
    codes = {
        "float": 1,
        "uint8": 2,
        "int8": 3,
        "int16": 5,
        "int32": 6,
        "int64": 7,
        "bool": 9,
        "float16": 10,
        "double": 11,
    }
    one, other = types.split()
    head = f'<ir_version: 8, opset_import: ["" : 13]> g ({one}[N, 4] x) => ({one}[N, 4] z)'
    there, back = f"Cast <to = {codes[other]}>", f"Cast <to = {codes[one]}>"
    body = f"a = {there} (x) [back] b = {back} (a) [end] z = {back} (b)"
    proto, state = passes(f"{head} {{ {body} }}", InferShapes(), RemoveIdentity(), tolerance=1)
    assert passes.ops(proto) == (["Cast"] if goes else ["Cast", "Cast"])
    alike = types in ("float float16", "int64 int32")
    assert passes.reasons(state).get("back") == ("the type in between is narrower" if alike else None)


def test_a_cast_there_and_back_with_other_readers(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (float16[N, 4] x0) => (float16[N, 4] y, float[N, 4] u) {
            x = Abs(x0) a = Cast <to = 1> (x) b = Cast <to = 10> (a) y = Neg(b) u = Exp(a)
        }""",
        InferShapes(),
        RemoveIdentity(),
        tolerance=0,
    )
    assert sorted(passes.ops(proto)) == ["Abs", "Cast", "Exp", "Neg"]


def test_graph_outputs_and_bodies_keep_what_they_need(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 8, opset_import: ["" : 13]> g (bool f, float[2, 3, 4] x) => (float[2, 3, 4] y, float[2, 3, 4] u,
                float[2, 3, 4] v, float[2, 3, 4] z) {
            a = Abs(x) y = Mul(a, ones) u = Add(zero, y) v = Div(x, ones) m = Reshape(y, same)
            z = If (f) <then_branch = g1 () => (float[2, 3, 4] p) { b = Mul(m, ones) p = Neg(b) },
                        else_branch = g2 () => (float[2, 3, 4] q) { c = Exp(m) q = Slice(c, start, end, axes) }>
        }""",
        InferShapes(),
        RemoveIdentity(),
        weights=VALUES,
        feeds={"f": np.array(True)},
        tolerance=0,
    )
    assert sorted(passes.ops(proto)) == ["Abs", "Add", "Div", "If"]
    assert proto.graph.node[0].output[0] == "y"
    branch = next(node for node in proto.graph.node if node.op_type == "If")
    assert [[node.op_type for node in a.g.node] for a in branch.attribute] == [["Neg"], ["Exp"]]
    assert [skip.node for skip in state.skipped] == ["Add_2", "Div_3"]


def test_running_it_twice_changes_nothing_more(passes: Any) -> None:
    text = around("a = Add(zero, x) b = Mul(a, ones) c = Reshape(b, same) y = Slice(c, start, end, axes)")
    proto, state = passes(text, InferShapes(), RemoveIdentity(), weights=VALUES, tolerance=0)
    assert passes.ops(proto) == ["Abs", "Neg"]
    assert RemoveIdentity().run(state) == 0

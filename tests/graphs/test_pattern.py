"""Nodes are read as formulas of one tensor, whatever their order."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.pattern import Formula, affine, near, rank, read_outside, scalar


def graph(body: str) -> gs.Graph:
    proto = onnx.parser.parse_model(f"""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 4] x, float[N, 4] z) => (float[N, 4] y)
        <float two = {{2}}, float half = {{0.5}}, float three = {{3}}, float zero = {{0}},
         float[4] row = {{1, 2, 3, 4}}, float[1, 1, 1] deep = {{1}}> {{ {body} }}""")
    return gs.import_onnx(proto)


def formula(body: str) -> Formula:
    found = graph(body)
    return Formula(found.outputs[0], found.inputs[0])


@pytest.mark.parametrize(
    ("body", "coefficients"),
    [
        ("y = Mul(x, two)", [0, 2]),
        ("a = Mul(x, x) b = Mul(a, x) c = Mul(b, half) y = Add(x, c)", [0, 1, 0, 0.5]),
        ("a = Pow(x, three) c = Div(a, two) y = Sub(x, c)", [0, 1, 0, -0.5]),
        ("a = Mul(x, x) b = Mul(half, a) c = Add(b, two) d = Neg(x) y = Mul(c, d)", [0, -2, 0, -0.5]),
        ("a = Sub(two, x) y = Pow(a, two)", [4, -4, 1]),
        ("a = Sub(x, x) y = Add(a, three)", [3]),
    ],
)
def test_polynomials(body: str, coefficients: list[float]) -> None:
    found = formula(body)
    assert found.is_near(coefficients)
    assert not found.is_near([*coefficients[:-1], coefficients[-1] * 1.001])
    assert not found.is_near([*coefficients, 1.0])
    assert len(found.nodes) == body.count("=")


@pytest.mark.parametrize(
    "body",
    [
        "y = Mul(x, z)",
        "y = Exp(x)",
        "y = Add(x, row)",
        "y = Div(two, x)",
        "y = Div(x, zero)",
        "y = Pow(x, half)",
        "y = Pow(two, x)",
        "a = Pow(x, three) y = Mul(a, x)",
        " ".join(f"t{i + 1} = Add(t{i}, two)" for i in range(9)).replace("t0", "x").replace("t9", "y"),
    ],
)
def test_what_is_no_polynomial_of_x(body: str) -> None:
    assert formula(body).polynomial is None
    assert not formula(body).is_near([0, 1])


def test_a_deep_tangle_is_read_in_bounded_time() -> None:
    body = " ".join(f"t{i + 1} = Add(t{i}, t{i})" for i in range(200))
    found = graph(body.replace("t0", "x").replace("t200", "y"))
    assert Formula(found.outputs[0], found.inputs[0]).polynomial is None
    assert len(Formula(found.nodes[6].outputs[0], found.inputs[0]).nodes) == 7


@pytest.mark.parametrize(
    ("node", "change"),
    [
        ("Add(x, two)", (1, 2)),
        ("Add(two, x)", (1, 2)),
        ("Sub(x, two)", (1, -2)),
        ("Sub(two, x)", (-1, 2)),
        ("Mul(half, x)", (0.5, 0)),
        ("Div(x, two)", (0.5, 0)),
        ("Div(two, x)", None),
        ("Div(x, zero)", None),
        ("Neg(x)", (-1, 0)),
        ("Neg(z)", None),
        ("Mul(z, two)", None),
        ("Mul(x, x)", None),
        ("Mul(x, row)", None),
        ("Add(x, deep)", None),
        ("Max(x, two)", None),
    ],
)
def test_affine(node: str, change: tuple[float, float] | None) -> None:
    found = graph(f"y = {node}")
    assert affine(found.nodes[0], found.inputs[0]) == change


def test_a_constant_that_would_add_axes_is_no_scalar() -> None:
    found = graph("y = Add(x, deep)")
    deep, x = found.nodes[0].inputs[1], found.inputs[0]
    assert scalar(deep, x) is None
    assert scalar(deep, gs.Variable("t", np.float32, [1, 2, 3])) == 1
    assert scalar(deep, gs.Variable("t", np.float32)) is None
    assert scalar(gs.Constant("c", np.array(4, np.float32)), gs.Variable("t", np.float32)) == 4
    assert rank(gs.Variable("t")) is None


@pytest.mark.parametrize(("dtype", "digits"), [(np.float16, 3), (np.float32, 5)])
def test_numbers_are_compared_in_the_precision_of_the_type(dtype: Any, digits: int) -> None:
    x = gs.Variable("x", dtype, [1])
    assert near(math.sqrt(2) * (1 + 0.5 * 10**-digits), math.sqrt(2), x)
    assert not near(math.sqrt(2) * (1 + 2 * 10**-digits), math.sqrt(2), x)


def test_tensors_read_outside_of_a_group() -> None:
    found: Any = graph("a = Neg(x) b = Exp(a) y = Mul(a, b)")
    outputs = graphs.output_ids(found)
    assert read_outside(found.nodes, outputs) is None
    assert read_outside([found.nodes[0], found.nodes[2]], outputs) == "a"
    assert read_outside(found.nodes, outputs | {id(found.nodes[1].outputs[0])}) == "b"

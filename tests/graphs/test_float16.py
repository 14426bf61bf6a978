"""What float16 can hold, and which inputs and outputs of an operator may have it."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qdqtool.graphs import model as models
from qdqtool.graphs.float16 import Slots, misfit, observed_misfit, slots
from tests.builders import normal, parse


def first(body: str, x: str, y: str, opset: int = 17, domain: str = "") -> Slots | str:
    """The slots of the first node."""
    proto = parse(body, x, y, {"w": normal(4, 4)}, opset=opset, domain=domain)
    graph, _ = models.to_graph(onnx.shape_inference.infer_shapes(proto))
    return slots(graph.nodes[0], opset)


IMAGE = "float[1, 2, 4, 4]"


@pytest.mark.parametrize(
    ("body", "x", "y", "inputs", "outputs"),
    [
        ("y = MatMul(x, w)", "float[N, 4] x", "float[N, 4] y", {0, 1}, {0}),
        ("y = Gather(w, i)", "int64[N] i", "float[N, 4] y", {0}, {0}),
        ("y = Where(c, x, w)", "bool[4, 4] c, float[4, 4] x", "float[4, 4] y", {1, 2}, {0}),
        ("y = Greater(x, w)", "float[4, 4] x", "bool[4, 4] y", {0, 1}, set()),
        ("y = Resize(x, , s)", f"{IMAGE} x, float[4] s", f"{IMAGE} y", {0}, {0}),
        ("y, m, d = LayerNormalization(x, w)", "float[N, 4] x", "float[N, 4] y, float[N, 1] m", {0, 1}, {0}),
        ("y = Concat <axis = 0> (x, x, w)", "float[N, 4] x", "float[M, 4] y", {0, 1, 2}, {0}),
        ("y, i = TopK(x, k)", "float[N, 4] x, int64[1] k", "float[N, K] y, int64[N, K] i", {0}, {0}),
    ],
)
def test_slots(body: str, x: str, y: str, inputs: set[int], outputs: set[int]) -> None:
    assert first(body, x, y) == Slots(frozenset(inputs), frozenset(outputs))


@pytest.mark.parametrize(
    ("body", "x", "y", "reason"),
    [
        ("y = Range(a, b, c)", "float a, float b, float c", "float[N] y", "Range of opset 17 takes no float16"),
        ("y = MelWeightMatrix(a, b, c, d, d)", "int64 a, int64 b, int64 c, float d", "float[N, M] y", "an attribute"),
        ("y = RandomNormal <shape = [4]> ()", "float[1] x", "float[4] y", "an attribute or operand of RandomNormal"),
        ("y = QuantizeLinear(x, s)", "float[4] x, float s", "uint8[4] y", "it converts between integers and float32"),
        ("y = SequenceConstruct(x)", "float[4] x", "seq(float[4]) y", "SequenceConstruct is about sequences or opt"),
        ("y = ScatterND <reduction = \"add\"> (x, i, u)", "float[4] x, int64[1, 1] i, float[1] u", "float[4] y",
         "ScatterND with a reduction has no float16 kernel"),
        ("y = If (c) <then_branch = t () => (float[4] p) { p = Neg(x) }, "
         "else_branch = e () => (float[4] q) { q = Abs(x) }>", "float[4] x, bool c", "float[4] y", "it holds graphs"),
    ],
)  # fmt: skip
def test_reasons(body: str, x: str, y: str, reason: str) -> None:
    found = first(body, x, y)
    assert isinstance(found, str)
    assert found.startswith(reason)


def test_other_domains_and_unknown_types() -> None:
    contrib = first("y = com.microsoft.Gelu(x)", "float[4] x", "float[4] y", domain="com.microsoft")
    assert contrib == "Gelu of domain 'com.microsoft' says nothing of float16"
    unknown = first("t = com.microsoft.Gelu(x) y = Neg(t)", "float[4] x", "float[4] y", domain="com.microsoft")
    assert isinstance(unknown, str)
    proto = parse("t = com.microsoft.Gelu(x) y = Neg(t)", "float[4] x", "float[4] y", {}, domain="com.microsoft")
    graph, _ = models.to_graph(proto)
    assert slots(graph.nodes[1], 17) == "the type of 't' is not known, or that of no tensor"


@pytest.mark.parametrize(
    ("values", "reason", "overflow"),
    [
        ([1.0, -65504.0, 0.0], None, False),
        ([65519.0], None, False),
        ([1.0, 65520.0], "reaches 6.55e+04, beyond float16's 65504", True),
        ([1.0, -3.4e38, 3.0e5], "reaches -3.4e+38, beyond float16's 65504", True),
        ([np.inf, -np.inf, np.nan, 1.0], None, False),
        ([1e-8], "loses 100 % of its values, which are too small for float16", False),
        ([1e-8, *[1.0] * 9], None, False),
        ([1e-9, 1e-9, *[1.0] * 8], "loses 20 % of its values, which are too small for float16", False),
        ([0.0, 0.0], None, False),
        ([], None, False),
    ],
)
def test_constants(values: list[float], reason: str | None, overflow: bool) -> None:
    found = misfit(np.array(values, np.float32))
    assert (None if found is None else found.reason) == reason
    assert (found is not None and found.overflow) == overflow


@pytest.mark.parametrize(
    ("lo", "hi", "reason"),
    [
        (-100.0, 30000.0, None),
        (-40000.0, 3.0, "reaches -4e+04; float16 ends at 65504"),
        (0.0, 1e5, "reaches 1e+05; float16 ends at 65504"),
        (0.0, 0.0, None),
        (-1e-5, 2e-5, "reaches 2e-05 at most, where float16 is coarse"),
        (0.0, 1e-4, None),
    ],
)
def test_activations(lo: float, hi: float, reason: str | None) -> None:
    found = observed_misfit(lo, hi)
    assert (None if found is None else found.reason) == reason

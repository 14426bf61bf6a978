"""Operands of shape [1] where the operator wants scalars."""

from __future__ import annotations

from typing import Any

import numpy as np

from qdqtool.passes.fold_constants import FoldConstants
from qdqtool.passes.infer_shapes import InferShapes
from qdqtool.passes.scalar_operands import ScalarOperands

# The branch is chosen when the model is loaded, and the limit of the Range then known to have the shape [1].
MODEL = """<ir_version: 8, opset_import: ["": 17]> g (float[2, 3] x) => (int64[K] y, float[2, 3] z)
    <int64 zero = {0}, int64 one = {1}, int64 six = {6}, int64[1] four = {4}, int64[1] five = {5}> {
        s = Size(x) c = Equal(s, six)
        n = If (c) <then_branch = t () => (int64[1] p) { p = Identity(four) },
                    else_branch = e () => (int64[1] q) { q = Identity(five) }>
        [range] y = Range(zero, n, one) z = Identity(x)
    }"""


def test_a_limit_of_one_element_becomes_a_scalar(passes: Any) -> None:
    x = {"x": np.zeros((2, 3), np.float32)}
    proto, _ = passes(MODEL, InferShapes(), ScalarOperands(), FoldConstants(), feeds=x)
    assert passes.evaluate(proto, x)["y"].tolist() == [0, 1, 2, 3]
    (node,) = [node for node in proto.graph.node if node.name == "range"]
    (reshape,) = [made for made in proto.graph.node if node.input[1] in made.output]
    assert (reshape.op_type, reshape.input[0]) == ("Reshape", "n")


def test_running_twice_changes_nothing(passes: Any) -> None:
    once, state = passes(MODEL, InferShapes(), ScalarOperands())
    assert ScalarOperands().run(state) == 0
    assert passes.ops(once).count("Reshape") == 1


def test_scalars_stay(passes: Any) -> None:
    source = """<ir_version: 8, opset_import: ["": 17]> g (int64 n) => (int64[K] y)
        <int64 zero = {0}, int64 one = {1}> { y = Range(zero, n, one) }"""
    proto, _ = passes(source, InferShapes(), ScalarOperands())
    assert passes.ops(proto) == ["Range"]

"""inline-branches: an If whose condition is a constant becomes the nodes of its branch."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qdqtool.passes import InferShapes, InlineBranches, LiftConstants, RemoveIdentity
from tests.builders import normal, parse

BODY = """
    a = Relu(x)
    y = If (flag) <
        then_branch = then () => (float[N] t) {
            b = Neg(a)
            t = If (no) <
                then_branch = inner () => (float[N] t) { t = Exp(b) },
                else_branch = last () => (float[N] t) { c = Add(b, a) t = Mul(c, k) }
            >
        },
        else_branch = other () => (float[N] t) { b = Tanh(a) t = Identity(b) }
    >
"""
PASSES = (LiftConstants(), InlineBranches(), InferShapes(), RemoveIdentity())


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("opset", [9, 11, 17])
def test_the_branch_that_runs_is_left(passes: Any, flag: bool, opset: int) -> None:
    constants = {"flag": np.array(flag), "no": np.array([False]), "k": normal(1)}
    proto = parse(BODY, "float[N] x", "float[N] y", constants, opset=opset)
    result, state = passes(proto, *PASSES, feeds={"x": normal(4)})
    assert passes.ops(result) == (["Relu", "Neg", "Add", "Mul"] if flag else ["Relu", "Tanh"])
    readers = next(node for node in state.graph.nodes if node.op == "Relu").outputs[0].outputs
    assert len(readers) == (2 if flag else 1)  # those of the other branch are gone


def test_a_condition_that_is_computed_stays(passes: Any) -> None:
    proto = parse(BODY, "float[N] x, bool flag", "float[N] y", {"no": np.array(False), "k": normal(1)})
    result, _ = passes(proto, *PASSES, feeds={"x": normal(4), "flag": np.array(True)})
    assert passes.ops(result) == ["Relu", "If"]
    then = next(a.g for a in result.graph.node[1].attribute if a.name == "then_branch")
    assert [node.op_type for node in then.node] == ["Neg", "Add", "Mul"]

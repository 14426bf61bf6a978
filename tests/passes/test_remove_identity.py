"""Nodes that change nothing go, and names known outside stay."""

from __future__ import annotations

from typing import Any

import numpy as np

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

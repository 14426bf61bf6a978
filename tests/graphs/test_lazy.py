"""Constants made when they are asked for, and values read without being kept."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.lazy import Derived, peek
from tests.builders import constants, normal, parse


def stored() -> Any:
    """A constant that is still part of the model's message."""
    proto = parse("[m] y = MatMul(x, w)", "float[N, 4] x", "float[N, 3] y", {"w": normal(4, 3)})
    graph, _ = models.to_graph(models.load(proto))
    return graph.tensors()["w"]


def test_peeking_keeps_no_copy() -> None:
    weight = stored()
    np.testing.assert_array_equal(peek(weight), normal(4, 3))
    assert not isinstance(weight._values, np.ndarray)
    np.testing.assert_array_equal(graphs.constant(weight), normal(4, 3))
    assert isinstance(weight._values, np.ndarray)
    assert peek(weight) is weight._values


def test_a_derived_constant_is_exported_and_keeps_nothing() -> None:
    weight, calls = stored(), []

    def negated(values: Any) -> Any:
        calls.append(values.shape)
        return -values

    derived = gs.Constant("d", Derived(weight, (4, 3), np.dtype(np.float32), negated))
    assert not calls
    assert (tuple(derived.shape), derived.dtype, derived._values.nbytes) == ((4, 3), np.float32, 48)
    result = gs.Variable("y", np.float32, ("N", 3))
    x = gs.Variable("x", np.float32, ("N", 4))
    graph = gs.Graph([gs.Node("MatMul", "m", inputs=[x, derived], outputs=[result])], [x], [result], opset=17)
    for _ in range(2):
        found = constants(models.to_proto(graph, models.Header(8)))
        np.testing.assert_array_equal(found["d"], -normal(4, 3))
    assert len(calls) == 2
    assert isinstance(derived._values, Derived)
    np.testing.assert_array_equal(derived.values, -normal(4, 3))


def test_derived_of_derived_and_of_arrays() -> None:
    first = gs.Constant("a", Derived(gs.Constant("b", normal(2, 3)), (3, 2), np.dtype(np.float32), np.transpose))
    second = Derived(first, (3, 2), np.dtype(np.float16), lambda values: values.astype(np.float16))
    np.testing.assert_array_equal(second.load(), normal(2, 3).T.astype(np.float16))
    np.testing.assert_array_equal(onnx.numpy_helper.to_array(second.tensor), normal(2, 3).T.astype(np.float16))

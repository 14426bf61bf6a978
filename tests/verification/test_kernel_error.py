"""Which fused kernel differs from the Q/DQ nodes that it stands for."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qdqtool import runtime
from qdqtool.data.batching import Batch, Batching
from qdqtool.verification import kernel_error
from qdqtool.verification.kernel_error import kernel_errors
from tests.builders import Arrays, conv_chain, feeds, parse, quantized


def batches(fed: Arrays) -> list[Batch]:
    plan = Batching(rows=True, size=8)
    return list(plan.batches(plan.samples([fed])))


def test_every_kernel_of_a_chain_is_compared() -> None:
    proto = conv_chain(3)
    done = quantized(proto, bias_correction=False).model
    found = kernel_errors(done, batches(feeds(proto, 8)))
    assert {(error.kernel, error.operator) for error in found} == {(f"c{i}", "QLinearConv") for i in range(3)}
    assert all(error.own_db > 40 and 0 <= error.differing < 0.05 for error in found)


def _bent(fused: onnx.ModelProto, kernel: str) -> onnx.ModelProto:
    """The fused graph with one kernel that puts out codes at twice the scale it should."""
    scale = next(node for node in fused.graph.node if node.name == kernel).input[6]
    tensor = next(t for t in fused.graph.initializer if t.name == scale)
    doubled = onnx.numpy_helper.from_array(2 * onnx.numpy_helper.to_array(tensor), "doubled")
    fused.graph.initializer.append(doubled)
    next(node for node in fused.graph.node if node.name == kernel).input[6] = "doubled"
    return fused


def test_the_kernel_at_fault_is_told_from_those_behind_it(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = conv_chain(3)
    done = quantized(proto, bias_correction=False).model
    true = kernel_error._fused(done, "cpu")
    monkeypatch.setattr(kernel_error, "_fused", lambda *_: _bent(true, "c1"))
    found = {error.kernel: error for error in kernel_errors(done, batches(feeds(proto, 8)))}
    assert next(iter(found)) == "c1"
    assert found["c1"].own_db < 10
    assert found["c1"].differing > 0.4
    assert found["c2"].own_db > 40  # on equal inputs it is right
    assert found["c2"].total_db < 15  # and hands on what it was given
    assert min(found["c0"].own_db, found["c0"].total_db) > 40


def test_a_product_is_named_where_the_runtime_put_a_reshape_behind_it() -> None:
    rng = np.random.default_rng(0)
    values = {"m": rng.standard_normal((16, 16)).astype(np.float32), "b": rng.standard_normal(16).astype(np.float32)}
    proto = parse("[w] w = MatMul(x, m) [bias] y = Add(w, b)", "float[1, 4, 16] x", "float[1, 4, 16] y", values)
    done = quantized(proto, bias_correction=False).model
    (found,) = kernel_errors(done, batches(feeds(proto, 1)))
    assert found.operator == "QGemm"
    assert found.own_db > 80


def test_where_nothing_fuses_there_is_nothing_to_tell() -> None:
    proto = parse("[a] y = Neg(x)", "float[N, 4] x", "float[N, 4] y", {})
    assert kernel_errors(proto, batches({"x": np.ones((2, 4), np.float32)})) == ()


def test_bodies_are_not_looked_into() -> None:
    inner = "then_branch = t () => (float[2] p) { p = Neg(x) }, else_branch = e () => (float[2] q) { q = Abs(x) }"
    assert kernel_errors(parse(f"y = If (f) <{inner}>", "float[2] x, bool f", "float[2] y", {}), []) == ()


def test_without_changes_of_the_layout_tensors_keep_their_names(tmp_path_factory: pytest.TempPathFactory) -> None:
    done = quantized(conv_chain(2), bias_correction=False).model
    path = tmp_path_factory.mktemp("fused") / "fused.onnx"
    runtime.session(done, optimized_path=path, layout=False)
    nodes = [node for node in onnx.load(path).graph.node if node.op_type == "QLinearConv"]
    assert [node.name for node in nodes] == ["c0", "c1"]

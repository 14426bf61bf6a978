"""Models whose large tensors lie in a file of their own."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qdqtool.graphs import external
from qdqtool.graphs import model as models
from qdqtool.verification import placement


def product(size: int = 64) -> onnx.ModelProto:
    large = numpy_helper.from_array(np.random.default_rng(0).standard_normal((size, size)).astype(np.float32), "w")
    small = numpy_helper.from_array(np.ones(size, np.float32), "b")
    nodes = [helper.make_node("MatMul", ["x", "w"], ["m"], "m"), helper.make_node("Add", ["m", "b"], ["y"], "a")]
    ends = [helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["N", size]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", ends[:1], ends[1:], [large, small], doc_string="said")
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8, producer_name="me")
    helper.set_model_props(proto, {"key": "value"})
    return proto


def test_what_was_written_is_the_model(tmp_path: Path) -> None:
    proto = product()
    external.write(proto, tmp_path / "m.onnx", tmp_path / "m.data")
    assert (tmp_path / "m.data").stat().st_size == 4 * 64 * 64
    assert (tmp_path / "m.onnx").stat().st_size < 2048
    onnx.checker.check_model(tmp_path / "m.onnx")
    loaded = models.load(tmp_path / "m.onnx")
    assert loaded.SerializeToString(deterministic=True) == proto.SerializeToString(deterministic=True)


def test_a_large_model_runs_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    proto, fed = product(), {"x": np.random.default_rng(1).standard_normal((3, 64)).astype(np.float32)}
    optimized, whole = placement.load(proto)
    assert any(numpy_helper.to_array(t).size == 64 * 64 for t in optimized.graph.initializer)
    monkeypatch.setattr(models, "_WORTH_SPARING", 1)
    optimized, parted = placement.load(proto)
    assert [t.name for t in optimized.graph.initializer if t.data_location == onnx.TensorProto.EXTERNAL]
    np.testing.assert_array_equal(whole.run(None, fed)[0], parted.run(None, fed)[0])

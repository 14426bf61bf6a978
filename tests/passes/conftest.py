"""Runs passes on a model given as ONNX text, and holds them to being numerically neutral."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest

from qdqtool.graphs import model
from qdqtool.passes_api import GRAPH_FACTS, Fact, Pass, PassManager, State

Array = npt.NDArray[Any]
FREE = {"N": 2, "T": 5}


class PassRunner:
    """Calls passes; every call compares the model's outputs before and after on random inputs."""

    def __call__(
        self,
        source: str | onnx.ModelProto,
        *passes: Pass,
        weights: Mapping[str, Array] | None = None,
        feeds: Mapping[str, Array] | None = None,
        tolerance: float = 1e-5,
    ) -> tuple[onnx.ModelProto, State]:
        """Parse the model, add ``weights``, run the passes, compare; returns the new model and the state."""
        proto = self.parse(source, **(weights or {})) if isinstance(source, str) else source
        state = self.state(proto)
        PassManager(passes).run(state, GRAPH_FACTS | {Fact.FOLDED})
        result = model.to_proto(state.graph, state.header)
        model.check(result)
        fed = {**self.random_feeds(proto), **(feeds or {})}
        before, after = self.evaluate(proto, fed), self.evaluate(result, fed)
        assert before.keys() == after.keys()
        for name, expected in before.items():
            assert expected.dtype == after[name].dtype
            scale = max(1.0, float(np.abs(expected, dtype=np.float64).max(initial=0.0)))
            np.testing.assert_allclose(after[name], expected, rtol=0, atol=tolerance * scale, err_msg=name)
        return result, state

    def parse(self, source: str, **weights: Array) -> onnx.ModelProto:
        """A model from ONNX text with further initializers."""
        proto = onnx.parser.parse_model(source)
        proto.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in weights.items())
        return proto

    def state(self, proto: onnx.ModelProto) -> State:
        """A state as passes see it; recipe and target are not there."""
        graph, header = model.to_graph(model.load(proto))
        return State(graph=graph, header=header, recipe=cast(Any, None), target=cast(Any, None))

    def random_feeds(self, proto: onnx.ModelProto) -> dict[str, Array]:
        """Random values for every input: N is 2, T is 5, any other free dimension 3."""
        rng = np.random.default_rng(0)
        feeds: dict[str, Array] = {}
        for info in model.inputs(proto):
            shape = [d if isinstance(d, int) else FREE.get(d or "", 3) for d in info.shape]
            if info.dtype.kind == "f":
                feeds[info.name] = rng.standard_normal(shape).astype(info.dtype)
            else:
                feeds[info.name] = rng.integers(0, 2, shape).astype(info.dtype)
        return feeds

    def evaluate(self, proto: onnx.ModelProto, feeds: Mapping[str, Array]) -> dict[str, Array]:
        """Outputs of the model in the runtime, graph optimization off."""
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
        names = [output.name for output in session.get_outputs()]
        return dict(zip(names, session.run(names, dict(feeds)), strict=True))

    def ops(self, proto: onnx.ModelProto) -> list[str]:
        """Operators of the top graph in order."""
        return [node.op_type for node in proto.graph.node]

    def constant(self, proto: onnx.ModelProto, name: str) -> Array:
        """Values of an initializer."""
        return next(onnx.numpy_helper.to_array(t) for t in proto.graph.initializer if t.name == name)

    def reasons(self, state: State) -> dict[str, str]:
        """Why nodes were left alone, by node."""
        return {skip.node: skip.reason for skip in state.skipped}


@pytest.fixture
def passes() -> PassRunner:
    """The runner of passes."""
    return PassRunner()

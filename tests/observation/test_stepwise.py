"""A model run stretch by stretch gives what it gives as a whole, and goes on with what was put in on the way."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qdqtool import runtime
from qdqtool.errors import PipelineError
from qdqtool.observation.stepwise import Stepwise
from tests.builders import Array, normal, parse

BODY = """
    [c0] c0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0) [r0] r0 = Relu(c0)
    [c1] c1 = Conv <pads = [1, 1, 1, 1]> (r0, w1, b1) [r1] r1 = Relu(c1)
    [s] s = Add(r1, r0) [t] total = ReduceSum <keepdims = 0> (s) [n] big = Greater(total, limit)
    [if] chosen = If (big) <
        then_branch = yes () => (float[N, C, H, W] u) { u = Mul(s, two) },
        else_branch = no () => (float[N, C, H, W] v) { v = Mul(s, r0) }>
    [c2] y = Conv <pads = [1, 1, 1, 1]> (chosen, w2, b2)"""


def network() -> onnx.ModelProto:
    values: dict[str, Array] = {f"w{i}": normal(4, 4, 3, 3, seed=i, scale=0.3) for i in range(3)}
    values |= {f"b{i}": normal(4, seed=i) for i in range(3)}
    values |= {"two": np.array(2, np.float32), "limit": np.array(0, np.float32)}
    return parse(BODY, "float[N, 4, 6, 6] x", "float[N, 4, 6, 6] y", values)


def batches() -> list[dict[str, Array]]:
    return [{"x": normal(count, 4, 6, 6, seed=count)} for count in (1, 3)]


def whole(proto: onnx.ModelProto, names: list[str]) -> list[list[Array]]:
    copied = onnx.ModelProto()
    copied.CopyFrom(proto)
    del copied.graph.output[:]
    copied.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = runtime.session(copied)
    return [runtime.run(session, names, feeds) for feeds in batches()]


def test_each_tensor_is_that_of_the_whole_model() -> None:
    names = ["r0", "s", "chosen"]
    model = Stepwise(network(), batches(), ["x", *names])
    taken = {name: model.take(name) for name in ("x", *names)}
    for number, expected in enumerate(whole(network(), names)):
        for name, value in zip(names, expected, strict=True):
            np.testing.assert_allclose(taken[name][number], value, atol=1e-5)
    np.testing.assert_array_equal(taken["x"][1], batches()[1]["x"])


def test_every_node_runs_once(monkeypatch: pytest.MonkeyPatch) -> None:
    ran: list[str] = []
    start = runtime.session

    def watched(proto: onnx.ModelProto, **options: object) -> object:
        ran.extend(node.name for node in proto.graph.node)
        return start(proto, **options)  # type: ignore[arg-type] # handed on as they came

    monkeypatch.setattr(runtime, "session", watched)
    model = Stepwise(network(), batches(), ["r0", "r0", "chosen"])
    for name in ("r0", "r0", "chosen"):
        model.take(name)
    assert sorted(ran) == sorted(["c0", "r0", "c1", "r1", "s", "t", "n", "if"])  # nothing wants y


def test_what_is_put_in_counts_for_what_comes_after() -> None:
    model = Stepwise(network(), batches(), ["r0", "chosen"])
    before = model.take("r0")
    weight = normal(4, 4, 3, 3, seed=9)
    model.replace("c1", 1, weight)
    model.replace("c2", 1, weight)  # nothing wanted depends on it
    changed = network()
    next(t for t in changed.graph.initializer if t.name == "w1").CopyFrom(onnx.numpy_helper.from_array(weight, "w1"))
    after = model.take("chosen")
    for number, (first, second) in enumerate(whole(changed, ["r0", "chosen"])):
        np.testing.assert_allclose(before[number], first, atol=1e-5)
        np.testing.assert_allclose(after[number], second, atol=1e-4)


def test_a_node_that_has_run_cannot_change() -> None:
    model = Stepwise(network(), batches(), ["r0", "s"])
    model.take("r0")
    with pytest.raises(PipelineError, match="'c0' has run already"):
        model.replace("c0", 1, normal(4, 4, 3, 3))

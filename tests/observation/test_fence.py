"""What a tensor's bits are does not depend on what else is observed, and the runtime fuses as much as that allows."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qdqtool import runtime
from qdqtool.observation.fence import add_fences, fences, without_fences
from qdqtool.observation.observe import with_outputs
from tests.builders import Arrays, conv, conv_chain, conv_values, parse
from tests.calibrated import NETWORK, data

INFERRED = onnx.shape_inference.infer_shapes(NETWORK)


def outputs(*observed: str) -> Arrays:
    """Values of the tensors, computed as observing them does."""
    model = with_outputs(INFERRED, observed)
    add_fences(model, fences(INFERRED, observed))
    active = runtime.session(model, threads=1)
    return dict(zip(observed, runtime.run(active, list(observed), data(4)), strict=True))


def test_bits_are_the_same_whatever_is_observed() -> None:
    every = outputs("r0", "c1", "s", "r1", "l", "p", "y")
    for some in (["r1"], ["c1", "y"], ["s", "l"], ["p"]):
        for name, values in outputs(*some).items():
            assert values.tobytes() == every[name].tobytes(), (name, some)


def test_what_may_be_fused_is_not_fenced() -> None:
    names = {name for node in INFERRED.graph.node for name in node.output}
    assert names - fences(INFERRED, []) == {"c0", "c2", "f"}  # before a Relu, before a LeakyRelu, and the same as "p"
    assert names - fences(INFERRED, ["c0"]) == {"c2", "f"}


@pytest.mark.parametrize("batch", [8, None], ids=["static", "free"])
def test_the_runtime_still_fuses_activation_functions(batch: int | None) -> None:
    chain = conv_chain(2)
    for value in (*chain.graph.input, *chain.graph.output) if batch else ():
        value.type.tensor_type.shape.dim[0].dim_value = 8
    model = with_outputs(chain, ["r0"])
    add_fences(model, fences(onnx.shape_inference.infer_shapes(chain), ["r0"]))
    operators = [node.op_type for node in runtime.optimized(model).graph.node]
    assert sum(operator.endswith("Conv") for operator in operators) == 2
    assert "Relu" not in operators
    assert operators.count("Size") == 2  # nor are fences folded where shapes are known


@pytest.mark.parametrize(("limits", "fuses"), [("low, high", True), ("low, most", False)])
def test_a_clip_fuses_where_its_limits_are_constant(limits: str, fuses: bool) -> None:
    body = f"{conv('c', 'x')} most = ReduceMax <keepdims = 0> (x) y = Clip(c, {limits})"
    values = {**conv_values(1), "low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    proto = onnx.shape_inference.infer_shapes(parse(body, "float[N, 8, 6, 6] x", "float[N, 8, 6, 6] y", values))
    assert fences(proto, []) == {"y", "most"} | (set() if fuses else {"c"})


def test_fences_are_no_outputs_that_anybody_asks_for() -> None:
    model = with_outputs(INFERRED, ["r0"])
    add_fences(model, fences(INFERRED, ["r0"]))
    names = [output.name for output in model.graph.output]
    assert len(names) > 2
    assert without_fences(names) == ["y", "r0"]
    onnx.checker.check_model(onnx.shape_inference.infer_shapes(model))

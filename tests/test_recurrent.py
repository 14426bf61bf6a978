"""LSTM, GRU and RNN: float where nobody asks otherwise, their weights in integers where somebody does."""

from __future__ import annotations

import onnx
import pytest

from tests.builders import Array, normal, parse
from tests.test_control_flow import made, reasons, sqnr

GATES = {"GRU": 3, "LSTM": 4, "RNN": 1}
HIDDEN = 16


def model(op: str, directions: int = 1) -> onnx.ModelProto:
    """MatMul, the recurrent layer, and a MatMul on its last state."""
    rows = GATES[op] * HIDDEN
    constants: dict[str, Array] = {
        "v": normal(8, 8, scale=0.3),
        "w": normal(directions, rows, 8, scale=0.3),
        "r": normal(directions, rows, HIDDEN, scale=0.2),
        "b": normal(directions, 2 * rows, scale=0.1),
        "u": normal(HIDDEN, 4, scale=0.2),
    }
    way = "forward" if directions == 1 else "bidirectional"
    body = f"""
        [first] a = MatMul(x, v)
        [layer] all, last = {op} <hidden_size = {HIDDEN}, direction = "{way}"> (a, w, r, b)
        [second] y = MatMul(last, u)
    """
    return parse(body, "float[6, N, 8] x", f"float[{directions}, N, 4] y", constants)


def samples() -> list[dict[str, Array]]:
    """Sequences of six steps."""
    return [{"x": normal(6, 1, 8, seed=i)} for i in range(16)]


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
@pytest.mark.parametrize("op", GATES)
def test_layers_around_are_quantized(op: str, target: str) -> None:
    proto = model(op)
    result = made(proto, samples(), target=target)
    assert set(result.plan.kernels) == {"first", "second"}
    assert f"{op} has no integer kernel on target {target}" in reasons(result)["layer"]
    assert sqnr(proto, result, samples()) > 28


@pytest.mark.parametrize("directions", [1, 2])
@pytest.mark.parametrize("op", GATES)
def test_weights_are_stored_in_integers_where_the_operator_is_named(op: str, directions: int) -> None:
    proto = model(op, directions)
    result = made(proto, samples(), op_types_to_quantize=[op, "MatMul"])
    assert result.plan.weight_only == {"layer"}
    layer = next(node for node in result.model.graph.node if node.name == "layer")
    makers = {node.output[0]: node for node in result.model.graph.node}
    scales = {t.name: tuple(t.dims) for t in result.model.graph.initializer}
    for index in (1, 2):
        assert makers[layer.input[index]].op_type == "DequantizeLinear"
        assert scales[makers[layer.input[index]].input[1]] == (GATES[op] * HIDDEN,)
    floats = [t for t in result.model.graph.initializer if t.data_type == onnx.TensorProto.FLOAT]
    assert all(len(t.dims) < 3 for t in floats)  # scales and biases alone
    assert sqnr(proto, result, samples()) > 28


def test_a_weight_that_is_computed_stays() -> None:
    proto = model("LSTM")
    nodes = list(proto.graph.node)
    nodes[1].input[2] = "computed"
    before = [
        onnx.helper.make_node("ReduceMax", ["x"], ["factor"], keepdims=0),
        onnx.helper.make_node("Mul", ["r", "factor"], ["computed"]),
    ]
    copied = onnx.GraphProto(node=[*before, *nodes])
    del proto.graph.node[:]
    proto.graph.node.extend(copied.node)
    result = made(proto, samples(), op_types_to_quantize=["LSTM", "MatMul"])
    assert reasons(result)["layer"] == "its weight is computed at run time"

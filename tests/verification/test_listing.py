"""One row for every node and every Q/DQ pair: where it runs, why, and what would change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qdqtool
from qdqtool import runtime
from qdqtool.verification import listing, placement
from qdqtool.verification.listing import Fate, Placed
from qdqtool.verification.partition import Partition
from tests.builders import conv, conv_chain, conv_values, normal, parse, quantized
from tests.cuda_stub import CudaStub

IMAGE = "float[N, 8, 8, 8]"


def rows_of(proto: onnx.ModelProto, **fields: Any) -> dict[tuple[str, str], Placed]:
    return {(row.kind, row.name): row for row in quantized(proto, bias_correction=False, **fields).report.listing}


def integer_kernels(rows: Any) -> int:
    nodes = [row for row in rows if row.kind == "node" and row.state == Fate.INTEGER]
    return sum(placement.is_integer_kernel(row.kernel) for row in nodes)


def counted(proto: onnx.ModelProto) -> int:
    operators, _ = placement.load_and_count(proto)
    return sum(number for op, number in operators.items() if placement.is_integer_kernel(op))


def test_all_kernels_and_pairs_of_a_chain() -> None:
    rows = rows_of(conv_chain(2))
    convolutions = [row for row in rows.values() if row.operator == "Conv"]
    assert [(row.name, row.state, row.kernel, row.provider) for row in convolutions] == [
        ("c0", "integer", "QLinearConv", "CPUExecutionProvider"),
        ("c1", "integer", "QLinearConv", "CPUExecutionProvider"),
    ]
    assert rows["node", "r0"].state == Fate.PART
    assert {row.state for row in rows.values() if row.kind == "pair"} == {Fate.INTEGER}
    assert rows["pair", "x"].reason == "one conversion is left at the border: the model takes in 'x' in float"


def test_a_float_node_has_its_reason_and_remedy() -> None:
    rows = rows_of(conv_chain(2), tensors={"x": {"dtype": "uint16"}})
    left = rows["node", "c0"]
    assert left.state == Fate.FLOAT
    assert left.reason == "its input 'x' has uint16 codes; integer kernels take 8 bits"
    assert left.remedy == "give it an 8-bit dtype with --tensor, or leave the node in float with --exclude"
    pair = rows["pair", "x"]
    assert (pair.state, pair.kernel) == (Fate.FLOAT, "QuantizeLinear, DequantizeLinear")
    assert "the model takes in 'x' in float; " in pair.reason


def test_a_node_left_out_has_the_reason_of_who_left_it_out() -> None:
    row = rows_of(conv_chain(2), nodes_to_exclude=["c1"])["node", "c1"]
    assert row.state == Fate.FLOAT
    assert "exclude" in row.reason


def test_a_layer_that_the_runtime_quantizes_although_its_weight_is_float() -> None:
    """Between two quantized layers the runtime's own optimizer takes a float weight for one to be quantized."""
    proto = quantized(conv_chain(3), bias_correction=False, nodes_to_exclude=["c1"]).model
    scalars = {tensor.name: tensor for tensor in proto.graph.initializer}
    nodes = {node.name: node for node in proto.graph.node}
    (spread,) = (n for n in proto.graph.node if nodes["c1"].input[0] in n.output)
    del spread.attribute[:]
    for index in (1, 2):
        values = onnx.numpy_helper.to_array(scalars[spread.input[index]])
        scalars[spread.input[index]].CopyFrom(onnx.numpy_helper.from_array(values[0], spread.input[index]))
    rows = {(row.kind, row.name): row for row in listing.listing(proto, placement.load(proto)[0])}
    row = rows["node", "c1"]
    assert (row.state, row.kernel) == (Fate.INTEGER, "QLinearConv")
    assert "quantizes it at load" in row.reason
    assert runtime.BIAS_OPTIMIZER in row.remedy


@pytest.mark.parametrize(
    ("body", "y"),
    [
        (f"{conv('a', 'x')} [left] b = Conv <pads = [1, 1, 1, 1]> (a, w1, b1) {conv('y', 'b', 2)}", "[N, 8, 8, 8]"),
        ("[p] a = Conv(x, w0, b0) [left] b = ConvTranspose(a, w1, b1) [q] y = Conv(b, w2, b2)", "[N, 8, 6, 6]"),
        (f"{conv('a', 'x')} f = Flatten(a) [left] g = Gemm(f, m, n) [q] y = Relu(g)", "[N, 10]"),
    ],
    ids=["Conv", "ConvTranspose", "Gemm"],
)
def test_a_layer_left_out_runs_in_float_between_layers_in_integers(body: str, y: str) -> None:
    values = {**conv_values(3), "m": normal(512, 10), "n": normal(10)}
    used = {name: value for name, value in values.items() if f"{name}," in body or f"{name})" in body}
    done = quantized(parse(body, f"{IMAGE} x", f"float{y} y", used), nodes_to_exclude=["left"])
    row = {(row.kind, row.name): row for row in done.report.listing}["node", "left"]
    assert row.state == Fate.FLOAT
    assert "exclude" in row.reason
    assert sum(node.op_type == "QuantizeLinear" for node in done.model.graph.node) == len(
        {node.input[0] for node in done.model.graph.node if node.op_type == "QuantizeLinear"}
    )


def test_weights_alone_are_kernels_too() -> None:
    values = {"m": conv_values(1)["w0"].reshape(8, -1)[:, :64].copy()}
    proto = parse("[p] y = MatMul(x, m)", "float[N, 8] x", "float[N, 64] y", values)
    rows = rows_of(proto, precision="w8a16")
    assert rows["node", "p"].kernel == "MatMulNBits"
    assert rows["node", "p"].state == Fate.INTEGER
    assert [row.state for row in rows.values() if row.kind == "pair"] == [Fate.INTEGER]


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
@pytest.mark.parametrize(
    "body",
    [
        f"{conv('a', 'x')} [r] r = Relu(a) {conv('b', 'r', 1)} [s] s = Add(r, b) [y] y = Relu(s)",
        f"{conv('a', 'x')} [t] t = Tanh(a) {conv('b', 't', 1)} [y] y = Sigmoid(b)",
        f"{conv('a', 'x')} [l] l = LeakyRelu(a) [m] y = MaxPool <kernel_shape = [1, 1]> (l)",
    ],
)
def test_integer_kernels_are_as_many_as_in_the_graph_that_runs(body: str, target: str) -> None:
    used = {name: value for name, value in conv_values(2).items() if f"{name}," in body or f"{name})" in body}
    done = quantized(parse(body, f"{IMAGE} x", f"{IMAGE} y", used), target=target, bias_correction=False)
    assert integer_kernels(done.report.listing) == counted(done.model) == done.report.integer_kernels


def test_what_fell_to_the_cpu_is_moved() -> None:
    proto = conv_chain(1)
    done = quantized(proto, bias_correction=False).model
    fallen = {"b0_DequantizeLinear": "DequantizeLinear"}
    nodes = {"CUDAExecutionProvider": {"c0": "Conv"}, "CPUExecutionProvider": fallen}
    known = Partition("cuda", gpu=False, nodes=nodes, fallen=fallen)
    found = listing.listing(done, done, provider="cuda", partition=known)
    rows = {(row.kind, row.name): row for row in found}
    bias = rows["pair", "b0"]
    assert (bias.state, bias.provider) == (Fate.MOVED, "CPUExecutionProvider")
    assert "with --target cuda" in bias.remedy
    assert rows["node", "c0"].state == Fate.FLOAT
    assert "no integer kernel" in rows["node", "c0"].reason
    assert rows["pair", "x"].state == Fate.FLOAT


def test_of_what_tensorrt_compiled_nothing_is_claimed() -> None:
    done = quantized(conv_chain(1), target="tensorrt", bias_correction=False).model
    nodes = {"TensorrtExecutionProvider": {"c0": "Conv", "r0": "Relu"}}
    known = Partition("tensorrt", gpu=True, nodes=nodes)
    rows = listing.listing(done, done, provider="tensorrt", partition=known)
    assert [row.state for row in rows if row.kind == "node"] == [Fate.COMPILED] * 2


def test_counts() -> None:
    row = Placed("a", "node", "Conv", Fate.INTEGER, "QLinearConv", "CPUExecutionProvider")
    assert listing.counts([row, row]) == {"node": {"integer": 2}, "pair": {}}


def test_a_chain_of_nodes_without_q_dq_is_said_to_have_none() -> None:
    proto = parse("[a] a = Neg(x) [b] y = Exp(a)", "float[2] x", "float[2] y", {})
    rows = listing.listing(proto, placement.load(proto)[0])
    assert [(row.name, row.state, row.reason) for row in rows] == [
        ("a", "float", "no Q/DQ pair is around it"),
        ("b", "float", "no Q/DQ pair is around it"),
    ]


def test_on_cuda_without_a_gpu(cuda_stub: CudaStub, tmp_path: Path) -> None:
    done = quantized(conv_chain(2), target="cpu", bias_correction=False).model
    kept = tmp_path / "optimized.onnx"
    seen = cuda_stub(done, optimized=kept)
    rows = {
        (row.kind, row.name): row for row in listing.listing(done, onnx.load(kept), provider="cuda", partition=seen)
    }
    assert not seen.gpu
    assert rows["pair", "b0"].state == Fate.MOVED
    assert {row.state for row in rows.values() if row.operator == "Conv"} == {Fate.FLOAT}
    assert np.all([row.remedy for row in rows.values() if row.state == Fate.MOVED])


@pytest.mark.zoo
@pytest.mark.slow
def test_integer_kernels_of_real_models(real_model: Path, any_data: Callable[[Path], Any]) -> None:
    done = qdqtool.quantize(
        real_model, any_data(real_model), target="cpu", provider="cpu", bias_correction=False, calibrator="minmax"
    )
    assert integer_kernels(done.report.listing) == counted(done.model)

"""A small toolbox for tests that build a model, quantize it, and compare it with float."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime

from qdqtool.graphs import model as models
from qdqtool.pipeline import Result, quantize
from qdqtool.planning.target import Target
from qdqtool.verification import placement

Array = npt.NDArray[Any]
Arrays = dict[str, Array]
FREE = {"N": 1, "T": 6, "H": 8, "W": 8}
TARGETS = ("cpu", "tensorrt")
"""The two ways to place Q/DQ; the target cuda places them as tensorrt does."""


def normal(*shape: int, seed: int = 0, scale: float = 1.0) -> Array:
    """Normal values, float32."""
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) * scale).astype(np.float32)


def weight(*shape: int, seed: int = 0, inputs: int | None = None) -> Array:
    """A weight that keeps the variance behind a Relu (He); ``inputs``: fan-in, by default that of [out, in, ...]."""
    return normal(*shape, seed=seed, scale=math.sqrt(2 / (inputs or math.prod(shape[1:]))))


def parse(
    body: str, x: str, y: str, constants: Mapping[str, Array], *, opset: int = 17, domain: str = ""
) -> onnx.ModelProto:
    """A model from the ONNX text of its body, its inputs and outputs; ``constants`` become initializers."""
    others = f', "{domain}": 1' if domain else ""
    head = f'<ir_version: 8, opset_import: ["": {opset}{others}]>'
    proto = onnx.parser.parse_model(f"{head} g ({x}) => ({y}) {{ {body} }}")
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(value, name) for name, value in constants.items())
    return proto


def feeds(proto: onnx.ModelProto, samples: int = 32, seed: int = 1, **free: int) -> Arrays:
    """Values in [-1, 1], as pixels are, for every float input, 0 and 1 for every other; samples along axis 0.

    Free dimensions have the sizes in ``free``, or else those in :data:`FREE`.
    """
    rng = np.random.default_rng(seed)
    found: Arrays = {}
    for info in models.inputs(proto):
        shape = [d if isinstance(d, int) else {**FREE, **free}.get(d or "", 3) for d in info.shape]
        shape[:1] = [samples * n for n in shape[:1]]
        values = rng.uniform(-1, 1, shape) if info.dtype.kind == "f" else rng.integers(0, 2, shape)
        found[info.name] = values.astype(info.dtype)
    return found


def single(arrays: Mapping[str, Array], rows: int = 1) -> Iterator[Arrays]:
    """Samples along axis 0 as feeds of ``rows`` samples each."""
    count = min(len(array) for array in arrays.values())
    for start in range(0, count, rows):
        yield {name: array[start : start + rows] for name, array in arrays.items()}


def run(proto: onnx.ModelProto, fed: Mapping[str, Array], *, optimize: bool = True) -> Arrays:
    """Outputs by name: as the runtime fuses the model, or every node as written."""
    options = onnxruntime.SessionOptions()
    if not optimize:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(fed)), strict=True))


def sqnr(reference: Array, got: Array) -> float:
    """Signal to quantization noise ratio in dB."""
    x, y = reference.astype(np.float64), got.astype(np.float64)
    noise = float(((x - y) ** 2).sum())
    return math.inf if noise == 0 else 10 * math.log10(max(float((x**2).sum()), 1e-300) / noise)


def quality(reference: onnx.ModelProto, quantized: onnx.ModelProto, fed: Mapping[str, Array]) -> dict[str, float]:
    """SQNR of every output in dB; of integer kernels and of Q/DQ as written the lower one."""
    wanted = run(reference, fed)
    others = [run(quantized, fed, optimize=optimize) for optimize in (True, False)]
    return {name: min(sqnr(value, other[name]) for other in others) for name, value in wanted.items()}


def quantized(proto: onnx.ModelProto, data: object = None, *, target: str | Target = "cpu", **fields: Any) -> Result:
    """Quantize on random data and hold the result to what every result must be: checked, and loaded by the runtime."""
    result = quantize(proto, feeds(proto) if data is None else data, target=target, provider="cpu", **fields)
    onnx.checker.check_model(result.model, full_check=True)
    placement.load_and_count(result.model)
    return result


def ops(proto: onnx.ModelProto, *, qdq: bool = True) -> list[str]:
    """Operators of the top graph in order; without Q/DQ where ``qdq`` is false."""
    skipped = () if qdq else ("QuantizeLinear", "DequantizeLinear")
    return [node.op_type for node in proto.graph.node if node.op_type not in skipped]


def constants(proto: onnx.ModelProto) -> Arrays:
    """Initializers by name."""
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in proto.graph.initializer}


def reasons(result: Result) -> dict[str, str]:
    """Why nodes were left alone, by node."""
    return {skip.node: skip.reason for skip in result.report.skipped}


def conv_values(layers: int, channels: int = 8) -> Arrays:
    """Weights w0, w1, ... of 3x3 convolutions that keep the number of channels, and biases b0, b1, ..."""
    weights = {f"w{i}": weight(channels, channels, 3, 3, seed=i) for i in range(layers)}
    return weights | {f"b{i}": normal(channels, seed=i, scale=0.1) for i in range(layers)}


def conv(result: str, source: str, index: int = 0) -> str:
    """A 3x3 convolution as ONNX text, with the values of :func:`conv_values`; the node is named as its result."""
    return f"[{result}] {result} = Conv <pads = [1, 1, 1, 1]> ({source}, w{index}, b{index})"


def conv_chain(layers: int, channels: int = 8, size: int = 8) -> onnx.ModelProto:
    """Conv, Relu, Conv, Relu, ...: nodes c0, r0, c1, r1, ... that put out tensors of their names."""
    steps = [f"{conv(f'c{i}', f'r{i - 1}' if i else 'x', i)} [r{i}] r{i} = Relu(c{i})" for i in range(layers)]
    shape = f"[N, {channels}, {size}, {size}]"
    return parse(" ".join(steps), f"float{shape} x", f"float{shape} r{layers - 1}", conv_values(layers, channels))

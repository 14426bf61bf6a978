"""Models built in code to measure speed on: a ResNet-50 and transformer blocks, float32, seeded random weights.

ResNet-50 as in He et al.: Deep residual learning for image recognition, 2016, table 1 (stride in the 3x3 layer), with
BatchNormalization folded away. Transformer blocks normalize before attention and before the two products behind it
(Xiong et al.: On layer normalization in the transformer architecture, 2020). Weights have He's scale, the last layer
of each branch a smaller one, so that activations stay of the order of 1 to the end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

Array = npt.NDArray[np.float32]
_OPSET = 20
_STAGES = (3, 4, 6, 3)
_BRANCH = 0.3


@dataclass
class _Builder:
    """Nodes and weights of a model in the making."""

    rng: np.random.Generator
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    constants: list[onnx.TensorProto] = field(default_factory=list)

    def constant(self, value: npt.NDArray[Any]) -> str:
        name = f"c{len(self.constants)}"
        self.constants.append(numpy_helper.from_array(value, name))
        return name

    def weight(self, *shape: int, fan_in: int, gain: float = 1.0) -> str:
        return self.constant((gain * math.sqrt(2 / fan_in) * self.rng.standard_normal(shape)).astype(np.float32))

    def bias(self, size: int) -> str:
        return self.constant((0.1 * self.rng.standard_normal(size)).astype(np.float32))

    def add(self, op: str, *inputs: str, **attributes: Any) -> str:
        name = f"{op.lower()}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(op, list(inputs), [name], name, **attributes))
        return name

    def conv(self, x: str, given: int, made: int, size: int, *, stride: int = 1, gain: float = 1.0) -> str:
        weight = self.weight(made, given, size, size, fan_in=given * size * size, gain=gain)
        pads = [size // 2] * 4
        return self.add("Conv", x, weight, self.bias(made), pads=pads, strides=[stride, stride])

    def linear(self, x: str, given: int, made: int, *, gain: float = 1.0) -> str:
        product = self.add("MatMul", x, self.weight(given, made, fan_in=given, gain=gain))
        return self.add("Add", product, self.bias(made))

    def model(self, shape: tuple[int, ...], result: str, made: tuple[int, ...]) -> onnx.ModelProto:
        given = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", *shape])
        output = helper.make_tensor_value_info(result, TensorProto.FLOAT, ["N", *made])
        graph = helper.make_graph(self.nodes, "g", [given], [output], self.constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", _OPSET)], ir_version=9)


def resnet50(*, size: int = 224, width: int = 64, classes: int = 1000, seed: int = 0) -> onnx.ModelProto:
    """ResNet-50 on images [N, 3, size, size]; ``width`` is the number of channels behind the first layer."""
    build = _Builder(np.random.default_rng(seed))
    x = build.add("Relu", build.conv("x", 3, width, 7, stride=2))
    x = build.add("MaxPool", x, kernel_shape=[3, 3], strides=[2, 2], pads=[1] * 4)
    channels = width
    for stage, blocks in enumerate(_STAGES):
        inner, outer = width << stage, (4 * width) << stage
        for block in range(blocks):
            stride = 2 if stage and not block else 1
            y = build.add("Relu", build.conv(x, channels, inner, 1))
            y = build.add("Relu", build.conv(y, inner, inner, 3, stride=stride))
            y = build.conv(y, inner, outer, 1, gain=_BRANCH)
            # Half the power is what behind a Relu keeps the power of what is before it.
            kept = x if block else build.conv(x, channels, outer, 1, stride=stride, gain=math.sqrt(0.5))
            x, channels = build.add("Relu", build.add("Add", y, kept)), outer
    x = build.add("Flatten", build.add("GlobalAveragePool", x))
    weight = build.weight(classes, channels, fan_in=channels)
    return build.model((3, size, size), build.add("Gemm", x, weight, build.bias(classes), transB=1), (classes,))


def transformer(
    *, tokens: int = 128, width: int = 1024, heads: int = 16, layers: int = 2, seed: int = 0
) -> onnx.ModelProto:
    """Transformer blocks on [N, tokens, width]: attention, then two products around a Gelu, 4 times as wide inside."""
    build, x = _Builder(np.random.default_rng(seed)), "x"
    split = build.constant(np.array([0, tokens, heads, width // heads], np.int64))
    merged = build.constant(np.array([0, tokens, width], np.int64))
    scale = build.constant(np.array(1 / math.sqrt(width // heads), np.float32))
    for _ in range(layers):
        y = _normalized(build, x, width)
        q, k, v = (
            build.add("Transpose", build.add("Reshape", build.linear(y, width, width), split), perm=perm)
            for perm in ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
        )
        scores = build.add("Softmax", build.add("Mul", build.add("MatMul", q, k), scale), axis=-1)
        y = build.add("Transpose", build.add("MatMul", scores, v), perm=[0, 2, 1, 3])
        y = build.linear(build.add("Reshape", y, merged), width, width, gain=_BRANCH)
        x = build.add("Add", x, y)
        y = build.add("Gelu", build.linear(_normalized(build, x, width), width, 4 * width))
        x = build.add("Add", x, build.linear(y, 4 * width, width, gain=_BRANCH))
    return build.model((tokens, width), _normalized(build, x, width), (tokens, width))


def _normalized(build: _Builder, x: str, width: int) -> str:
    gain = build.constant((1 + 0.1 * build.rng.standard_normal(width)).astype(np.float32))
    return build.add("LayerNormalization", x, gain, build.bias(width), axis=-1)


def images(samples: int, size: int = 224, seed: int = 1) -> Array:
    """Smooth random images [samples, 3, size, size], of mean 0 and variance 1."""
    rng = np.random.default_rng(seed)
    coarse = (
        rng.standard_normal((samples, 3, -(-size // 8), -(-size // 8))).repeat(8, 2).repeat(8, 3)[:, :, :size, :size]
    )
    found: Array = (0.8 * coarse + 0.6 * rng.standard_normal((samples, 3, size, size))).astype(np.float32)
    return found


def embeddings(samples: int, tokens: int = 128, width: int = 1024, seed: int = 1) -> Array:
    """Random embeddings [samples, tokens, width] of which some channels are much larger than others."""
    rng = np.random.default_rng(seed)
    large = np.exp(0.5 * rng.standard_normal(width))
    found: Array = (large * rng.standard_normal((samples, tokens, width))).astype(np.float32)
    return found

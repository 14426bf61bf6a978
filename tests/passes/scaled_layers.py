"""Models of a linear layer behind arithmetic on channels, as ONNX text."""

from __future__ import annotations

from typing import Any

import numpy as np

BATCHNORM = "BatchNormalization <epsilon = 0.01> ({x}, gamma, beta, mean, var)"
PADDED = "'layer' pads with 0, which the shift would move"
CONVOLUTIONS: dict[str, tuple[int, ...]] = {
    "Conv(x, w, b)": (6, 4, 3, 3),
    "Conv <group = 2> (x, w, b)": (6, 2, 3, 3),
    "Conv <group = 4> (x, w, b)": (8, 1, 3, 3),
    'Conv <auto_pad = "VALID", dilations = [2, 2]> (x, w)': (6, 4, 2, 2),
    'Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)': (6, 4, 1, 1),
    "ConvTranspose(x, w, b)": (4, 6, 1, 1),
    "ConvTranspose <group = 2> (x, w, b)": (4, 3, 1, 1),
}
PRODUCTS: dict[str, tuple[int, ...]] = {
    "Gemm(x, w, b)": (4, 6),
    "Gemm <alpha = 0.5, beta = 3.0> (x, w, b)": (4, 6),
    "Gemm <transB = 1> (x, w)": (6, 4),
    "MatMul(x, w)": (4, 6),
}


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> Any:
    return (np.random.default_rng([seed, *shape]).standard_normal(shape) / 2).astype(dtype)


def values(weight: tuple[int, ...], outputs: int = 6, dtype: str = "float32") -> dict[str, Any]:
    """Weights, a BatchNormalization and factors whose channels are about alike."""
    rng = np.random.default_rng(1)
    vectors = {
        name: rng.uniform(0.8, 1.2, 4) * np.array([1, -1, 1, -1]) for name in ("gamma", "beta", "mean", "k", "t")
    }
    known = {**vectors, "var": rng.uniform(0.8, 1.2, 4), "two": np.array(2.0), "four": np.array(0.25)}
    return {
        **{name: value.astype(dtype) for name, value in known.items()},
        "w": normal(*weight, dtype=dtype),
        "b": normal(outputs, dtype=dtype),
        "kc": known["k"].reshape(4, 1, 1).astype(dtype),
        "tc": known["t"].reshape(1, 4, 1, 1).astype(dtype),
    }


def source(body: str, *, opset: int = 13, shape: str = "[N, 4, 6, 6]", dtype: str = "float", outputs: str = "y") -> str:
    given = ", ".join(f"{dtype} {name}" for name in outputs.split())
    return f'<ir_version: 8, opset_import: ["" : {opset}]> g ({dtype}{shape} x0) => ({given}) {{ {body} }}'

"""What the runtime really made of a Q/DQ graph: integer kernels, float operators, conversions left over."""

from __future__ import annotations

import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import onnx

from qdqtool import runtime
from qdqtool.scopes import bodies

_INTEGER_OPS = frozenset(
    {
        "QGemm",
        "MatMulIntegerToFloat",
        "MatMulInteger",
        "ConvInteger",
        "DynamicQuantizeMatMul",
        "MatMulNBits",
        "QAttention",
    }
)


def is_integer_kernel(op: str) -> bool:
    """Whether an operator of an optimized graph computes on integer codes."""
    return op.startswith("QLinear") or op in _INTEGER_OPS


def load_and_count(proto: onnx.ModelProto, *, provider: str = "cpu") -> tuple[dict[str, int], Any]:
    """Load a model with all optimizations; returns operator -> count in the graph that really runs, and the session."""
    with tempfile.TemporaryDirectory(prefix="qdqtool-") as folder:
        path = Path(folder) / "optimized.onnx"
        active = runtime.session(proto, provider=provider, optimized_path=path)
        optimized = onnx.load(path)
    return dict(
        Counter(
            node.op_type for graph in (optimized.graph, *bodies(optimized.graph)) for node in graph.node
        ).most_common()
    ), active

"""Which fused kernel computes something else than the Q/DQ nodes that it stands for.

A file has two accuracies: with every Q and DQ computed as written in float (emulated), and as the runtime fuses it into
kernels on integers. Both graphs keep many tensors by name. A kernel's own share of their difference is seen where it
reads what the emulation computes, in one run of both graphs as one; what it hands on from kernels before it, in a run
of the fused graph alone.

The fused graph is the runtime's without changes of the layout, which only rename tensors.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx
from onnx import numpy_helper

from qdqtool import runtime
from qdqtool.data.batching import Batch
from qdqtool.graphs.links import CONVERSIONS, Links
from qdqtool.graphs.scopes import bodies
from qdqtool.verification.sqnr import Sqnr
from qdqtool.verification.tensor_error import PREFIX, joined

_MOVES: Final = frozenset({"Reshape", "Squeeze", "Transpose", "Unsqueeze"})
Array = npt.NDArray[Any]


@dataclass(frozen=True)
class KernelError:
    """How far a fused kernel is from the Q/DQ nodes that it stands for, at one tensor that it puts out.

    Attributes:
        kernel: the node's name in the fused graph.
        operator: its operator, such as QLinearConv.
        tensor: what it puts out; codes count as differences from their zero point.
        own_db: SQNR in dB where it reads what the emulation computes: the kernel's own rounding.
        total_db: SQNR in dB in the fused graph, with what comes from kernels before it.
        differing: share of the tensor's entries, 0 to 1, that are another code (or another float) on equal inputs.
    """

    kernel: str
    operator: str
    tensor: str
    own_db: float
    total_db: float
    differing: float


def kernel_errors(
    quantized: onnx.ModelProto, batches: Iterable[Batch], provider: str = "cpu"
) -> tuple[KernelError, ...]:
    """Every fused kernel whose result can be compared, the one that differs most by itself first.

    Empty where the model has control-flow bodies, whose tensors cannot be read from outside, and where nothing fused.

    Raises:
        ModelError: the runtime refuses a graph, or does not run it.
    """
    if any(True for _ in bodies(quantized.graph)):
        return ()
    fused = _fused(quantized, provider)
    kernels = _kernels(quantized, fused)
    if not kernels:
        return ()
    shared = {name: name for name in kernels} | _shared(quantized, fused)
    wanted = [*kernels, *(PREFIX + name for name in kernels)]
    both = runtime.session(_exposed(joined(quantized, fused, shared), wanted), provider=provider, optimize=False)
    alone = runtime.session(_exposed(fused, kernels), provider=provider, optimize=False)
    zeros = _zero_points(quantized)
    own, total = ({name: _Apart(zeros.get(name)) for name in kernels} for _ in range(2))
    for batch in batches:
        values = [batch.real(value) for value in runtime.run(both, wanted, batch.feeds)]
        found = [batch.real(value) for value in runtime.run(alone, list(kernels), batch.feeds)]
        want, got = values[: len(kernels)], values[len(kernels) :]
        for name, x, y, z in zip(kernels, want, got, found, strict=True):
            own[name].add(x, y)
            total[name].add(x, z)
    makers = Links.of(fused.graph).makers
    errors = [
        KernelError(node.name, node.op_type, name, own[name].sqnr.db, total[name].sqnr.db, own[name].share)
        for name, node in ((name, _computing(node, makers, shared)) for name, node in kernels.items())
    ]
    return tuple(sorted(errors, key=lambda error: (error.own_db, error.total_db)))


@dataclass
class _Apart:
    """Two forms of a tensor, summed over batches."""

    zero: Array | None
    sqnr: Sqnr
    entries: int = 0
    differing: int = 0

    def __init__(self, zero: Array | None) -> None:
        self.zero, self.sqnr = zero, Sqnr()

    def add(self, want: Array, got: Array) -> None:
        """Add a batch."""
        self.entries += want.size
        self.differing += int(np.count_nonzero(want != got))
        if self.zero is not None:
            want, got = (value.astype(np.float64) - self.zero for value in (want, got))
        self.sqnr.add(want, got)

    @property
    def share(self) -> float:
        return self.differing / self.entries if self.entries else math.nan


def _fused(quantized: onnx.ModelProto, provider: str) -> onnx.ModelProto:
    with tempfile.TemporaryDirectory(prefix="qdqtool-") as folder:
        path = Path(folder) / "fused.onnx"
        runtime.session(quantized, provider=provider, optimized_path=path, layout=False)
        return onnx.load(path)


def _shared(quantized: onnx.ModelProto, fused: onnx.ModelProto) -> dict[str, str]:
    """Results of nodes that both graphs have, each under its own name."""
    made = {name for node in quantized.graph.node for name in node.output if name}
    return {name: name for node in fused.graph.node for name in node.output if name in made}


def _kernels(quantized: onnx.ModelProto, fused: onnx.ModelProto) -> dict[str, onnx.NodeProto]:
    """Result -> the fused node that makes it, where the plain graph makes it by another operator."""
    made = {name: node.op_type for node in quantized.graph.node for name in node.output}
    nodes = [node for node in fused.graph.node if node.op_type not in CONVERSIONS]
    return {name: node for node in nodes for name in node.output if name in made and made[name] != node.op_type}


def _computing(node: onnx.NodeProto, makers: Mapping[str, onnx.NodeProto], shared: Mapping[str, str]) -> onnx.NodeProto:
    """The kernel behind a node that only moves what the runtime's own kernel put out."""
    while node.op_type in _MOVES and node.input[0] in makers and node.input[0] not in shared:
        node = makers[node.input[0]]
    return node


def _zero_points(quantized: onnx.ModelProto) -> Mapping[str, Array]:
    """Tensor of codes -> its zero point, of shape (); those of one code a channel are left out."""
    constants = Links.of(quantized.graph).constants
    found = {}
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear" and len(node.input) > 2 and node.input[2] in constants:
            zero = numpy_helper.to_array(constants[node.input[2]])
            if zero.size == 1:
                found[node.output[0]] = zero.reshape(()).astype(np.float64)
    return found


def _exposed(proto: onnx.ModelProto, names: Sequence[str] | Mapping[str, object]) -> onnx.ModelProto:
    """The model with more outputs, whose types the runtime works out."""
    extended = onnx.ModelProto()
    extended.CopyFrom(proto)
    known = {value.name for value in proto.graph.output}
    extended.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names if name not in known)
    return extended

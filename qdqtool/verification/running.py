"""A loaded model as something to run again and again on inputs and outputs that stay where they are."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx

from qdqtool import runtime
from qdqtool.data.fit import Feeds
from qdqtool.errors import DataError, ModelError, RuntimeUnavailableError
from qdqtool.graphs.links import CONVERSIONS
from qdqtool.graphs.scopes import bodies
from qdqtool.verification import partition, placement

FLOAT_LAYERS: Final = frozenset(
    {"Conv", "FusedConv", "NhwcFusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "ConvTranspose"}
)


@dataclass(frozen=True)
class Work:
    """What a model does in the graph that runs, as far as it says why the model is slow.

    Attributes:
        operators: operator -> how many nodes of it there are.
        conversions: names of the QuantizeLinear and DequantizeLinear nodes that fused into nothing.
        layers: names of convolutions and matrix products in float.
        fallen: names of nodes that compute values, on the CPU although another provider was asked for.
        copies: tensors copied between devices at every run.
    """

    operators: Mapping[str, int]
    conversions: tuple[str, ...] = ()
    layers: tuple[str, ...] = ()
    fallen: tuple[str, ...] = ()
    copies: tuple[str, ...] = ()


def loaded(proto: onnx.ModelProto, *, provider: str, **options: Any) -> tuple[Work, Any]:
    """What a model does in the graph that runs, and the session; ``options`` are those of :func:`runtime.session`."""
    config = {**options.pop("config", {}), **(partition.RECORD if provider != "cpu" else {})}
    with tempfile.TemporaryDirectory(prefix="qdqtool-") as folder:
        path = Path(folder) / "optimized.onnx"
        active = runtime.session(proto, optimized_path=path, provider=provider, config=config, **options)
        optimized = onnx.load(path, load_external_data=False)
    placed = None
    if provider != "cpu":
        with contextlib.suppress(RuntimeUnavailableError):  # an older runtime does not tell
            placed = partition.read(active, optimized, provider)
    nodes = [node for graph in (optimized.graph, *bodies(optimized.graph)) for node in graph.node]
    work = Work(
        placement.operators(optimized),
        conversions=tuple(node.name for node in nodes if node.op_type in CONVERSIONS),
        layers=tuple(node.name for node in nodes if node.op_type in FLOAT_LAYERS),
        fallen=() if placed is None else tuple(placed.fallen),
        copies=() if placed is None else placed.copies,
    )
    return work, active


def runner(active: Any, feeds: Feeds, device: str) -> Callable[[], None]:
    """One run on inputs that lie on the device, into outputs that lie there, each in the same place every time.

    Raises:
        ModelError: the model does not run on the feeds.
    """
    import onnxruntime as ort

    half = {given.name for given in active.get_inputs() if given.type == "tensor(float16)"}
    outputs = [output.name for output in active.get_outputs()]
    try:
        binding = active.io_binding()
        for name, value in feeds.items():
            fed = value.astype(np.float16) if name in half else value
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(fed, device, 0))
        for name in outputs:
            binding.bind_output(name, device)
        active.run_with_iobinding(binding)  # tells the outputs' shapes
        made = binding.get_outputs()
        binding.clear_binding_outputs()
        for name, value in zip(outputs, made, strict=True):
            binding.bind_ortvalue_output(name, value)
    except Exception as error:  # the runtime's own exceptions share no base but Exception
        raise ModelError(f"ONNX Runtime cannot run the model on these inputs: {error}") from error

    def run() -> None:
        active.run_with_iobinding(binding)
        if device != "cpu":
            binding.synchronize_outputs()

    return run


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[dict[str, str]]:
    """Pin this thread to a processor, and give the configuration that pins a session's others; 0 threads: pin none.

    Raises:
        DataError: the system cannot pin threads, or this process may use fewer processors.
    """
    spinning = {"session.intra_op.allow_spinning": "1"}  # the runtime's own default, and so what users meet
    if not threads:
        yield spinning
        return
    if not hasattr(os, "sched_setaffinity"):
        raise DataError("threads cannot be pinned on this system; leave --threads out")
    before = os.sched_getaffinity(0)
    if threads > len(before):
        raise DataError(f"{threads} threads were asked for, and this process may use {len(before)} processors")
    first, *others = sorted(before)[:threads]
    affinities = {"session.intra_op_thread_affinities": ";".join(str(cpu + 1) for cpu in others)} if others else {}
    os.sched_setaffinity(0, {first})
    try:
        yield {**spinning, **affinities}
    finally:
        os.sched_setaffinity(0, before)

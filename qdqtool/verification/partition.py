"""Which execution provider runs which node of a model, and what is copied between devices.

Asked in another process, a model's partition on CUDA can be known without a GPU: with CUDA libraries that do nothing
in the place of NVIDIA's, the runtime partitions and optimizes as ever. Such a partition says so; nothing can be run.

CUDA has no DequantizeLinear for int32. A file made for CUDA keeps its biases float therefore; but before it
partitions, the runtime's optimizer ``WeightBiasQuantization`` turns the bias of every Conv, ConvTranspose and Gemm
between Q/DQ into int32 (:func:`returning_biases`), unless a session leaves it out, as all of qdqtool's do.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import onnx

from qdqtool import runtime
from qdqtool.errors import ModelError, RuntimeUnavailableError
from qdqtool.graphs import model as models
from qdqtool.graphs.links import Links
from qdqtool.graphs.scopes import bodies
from qdqtool.planning.target import Target
from qdqtool.verification import placement

RECORD: Final = {"session.record_ep_graph_assignment_info": "1"}
"""Session configuration without which the runtime does not tell its partition."""
_CPU: Final = "CPUExecutionProvider"
_FLOATS: Final = frozenset(getattr(onnx.TensorProto, name) for name in ("FLOAT", "FLOAT16", "BFLOAT16", "DOUBLE"))
_BIASED: Final = frozenset({"Conv", "ConvTranspose", "Gemm"})


@dataclass(frozen=True)
class Partition:
    """What each execution provider runs.

    Attributes:
        provider: the execution provider that was asked for, as qdqtool calls it.
        gpu: whether there was a device; False: the placement is exact, but nothing ran or can run.
        nodes: provider -> its nodes, as ``name -> operator``, in the graph before the provider's own fusions.
        fallen: nodes on the CPU that compute values of the model, or may where types are not told.
        shapes: nodes on the CPU that compute shapes, indices and conditions, where they belong.
        copies: tensors that are copied from one device to the other at every run, once a copy.
        operators: operator -> count in the graph that runs in the end, after all fusions.
    """

    provider: str
    gpu: bool
    nodes: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    fallen: Mapping[str, str] = field(default_factory=dict)
    shapes: Mapping[str, str] = field(default_factory=dict)
    copies: tuple[str, ...] = ()
    operators: Mapping[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        note = "" if self.gpu else " (placement only, no GPU)"
        counts = ", ".join(f"{len(nodes)} on {provider}" for provider, nodes in self.nodes.items())
        return f"{counts}; {len(self.fallen)} fell to the CPU, {len(self.copies)} copies{note}"


def partition(proto: onnx.ModelProto, *, provider: str = "cuda", config: Mapping[str, str] | None = None) -> Partition:
    """Load a model and ask the runtime how it partitioned it; the process must have found the provider's libraries.

    Args:
        proto: the model.
        provider: a key of :data:`qdqtool.runtime.PROVIDERS`.
        config: further session configuration entries.

    Raises:
        ModelError: the runtime refuses the model.
        RuntimeUnavailableError: the provider does not load here.
    """
    optimized, active = placement.load(proto, provider=provider, config={**RECORD, **(config or {})})
    return read(active, optimized, provider)


def read(active: Any, optimized: onnx.ModelProto, provider: str) -> Partition:
    """The partition of a session that was created with :data:`RECORD`, from which ``optimized`` was saved.

    Raises:
        RuntimeUnavailableError: the provider does not load here, or this runtime does not tell.
    """
    wanted = runtime.PROVIDERS[provider][0]
    if wanted not in active.get_providers():
        raise RuntimeUnavailableError(f"{wanted} does not load here: its libraries or a device are missing")
    if not hasattr(active, "get_provider_graph_assignment_info"):
        raise RuntimeUnavailableError("this version of onnxruntime does not tell which provider runs what; upgrade it")
    nodes: dict[str, dict[str, str]] = {}
    for part in active.get_provider_graph_assignment_info():
        nodes.setdefault(part.ep_name, {}).update((node.name, node.op_type) for node in part.get_nodes())
    on_cpu = nodes.get(_CPU, {}) if wanted != _CPU else {}
    known = dict(_computes_values(optimized))
    computes = {name: known.get(name, _can_put_out_floats(op)) for name, op in on_cpu.items()}
    return Partition(
        provider,
        gpu=not runtime.is_stub_driver(),
        nodes=nodes,
        fallen={name: op for name, op in on_cpu.items() if computes[name]},
        shapes={name: op for name, op in on_cpu.items() if not computes[name]},
        copies=tuple(node.input[0] for node in _nodes(optimized) if node.op_type.startswith("Memcpy")),
        operators=placement.operators(optimized),
    )


def partition_apart(
    path: str | os.PathLike[str],
    libraries: str | os.PathLike[str],
    *,
    config: Mapping[str, str] | None = None,
    optimized: str | os.PathLike[str] | None = None,
) -> Partition:
    """The partition on CUDA in a process of its own, whose CUDA libraries are those in a folder.

    Libraries are found when a process starts, hence another one.

    Args:
        path: the model's file.
        libraries: the folder, searched before all others.
        config: further session configuration entries.
        optimized: where to save the graph that the runtime makes of the model.

    Raises:
        ModelError: the runtime refuses the model, or CUDA does not load with these libraries; its words are given.
    """
    search = os.pathsep.join(filter(None, (os.fspath(libraries), os.environ.get("LD_LIBRARY_PATH"))))
    command = (sys.executable, "-c", "from qdqtool.verification.partition import main; main()", os.fspath(path))
    done = subprocess.run(
        (*command, json.dumps(dict(config or {})), os.fspath(optimized or "")),
        env={**os.environ, "LD_LIBRARY_PATH": search},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        raise ModelError(
            f"{os.fspath(path)} cannot be placed on CUDA: {(done.stderr.splitlines() or ['it crashed'])[-1]}"
        )
    values = json.loads(done.stdout.splitlines()[-1])
    return Partition(**{**values, "copies": tuple(values["copies"])})


def main() -> None:
    """Print the partition of the model ``argv[1]`` on CUDA as JSON; ``argv[2]`` is session configuration as JSON.

    ``argv[3]`` is where the graph that runs is saved; "": nowhere.
    """
    path, config, saved = sys.argv[1:]
    optimized, active = placement.load(models.load(path), provider="cuda", config={**RECORD, **json.loads(config)})
    if saved:
        models.save(optimized, saved)
    print(json.dumps(dataclasses.asdict(read(active, optimized, "cuda"))))


def on_gpu(target: Target) -> bool:
    """Whether a target's files are for a provider that runs on CUDA."""
    return any(runtime.PROVIDERS[name][0] in target.providers for name in ("cuda", "tensorrt"))


def bias_note(count: int) -> str:
    """What to tell the user about :func:`returning_biases`."""
    return (
        f"ONNX Runtime turns {count} float biases into int32 at load, which CUDA leaves to the CPU, with a copy of "
        f"each at every run, unless a session has the configuration entry "
        f"{runtime.WITHOUT_OPTIMIZERS}={runtime.BIAS_OPTIMIZER}"
    )


def returning_biases(proto: onnx.ModelProto) -> list[str]:
    """Nodes whose float bias the runtime turns into int32 where a session does not leave that out.

    They read their input through a DequantizeLinear with one scale, and are followed, but for Relu and Clip, by
    one QuantizeLinear alone.
    """
    everywhere = Links.of(proto.graph).everywhere()
    return [n.name for links in everywhere for n in links.graph.node if n.op_type in _BIASED and _returns(n, links)]


def _returns(node: onnx.NodeProto, links: Links) -> bool:
    bias = links.constants.get(node.input[2]) if len(node.input) > 2 else None
    source = links.dequantizer(node.input[0])
    if bias is None or len(bias.dims) != 1 or source is None or not _is_scalar(links.constants.get(source.input[1])):
        return False
    readers = links.read(node.output[0])
    while len(readers) == 1 and readers[0].op_type in ("Relu", "Clip"):
        readers = links.read(readers[0].output[0])
    return len(readers) == 1 and readers[0].op_type == "QuantizeLinear"


def _is_scalar(tensor: onnx.TensorProto | None) -> bool:
    return tensor is not None and list(tensor.dims) in ([], [1])


def _can_put_out_floats(op: str) -> bool:
    """Whether an operator's results may be floats."""
    if not onnx.defs.has(op):
        return True
    schema = onnx.defs.get_schema(op)
    allowed = {one.type_param_str: one.allowed_type_strs for one in schema.type_constraints}
    types = [name for out in schema.outputs for name in allowed.get(out.type_str, [out.type_str])]
    return any("float" in name or "double" in name for name in types)


def _nodes(proto: onnx.ModelProto) -> Iterator[onnx.NodeProto]:
    for graph in (proto.graph, *bodies(proto.graph)):
        yield from graph.node


def _computes_values(proto: onnx.ModelProto) -> Iterator[tuple[str, bool]]:
    """Node name -> whether it puts out float values, or may where the graph does not tell a type (as in bodies)."""
    for graph in (proto.graph, *bodies(proto.graph)):
        types = Links.of(graph).types
        for node in graph.node:
            told = [types.get(name) for name in node.output if name]
            may = None in told and _can_put_out_floats(node.op_type)
            yield node.name, may or any(number in _FLOATS for number in told)

"""How activations are observed within a budget of memory: which tensors in one sweep, how much of the data at once.

Within a sweep every thread holds the observed activations of its batch. Where those of a single sample exceed the
budget, the tensors are split into groups in the order of the graph, and the data pass once for each group.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

import onnx

from qdqtool.errors import DataError
from qdqtool.observation.bodies import expose
from qdqtool.units import count, size

_BATCH_BYTES: Final = 32 << 20  # observed activations of the batches that run at once: more is not faster
TRIAL: Final = 4
"""Samples held at once where it is tried whether samples may be joined: two joined and the same two apart."""
_UNITS: Final = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "KI": 1 << 10, "MI": 1 << 20, "GI": 1 << 30}


@dataclass(frozen=True)
class Sweeps:
    """Groups of tensors, each observed in one pass over the data.

    Attributes:
        groups: names of tensors, in the order of the graph.
        bytes_each: observed activations of one sample in the largest group, bytes.
        threads: batches that run at once.
        batch_bytes: observed activations of one batch, bytes, unless one sample alone has more.
        budget: what observed activations were to take at most, bytes.
        held: samples that are held at once at least.
        beyond: tensor -> bytes of these samples, where one tensor alone takes more than the budget.
    """

    groups: tuple[tuple[str, ...], ...]
    bytes_each: int
    threads: int
    batch_bytes: int
    budget: int
    held: int
    beyond: Mapping[str, int] = field(default_factory=dict)

    def notes(self) -> list[str]:
        """What the user should know: nothing where the data pass once and the budget is kept."""
        found = []
        if len(self.groups) > 1:
            tensors = count(max(map(len, self.groups)), "tensor")
            found.append(
                f"the data pass {len(self.groups)} times, for up to {tensors} each time, to keep observed activations "
                f"within {size(self.budget)}"
            )
        if self.beyond:
            most = max(self.beyond, key=lambda name: self.beyond[name])
            why = "" if self.held == 1 else f" for the {self.held} samples of a trial whether they may be joined"
            others = f", and {count(len(self.beyond) - 1, 'more tensor')} likewise" if len(self.beyond) > 1 else ""
            found.append(
                f"{size(self.budget)} for observed activations are exceeded: {most!r} alone takes "
                f"{size(self.beyond[most])}{why}{others}"
            )
        return found


def plan_sweeps(sizes: Mapping[str, int], budget: int | None, threads: int, held: int = TRIAL) -> Sweeps:
    """Divide tensors into sweeps.

    Args:
        sizes: tensor -> bytes of its values for one sample, in the order of the graph.
        budget: bytes that observed activations may take at any time; None: half of this machine's memory.
        threads: batches that may run at once.
        held: samples that must be held at once.
    """
    limit = default_budget() if budget is None else budget
    groups: list[list[str]] = [[]]
    filled = 0
    for name, each in sizes.items():
        if filled and each and held * (filled + each) > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += each
    largest = max(sum(sizes[name] for name in group) for group in groups)
    threads = max(1, min(threads, limit // max(largest, 1)))
    beyond = {name: held * each for name, each in sizes.items() if held * each > limit}
    together = min(_BATCH_BYTES, limit) // threads
    return Sweeps(tuple(map(tuple, groups)), largest, threads, together, limit, held, beyond)


def default_budget() -> int:
    """Half of the machine's physical memory, bytes; 8 GiB where the system does not tell."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):
        return 8 << 30


def known_sizes(proto: onnx.ModelProto, tensors: Sequence[str], *, rows: bool = True) -> dict[str, int] | None:
    """Bytes of each tensor for one sample by the shapes in the model; None where one of them is unknown.

    Args:
        proto: the model.
        tensors: names of float tensors.
        rows: a sample is one row along axis 0 of the inputs, whose free extent is 1 then in every tensor that has it;
            else it is unknown.
    """
    values = {v.name: v for v in (*proto.graph.value_info, *proto.graph.input, *proto.graph.output)}
    first = [v.type.tensor_type.shape.dim[:1] for v in proto.graph.input if v.type.HasField("tensor_type")]
    batch = {dim.dim_param for dims in first for dim in dims if rows and dim.dim_param}
    found = {}
    for name in tensors:
        kind = values[name].type.tensor_type if name in values else None
        if kind is None or not kind.HasField("shape"):
            return None
        dims = [1 if d.dim_param in batch else d.dim_value if d.HasField("dim_value") else None for d in kind.shape.dim]
        if None in dims:
            return None
        found[name] = 4 * math.prod(d for d in dims if d is not None)
    return found


def measuring(proto: onnx.ModelProto, tensors: Sequence[str]) -> onnx.ModelProto:
    """The model with nothing but the number of elements of each tensor as outputs, named as in :func:`size_name`."""
    model = onnx.ModelProto()
    model.CopyFrom(proto)
    del model.graph.output[:]
    expose(model.graph, dict.fromkeys(tensors, onnx.TensorProto.FLOAT))
    for name in tensors:
        model.graph.node.append(onnx.helper.make_node("Size", [name], [size_name(name)]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(size_name(name), onnx.TensorProto.INT64, []))
    return model


def size_name(tensor: str) -> str:
    """Name of the output that tells a tensor's number of elements."""
    return f"qdqtool.size.{tensor}"


def parse_bytes(text: str | int) -> int:
    """Bytes in "4GB", "512 MiB", "1e9" or a number.

    Raises:
        DataError: it is none of these, or not positive.
    """
    match = re.fullmatch(r"\s*([\d.]+(?:[eE]\+?\d+)?)\s*([kKmMgG]?[iI]?)[bB]?\s*", str(text))
    try:
        found = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    except (ValueError, KeyError, OverflowError):
        found = 0
    if found <= 0:
        raise DataError(f"{text!r} is no amount of memory; give bytes, or as in 4GB or 512MiB")
    return found

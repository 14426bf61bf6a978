"""A model's large tensors in a file of their own, written one after the other: no second copy of the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import onnx

LEAST: Final = 1024
"""Bytes; smaller tensors stay in the model's own file."""


def write(proto: onnx.ModelProto, path: Path, data: Path) -> None:
    """Write ``proto`` to ``path`` and the values of its large initializers to ``data``, beside which it will lie."""
    shell = onnx.ModelProto()
    _copy_fields(proto, shell, without="graph")
    _copy_fields(proto.graph, shell.graph, without="initializer")
    with data.open("wb") as stream:
        for tensor in proto.graph.initializer:
            values = tensor.raw_data
            if len(values) < LEAST:
                shell.graph.initializer.append(tensor)
                continue
            reference = shell.graph.initializer.add()
            _copy_fields(tensor, reference, without="raw_data")
            reference.data_location = onnx.TensorProto.EXTERNAL
            start, length = stream.tell(), stream.write(values)
            for key, value in (("location", data.name), ("offset", start), ("length", length)):
                reference.external_data.add(key=key, value=str(value))
    path.write_bytes(shell.SerializeToString(deterministic=True))


def _copy_fields(source: Any, copied: Any, *, without: str) -> None:
    for field, value in source.ListFields():
        if field.name == without:
            continue
        if isinstance(value, (int, float, str, bytes)):
            setattr(copied, field.name, value)
        else:  # a message, or several of anything
            getattr(copied, field.name).MergeFrom(value)

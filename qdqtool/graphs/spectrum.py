"""Layers that compute or read a power spectrum: what is small in it counts as much as what is large.

A short-time Fourier transform is exported as a convolution (or product) whose outputs, real and imaginary parts, are
squared, added, and then rooted or put through a logarithm. Their values span many powers of two, and a step that suits
the loudest band of the loudest sample drowns all others: on a speech detector such layers in 8 bits cost 15 dB of its
outputs beside float ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs

_MOVES: Final = frozenset(
    {"Concat", "Flatten", "Gather", "Identity", "Reshape", "Slice", "Split", "Squeeze", "Transpose", "Unsqueeze"}
)
_LAYERS: Final = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
_TRANSFORMS: Final = frozenset({"DFT", "STFT"})
_KEEPS: Final = _MOVES | {"Add", "Clip", "Div", "Max", "Mul", "Pow", "ReduceMean", "ReduceSum", "Sqrt", "Sum"}
"""Operators behind a square whose result is a spectrum still; a logarithm ends it."""


def layers(graph: gs.Graph) -> dict[int, str]:
    """Why a layer of the graph should stay float, by the node's identity, for those around a spectrum."""
    outputs = graphs.output_ids(graph)
    found: dict[int, str] = {}
    for node in graphs.all_nodes(graph):
        if node.op not in _LAYERS | _TRANSFORMS:
            continue
        ends = list(_ends(node, outputs))
        if not ends or not all(end is not None and _is_square(end) for end in ends):
            continue
        if node.op in _LAYERS:
            found[id(node)] = "its outputs are squared as a spectrum's are, whose small values 8 bits would drown"
        for reader in _readers(end for end in ends if end is not None):
            found[id(reader)] = "it reads a spectrum, whose small values 8 bits would drown"
    return found


def _is_square(node: gs.Node) -> bool:
    if node.op == "Mul":
        return node.inputs[0] is node.inputs[1]
    exponent = graphs.constant(graphs.input_at(node, 1)) if node.op == "Pow" else None
    return exponent is not None and bool((exponent == 2).all())


def _ends(node: gs.Node, outputs: set[int]) -> Iterator[gs.Node | None]:
    """Who reads a node's outputs, behind those that only move values; None for whoever is outside of the graph."""
    waiting, seen = [node], {id(node)}
    while waiting:
        for tensor in waiting.pop().outputs:
            if id(tensor) in outputs:
                yield None
            for reader in tensor.outputs:
                if id(reader) not in seen:
                    seen.add(id(reader))
                    if reader.op in _MOVES:
                        waiting.append(reader)
                    else:
                        yield reader


def _readers(squares: Iterator[gs.Node]) -> Iterator[gs.Node]:
    """Layers that read what becomes of squares."""
    waiting = list(squares)
    seen = set(map(id, waiting))
    while waiting:
        for reader in (reader for tensor in waiting.pop().outputs for reader in tensor.outputs):
            if id(reader) not in seen:
                seen.add(id(reader))
                if reader.op in _LAYERS:
                    yield reader
                elif reader.op in _KEEPS:
                    waiting.append(reader)

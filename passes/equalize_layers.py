"""Cross-layer equalization: rescale consecutive linear layers so that their weights' channels are alike.

    W2 f(W1 x + b1) = (W2 S) f(S^-1 W1 x + S^-1 b1),    s_i = sqrt(r1_i / r2_i)

with f a Relu or anything else that commutes with a positive factor for each channel, r1_i the largest magnitude in
output channel i of W1 and r2_i that in input channel i of W2: both become sqrt(r1_i r2_i) (Nagel et al., Data-Free
Quantization Through Weight Equalization and Bias Correction, ICCV 2019, section 4.1). Each layer is part of two pairs,
so pairs are balanced one after the other until no factor changes any more.

Weights with one scale each gain most. Where every output channel has a scale of its own, only the activation between
the layers can gain, and its ranges are not what the weights' are. A channel with small weights and a large bias would
take up the activation's whole range, were it made as large as the others; so factors have a limit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Final

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.channel_paths import ChannelPath, follow
from qdqtool.graphs.channel_sources import LayerSource
from qdqtool.graphs.weight_matrix import WeightMatrix
from qdqtool.passes_api import Fact, State
from qdqtool.spec import FloatArray

_SWEEPS: Final = 10
_CONVERGED: Final = 0.02
"""Largest change of a factor, as a share of it, that is none."""
_LIMIT: Final = 8.0


@dataclass
class _Pair:
    source: LayerSource
    path: ChannelPath
    factors: FloatArray

    @cached_property
    def names(self) -> tuple[str, ...]:
        """The source's node and those of the layers that read it."""
        return self.source.name, *(each.layer.node.name for each in self.path.layers)


@dataclass(frozen=True)
class EqualizeLayers:
    """Balance the channels of consecutive linear layers by factors that leave the outputs as they are."""

    name: ClassVar[str] = "equalize-layers"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.SHAPES})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAN, Fact.STATISTICS, Fact.PARAMS, Fact.QDQ})

    def run(self, state: State) -> int:
        """Rescale weights and biases; returns the number of layers whose output was rescaled."""
        outputs, taken = graphs.output_ids(state.graph), graphs.tensor_names(state.graph)
        pairs = []
        for _, graph in graphs.all_graphs(state.graph):
            here = {id(node) for node in graph.nodes}
            for node in graph.nodes:
                found = _pair(node, here, outputs)
                if isinstance(found, str):
                    state.skip(self.name, node.name, found)
                elif found is not None:
                    pairs.append(found)
        _balance(pairs)
        changed = 0
        for pair in pairs:
            reason = _apply(pair, state, outputs, taken)
            if reason is not None:
                state.skip(self.name, pair.source.name, reason)
            changed += reason is None
        return changed


def _pair(node: gs.Node, here: set[int], outputs: set[int]) -> _Pair | str | None:
    """A layer with those behind it; None where the node is no layer, a reason where there are none to balance."""
    source = LayerSource.of(node, outputs)
    if source is None or isinstance(source, str):
        return source
    path = follow(source.tensor, source.axis, source.channels, here, outputs)
    return path if isinstance(path, str) else _Pair(source, path, np.ones(source.channels))


def _balance(pairs: list[_Pair]) -> None:
    """Find every pair's factors, by which its source's output channels are to be divided."""
    layers = [layer for pair in pairs for layer in (pair.source.layer, *(each.layer for each in pair.path.layers))]
    peaks = {layer.node.name: WeightMatrix.of(layer).peak for layer in layers}
    moving = pairs
    for _ in range(_SWEEPS):
        changed = {name for pair in moving for name in _balance_pair(pair, peaks)}
        moving = [pair for pair in pairs if not changed.isdisjoint(pair.names)]
        if not moving:
            return


def _balance_pair(pair: _Pair, peaks: dict[str, FloatArray]) -> tuple[str, ...]:
    """Balance one pair, in ``peaks`` too, which are as of :class:`WeightMatrix`; returns the layers that changed."""
    source, *readers = (peaks[name] for name in pair.names)
    first = source.max(axis=2).reshape(-1)
    second = np.max([reader.max(axis=1).reshape(-1) for reader in readers], axis=0)
    used = (first > 0) & (second > 0)
    ratio = np.sqrt(np.divide(first, second, out=np.ones_like(first), where=used))
    change = np.clip(pair.factors * ratio, 1 / _LIMIT, _LIMIT) / pair.factors
    if float(np.abs(change - 1).max()) < _CONVERGED:
        return ()
    source /= change.reshape(len(source), -1, 1)
    for reader in readers:
        np.multiply(reader, change.reshape(len(reader), 1, -1), out=reader)
    pair.factors *= change
    return pair.names


def _apply(pair: _Pair, state: State, outputs: set[int], taken: set[str]) -> str | None:
    """Store the scaled parameters; returns the reason where they stay."""
    factors = pair.factors
    weights = pair.path.divided(1 / factors, outputs)
    if weights is None:
        return "its parameters would not be finite"
    reason = pair.source.multiply(1 / factors, state, taken)
    if reason is None:
        pair.path.store(weights, outputs, taken)
    return reason

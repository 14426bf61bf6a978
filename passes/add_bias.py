"""Give layers without a bias one of zeros, for bias correction to write to; it costs nothing at run time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.linear import LinearLayer
from qdqtool.passes_api import Fact, State


@dataclass(frozen=True)
class AddBias:
    """Give convolutions and Gemms without a bias one of zeros, for bias correction to fill."""

    name: ClassVar[str] = "add-bias"
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset({Fact.PLAN, Fact.STATISTICS, Fact.PARAMS, Fact.QDQ})

    def run(self, state: State) -> int:
        """Return the number of layers that got a bias."""
        taken = graphs.tensor_names(state.graph)
        count = 0
        for node in graphs.all_nodes(state.graph):
            layer = LinearLayer.of(node)
            if layer is None or layer.bias_input is None or layer.bias is not None or layer.channels is None:
                continue
            if graphs.is_constant(layer.weight) and graphs.is_float(layer.weight):
                layer.set_bias(np.zeros(layer.channels, layer.weight.dtype), taken)
                count += 1
        return count

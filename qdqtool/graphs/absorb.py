"""Let a linear layer take over the arithmetic of nodes behind it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

import numpy as np
import onnx_graphsurgeon as gs

from qdqtool.graphs import graph as graphs
from qdqtool.graphs.channels import ChannelMap
from qdqtool.graphs.linear import LinearLayer
from qdqtool.spec import FloatArray

if TYPE_CHECKING:
    from qdqtool.passes_api import State


def absorb(layer: LinearLayer, nodes: Sequence[gs.Node], change: ChannelMap, state: State) -> None:
    """Take out the nodes behind a layer that now does their work, ``change``, itself.

    The layer makes the last one's result under its name. What is recorded of a BatchNormalization folded before moves
    along.
    """
    result, before = nodes[-1].outputs[0], layer.node.outputs[0].name
    for node in nodes:
        graphs.unlink(node)
    layer.node.outputs[0] = result
    state.merged(layer.node.name, *(node.name for node in nodes))
    if before in state.batchnorms:
        beta, gamma = cast(tuple[FloatArray, FloatArray], state.batchnorms.pop(before))
        state.batchnorms[result.name] = (beta * change.scale + change.shift, np.abs(gamma * change.scale))

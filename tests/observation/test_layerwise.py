"""Layers read what the layers before them give out as they were chosen; large activations make the samples few."""

from __future__ import annotations

import numpy as np
import pytest

from qdqtool.graphs.linear import LinearLayer
from qdqtool.observation import layerwise
from qdqtool.observation.layerwise import Layerwise
from qdqtool.passes_api import State
from tests.builders import conv_chain, normal
from tests.passes.test_round_weights import chosen

FED = {"x": normal(16, 8, 8, 8)}


def state_of() -> State:
    return chosen(conv_chain(3), FED, weight_rounding="nearest")


def walk_of(state: State) -> Layerwise:
    layers = [LinearLayer(node) for node in state.graph.nodes if node.op == "Conv"]
    return Layerwise(state, layers)


def test_what_a_layer_reads_follows_from_what_was_settled() -> None:
    walk = walk_of(state_of())
    first, second, third = walk.layers
    same = list(walk.inputs(first))
    assert len(same) == 16
    for exact, seen in same:
        np.testing.assert_allclose(exact, seen, atol=0.02 * np.abs(exact).max())
    walk.settle(second.node.name, 1, np.zeros(second.weight.shape, np.float32))
    for exact, seen in walk.inputs(second):
        assert 0 < np.abs(exact - seen).max() < np.abs(exact).max()
    constant = [seen for _, seen in walk.inputs(third)]
    assert max(np.abs(seen - constant[0]).max() for seen in constant) == 0


def test_large_activations_make_the_samples_few(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layerwise, "_BYTES", 1)
    state = state_of()
    walk = walk_of(state)
    assert len(list(walk.inputs(walk.layers[0]))) == 8
    assert any("8 of 16 samples" in note for note in state.notes)

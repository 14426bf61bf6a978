"""The switchboard computes what the quantized model computes, and without switches what the float model does."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool import pipeline
from qdqtool.data.source import open_data
from qdqtool.graphs import model as models
from qdqtool.mixed_precision import candidates
from qdqtool.mixed_precision.emulation import Emulator, decibels
from qdqtool.mixed_precision.judge import Judge
from qdqtool.mixed_precision.widths import WIDTHS, recipe_of
from qdqtool.observation.observe import Observing
from qdqtool.recipe import Recipe
from tests.builders import Arrays, feeds, normal, parse, quantized, run, sqnr, weight
from tests.mixed_precision.network import LAYERS, network


def emulator(proto: onnx.ModelProto, fed: Arrays, **fields: Any) -> tuple[Emulator, list[str]]:
    recipe = Recipe.of({"target": "cpu", "calibrator": "minmax", "bias_correction": False, **fields})
    state, facts = pipeline.load(proto, recipe, "cpu")
    state.observing = Observing(None)
    state.data = open_data(fed, models.inputs(proto))
    layers = candidates.prepare(state, facts, recipe)
    made = candidates.code(state, layers, [width for name, width in WIDTHS.items() if name != "3"])
    judge = Judge(proto, state.data)
    batches = judge.batches(judge.few)
    return Emulator(made, batches, judge, correct=recipe.bias_correction), [layer.name for layer in layers]


TRANSFORMER = parse(
    """
    [m0] h0 = MatMul(x, w0) [a0] h1 = Add(h0, b0) [r] h2 = Relu(h1)
    [m1] h3 = MatMul(h2, w1) [s] h4 = Softmax(h3) [m2] y = MatMul(h4, w2)
    """,
    "float[N, 6, 12] x",
    "float[N, 6, 4] y",
    {"w0": weight(12, 20, inputs=12), "b0": normal(20, scale=0.1), "w1": weight(20, 8, inputs=20), "w2": normal(8, 4)},
)


@pytest.mark.parametrize("opset", [13, 17, 18])
def test_without_switches_it_is_the_float_model(opset: int) -> None:
    proto = network(opset)
    emulating, names = emulator(proto, feeds(proto), bias_correction=True)
    assert tuple(names) == LAYERS
    assert decibels(emulating.measure(dict.fromkeys(names, "float"))[0]) > 120


@pytest.mark.parametrize("proto", [network(), TRANSFORMER], ids=["convolutions", "products"])
@pytest.mark.parametrize("width", ["4", "8"])
def test_an_assignment_has_the_noise_of_its_quantized_model(proto: onnx.ModelProto, width: str) -> None:
    fed = feeds(proto)
    # By GPTQ a layer makes up for the layers before it, which none does that is rounded by itself.
    fields = {"target": "cpu", "calibrator": "minmax", "bias_correction": False, "weight_rounding": "nearest"}
    emulating, names = emulator(proto, fed, **fields)
    model = quantized(proto, fed, **recipe_of(Recipe.of(fields), dict.fromkeys(names, width)).values()).model
    real = sqnr(run(proto, fed)["y"], run(model, fed, optimize=False)["y"])
    assert decibels(emulating.measure(dict.fromkeys(names, width))[0]) == pytest.approx(real, abs=1.5)


def test_more_bits_are_less_noise_for_every_layer_alone() -> None:
    emulating, names = emulator(network(), feeds(network()))
    for name in names:
        found = [emulating.measure({name: width})[0] for width in ("2", "4", "8", "16", "float")]
        assert np.all(np.diff(found) < 0), name


def test_keeping_means_takes_noise_away() -> None:
    fed = feeds(network())
    with_means, without = (
        emulator(network(), fed, bias_correction=correct, weight_rounding="nearest")[0].measure({"fc2": "2"})[0]
        for correct in (True, False)
    )
    assert with_means < without


def test_a_weight_that_two_layers_share_has_a_switch_for_each() -> None:
    proto = parse(
        "[a] h = Conv <pads = [1, 1, 1, 1]> (x, w) [b] y = Conv <pads = [1, 1, 1, 1]> (h, w)",
        "float[N, 4, 6, 6] x",
        "float[N, 4, 6, 6] y",
        {"w": weight(4, 4, 3, 3)},
    )
    emulating, _ = emulator(proto, feeds(proto))
    one, other, both = (emulating.measure(chosen)[0] for chosen in ({"a": "4"}, {"b": "4"}, {"a": "4", "b": "4"}))
    assert 0 < one < both
    assert 0 < other < both

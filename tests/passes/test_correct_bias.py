"""Empirical bias correction: layers keep their mean, and noise moves nothing."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from qdqtool import chains, pipeline, runtime
from qdqtool.data import source as sources
from qdqtool.graphs import graph as graphs
from qdqtool.graphs import model as models
from qdqtool.graphs.linear import bias_place, replace_constant
from qdqtool.observation import observe
from qdqtool.passes import ChooseRanges, CorrectBias, Observe, PlanQuantization
from qdqtool.passes.correct_bias import shrunk
from qdqtool.passes_api import Fact, PassManager, State
from qdqtool.planning.insert import insert
from tests.builders import (
    TARGETS,
    Array,
    Arrays,
    conv,
    conv_chain,
    conv_values,
    normal,
    parse,
    quantized,
    run,
    single,
)


def rounded_down(*shape: int, axis: int) -> Array:
    """A weight whose codes all lie 0.45 steps below it: rounding shifts the mean of every output channel."""
    values = ((np.random.default_rng(0).integers(-60, 60, shape) + 0.45) / 127).astype(np.float32)
    for channel in np.moveaxis(values, axis, 0):
        channel[(0,) * channel.ndim] = 1
    return values


LAYERS = {
    "Conv": ("y = Conv(x, w, b)", "[{n}, 16, 6, 6]", "[{n}, 8, 4, 4]", (8, 16, 3, 3), 0, 1),
    "Conv of one dimension": ("y = Conv(x, w, b)", "[{n}, 16, 9]", "[{n}, 8, 7]", (8, 16, 3), 0, 1),
    "Conv without bias": ("y = Conv(x, w)", "[{n}, 16, 6, 6]", "[{n}, 8, 4, 4]", (8, 16, 3, 3), 0, 1),
    "ConvTranspose": (
        "y = ConvTranspose <strides = [2, 2]> (x, w, b)",
        "[{n}, 16, 5, 5]",
        "[{n}, 8, 10, 10]",
        (16, 8, 2, 2),
        1,
        1,
    ),
    "Gemm": ("y = Gemm <transB = 1> (x, w, b)", "[{n}, 64]", "[{n}, 8]", (8, 64), 0, -1),
    "MatMul of rank 2": ("m = MatMul(x, w) y = Add(m, b)", "[{n}, 64]", "[{n}, 8]", (64, 8), 1, -1),
    "MatMul of rank 3": ("m = MatMul(x, w) y = Add(m, b)", "[{n}, 6, 64]", "[{n}, 6, 8]", (64, 8), 1, -1),
}


@pytest.mark.parametrize("batch", ["N", "1"])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("layer", LAYERS)
def test_a_layer_keeps_its_mean(layer: str, target: str, batch: str) -> None:
    body, x, y, shape, axis, channel = LAYERS[layer]
    values = {"w": rounded_down(*shape, axis=axis)} | ({"b": normal(8)} if "b)" in body else {})
    proto = parse(body, f"float{x.format(n=batch)} x", f"float{y.format(n=batch)} y", values)
    sizes = [int(n) for n in x.strip("[]").split(", ")[1:]]
    fed = {"x": np.random.default_rng(1).uniform(0, 1, (32, *sizes)).astype(np.float32)}
    left, corrected = (
        np.abs(mean_error(proto, quantized(proto, fed, target=target, bias_correction=on).model, fed, channel))
        for on in (False, True)
    )
    assert left.min() > 0.02
    assert corrected.max() < 0.1 * left.min()


def mean_error(proto: onnx.ModelProto, other: onnx.ModelProto, fed: Arrays, channel: int) -> Array:
    """Mean of float minus quantized output in every channel."""
    rows = list(single(fed))
    wanted, got = (np.concatenate([run(m, row)["y"] for row in rows]).astype(np.float64) for m in (proto, other))
    difference = np.moveaxis(wanted - got, channel, -1)
    means: Array = difference.reshape(-1, difference.shape[-1]).mean(axis=0)
    return means


def calibrated(proto: onnx.ModelProto, fed: Arrays, target: str) -> State:
    """The state right before biases are corrected."""
    recipe = pipeline.make_recipe(None, {"target": target})
    state, facts = pipeline.load(proto, recipe, "cpu")
    with sources.open_data(fed, models.inputs(proto)) as opened:
        state.data = opened
        passes = [*chains.preparation(), PlanQuantization(), Observe(), ChooseRanges()]
        PassManager(passes).run(state, facts | {Fact.DATA})
    return state


def biases(graph: gs.Graph) -> dict[str, tuple[gs.Node, int, int]]:
    """Layer -> the node that adds its bias, the bias's input there, and the channel axis; in order."""
    outputs = graphs.output_ids(graph)
    places = {node.name: bias_place(node, outputs) for node in graph.nodes}
    nodes = {node.name: node for node in graph.nodes}
    return {name: (nodes[p.node], p.index, p.axis) for name, p in places.items() if p is not None}


def sample_means(graph: gs.Graph, state: State, tensor: str, axis: int) -> Array:
    """Mean of a tensor in every sample and channel, from a session of its own."""
    proto = observe.with_outputs(models.to_proto(graph, state.header), [tensor])
    active = runtime.session(proto, config={"session.disable_quant_qdq": "1"})
    fed = {name: np.concatenate([s.feeds[name] for s in state.held]) for name in state.held[0].feeds}
    values = np.moveaxis(active.run([tensor], fed)[0].astype(np.float64), axis, -1)
    means: Array = values.reshape(len(values), -1, values.shape[-1]).mean(axis=1)
    return means


def layer_after_layer(state: State) -> dict[str, Array]:
    """Corrected biases by layer, each measured in a quantized model in which all layers before it are corrected."""
    assert state.plan is not None
    assert state.params is not None
    graph, found = graphs.copy(state.graph), {}
    for name, (node, index, axis) in biases(graph).items():
        tensor = node.outputs[0].name
        wanted = sample_means(state.graph, state, tensor, axis)
        got = sample_means(insert(graph, state.plan, state.params), state, tensor, axis)
        found[name] = node.inputs[index].values + shrunk(wanted - got)
        replace_constant(node, index, found[name].astype(np.float32), f"{name}.bias", graphs.tensor_names(graph))
    return found


@pytest.mark.parametrize("target", TARGETS)
def test_one_run_corrects_as_layer_after_layer_does(target: str) -> None:
    body = f"""{conv("a", "x")} r = Relu(a) {conv("c", "r", 1)} s = Relu(c)
        p = GlobalAveragePool(s) f = Flatten(p) y = Gemm <transB = 1> (f, v, d)"""
    values = conv_values(2) | {"v": rounded_down(5, 8, axis=0), "d": normal(5)}
    values |= {name: rounded_down(8, 8, 3, 3, axis=0) / np.float32(4) for name in ("w0", "w1")}
    proto = parse(body, "float[N, 8, 8, 8] x", "float[N, 5] y", values)
    state = calibrated(proto, {"x": np.random.default_rng(1).uniform(0, 1, (24, 8, 8, 8)).astype(np.float32)}, target)
    before = {name: node.inputs[index].values for name, (node, index, _) in biases(state.graph).items()}
    wanted = layer_after_layer(state)
    assert CorrectBias().run(state) == 3
    rounding = 1e-4 if target == "cpu" else 1e-5  # where a bias is int32, the reference rounds every one to S_x S_w
    for name, (node, index, _) in biases(state.graph).items():
        np.testing.assert_allclose(node.inputs[index].values, wanted[name], rtol=0, atol=rounding)
        assert np.abs(wanted[name] - before[name]).max() > 1e-3


def test_layers_that_share_a_bias_get_their_own() -> None:
    body = "[one] c = Gemm(x, w, b) r = Relu(c) [two] y = Gemm(r, w, b)"
    fed = {"x": np.random.default_rng(1).uniform(0, 1, (32, 16)).astype(np.float32)}
    proto = parse(body, "float[N, 16] x", "float[N, 16] y", {"w": rounded_down(16, 16, axis=1), "b": normal(16)})
    state = calibrated(proto, fed, "cpu")
    CorrectBias().run(state)
    one, two = (node.inputs[index] for node, index, _ in biases(state.graph).values())
    assert one.name != two.name
    assert np.abs(one.values - two.values).max() > 1e-3


def test_what_has_no_bias_is_named_and_left() -> None:
    proto = parse("[mm] y = MatMul(x, w)", "float[N, 3, 16] x", "float[N, 3, 8] y", {"w": rounded_down(16, 8, axis=1)})
    result = quantized(proto, {"x": normal(8, 3, 16)})
    assert [s.reason for s in result.report.skipped if s.pass_name == "correct-bias"] == [
        "it has no constant bias to correct"
    ]
    assert result.report.verification is not None
    assert result.report.verification.worst_db > 30


def test_sentences_of_different_length_are_corrected_together() -> None:
    proto = parse(
        "m = MatMul(x, w) y = Add(m, b)",
        "float[N, T, 64] x",
        "float[N, T, 8] y",
        {"w": rounded_down(64, 8, axis=1), "b": normal(8)},
    )
    rng = np.random.default_rng(0)
    data = [{"x": rng.uniform(0, 1, (1, n, 64)).astype(np.float32)} for n in (3, 9, 3, 9, 5, 20, 20, 7)]
    left, right = (quantized(proto, data, bias_correction=on).report.verification for on in (False, True))
    assert left is not None
    assert right is not None
    assert right.worst_db > left.worst_db + 6


def test_a_net_without_a_shift_is_hardly_changed() -> None:
    proto = conv_chain(2)
    fed = {"x": np.random.default_rng(0).uniform(-1, 1, (32, 8, 8, 8)).astype(np.float32)}
    off, on = (quantized(proto, fed, bias_correction=b).report.verification for b in (False, True))
    assert off is not None
    assert on is not None
    assert on.worst_db > off.worst_db - 0.1


DIFFERENCES = arrays(
    np.float64, st.tuples(st.integers(1, 12), st.integers(1, 6)), elements=st.floats(-10, 10, width=32)
)


@settings(deadline=None, derandomize=True)
@given(DIFFERENCES)
def test_a_shift_is_never_beyond_the_mean(differences: Any) -> None:
    mean, shift = differences.mean(axis=0), shrunk(differences)
    assert (np.abs(shift) <= np.abs(mean) * (1 + 1e-12)).all()
    assert (shift * mean >= 0).all()


def test_a_shift_without_spread_is_taken_whole() -> None:
    shift = np.array([0.5, -0.25, 0.0])
    np.testing.assert_allclose(shrunk(np.tile(shift, (8, 1))), shift)
    np.testing.assert_allclose(shrunk(shift[None]), shift)  # one sample tells no spread


def test_noise_alone_moves_nothing() -> None:
    noise = np.random.default_rng(0).standard_normal((16, 200))
    noise -= noise.mean(axis=0)
    error = noise.std(axis=0, ddof=1) / 4
    assert not shrunk(noise + 0.99 * error).any()
    assert shrunk(noise + 3 * error).all()


def test_the_more_samples_the_less_is_shrunk() -> None:
    rng = np.random.default_rng(0)
    true = rng.standard_normal(50)
    errors = []
    for count in (4, 16, 64, 256):
        differences = true + 4 * rng.standard_normal((count, 50))
        errors.append(float(((shrunk(differences) - true) ** 2).mean()))
        assert errors[-1] < ((differences.mean(axis=0) - true) ** 2).mean()
    assert errors == sorted(errors, reverse=True)

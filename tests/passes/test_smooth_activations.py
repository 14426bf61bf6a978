"""Activations whose channels differ are smoothed into the parameters around them, where that lessens the noise."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

import qdqtool
from qdqtool.chains import preparation, quantization
from qdqtool.data.source import open_data
from qdqtool.errors import StatisticsError
from qdqtool.graphs import model as models
from qdqtool.passes_api import Fact, PassManager, State
from qdqtool.pipeline import load, make_recipe
from tests.builders import TARGETS, Arrays, constants, normal, ops, parse, quality, quantized, run, sqnr, weight

OUTLIERS = np.where(np.arange(16) % 8 == 3, 40.0, 1.0).astype(np.float32)
"""Two of sixteen channels are forty times as large as the others."""
DATA = {"x": normal(32, 6, 16, seed=9)}


def values() -> Arrays:
    return {
        "g": OUTLIERS,
        "o": normal(16, seed=1),
        "w": weight(12, 16, seed=2).T / np.sqrt(OUTLIERS)[:, None],
        "v": weight(8, 16, seed=3).T / np.sqrt(OUTLIERS)[:, None],
        "u": weight(16, 16, seed=4) * OUTLIERS,
        "b": normal(16, seed=5) * OUTLIERS,
    }


def model(body: str, *, shape: str = "[N, 6, 16]", outputs: str = "float[N, 6, 12] y", **more: Any) -> Any:
    return parse(body, f"float{shape} x", outputs, values() | more)


NORMALIZED = "[ln] h = LayerNormalization(x, g, o) y = MatMul(h, w)"
PROJECTED = "[p] p = MatMul(x, u) h = Add(p, b) r = Relu(h) y = MatMul(r, w)"
ATTENTION = """[q] q = MatMul(x, a) [k] k = MatMul(x, c) t = Transpose <perm = [0, 2, 1]> (k) s = MatMul(q, t)
    p = Softmax(s) [v] h = MatMul(x, u) m = MatMul(p, h) y = MatMul(m, w)"""


def decibels(proto: Any, result: Any, fed: Arrays = DATA) -> float:
    return quality(proto, result.model, fed)["y"]


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("body", [NORMALIZED, PROJECTED, ATTENTION], ids=["normalized", "projected", "attention"])
def test_free_places(body: str, target: str) -> None:
    proto = model(body, a=weight(16, 16, seed=6), c=weight(16, 16, seed=7))
    plain, smooth = (quantized(proto, DATA, target=target, smoothing=name) for name in ("off", "free"))
    assert decibels(proto, smooth) > decibels(proto, plain) + 2
    assert ops(smooth.model) == ops(plain.model)
    assert smooth.report.integer_kernels == plain.report.integer_kernels


@pytest.mark.parametrize("target", TARGETS)
def test_new_data_gain_as_much(target: str) -> None:
    proto, fresh = model(NORMALIZED), {"x": normal(32, 6, 16, seed=10)}
    plain, smooth = (quantized(proto, DATA, target=target, smoothing=name) for name in ("off", "free"))
    assert decibels(proto, smooth, fresh) > decibels(proto, plain, fresh) + 2


def test_several_readers_share_the_factors() -> None:
    proto = model(
        "[ln] h = LayerNormalization(x, g, o) y = MatMul(h, w) z = MatMul(h, v)",
        outputs="float[N, 6, 12] y, float[N, 6, 8] z",
    )
    plain, smooth = (quantized(proto, DATA, smoothing=name) for name in ("off", "free"))
    before, after = (quality(proto, result.model, DATA) for result in (plain, smooth))
    assert min(after[name] - before[name] for name in "yz") > 2


def smoothed(proto: Any, **fields: Any) -> State:
    """The state before ranges are chosen; the float graph of which is smoothed."""
    recipe = make_recipe(None, {"target": "cpu", "smoothing": "free", **fields})
    state, _ = load(proto, recipe, "cpu")
    with open_data(DATA, models.inputs(proto)) as opened:
        state.data = opened
        steps = [*preparation(recipe), *quantization(recipe)]
        end = next(i for i, step in enumerate(steps) if step.name == "choose-ranges")
        PassManager(steps[:end]).run(state, frozenset({Fact.DATA}))
    return state


@pytest.mark.parametrize("body", [NORMALIZED, PROJECTED], ids=["normalized", "projected"])
def test_the_float_model_and_its_statistics_stay_true(body: str) -> None:
    proto = model(body)
    state = smoothed(proto)
    changed = models.to_proto(state.graph, state.header)
    assert not np.array_equal(constants(changed)["w"], constants(proto)["w"])
    want, got = run(proto, DATA)["y"], run(changed, DATA)["y"]
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert state.statistics is not None
    name = "h" if body is NORMALIZED else "r"
    changed.graph.output.extend([onnx.helper.make_tensor_value_info(name, 1, None)])
    seen, stats = run(changed, DATA)[name], state.statistics[name]
    assert [stats.lo, stats.hi] == pytest.approx([seen.min(), seen.max()], rel=1e-5)
    assert stats.count == seen.size
    for share in (0.02, 0.5, 0.98):  # bins of channels are at most 1/16 of a value wide
        below = float((stats.bins.count * (stats.bins.center <= np.quantile(seen, share))).sum() / stats.count)
        assert below == pytest.approx(float((seen <= np.quantile(seen, share)).mean()), abs=0.02)


def test_a_model_input_gets_a_mul_on_request_alone() -> None:
    proto = model("y = MatMul(x, w)")
    fed = {"x": DATA["x"] * OUTLIERS}
    free, all_of_it = (quantized(proto, fed, smoothing=name) for name in ("free", "inputs"))
    assert "Mul" not in ops(free.model)
    assert ops(all_of_it.model, qdq=False) == ["Mul", "MatMul"]
    assert all_of_it.report.integer_kernels == free.report.integer_kernels == 1
    assert decibels(proto, all_of_it, fed) > decibels(proto, free, fed) + 6


@pytest.mark.parametrize("smoothing", ["inputs", "all"])
def test_a_mul_must_be_worth_a_bit(smoothing: str) -> None:
    proto = model("y = MatMul(x, w)", w=weight(12, 16, seed=2).T)
    result = quantized(proto, DATA, smoothing=smoothing)
    assert "Mul" not in ops(result.model)
    assert {s.reason for s in result.report.skipped if s.node == "x"} == {"expected noise would not fall to 1/4"}


@pytest.mark.parametrize(
    ("body", "node", "reason"),
    [
        ("[ln] h = LayerNormalization(x, g, o) m = MatMul(h, u) y = Add(h, m)", "ln", "Add does not commute"),
        ("[p] p = MatMul(x, u) h = Sigmoid(p) y = MatMul(h, w)", "p", "Sigmoid does not commute"),
        ("[ln] h = LayerNormalization(x, g, o) i = Clip(h, six) y = MatMul(i, w)", "ln", "the bounds of Clip"),
        ("[ln] h = LayerNormalization(x, g, o) [s] y = Softmax(h)", "ln", "Softmax does not commute"),
        ("[ln] h = LayerNormalization(x, g, g) y = MatMul(h, w)", "ln", "it shares its weight or bias"),
    ],
)
def test_left_alone(body: str, node: str, reason: str) -> None:
    wide = "float[N, 6, 16] y" if "Softmax" in body or "Add(h, m)" in body else "float[N, 6, 12] y"
    proto = model(body, outputs=wide, six=np.array(-6, np.float32))
    result = quantized(proto, DATA, smoothing="free")
    found = [s.reason for s in result.report.skipped if s.pass_name == "plan-smoothing" and s.node == node]
    assert len(found) == 1
    assert found[0].startswith(reason)


def test_channels_that_are_alike_are_left_alone() -> None:
    proto = model(NORMALIZED, g=np.ones(16, np.float32), w=weight(12, 16, seed=2).T)
    result = quantized(proto, DATA, smoothing="free")
    assert {s.reason for s in result.report.skipped if s.node == "ln"} >= {"expected noise would not fall to 1/2"}


def test_a_range_set_by_the_user_is_kept() -> None:
    proto = model(NORMALIZED)
    result = quantized(proto, DATA, smoothing="free", tensors={"h": {"range": [-90.0, 90.0]}})
    found = {s.reason for s in result.report.skipped if s.node == "ln"}
    assert "a range is set for it, or it has one for each channel" in found


def test_channels_of_zeros() -> None:
    gain, rows = OUTLIERS.copy(), values()["w"].copy()
    gain[[1, 3]], rows[[1, 5]] = 0, 0
    proto = model(NORMALIZED, g=gain, o=np.zeros(16, np.float32), w=rows)
    plain, smooth = (quantized(proto, DATA, smoothing=name) for name in ("off", "free"))
    assert decibels(proto, smooth) > decibels(proto, plain) - 0.5
    assert all(np.isfinite(value).all() for value in constants(smooth.model).values())


def test_statistics_serve_other_calibrators_and_must_hold_the_channels() -> None:
    proto = model(NORMALIZED)
    seen = qdqtool.calibrate(proto, DATA, targets=["cpu"], smoothing="free", provider="cpu")
    found = {}
    for calibrator in ("minmax", "mse"):
        made = qdqtool.quantize(proto, statistics=seen, target="cpu", calibrator=calibrator, smoothing="free")
        again = quantized(proto, DATA, calibrator=calibrator, smoothing="free", bias_correction=False)
        found[calibrator] = sqnr(run(proto, DATA)["y"], run(made.model, DATA)["y"])
        np.testing.assert_array_equal(run(made.model, DATA)["y"], run(again.model, DATA)["y"])
    assert min(found.values()) > 30
    bare = qdqtool.calibrate(proto, DATA, targets=["cpu"], provider="cpu", cache=False)
    with pytest.raises(StatisticsError, match="no statistics of 'h'"):
        qdqtool.quantize(proto, statistics=bare, target="cpu", smoothing="free")


@pytest.mark.parametrize("smoothing", ["free", "all"])
def test_recipes_name_it(smoothing: str) -> None:
    recipe = qdqtool.Recipe.of({"smoothing": smoothing})
    assert recipe.values() == {"smoothing": smoothing}
    assert "plan-smoothing" in [step.name for step in quantization(recipe)]
    with pytest.raises(qdqtool.QdqError, match="smoothing has no use with precision w8a16"):
        qdqtool.Recipe.of({"smoothing": smoothing, "precision": "w8a16"})

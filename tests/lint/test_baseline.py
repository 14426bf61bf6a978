"""A baseline says what a model is like; a worse model breaks it, within its tolerances it does not."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import onnx
import pytest

from qdqtool.errors import QdqError
from qdqtool.lint import baseline, subject
from qdqtool.lint.baseline import Baseline, Measures, Tolerances
from qdqtool.lint.findings import Severity
from qdqtool.lint.measure import measure
from qdqtool.planning.target import TARGETS
from tests.builders import conv_chain, feeds, quantized
from tests.lint.models import model, values

V = values()
MEASURES = Measures(
    samples=8, provider="cpu", sqnr_db={"y": 40.0}, metric="top1", score=90.0, latency_ratio=0.5,
    latency_interval=(0.48, 0.52),
)  # fmt: skip


def state(proto: onnx.ModelProto, measures: Measures | None = None, target: str = "cpu") -> Baseline:
    return baseline.of(subject.load(proto), TARGETS[target], measures)


def broken(now: Baseline, before: Baseline, **tolerances: float) -> list[tuple[str, str]]:
    found = baseline.compare(now, before, Tolerances(**tolerances))
    return [(one.rule, one.node or one.tensor) for one in found if one.severity is Severity.ERROR]


def test_the_state_of_a_model() -> None:
    found = state(model())
    assert found.placement == {"conv": "integer"}
    assert found.ranges["x"] == pytest.approx((-128 * 2 / 255, 127 * 2 / 255))
    assert found.ranges["r"] == pytest.approx((0, 255 * 0.02))
    assert broken(found, found) == []


def test_a_file_gives_it_back(tmp_path: Path) -> None:
    infinite = Measures(**{**MEASURES.model_dump(), "sqnr_db": {"y": math.inf, "z": -math.inf}})
    for one in (state(model()), state(model(), MEASURES), state(model(), infinite)):
        (tmp_path / "baseline.json").write_text(one.to_json(), encoding="utf-8")
        assert baseline.read(tmp_path / "baseline.json") == one


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no baseline"),
        ('{"version": 2, "target": "cpu", "ranges": {}, "placement": {}}', "version"),
        ('{"version": 1, "target": "cpu", "ranges": {}, "placement": {}, "more": 1}', "more"),
        ('{"version": 1, "target": "cpu", "ranges": {"x": [0]}, "placement": {}}', "ranges.x"),
    ],
)
def test_a_broken_file_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "b.json").write_text(text)
    with pytest.raises(QdqError, match=message):
        baseline.read(tmp_path / "b.json")


def test_ranges_drift() -> None:
    before = state(model())
    moved = state(model({"rs": np.array(0.0225, np.float32)}))
    assert broken(moved, before) == [("QDQ101", "r")]
    assert broken(moved, before, range_drift=0.13) == []
    assert broken(before, before, range_drift=0) == []


def test_a_range_that_is_gone() -> None:
    texts = {"[out_q] rq = QuantizeLinear(r, rs, rz)": "", "[out_dq] y = DequantizeLinear(rq, rs, rz)": "y = Neg(r)"}
    now, before = state(model(texts=texts)), state(model())
    assert broken(now, before) == [("QDQ101", "r"), ("QDQ102", "conv")]
    assert broken(before, now) == []
    notes = baseline.compare(before, now, Tolerances())
    assert {(one.rule, one.severity) for one in notes} == {("QDQ101", Severity.NOTE), ("QDQ102", Severity.NOTE)}


def test_a_kernel_that_runs_in_float_now() -> None:
    now = state(model({"rz": np.array(10, np.uint8)}))
    assert now.placement == {"conv": "float"}  # asked of the runtime
    assert ("QDQ102", "conv") in broken(now, state(model()))


def test_placement_on_a_target_that_is_not_here() -> None:
    result = quantized(conv_chain(2), target="tensorrt")
    assert state(result.model, target="tensorrt").placement == {"c0": "integer", "c1": "integer"}


@pytest.mark.parametrize(
    ("changes", "rule", "tolerance"),
    [
        ({"sqnr_db": {"y": 38.5}}, "QDQ103", {"sqnr_drop": 2.0}),
        ({"sqnr_db": {}}, "QDQ103", {"sqnr_drop": math.inf}),
        ({"score": 89.0}, "QDQ104", {"score_drop": 1.5}),
        ({"latency_ratio": 0.7, "latency_interval": (0.65, 0.75)}, "QDQ105", {"latency_increase": 0.5}),
    ],
)
def test_measures_that_are_worse(changes: dict[str, object], rule: str, tolerance: dict[str, float]) -> None:
    before = state(model(), MEASURES)
    now = before.model_copy(update={"measures": MEASURES.model_copy(update=changes)})
    assert [one for one, _ in broken(now, before)] == [rule]
    assert broken(now, before, **tolerance) == []
    assert broken(before, now) == []


def test_a_wide_interval_breaks_nothing() -> None:
    before = state(model(), MEASURES)
    disturbed = MEASURES.model_copy(update={"latency_ratio": 0.9, "latency_interval": (0.5, 1.4)})
    assert broken(before.model_copy(update={"measures": disturbed}), before) == []


@pytest.mark.parametrize(
    ("changes", "message"), [({"provider": "cuda"}, "measured on cuda"), ({"metric": "top5"}, "metric top5")]
)
def test_unlike_measures_are_refused(changes: dict[str, object], message: str) -> None:
    before = state(model(), MEASURES.model_copy(update=changes))
    with pytest.raises(QdqError, match=message):
        broken(state(model(), MEASURES), before)


def test_another_target_is_refused() -> None:
    with pytest.raises(QdqError, match="of target cuda, and the check of cpu"):
        broken(state(model()), state(model(), target="cuda"))


def test_measuring(tmp_path: Path) -> None:
    proto = conv_chain(2)
    fed = feeds(proto, 8)
    onnx.save(proto, tmp_path / "float.onnx")
    np.savez(tmp_path / "eval.npz", x=fed["x"], labels=np.zeros(8, np.int64))
    result = quantized(proto, fed)
    found = measure(tmp_path / "float.onnx", result.model, str(tmp_path / "eval.npz"), metric="top1", seconds=0.01)
    assert found.samples == 8
    assert found.sqnr_db["r1"] > 25
    assert found.score is not None
    assert 0 < found.latency_interval[0] <= found.latency_ratio <= found.latency_interval[1]

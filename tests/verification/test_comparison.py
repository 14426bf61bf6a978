"""How near two models are: figures that can be checked by hand, and errors that say what does not fit."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import pytest
from onnx import numpy_helper

import qdqtool
from qdqtool.data.fit import Feeds
from qdqtool.data.source import open_data
from qdqtool.errors import DataError, RecipeError
from qdqtool.graphs import model as models
from qdqtool.verification.comparison import Comparison, compare
from qdqtool.verification.metric import find_metric
from qdqtool.verification.sqnr import Sqnr

Array = npt.NDArray[Any]
RNG = np.random.default_rng(11)
X = RNG.standard_normal((40, 4)).astype(np.float32)
W = RNG.standard_normal((4, 3)).astype(np.float32)


def build(body: str, io: str = "(float[N, 4] x) => (float[N, 3] y)", **weights: npt.ArrayLike) -> onnx.ModelProto:
    proto = onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 17]> g {io} {{ {body} }}')
    for name, value in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.asarray(value, np.float32), name))
    return onnx.shape_inference.infer_shapes(proto)


FLOAT = build("h = MatMul(x, w) r = Relu(h) y = MatMul(r, v)", w=W, v=np.eye(3))


def scaled(factor: float) -> onnx.ModelProto:
    """The model with a first layer that is off by a factor."""
    return build("h = MatMul(x, w) r = Relu(h) y = MatMul(r, v)", w=factor * W, v=np.eye(3))


def compared(reference: onnx.ModelProto, other: onnx.ModelProto, source: object = None, **options: Any) -> Comparison:
    data = open_data({"x": X} if source is None else source, models.inputs(reference))
    return compare(reference, other, data, **options)


# SQNR


def test_sqnr_is_signal_over_noise_summed_over_batches() -> None:
    total = Sqnr()
    total.add(np.array([3.0, 0.0]), np.array([3.0, 0.1]))
    total.add(np.array([1.0]), np.array([0.7]))
    assert total.db == pytest.approx(10 * math.log10((9 + 1) / (0.01 + 0.09)))


@pytest.mark.parametrize(
    ("reference", "value", "db"),
    [
        ([1.0, 2.0], [1.0, 2.0], math.inf),
        ([0.0, 0.0], [0.0, 0.0], math.inf),
        ([0.0, 0.0], [0.0, 1e-9], -math.inf),
        ([1.0, math.nan], [1.0, math.nan], math.inf),
        ([1.0, -math.inf], [1.0, -math.inf], math.inf),
        ([1.0, -math.inf], [1.0, -3e38], -math.inf),
        ([1.0, 2.0], [1.0, math.nan], -math.inf),
        ([1.0, 2.0], [1.0, math.inf], -math.inf),
        ([], [], math.inf),
        ([10.0], [11.0], 20.0),
        ([-math.inf, 10.0], [-math.inf, 11.0], 20.0),
    ],
)
def test_sqnr_of_zeros_and_of_what_is_not_finite(reference: list[float], value: list[float], db: float) -> None:
    total = Sqnr()
    total.add(np.array(reference, np.float32), np.array(value, np.float32))
    assert total.db == pytest.approx(db, abs=1e-3)


def test_values_are_subtracted_in_double_precision() -> None:
    total = Sqnr()
    total.add(np.full(4, 60000, np.float16), np.full(4, 59968, np.float16))
    assert total.db == pytest.approx(20 * math.log10(60000 / 32), abs=0.01)


# Two models


def test_a_model_equals_itself() -> None:
    found = compared(FLOAT, FLOAT)
    assert found.samples == 40
    assert found.fused == {"y": math.inf}
    assert found.tensors == {"h": math.inf, "r": math.inf}
    assert found.worst_db == math.inf
    assert found.agreement == 1.0


def test_an_error_of_one_percent_is_40_db() -> None:
    found = compared(FLOAT, scaled(1.01))
    assert found.fused["y"] == found.emulated["y"] == pytest.approx(40, abs=0.01)
    assert found.tensors["h"] == pytest.approx(40, abs=0.01)
    assert found.agreement == 1.0
    assert found.metric is None
    assert compared(FLOAT, scaled(1.01), tensors=False).tensors == {}


def test_agreement_is_the_share_of_equal_classes() -> None:
    logits = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    identity = build("y = Identity(x)", "(float[N, 3] x) => (float[N, 3] y)")
    shifted = build("y = Add(x, k)", "(float[N, 3] x) => (float[N, 3] y)", k=[2, 0, 0])
    assert compared(identity, shifted, {"x": logits}).agreement == 0.5
    single = build("y = Identity(x)", "(float[N, 1] x) => (float[N, 1] y)")
    assert compared(single, single, {"x": logits[:, :1]}).agreement is None


def test_different_outputs_are_refused() -> None:
    other = build("h = MatMul(x, w) z = Relu(h)", "(float[N, 4] x) => (float[N, 3] z)", w=W)
    with pytest.raises(DataError, match=r"has no output 'y'; it has z\. Are these two forms of one model\?"):
        compared(FLOAT, other)


def test_progress_counts_samples() -> None:
    told: list[tuple[str, int, int | None]] = []
    compared(FLOAT, FLOAT, progress=lambda *news: told.append(news))
    assert told[-1] == ("compare", 40, 40)


# Batches


@pytest.mark.parametrize("count", [12, 10, 3])
def test_a_fixed_batch_is_compared_sample_by_sample(count: int) -> None:
    io = "(float[6, 4] x) => (float[6, 3, 1] y, float m)"
    body = "h = MatMul(x, w) y = Unsqueeze(h, axes) m = ReduceMax <keepdims = 0> (w)"
    fixed, other = (build(body, io, w=k * W) for k in (1, 1.01))
    for proto in (fixed, other):
        proto.graph.initializer.append(numpy_helper.from_array(np.array([2]), "axes"))
    labels = (X[:count] @ W).argmax(1)
    found = compared(fixed, other, {"x": X[:count]}, labels=labels, metric="top1")
    assert found.samples == count
    assert found.fused == pytest.approx({"y": 40, "m": 40}, abs=0.01)
    assert found.float_score == 100
    assert found.agreement == 1.0
    assert found.tensors["h"] == pytest.approx(40, abs=0.01)


def test_labels_meet_their_samples_where_lengths_differ() -> None:
    body = "y = ReduceMean <axes = [1], keepdims = 0> (x)"
    mean = build(body, "(float[N, T, 3] x) => (float[N, 3] y)")
    rng = np.random.default_rng(5)
    feeds: list[Feeds] = [
        {"x": rng.standard_normal((1, length, 3)).astype(np.float32)} for length in (5, 3, 5, 4, 3, 5, 3, 3, 5)
    ]
    labels = np.array([feed["x"].mean(1).argmax() for feed in feeds])
    found = compared(mean, mean, feeds, labels=labels, metric="top1")
    assert len(set(labels.tolist())) > 1
    assert found.float_score == 100


# Metrics


def test_top1_and_top5_are_percentages() -> None:
    outputs = {"y": np.array([[1, 2, 3], [3, 2, 1], [0, 9, 0], [5, 6, 4]], np.float32)}
    labels = np.array([2, 0, 0, 0])
    assert np.mean(find_metric("top1")(outputs, labels)) == 50
    assert np.mean(find_metric("top5")(outputs, labels)) == 100
    wide = {"y": np.tile(np.arange(10, dtype=np.float32), (4, 1))}
    assert np.mean(find_metric("top5")(wide, np.array([9, 5, 4, 0]))) == 50
    assert np.mean(find_metric("top1")(wide, np.array([[9], [5], [4], [0]]))) == 25


def test_the_score_of_both_models() -> None:
    labels = np.maximum(X @ W, 0).argmax(1)
    found = compared(FLOAT, scaled(-1.0), labels=labels, metric="top1")
    assert found.metric == "top1"
    assert found.float_score == 100
    assert found.quantized_score is not None
    assert found.quantized_score < 60


def mean_error(outputs: Mapping[str, Array], labels: Array) -> float:
    """A metric of the user's: one number over all samples."""
    return -float(np.abs(outputs["y"] - labels).mean())


def test_a_function_of_the_users_is_a_metric(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    module = types.ModuleType("my_metrics")
    module.mean_error = mean_error  # type: ignore[attr-defined]  # a module made for the test
    monkeypatch.setitem(sys.modules, "my_metrics", module)
    labels = np.maximum(X @ W, 0)
    found = compared(FLOAT, scaled(2.0), labels=labels, metric="my_metrics:mean_error")
    assert found.float_score == pytest.approx(0, abs=1e-5)
    assert found.quantized_score == pytest.approx(-np.abs(labels).mean(), rel=1e-5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("top2", r"unknown metric 'top2'; known: top1, top5, or package\.module:function\. Did you mean 'top"),
        ("no_such_module:f", "metric 'no_such_module:f' cannot be imported: No module named"),
        ("math:no_such_function", "cannot be imported: .*no_such_function"),
    ],
)
def test_metrics_that_do_not_exist(name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        find_metric(name)


def test_labels_that_are_missing_or_too_few() -> None:
    with pytest.raises(DataError, match=r"metric 'top1' needs labels: an .npz"):
        compared(FLOAT, FLOAT, metric="top1")
    with pytest.raises(DataError, match="there are 39 labels for 40 samples; metric 'top1' needs one each"):
        compared(FLOAT, FLOAT, metric="top1", labels=np.zeros(39, np.int64))


@pytest.mark.zoo
@pytest.mark.slow
def test_accuracy_three_ways_on_real_models(real_model: Path, any_data: Callable[[Path], Any]) -> None:
    """Float, emulated and fused, models with recurrent layers and control-flow bodies included."""
    source = any_data(real_model)
    done = qdqtool.quantize(
        real_model, source, target="cpu", provider="cpu", bias_correction=False, calibrator="minmax"
    )
    found = compare(real_model, done.model, open_data(source, models.inputs(models.load(real_model))))
    assert found.fused.keys() == found.emulated.keys() == found.apart.keys()
    assert found.samples == 2
    assert found.worst_db > 5
    assert not any(math.isnan(value) for value in (*found.fused.values(), *found.emulated.values()))

"""Repair names the layer that hurts and the cheapest remedy that works, and says so on other samples."""

from __future__ import annotations

import re
import sys
import tomllib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

import qdqtool
from qdqtool.errors import DataError, GateError, ModelError, RecipeError
from qdqtool.recipe import Recipe
from qdqtool.repairs.values import Repair
from tests.builders import Arrays, conv_chain, feeds, quality, run
from tests.repairs.models import GOOD, biased_rounding, data, idle_channel, large_weights, outlier_channel


def quantize(proto: onnx.ModelProto, **recipe: Any) -> qdqtool.Result:
    fields = {"target": "cpu", "calibrator": "minmax", **recipe}
    return qdqtool.quantize(proto, data(proto), recipe=fields, cache=False, provider="cpu")


def repair(proto: onnx.ModelProto, quantized: onnx.ModelProto, given: Any = None, **options: Any) -> Repair:
    samples = data(proto) if given is None else given
    return qdqtool.repair(proto, quantized, samples, **{"cache": False, "provider": "cpu", **options})


def first(found: Repair) -> tuple[str, str]:
    return found.steps[0].layer, found.steps[0].remedy


def test_a_good_model_is_left_alone() -> None:
    found = repair(GOOD, quantize(GOOD).model)
    assert not found.changed
    assert (found.steps, found.left, found.difference, found.tries) == ((), (), "", 1)
    assert found.after == found.given
    found.gate()
    with pytest.raises(qdqtool.QdqError, match="nothing was repaired"):
        found.save("nowhere.onnx")


@pytest.mark.parametrize("target", ["cpu", "cuda"])
def test_a_range_that_is_too_narrow(target: str) -> None:
    given = quantize(GOOD, target=target, tensors={"r1": {"range": [0, 0.2]}})
    found = repair(GOOD, given.model)
    assert first(found) == ("c2", "calibrator")
    assert len(found.steps) == 1
    assert found.given.worst_db < 5
    assert found.after.worst_db > 30
    assert found.steps[0].after_db > 30
    assert found.recipe.tensors == {}
    assert "taken out: tensors.'r1'" in found.difference
    assert (found.steps[0].macs, found.analysis.worst_first()[0].node) == (0, "c2")


def test_a_range_of_nodes_that_is_too_narrow() -> None:
    found = repair(GOOD, quantize(GOOD, nodes={"c2": {"range": [0, 0.2]}}).model)
    assert first(found) == ("c2", "calibrator")
    assert found.after.worst_db > 30
    assert found.recipe.nodes == {}


def test_the_rounding_of_an_output_belongs_to_the_layer_that_makes_it() -> None:
    found = repair(GOOD, quantize(GOOD, tensors={"r3": {"range": [0, 0.2]}}).model)
    assert first(found) == ("c3", "calibrator")
    assert found.after.worst_db > 30


def test_weights_of_very_different_channels_under_one_scale() -> None:
    proto = large_weights()
    found = repair(proto, quantize(proto, per_channel=False, equalization=False).model)
    assert first(found) == ("c1", "granularity")
    assert len(found.steps) == 1
    assert found.after.worst_db > 30
    assert tomllib.loads(found.difference) == {"tensors": {"w1": {"granularity": "per_channel"}}}
    assert 0 < found.steps[0].bytes < 1000


def test_a_shifted_mean() -> None:
    proto = biased_rounding()
    found = repair(proto, quantize(proto, bias_correction=False).model)
    assert first(found) == ("fc", "bias")
    assert found.steps[0].after_db > found.steps[0].before_db + 15
    assert found.recipe.bias_correction


def test_an_outlier_channel_is_balanced_or_gets_16_bits() -> None:
    proto = idle_channel()
    given = quantize(proto, smoothing="off")
    found = repair(proto, given.model, min_sqnr=25, allow=("bias", "bits", "float"))
    assert first(found) == ("c1", "bits")
    assert found.recipe.tensors["r0"].dtype == "uint16"
    assert found.steps[0].macs > 0
    found.gate()
    proto = outlier_channel()
    balanced = repair(proto, quantize(proto, smoothing="off").model, allow=("equalization",))
    assert first(balanced) == ("c1", "equalization")
    assert balanced.steps[0].macs == 0


def test_layers_of_4_bits_get_8() -> None:
    found = repair(GOOD, quantize(GOOD, precision="w4a8", bias_correction=False).model, min_sqnr=28, allow=["bits"])
    assert found.changed
    assert {step.remedy for step in found.steps} == {"bits"}
    assert all(one.precision == "w8a8" or one.dtype for one in found.recipe.nodes.values())
    assert found.after.worst_db > found.given.worst_db + 5


def test_a_goal_that_cannot_be_reached() -> None:
    proto = outlier_channel()
    found = repair(proto, quantize(proto, smoothing="off").model, min_sqnr=30, allow=("calibrator", "bias"))
    with pytest.raises(GateError, match=r"below --min-sqnr 30 dB, and nothing more that is allowed helps"):
        found.gate()
    assert any(one.layer == "c1" for one in found.left)


def test_nothing_is_done_beyond_the_goal() -> None:
    proto = outlier_channel()
    found = repair(proto, quantize(proto, smoothing="off").model, min_sqnr=5)
    assert [(step.layer, step.remedy) for step in found.steps] == [
        ("c1", "equalization")
    ]  # no calibrator is needed then
    assert found.steps[0].before_db < 5 < found.after.worst_db


def test_the_arithmetic_out_of_integers_is_limited() -> None:
    proto = outlier_channel()
    found = repair(proto, quantize(proto, smoothing="off").model, allow=("float",), max_float=0.1)
    assert not found.changed
    assert "--max-float" in next(one.reason for one in found.left if one.layer == "c1")
    freed = repair(proto, quantize(proto, smoothing="off").model, allow=("float",), max_float=1)
    assert first(freed) == ("c1", "float")
    assert freed.result is not None
    assert "c1" in freed.recipe.nodes_to_exclude


def test_the_recipe_makes_the_repaired_model() -> None:
    proto = large_weights()
    found = repair(proto, quantize(proto, per_channel=False, equalization=False).model)
    assert found.result is not None
    again = qdqtool.quantize(proto, data(proto), recipe=found.recipe, cache=False, provider="cpu")
    assert again.model.SerializeToString() == found.result.model.SerializeToString()
    base = Recipe.of({"target": "cpu", "calibrator": "minmax", "per_channel": False, "equalization": False}).values()
    assert Recipe.of({**base, **tomllib.loads(found.difference)}).values() == found.recipe.values()


def test_it_repeats() -> None:
    proto = outlier_channel()
    given = quantize(proto, smoothing="off").model
    one, other = (repair(proto, given) for _ in range(2))
    assert one.to_json() == other.to_json()
    assert one.result is not None
    assert other.result is not None
    assert one.result.model.SerializeToString() == other.result.model.SerializeToString()


def test_the_order_of_samples_does_not_matter() -> None:
    proto = large_weights()
    given = quantize(proto, per_channel=False, equalization=False).model
    turned = {name: values[::-1].copy() for name, values in data(proto).items()}
    assert repair(proto, given).steps == repair(proto, given, turned).steps


def test_what_is_reported_was_measured_on_other_samples_than_what_was_chosen() -> None:
    proto, others = large_weights(), feeds(large_weights(), 20, seed=5)
    given = quantize(proto, per_channel=False, equalization=False).model
    found = repair(proto, given, evaluation=others)
    assert (found.samples.choosing, found.samples.reporting) == (10, 10)
    assert found.result is not None
    seen = quality(proto, found.result.model, others)
    assert abs(min(seen.values()) - found.after.worst_db) < 3


def hits(outputs: Arrays, labels: np.ndarray) -> np.ndarray:
    """A metric: whether the greatest channel of one pixel is the one named."""
    values = next(iter(outputs.values()))
    found: np.ndarray = 100.0 * (values[:, :, 3, 3].argmax(1) == labels)
    return found


def test_a_goal_in_the_units_of_a_metric() -> None:
    samples = feeds(GOOD, 200, seed=3)
    labels = run(GOOD, samples)["r3"][:, :, 3, 3].argmax(1)
    given = quantize(GOOD, tensors={"r1": {"range": [0, 0.05]}}).model
    metric = f"{hits.__module__}:hits"
    sys.modules.setdefault(hits.__module__, sys.modules[__name__])
    found = repair(GOOD, given, evaluation={**samples, "labels": labels}, metric=metric, max_drop=5.0)
    assert found.given.drop is not None
    assert found.given.drop > 5
    assert found.after.drop is not None
    assert found.after.drop <= 5
    assert found.steps[0].layer == "c2"
    found.gate()


def test_values_are_plain() -> None:
    found = repair(GOOD, quantize(GOOD, tensors={"r1": {"range": [0, 0.2]}}).model)
    values = found.to_dict()
    assert values["steps"][0]["layer"] == "c2"
    layer = next(one for one in values["analysis"]["layers"] if one["node"] == "c2")
    assert layer["hurts"] is True
    assert layer["own_db"] < 5
    assert values["recipe"]["target"] == "cpu"
    assert found.analysis.to_dict()["layers"] == values["analysis"]["layers"]


def test_another_float_model_is_refused() -> None:
    with pytest.raises(ModelError, match="was made from another float model"):
        repair(conv_chain(3), quantize(GOOD).model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"allow": ["calibrater"]}, RecipeError, "unknown remedy 'calibrater'.*Did you mean 'calibrator'"),
        ({"max_drop": 1.0}, RecipeError, "name one with metric"),
        ({"metric": "top1", "max_drop": 1.0}, DataError, "--eval"),
        ({"min_gain": 0.0}, RecipeError, "above 0 dB"),
        ({"max_float": 2.0}, RecipeError, "from 0 to 1"),
        ({"target": "tensorrt"}, RecipeError, "is for target cpu"),
    ],
)
def test_wrong_usage(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        repair(GOOD, quantize(GOOD).model, **options)


def test_one_sample_cannot_serve_choosing_and_reporting() -> None:
    with pytest.raises(DataError, match="needs two at least"):
        repair(GOOD, quantize(GOOD).model, feeds(GOOD, 1))


def test_models_without_quantized_activations_are_refused() -> None:
    with pytest.raises(ModelError, match="holds no DequantizeLinear"):
        repair(GOOD, GOOD)
    proto = biased_rounding()
    alone = qdqtool.quantize(proto, recipe={"target": "cpu", "precision": "w8a16"}, provider="cpu").model
    with pytest.raises(ModelError, match="activations are float"):
        repair(proto, alone)
    del alone.metadata_props[:]
    with pytest.raises(ModelError, match="quantizes no activations"):
        repair(proto, alone)


class _Reader:
    """Calibration data as onnxruntime's quantizer wants them."""

    def __init__(self, arrays: Arrays) -> None:
        self._feeds: Iterator[Arrays] = iter({"x": row[None]} for row in arrays["x"])

    def get_next(self) -> Arrays | None:
        return next(self._feeds, None)


@pytest.fixture
def foreign(tmp_path: Path) -> onnx.ModelProto:
    """The model of :func:`large_weights`, quantized by onnxruntime with one scale a weight and ``c3`` in float."""
    quantization = pytest.importorskip("onnxruntime.quantization")
    proto = large_weights()
    onnx.save(proto, tmp_path / "float.onnx")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantization.quantize_static(
            tmp_path / "float.onnx",
            tmp_path / "quantized.onnx",
            _Reader(data(proto)),
            quant_format=quantization.QuantFormat.QDQ,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=["c3"],
        )
    return onnx.load(tmp_path / "quantized.onnx")


def test_a_model_of_another_quantizer(foreign: onnx.ModelProto) -> None:
    proto = large_weights()
    found = repair(proto, foreign)
    note = next(note for note in found.notes if "holds no recipe" in note)
    assert re.search(r"target cpu, w8a8, minmax, weights per tensor, 1 layer in float", note)
    assert "c3" in found.recipe.nodes_to_exclude
    assert ("c1", "granularity") in {(step.layer, step.remedy) for step in found.steps}
    assert found.given.worst_db < 10
    assert found.after.worst_db > 25
    assert repair(proto, foreign, target="tensorrt").recipe.target == "tensorrt"

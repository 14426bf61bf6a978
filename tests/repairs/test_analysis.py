"""Own against inherited error, on samples that are told apart by content."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import onnx
import pytest

from qdqtool.data.batching import Sample, digest
from qdqtool.data.source import open_data
from qdqtool.errors import DataError
from qdqtool.graphs import model as models
from qdqtool.planning.plan import Use
from qdqtool.recipe import Recipe
from qdqtool.repairs.analysis import Analysis
from qdqtool.repairs.mending import look
from qdqtool.repairs.probes import Judge, Ratio, divide, score
from qdqtool.repairs.workbench import Trial, Workbench
from qdqtool.spec import QuantizedWeight
from tests.builders import Arrays, run, sqnr
from tests.repairs.models import GOOD, data


def bench(proto: onnx.ModelProto) -> Workbench:
    return Workbench(proto, open_data(data(proto), models.inputs(proto)), provider="cpu")


def recipe(**fields: object) -> Recipe:
    return Recipe.of({"target": "cpu", "calibrator": "minmax", **fields})


def samples(arrays: Arrays) -> list[Sample]:
    feeds = [{"x": arrays["x"][index : index + 1]} for index in range(len(arrays["x"]))]
    return [Sample(feed, digest(feed), index) for index, feed in enumerate(feeds)]


def analysis(made: Workbench, trial: Trial) -> Analysis:
    judge = Judge(made.original, samples(data(GOOD))[:8], made.batching(trial.recipe))
    return look(made, judge, trial, judge.ratios(trial.proto))


def test_a_layer_behind_the_one_that_errs_inherits_the_error() -> None:
    made = bench(GOOD)
    found = analysis(made, made.quantize(recipe(tensors={"r1": {"range": [0, 0.2]}})))
    layers = {layer.node: layer for layer in found.layers}
    assert [layer.node for layer in found.suspects()] == ["c2"]
    assert layers["c2"].own_db < 5
    assert layers["c2"].share > 0.95
    assert layers["c3"].own_db > 30  # its bias was corrected for what it is handed, which is no error of its own
    assert layers["c3"].total_db < 5
    assert layers["c3"].inherited_db == pytest.approx(layers["c3"].total_db, abs=0.1)
    assert layers["c1"].total_db > 30
    assert sum(layer.share for layer in found.layers) == pytest.approx(1)


def test_the_judge_measures_what_validate_does() -> None:
    made = bench(GOOD)
    trial = made.quantize(recipe())
    probes = samples(data(GOOD))[:8]
    ratio = Judge(made.original, probes, made.batching(trial.recipe)).ratios(trial.proto)["r3"]
    both = np.concatenate([sample.feeds["x"] for sample in probes])
    assert ratio.db == pytest.approx(sqnr(run(GOOD, {"x": both})["r3"], run(trial.proto, {"x": both})["r3"]), abs=0.01)
    assert 0 < ratio.error < 1
    assert ratio.sure == ratio.db - ratio.error


def test_samples_are_divided_by_content() -> None:
    given = samples(data(GOOD))
    doubled = [*given, *(dataclasses.replace(one, position=one.position + 96) for one in given)]
    found = divide(doubled, calibration=False, source="data")
    choosing, reporting = ({one.digest for one in side} for side in (found.choosing, found.reporting))
    assert not choosing & reporting
    assert (len(choosing), len(reporting)) == (32, 32)
    turned = divide(given[::-1], calibration=False, source="data")
    assert [one.digest for one in turned.choosing] == [one.digest for one in found.choosing]
    spare = divide(given, calibration=True, source="data")
    corrected = sorted(one.digest for one in given)[:64]
    assert not {one.digest for one in (*spare.choosing, *spare.reporting)} & {*corrected}
    with pytest.raises(DataError, match="needs two at least"):
        divide([given[0], given[0]], calibration=False, source="data")


def test_one_figure_for_all_outputs_counts_nothing_beyond_what_is_enough() -> None:
    ratios = {"a": Ratio(50.0, 1.0), "b": Ratio(20.0, 2.0)}
    assert score(ratios, None) == 35
    assert score(ratios, 30.0) == (30 + 18) / 2
    assert score({"a": Ratio(math.inf, 0.0)}, None) == 120


def weights(trial: Trial) -> Arrays:
    """Codes of weights by the node that reads them."""
    params = trial.state.params or {}
    return {
        key.node: value.codes
        for key, value in params.items()
        if isinstance(key, Use) and isinstance(value, QuantizedWeight)
    }


def test_codes_are_kept_while_a_weight_and_its_scales_stay() -> None:
    made = bench(GOOD)
    first = made.quantize(recipe(precision="w4a8"))
    again = made.quantize(recipe(precision="w4a8"))
    other = made.quantize(recipe(precision="w4a8", nodes={"c2": {"precision": "w8a8"}}))
    assert first.proto.SerializeToString() == again.proto.SerializeToString()
    assert made.exact(first).proto.SerializeToString() == first.proto.SerializeToString()
    codes = [weights(one) for one in (first, other)]
    assert np.array_equal(codes[0]["c3"], codes[1]["c3"])
    assert np.abs(codes[0]["c2"]).max() <= 7 < np.abs(codes[1]["c2"]).max()

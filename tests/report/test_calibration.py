"""What is said about calibration data: one line when all is well, and one for each kind of finding."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from qdqtool.pipeline import quantize
from qdqtool.report import calibration
from qdqtool.statistics.adequacy import FEW, Adequacy, Outlier, SetEnds, TensorAdequacy
from qdqtool.statistics.extremes import SampleId
from tests import builders

ONE, OTHER = SampleId(12, "a3f9c2001122"), SampleId(40, "00ff00aabbcc")
VARIED = TensorAdequacy("varied", 37, 0.01, 0.05, None, ONE)


def adequacy(count: int = 80, **changes: Any) -> Adequacy:
    values = {
        "samples": 500,
        "stable_after": 37,
        "last_stable_after": 37,
        "growing": 0.8,
        "tensors": {f"t{i}": VARIED for i in range(count)},
        **changes,
    }
    return Adequacy(**values)


def of_content(**tensors: TensorAdequacy) -> Adequacy:
    return adequacy(2, tensors={"t0": VARIED, **tensors})


class TestSummary:
    def test_all_is_well(self) -> None:
        assert calibration.summary(adequacy()) == "ranges stable after 37 of 500 samples"
        assert calibration.findings(adequacy()) == []

    def test_most_ranges(self) -> None:
        expected = "90 % of the ranges stable after 37 of 500 samples"
        assert calibration.summary(adequacy(last_stable_after=412)) == expected

    def test_repeats_are_said(self) -> None:
        assert calibration.summary(adequacy(repeats=20)) == "ranges stable after 37 of 500 samples (480 distinct)"

    def test_ranges_that_would_grow(self) -> None:
        found = adequacy(growing=12.4, settled=False)
        found = replace(found, tensors={**found.tensors, "conv_12": replace(VARIED, sole_share=0.431)})
        assert calibration.summary(found) == (
            "500 samples; as many again would widen about 12 of 81 ranges by more than 10 % "
            "(one sample alone makes 43 % of conv_12)"
        )

    def test_few_samples(self) -> None:
        usual = "to take ranges from; a few dozen to a few hundred are usual"
        assert calibration.summary(adequacy(samples=15, settled=False)) == f"15 samples are few {usual}"
        assert calibration.summary(adequacy(samples=1)) == f"1 sample is little {usual}"
        assert calibration.summary(adequacy(samples=60, repeats=50)) == f"60 samples (10 distinct) are few {usual}"
        assert "few" not in calibration.summary(adequacy(samples=16))

    def test_nothing_observed(self) -> None:
        assert calibration.summary(Adequacy(samples=12)) == ""
        assert calibration.summary(adequacy(1, tensors={"t": TensorAdequacy("nothing")})) == ""


class TestFindings:
    def test_random_inputs(self) -> None:
        (line,) = calibration.findings(adequacy(random_inputs={"x": "uniform"}))
        assert line.startswith("input 'x' looks like random numbers (uniform): ")

    def test_outliers(self) -> None:
        (line,) = calibration.findings(adequacy(outliers=(Outlier(ONE, 41, 19.7),)))
        assert line == (
            "1 sample reaches far beyond the others: sample 12 (a3f9c2…) 20 times the usual magnitude "
            "in 41 of 80 ranges. Are they valid?"
        )
        (line,) = calibration.findings(adequacy(outliers=(Outlier(ONE, 41, 19.7), *[Outlier(OTHER, 2, 4.25)] * 6)))
        assert line.startswith("7 samples reach far")
        assert "sample 40 (00ff00…) 4.2 times the usual magnitude in 2 of 80 ranges" in line
        assert line.count("sample 40") == 2
        assert "; and 4 more" in line

    def test_values_that_are_not_finite_are_one_line_for_any_number_of_tensors(self) -> None:
        bad = {f"b{i}": replace(VARIED, nan=3, first_non_finite=OTHER if i else ONE) for i in range(5)}
        (line,) = calibration.findings(of_content(**bad))
        assert line == (
            "5 tensors (b0, b1, b2 and 2 more) held NaN or Inf, first in sample 12 (a3f9c2…); "
            "ranges come from the finite values."
        )

    def test_tensors_of_one_value_or_none(self) -> None:
        found = of_content(
            state=TensorAdequacy("zero"),
            one=TensorAdequacy("constant"),
            other=TensorAdequacy("constant"),
            branch=TensorAdequacy("nothing"),
            broken=TensorAdequacy("nothing", nan=9, first_non_finite=ONE),
        )
        broken, zero, constant, nothing = calibration.findings(found)
        assert broken.startswith("1 tensor (broken) held NaN")
        assert zero == "1 tensor (state) held 0 in every sample, which leaves the range open."
        assert constant == "2 tensors (one, other) held one and the same value in every sample."
        assert nothing == "1 tensor (branch) got no value from any sample."


def test_details_show_what_hangs_on_one_sample_first() -> None:
    tensors = {f"t{i}": replace(VARIED, sole_share=i / 100, stable_after=i) for i in range(20)}
    table, setters = calibration.details(adequacy(tensors=tensors, setters=(SetEnds(ONE, 9), SetEnds(OTHER, 2))))
    columns = [list(map(str, column.cells)) for column in table.columns]  # type: ignore[union-attr]
    assert [column[1] for column in columns] == ["t19", "19", "19 %", "several", "sample 12 (a3f9c2…)"]
    assert [len(column) for column in columns] == [9] * 5
    assert str(setters).endswith("sample 12 (a3f9c2…) 9, sample 40 (00ff00…) 2")


class TestOfARun:
    proto = builders.conv_chain(2)
    x = np.cumsum(np.random.default_rng(0).standard_normal((40, 8, 8, 8)), axis=3).astype(np.float32) / 4

    def found(self, data: object) -> Adequacy:
        found = quantize(self.proto, data, target="cpu", provider="cpu").report.calibration
        assert found is not None
        return found

    def test_positions_are_those_of_the_data(self) -> None:
        x = self.x.copy()
        x[31] *= 30
        found = self.found({"x": x})
        assert (found.samples, found.repeats) == (40, 0)
        assert [outlier.sample.position for outlier in found.outliers] == [31]
        assert found.tensors["x"].hi_sample == found.outliers[0].sample
        assert found.random_inputs == {}

    def test_random_data_are_noticed_unless_asked_for(self) -> None:
        assert self.found(builders.feeds(self.proto)).random_inputs == {"x": "uniform"}
        assert self.found("synthetic:20").random_inputs == {}

    def test_json_has_all_of_it(self) -> None:
        x = np.concatenate([self.x, self.x[:5]])
        x[7, 0, 0, 0] = np.nan
        report = quantize(self.proto, {"x": x}, target="cpu", provider="cpu").report
        read = json.loads(report.to_json())["calibration"]
        assert report.calibration is not None
        assert (read["samples"], read["repeats"]) == (45, 5)
        assert read["tensors"].keys() == report.calibration.tensors.keys()
        assert read["tensors"]["x"]["first_non_finite"]["position"] == 7
        assert read["tensors"]["x"]["stable_after"] == report.calibration.tensors["x"].stable_after
        assert [setter["ends"] for setter in read["setters"]] == [setter.ends for setter in report.calibration.setters]


@pytest.mark.parametrize("count", [1, 200])
def test_many_tensors_make_no_more_lines(count: int) -> None:
    zero = {f"z{i}": TensorAdequacy("zero") for i in range(count)}
    assert len(calibration.findings(of_content(**zero))) == 1


@pytest.mark.zoo
@pytest.mark.parametrize("name", ["resnet8_cifar10", "dscnn_kws", "autoencoder_toycar"])
def test_real_data(zoo: Any, name: str) -> None:
    case = zoo.load(name)
    feeds = zoo.feeds(case, 64)
    found = quantize(case.model, feeds, target="cpu").report.calibration
    assert found is not None
    assert found.distinct >= FEW
    assert (found.outliers, found.random_inputs) == ((), {})
    (one,) = feeds[5]
    feeds[5] = {one: 20 * feeds[5][one]}
    spoilt = quantize(case.model, feeds, target="cpu").report.calibration
    assert spoilt is not None
    assert [outlier.sample.position for outlier in spoilt.outliers] == [5]

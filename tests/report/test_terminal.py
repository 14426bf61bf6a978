"""The pages for people: what is said, in which order, and with which unit."""

from __future__ import annotations

import io
import time
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console, RenderableType

from qdqtool.passes_api import Skip, Timing
from qdqtool.report import progress, terminal
from qdqtool.report.values import Report, Sizes
from qdqtool.statistics.adequacy import Adequacy, TensorAdequacy
from qdqtool.verification.comparison import Comparison


def text(page: RenderableType) -> str:
    stream = io.StringIO()
    Console(file=stream, width=120).print(page)
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def report(**changes: Any) -> Report:
    values: dict[str, Any] = {
        "versions": {},
        "recipe": {"target": "cpu", "precision": "w8a8", "calibrator": {"name": "percentile", "percentile": 99.9}},
        "float_sha256": "0",
        "samples": 1,
        "synthetic": False,
        "opset": 17,
        "tensors": (),
        "layers": {"conv": "Conv"},
        "weight_only": (),
        "skipped": (),
        "notes": (),
        "sizes": Sizes(400_000, 100_000, {}),
        "verification": Comparison(16, {"y": 36.4}, {"y": 41.1}),
        "kernels": {"QLinearConv": 3, "Relu": 2},
        "timings": (Timing("observe", 1, 1.5), Timing("plan", 3, 0.25), Timing("plan", 0, 0.25)),
        **changes,
    }
    return Report(**values)


def page(**changes: Any) -> str:
    return text(terminal.quantization(report(**changes), source="a[b].onnx", output="b.onnx"))


def test_head_settings_and_times() -> None:
    shown = page()
    assert shown.startswith("a[b].onnx -> b.onnx   400 kB -> 100 kB, 4.00 times smaller\n")
    assert "target cpu, w8a8, calibrator percentile (percentile 99.9), 1 calibration sample\n" in shown
    assert "Took 2.00 s: observe 1.50 s, plan 0.50 s" in shown
    assert "Wrote" not in shown


def test_a_file_that_grew_is_called_larger() -> None:
    assert "2.00 times larger" in page(sizes=Sizes(100, 200, {}))


def test_outputs_are_listed_worst_first_and_cut() -> None:
    values = {f"out{i}": float(i) for i in range(terminal.OUTPUTS + 3)}
    shown = page(verification=Comparison(16, values, values))
    assert shown.index("out0") < shown.index("out1")
    assert "and 3 better outputs more; --json lists all" in shown


def test_reasons_are_grouped_with_the_most_frequent_first() -> None:
    skips = [Skip("plan", "one", "rare"), *(Skip("plan", f"n{i}", "common") for i in range(5))]
    skips += [Skip("plan", "conv", "runs in integers after all"), Skip("fold-batchnorm", "bn", "two readers")]
    shown = page(skipped=tuple(skips))
    assert "Stayed float  6 nodes, by reason\n  5  common\n     n0, n1, n2 and 2 more\n  1  rare\n     one\n" in shown
    assert "after all" not in shown
    assert "Left as they were by preparation  1 node" in shown
    assert "fold-batchnorm: two readers" in shown


@pytest.mark.parametrize(
    ("target", "provider", "said"), [("cuda", "cpu", True), ("cuda", "cuda", False), ("cpu", "cpu", False)]
)
def test_figures_of_another_provider_are_marked(target: str, provider: str, said: bool) -> None:
    recipe = {"target": target, "precision": "w8a8", "calibrator": {"name": "mse"}}
    shown = page(recipe=recipe, verification=Comparison(16, {"y": 36.4}, {"y": 41.1}, provider=provider))
    assert ("these figures are" in shown) is said
    assert f"on the {provider.upper()} provider" in shown


def test_scores_have_the_metric_s_unit() -> None:
    found = Comparison(8, {"y": 30.0}, {"y": 30.0}, metric="top1", float_score=91.0, quantized_score=90.5)
    assert "91.0 %" in page(evaluation=found)
    assert "-0.50 points" in page(evaluation=found)
    own = Comparison(8, {"y": 30.0}, {"y": 30.0}, metric="m:f", float_score=0.91, quantized_score=0.91)
    assert "+0\n" in page(evaluation=own)


class TestCalibrationData:
    found = Adequacy(20, stable_after=7, last_stable_after=7, tensors={"a": TensorAdequacy("varied", 7)})

    def test_one_line_when_all_is_well(self) -> None:
        shown = page(calibration=self.found)
        assert "1 calibration sample\nCalibration data: ranges stable after 7 of 20 samples\n\nAccuracy" in shown

    def test_findings_come_below_it(self) -> None:
        shown = page(calibration=replace(self.found, random_inputs={"x[0]": "normal"}))
        assert "of 20 samples\n  input 'x[0]' looks like random numbers (normal)" in shown

    def test_findings_without_ranges(self) -> None:
        shown = page(calibration=Adequacy(20, random_inputs={"x": "normal"}))
        assert "Calibration data" not in shown
        assert "  input 'x' looks like random" in shown

    def test_of_synthetic_data_there_is_nothing_to_say(self) -> None:
        shown = text(
            terminal.quantization(report(calibration=self.found, synthetic=True), source="a", output="b", verbose=True)
        )
        assert "Calibration data" not in shown

    def test_verbose_lists_tensors(self) -> None:
        shown = text(terminal.quantization(report(calibration=self.found), source="a", output="b", verbose=True))
        assert "Calibration data  ranges that depend most on one sample\n  tensor  stable after" in shown


def test_without_verification_there_is_no_accuracy() -> None:
    assert "Accuracy" not in page(verification=None)


def test_tensors_of_a_comparison_are_cut() -> None:
    tensors = {f"t{i}": 10.0 + i for i in range(20)}
    shown = text(terminal.comparison(Comparison(4, {"y": 30.0}, {"y": 30.0}, tensors), reference="a", quantized="b"))
    assert "a against b   4 samples" in shown
    assert shown.index("t0 ") < shown.index("t7 ")
    assert "10.0 dB" in shown
    assert "t19" not in shown
    assert "12 tensors more" in shown


class TestProgress:
    def test_nobody_sees_it_without_a_terminal(self) -> None:
        with progress.progress_bar() as bar:
            assert bar is None

    def test_shows_count_rate_and_time_left(self, monkeypatch: pytest.MonkeyPatch) -> None:
        stream = io.StringIO()
        stream.isatty = lambda: True  # type: ignore[method-assign]  # a terminal to look at
        monkeypatch.setattr("sys.stderr", stream)
        monkeypatch.setenv("TERM", "xterm")
        with progress.progress_bar() as bar:
            assert bar is not None
            bar("observe", 0, None)
            for done in (5, 10):
                bar("observe", done, 20)
                time.sleep(0.25)  # it is drawn ten times a second
            bar("compare", 1, 4)
        shown = stream.getvalue()
        assert "Observing" in shown
        assert "10/20" in shown
        assert "samples/s" in shown
        assert "Comparing" in shown
        assert "1/4" in shown

    def test_quiet(self) -> None:
        with progress.progress_bar(quiet=True) as bar:
            assert bar is None

"""Statistics observed once serve every choice; parts merge to the whole; what does not belong together is refused."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import qdqtool
from qdqtool import Calibration, pipeline, runtime
from qdqtool.calibrators import BUILTIN
from qdqtool.errors import DataError, RecipeError, StatisticsError
from qdqtool.graphs import model as models
from qdqtool.observation.calibration import ModelKey, merged
from qdqtool.statistics.tensor import Statistics
from tests.builders import Array, parse
from tests.calibrated import calibrate, content, data, network, observed, quantize, watch

X = data()["x"]
NOTHING = parse("y = Sin(x)", "float[N, 3] x", "float[N, 3] y", {})


@pytest.fixture(scope="module")
def every() -> Calibration:
    """Of every target's tensors."""
    return calibrate({"x": X})


def parts(*cuts: int, **fields: object) -> dict[str, Calibration]:
    return {f"part{i}": calibrate({"x": part}, **fields) for i, part in enumerate(np.split(X, cuts))}


def identical(one: Calibration, other: Calibration) -> bool:
    """With the order of samples, which equality leaves out."""
    records = [[stats.records.tobytes() for stats in found.statistics.tensors.values()] for found in (one, other)]
    return records[0] == records[1] and dataclasses.replace(one, sources=()) == dataclasses.replace(other, sources=())


# Observed once


CHOICES = [*({"calibrator": calibrator.name} for calibrator in BUILTIN), {"target": "cuda"}, {"target": "tensorrt"}]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: "-".join(choice.values()))
def test_any_choice_is_what_quantizing_from_the_data_gives(every: Calibration, choice: dict[str, str]) -> None:
    straight = quantize({"x": X}, **choice)
    assert content(quantize({"x": X}, statistics=every, **choice)) == content(straight)


def test_a_tensor_has_the_same_statistics_whatever_else_is_observed(every: Calibration) -> None:
    for target in ("cpu", "tensorrt"):
        alone = calibrate({"x": X}, targets=[target])
        assert identical(alone, every.of([*alone.statistics.tensors]))


def test_observing_runs_each_sample_once_for_all_targets(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = watch(monkeypatch)
    found = calibrate({"x": X})
    assert sum(len(batch.positions) for batch in taken) == found.statistics.samples == len(X)
    assert {*found.statistics.tensors} == {"x", "r0", "c1", "r1", "c2", "l", "p", "f"}
    assert observed(taken) == {"x", "r0", "c1", "r1", "l", "p"}  # the others follow from these


def test_targets_are_named_and_a_misspelt_one_costs_nothing() -> None:
    assert calibrate({"x": X}, targets=["tensorrt", "cuda"]).statistics.tensors.keys() == {"x", "r0", "r1", "f"}
    with pytest.raises(RecipeError, match=r"unknown target 'tensort'.*Did you mean 'tensorrt'\?"):
        calibrate(iter([]), "no such model.onnx", targets=["tensort"])
    with pytest.raises(RecipeError, match="no target was named"):
        calibrate({"x": X}, targets=[])
    with pytest.raises(DataError, match="observing needs calibration data"):
        calibrate(None)


def test_what_a_recipe_quantizes_beyond_the_target_is_observed_too() -> None:
    recipe = {"tensors": {"r1": {"granularity": "per_channel"}}, "nodes_to_exclude": ["c2"], "calibrator": "aciq"}
    found = calibrate({"x": X}, targets=["cpu"], recipe=recipe)
    assert found.has("r1", 1)
    assert not found.has("c2")
    straight = quantize({"x": X}, recipe=recipe)
    assert content(quantize({"x": X}, recipe=recipe, statistics=found)) == content(straight)


def test_the_cpu_target_alone_asks_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def resolve(wanted: str) -> tuple[str, None]:
        asked.append(wanted)
        return "cpu", None

    monkeypatch.setattr(runtime, "resolve_provider", resolve)
    for targets in (["cpu"], ["cpu", "tensorrt"]):
        calibrate({"x": X}, provider="auto", targets=targets)
    assert asked == ["cpu", "auto"]


def test_names_are_public() -> None:
    assert qdqtool.calibrate is pipeline.calibrate
    assert {"calibrate", "Calibration"} <= set(qdqtool.__all__)


# Without data


def test_what_needs_data_is_left_out_and_named(every: Calibration) -> None:
    found = quantize(statistics=every)
    assert found.report.verification is None
    assert [note.partition(":")[0] for note in found.report.notes] == [
        "not compared with the float model",
        "biases were corrected from BatchNormalization alone",
    ]
    assert json.loads(found.report.to_json())["notes"] == list(found.report.notes)
    assert found.report.kernels  # checked and loaded all the same
    plain = quantize({"x": X}, bias_correction=False)
    assert constants_of(found.model) == constants_of(plain.model)
    assert len(quantize(statistics=every, bias_correction=False).report.notes) == 1


def constants_of(proto: onnx.ModelProto) -> dict[str, bytes]:
    return {t.name: t.SerializeToString(deterministic=True) for t in proto.graph.initializer}


def test_a_gate_without_data_is_an_error(every: Calibration) -> None:
    with pytest.raises(DataError, match="--min-sqnr compares on data"):
        quantize(statistics=every, min_sqnr=10.0)
    with pytest.raises(DataError, match="or statistics observed before"):
        quantize()


def test_a_number_of_samples_is_that_of_the_statistics(every: Calibration) -> None:
    few = calibrate({"x": X}, samples=6)
    assert few.statistics.samples == 6
    assert content(quantize({"x": X}, statistics=few, samples=6)) == content(quantize({"x": X}, samples=6))
    notes = quantize({"x": X}, statistics=every, samples=6).report.notes
    assert notes == (f"ranges come from all {len(X)} samples of the statistics, not from 6 of them",)


def test_random_data_mark_the_model(every: Calibration) -> None:
    random = calibrate("synthetic:4", targets=["cpu"])
    assert random.synthetic
    for found, what in (
        (quantize(statistics=random), "ranges"),
        (quantize({"x": X}, statistics=random), "ranges"),
        (quantize("synthetic:4", statistics=every), "bias corrections"),
    ):
        assert found.report.synthetic
        assert models.metadata(found.model)[pipeline.SYNTHETIC_KEY] == f"{what} come from random data"
    mixed = merged({"real": calibrate({"x": X}, targets=["cpu"]), "random": random})
    assert quantize(statistics=mixed).report.synthetic
    assert pipeline.SYNTHETIC_KEY not in models.metadata(quantize(statistics=every).model)


# Another model


def edited(change: Callable[[onnx.ModelProto], object]) -> onnx.ModelProto:
    proto = network()
    change(proto)
    return proto


def reweighted(proto: onnx.ModelProto) -> None:
    bias = next(t for t in proto.graph.initializer if t.name == "b3")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + np.float32(1e-3), "b3"))


OTHER_MODELS = {
    "weights": (reweighted, "the same graph with other weights"),
    "attribute": (lambda p: p.graph.node[6].attribute.pop(), "another graph"),
    "names": (lambda p: setattr(p.graph.node[-1], "name", "tail"), "another graph"),
    "opset": (lambda p: setattr(p.opset_import[0], "version", 16), "another graph"),
}


@pytest.mark.parametrize("case", OTHER_MODELS)
def test_statistics_of_another_model_are_refused_with_the_reason(every: Calibration, case: str) -> None:
    change, reason = OTHER_MODELS[case]
    message = rf"^arrays in memory .*do not belong to this model: they were observed on {reason}.*run 'qdqtool observe'"
    with pytest.raises(StatisticsError, match=message):
        quantize(statistics=every, model=edited(change))


def test_documentation_and_the_form_of_the_file_make_no_other_model(every: Calibration, tmp_path: Path) -> None:
    proto = network()
    proto.doc_string = proto.graph.doc_string = "told"
    onnx.helper.set_model_props(proto, {"by": "me"})
    for node in proto.graph.node:
        node.doc_string = "where it comes from"
    quantize(statistics=every, model=proto)
    quantize(statistics=every, model=models.save(proto, tmp_path / "large.onnx", external_data=True))


def test_sparse_weights_count() -> None:
    def key(value: float) -> ModelKey:
        proto = parse("y = MatMul(x, w)", "float[N, 3] x", "float[N, 3] y", {})
        values = onnx.helper.make_tensor("w", onnx.TensorProto.FLOAT, [1], [value])
        indices = onnx.helper.make_tensor("i", onnx.TensorProto.INT64, [1], [4])
        proto.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [3, 3]))
        return ModelKey.of(proto)

    assert key(1) == key(1) != key(2)


def test_tensors_that_were_not_observed_are_named() -> None:
    only = calibrate({"x": X}, targets=["tensorrt"])
    with pytest.raises(StatisticsError, match=r"no statistics of 'c1', 'c2', 'l' and 1 more tensors.*--target"):
        quantize(statistics=only)
    whole = calibrate({"x": X}, targets=["cpu"])
    with pytest.raises(StatisticsError, match=r"no statistics of 'r1'.*--recipe"):
        quantize(statistics=whole, tensors={"r1": {"granularity": "per_channel"}})


# Merging


@settings(deadline=None, max_examples=8)
@given(st.lists(st.integers(1, len(X) - 1), unique=True, min_size=1, max_size=4).map(sorted))
def test_parts_in_the_order_of_the_data_are_one_run(cuts: list[int]) -> None:
    assert identical(merged(parts(*cuts)), calibrate({"x": X}))


@pytest.mark.parametrize("calibrator", ["mse", "moving_average"])
def test_parts_give_the_bytes_of_one_run(calibrator: str) -> None:
    found = parts(1, 9)  # one sample alone cannot tell that samples may be joined
    straight = quantize({"x": X}, calibrator=calibrator)
    assert content(quantize({"x": X}, statistics=merged(found), calibrator=calibrator)) == content(straight)
    recipe = {"calibrator": calibrator, "bias_correction": False}
    whole = content(quantize({"x": X}, **recipe))
    assert content(quantize(statistics=merged(found), **recipe)) == whole
    shuffled = content(quantize(statistics=merged(dict(reversed(found.items()))), **recipe))
    assert (shuffled == whole) == (calibrator != "moving_average")


def test_merged_parts_merge_on(every: Calibration) -> None:
    found = [*parts(5, 10, 15).values()]
    left, right = merged({"a": found[0], "b": found[1]}), merged({"c": found[2], "d": found[3]})
    assert identical(merged({"ab": left, "cd": right}), every)
    with pytest.raises(StatisticsError, match="ab and b are of the same data"):
        merged({"ab": left, "b": found[1]})


def test_channels_merge_as_well() -> None:
    recipe = {"tensors": {"r1": {"granularity": "per_channel"}}}
    found = merged(parts(7, targets=["cpu"], recipe=recipe))
    assert identical(found, calibrate({"x": X}, targets=["cpu"], recipe=recipe))
    assert found.has("r1", 1)


def test_the_same_data_are_not_merged_twice_whatever_their_order(every: Calibration) -> None:
    again = calibrate({"x": X[::-1]})
    with pytest.raises(StatisticsError, match=r"a.stats and b.stats are of the same data.*leave one out"):
        merged({"a.stats": every, "b.stats": again})


def test_a_model_without_anything_to_observe_merges_too() -> None:
    rows = np.random.default_rng(0).standard_normal((2, 5, 3)).astype(np.float32)
    one, other = (calibrate({"x": values}, NOTHING) for values in rows)
    assert one.statistics.tensors == {}
    assert merged({"a": one, "b": other}).statistics == Statistics({}, 10)
    with pytest.raises(StatisticsError, match="same data"):
        merged({"a": one, "b": calibrate({"x": rows[0]}, NOTHING)})


def moved_to(calibration: Calibration) -> Calibration:
    return dataclasses.replace(calibration, runtime="onnxruntime 1.0, cuda")


def whole_feeds(calibration: Calibration) -> Calibration:
    return dataclasses.replace(calibration, batching=dataclasses.replace(calibration.batching, rows=False))


APART: dict[str, tuple[Callable[[Array], Calibration], str]] = {
    "weights": (lambda x: calibrate({"x": x}, edited(reweighted)), "the same graph with other weights"),
    "graph": (lambda x: calibrate({"x": x}, network(opset=16)), "another graph"),
    "tensors": (
        lambda x: calibrate({"x": x}, targets=["cpu"]),
        r"differ in what was observed \('f'\); observe both for the same targets",
    ),
    "channels": (
        lambda x: calibrate({"x": x}, tensors={"r1": {"granularity": "per_channel"}}),
        r"differ in what was observed \('r1'\)",
    ),
    "runtime": (lambda x: moved_to(calibrate({"x": x})), "the second by onnxruntime 1.0, cuda"),
    "feeds": (lambda x: whole_feeds(calibrate({"x": x})), "a sample is a row of the data, in the other a whole feed"),
}


@pytest.mark.parametrize("case", APART)
def test_what_is_no_part_of_the_same_run_is_refused_by_name(case: str) -> None:
    make, reason = APART[case]
    first = calibrate({"x": X[:5]})
    with pytest.raises(StatisticsError, match=rf"one\.stats and two\.stats cannot be merged: .*{reason}"):
        merged({"one.stats": first, "two.stats": make(X[5:])})


def test_positions_go_on_from_part_to_part() -> None:
    x = X[:9].copy()
    x[7, 0, 0, 0] = np.nan
    found = merged({str(i): calibrate({"x": part}) for i, part in enumerate(np.split(x, [4]))})
    stats = found.statistics["x"]
    assert stats.records["position"].tolist() == list(range(9))
    assert stats.first_non_finite is not None
    assert stats.first_non_finite[0] == 7
    assert identical(found, calibrate({"x": x}))

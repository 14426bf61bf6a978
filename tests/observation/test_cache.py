"""What was observed is not observed again; the cache changes time and nothing else, whatever state it is in."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import platformdirs
import pytest

import qdqtool
from qdqtool import runtime
from qdqtool.observation import cache, statistics_file
from qdqtool.observation.cache import Cache, default_folder
from qdqtool.observation.calibration import ModelKey
from qdqtool.observation.observe import ObserveJob
from tests.builders import normal, parse
from tests.calibrated import NETWORK, calibrate, content, data, network, observed, positions, quantize, watch

X = data()["x"]


@pytest.fixture(scope="module")
def straight() -> dict[str, bytes]:
    """What quantizing for a target without any cache gives."""
    return {target: content(quantize({"x": X}, target=target)) for target in ("cpu", "tensorrt")}


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cache")
    quantize({"x": X}, cache=folder)
    return folder


@pytest.fixture
def warm(filled: Path, tmp_path: Path) -> Path:
    """A cache that holds the statistics for the target cpu."""
    return Path(shutil.copytree(filled, tmp_path / "kept"))


# What is found in it


@pytest.mark.parametrize(
    "choice",
    [
        {"calibrator": "mse"},
        {"calibrator": {"name": "moving_average", "constant": 0.5}},
        {"tensors": {"r0": {"dtype": "uint16"}}},
        {"per_channel": False, "equalization": False, "reduce_range": True},
        {"nodes_to_exclude": ["c1"]},
        {"memory": "4kB"},
    ],
    ids=str,
)
def test_another_choice_observes_nothing(warm: Path, choice: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    taken = watch(monkeypatch)
    found = quantize({"x": X}, cache=warm, **choice)
    assert taken == []
    kept = "statistics of {0} of {0} tensors were kept from an earlier run (--no-cache observes them again)"
    assert kept.format(len({t.tensor for t in found.report.tensors if t.observed})) in found.report.notes
    assert content(found) == content(quantize({"x": X}, **choice))
    assert len(taken) > 0


def test_a_width_that_raises_the_opset_observes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old = network(opset=13)
    quantize({"x": X}, old, cache=tmp_path)
    taken = watch(monkeypatch)
    found = quantize({"x": X}, old, cache=tmp_path, tensors={"r0": {"dtype": "int16"}})
    assert found.report.opset == 21
    assert taken == []


def test_another_target_observes_only_what_is_missing(
    tmp_path: Path, straight: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize({"x": X}, cache=tmp_path, target="tensorrt")
    taken = watch(monkeypatch)
    found = quantize({"x": X}, cache=tmp_path)
    assert observed(taken) == {"c1", "l"}
    assert "statistics of 4 of 7 tensors were kept" in "".join(found.report.notes)  # "f" has the values of "p"
    assert content(found) == straight["cpu"]
    taken.clear()
    assert content(quantize({"x": X}, cache=tmp_path, target="tensorrt")) == straight["tensorrt"]
    assert taken == []


def test_a_tensor_that_the_runtime_would_fuse_makes_an_entry_of_its_own(warm: Path) -> None:
    """With its activation function excluded, a convolution's output is observed: that may change bits of others."""
    recipe = {"nodes_to_exclude": ["r0"]}
    wanted = content(quantize({"x": X}, recipe=recipe))
    assert content(quantize({"x": X}, cache=warm, recipe=recipe)) == wanted
    assert len([*warm.iterdir()]) == 2


def test_statistics_of_all_serve_each(
    tmp_path: Path, straight: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    every = calibrate({"x": X}, cache=tmp_path)
    taken = watch(monkeypatch)
    for target, bytes_ in straight.items():
        assert content(quantize({"x": X}, cache=tmp_path, target=target)) == bytes_
    assert calibrate({"x": X}, cache=tmp_path) == every
    assert taken == []


def test_a_cache_makes_no_other_file(warm: Path, tmp_path: Path) -> None:
    found = statistics_file.write(calibrate({"x": X}, cache=warm), tmp_path / "warm.stats")
    other = statistics_file.write(calibrate({"x": X}), tmp_path / "cold.stats")
    assert found.read_bytes() == other.read_bytes()


def test_channels_are_observed_where_only_the_tensor_was(warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = {"tensors": {"r1": {"granularity": "per_channel"}}, "calibrator": "aciq"}
    taken = watch(monkeypatch)
    first = content(quantize({"x": X}, cache=warm, recipe=recipe))
    assert observed(taken) == {"r1"}
    assert content(quantize({"x": X}, cache=warm, recipe=recipe)) == first
    assert observed(taken) == {"r1"}
    assert content(quantize({"x": X}, recipe=recipe)) == first


def test_channels_of_a_tensor_that_follows_are_its_own(tmp_path: Path) -> None:
    recipe = {"tensors": {"l": {"granularity": "per_channel"}, "c2": {"granularity": "per_channel"}}}
    cold = calibrate({"x": X}, recipe=recipe, targets=["cpu"])
    assert cold.has("l", 1)
    assert cold.has("c2", 1)
    assert cold.statistics["l"].channels != cold.statistics["c2"].channels
    calibrate({"x": X}, cache=tmp_path)
    assert calibrate({"x": X}, cache=tmp_path, recipe=recipe, targets=["cpu"]) == cold
    plain = calibrate({"x": X}, cache=tmp_path, targets=["cpu"])
    assert [s.histogram for s in plain.statistics.tensors.values()] == [
        s.histogram for s in calibrate({"x": X}, targets=["cpu"]).statistics.tensors.values()
    ]


# What is not


def reweighted() -> onnx.ModelProto:
    proto = network()
    bias = next(t for t in proto.graph.initializer if t.name == "b0")
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) * 2, "b0"))
    return proto


OTHERS: dict[str, dict[str, Any]] = {
    "other data": {"data": {"x": np.concatenate([X[:-1], -X[-1:]])}},
    "another order": {"data": {"x": X[::-1]}},
    "a sample more": {"data": {"x": np.concatenate([X, X[:1]])}},
    "other feeds of the same rows": {"data": [{"x": X[:10]}, {"x": X[10:]}]},
    "so many samples": {"samples": len(X)},
    "other weights": {"model": reweighted()},
    "another model": {"model": network(opset=16)},
}


@pytest.mark.parametrize("case", OTHERS)
def test_anything_else_is_observed(warm: Path, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    change = OTHERS[case]
    taken = watch(monkeypatch)
    found = quantize(**{"data": {"x": X}, "cache": warm, **change})
    assert len(positions(taken)) == found.report.samples
    assert content(found) == content(quantize(**{"data": {"x": X}, **change}))


def test_another_runtime_or_version_of_this_program_observes(warm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken = watch(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(runtime, "describe", lambda provider: f"onnxruntime 99, {provider}")
        quantize({"x": X}, cache=warm)
    assert len(positions(taken)) == len(X)
    monkeypatch.setattr(qdqtool, "__version__", "99")
    quantize({"x": X}, cache=warm)
    assert len(positions(taken)) == 2 * len(X)


def test_nothing_is_kept_or_found_without_a_cache(own_cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    quantize({"x": X}, cache=False)
    assert not own_cache.exists()
    quantize({"x": X}, cache=True)
    assert len([*own_cache.iterdir()]) == 1
    taken = watch(monkeypatch)
    quantize({"x": X}, cache=False)
    assert len(positions(taken)) == len(X)


def test_tensors_that_want_other_samples_do_not_mix(tmp_path: Path) -> None:
    """Whether rows may be joined shows in "s" alone: without it rows are samples, with it whole feeds are."""
    proto = parse(
        "t = MatMul(x, w) s = Softmax <axis = 0> (x) m = MatMul(s, w) z = Mul(m, none) y = Add(t, z)",
        "float[N, 4] x",
        "float[N, 4] y",
        {"w": normal(4, 4), "none": np.zeros(1, np.float32)},
    )
    rows = normal(6, 4)
    given = [{"x": rows[:4]}, {"x": rows[4:]}]
    first = calibrate(given, proto, cache=tmp_path, op_types_to_quantize=["Add"], targets=["cpu"], nodes_to_exclude=[])
    both = [calibrate(given, proto, cache=tmp_path / str(i), targets=["cpu"]) for i in range(2)]
    mixed = calibrate(given, proto, cache=tmp_path, targets=["cpu"])
    assert mixed == both[0] == both[1]
    assert {len(stats.records) for stats in mixed.statistics.tensors.values()} == {mixed.statistics.samples}
    assert first.statistics.tensors.keys() <= mixed.statistics.tensors.keys()


def test_a_partial_cut_otherwise_is_left_alone(tmp_path: Path) -> None:
    found, kept = calibrate({"x": X[:4]}, targets=["tensorrt"]), entry(tmp_path, "a")
    names = [*found.statistics.tensors]
    kept.keep(found.statistics, whole=False, plan=found.batching)
    assert kept.partial(names, {}, found.batching) == found.statistics
    assert kept.partial(names, {}, replace(found.batching, rows=False)) is None
    assert kept.partial(names[1:], {}, found.batching) is None
    assert kept.load() is None


# A cache in a bad state


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty", "a folder", "of another model"])
def test_damage_costs_time_alone(
    warm: Path, straight: dict[str, bytes], damage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (path,) = warm.iterdir()
    whole = path.read_bytes()
    path.unlink()
    if damage == "a folder":
        path.mkdir()
    elif damage == "of another model":
        statistics_file.write(calibrate({"x": X}, reweighted(), targets=["cpu"]), path)
    else:
        path.write_bytes({"truncated": whole[:-100], "garbage": b"\0" * 1000, "empty": b""}[damage])
    taken = watch(monkeypatch)
    assert content(quantize({"x": X}, cache=warm)) == straight["cpu"]
    assert len(positions(taken)) == len(X)
    if damage != "a folder":
        assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_made_costs_time_alone(
    tmp_path: Path, straight: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in its place")
    for folder in (tmp_path / "file", tmp_path / "file" / "deeper"):
        assert content(quantize({"x": X}, cache=folder)) == straight["cpu"]
        assert Cache(folder).clear() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["file"]

    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "replace", refused)  # as in a folder that may only be read, which root would not notice
    assert content(quantize({"x": X}, cache=tmp_path)) == straight["cpu"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_folder_is_the_systems_or_the_one_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("QDQTOOL_CACHE_DIR", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("QDQTOOL_CACHE_DIR", "~/mine")
    assert default_folder() == tmp_path / "mine"
    monkeypatch.delenv("QDQTOOL_CACHE_DIR")
    assert default_folder() == platformdirs.user_cache_path("qdqtool", appauthor=False)


def test_a_user_without_a_home_has_no_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, straight: dict[str, bytes]
) -> None:
    def unknown(_: int) -> None:
        raise KeyError("no such user")

    monkeypatch.delenv("QDQTOOL_CACHE_DIR")
    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.chdir(tmp_path)
    assert default_folder() is None
    assert content(quantize({"x": X}, cache=True)) == straight["cpu"]
    monkeypatch.setattr(platformdirs, "user_cache_path", lambda *_, **__: Path("~/.cache/qdqtool"))
    assert default_folder() is None
    assert list(tmp_path.iterdir()) == []


# Its size


def entry(folder: Path, name: str, most_bytes: int = 2 << 30) -> cache.Entry:
    return Cache(folder, most_bytes).entry(ModelKey("graph", name), "data", None, "runtime")


def test_what_was_used_longest_ago_goes(tmp_path: Path) -> None:
    found = calibrate({"x": X[:4]}, targets=["tensorrt"])
    names = ["a", "b", "c"]
    for age, name in enumerate(reversed(names)):
        kept = entry(tmp_path, name)
        kept.complete(qdqtool.Calibration(kept.model, found.statistics, found.sources, found.batching, "runtime"))
        for path in tmp_path.glob(f"{kept.name}*"):
            os.utime(path, (time.time() - 100 - age,) * 2)
    size = max(Cache(tmp_path).sizes().values())
    assert entry(tmp_path, "a").load() is not None  # was the oldest, and is used now
    kept = entry(tmp_path, "d", most_bytes=3 * size)
    kept.complete(qdqtool.Calibration(kept.model, found.statistics, found.sources, found.batching, "runtime"))
    assert {name: entry(tmp_path, name).load() is not None for name in "abcd"} == {
        "a": True,
        "b": False,
        "c": True,
        "d": True,
    }
    assert sum(Cache(tmp_path).sizes().values()) <= 3 * size


def test_what_is_larger_than_all_is_not_kept(tmp_path: Path, straight: dict[str, bytes]) -> None:
    found = calibrate({"x": X[:4]}, targets=["tensorrt"])
    kept = entry(tmp_path, "a", most_bytes=10)
    kept.complete(qdqtool.Calibration(kept.model, found.statistics, found.sources, found.batching, "runtime"))
    assert list(tmp_path.iterdir()) == []


def test_what_killed_writers_left_goes_in_time(tmp_path: Path) -> None:
    for name, age in ((".qdqtool-old", 7200), (".qdqtool-new", 60)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "half.stats").write_bytes(b"half")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    (tmp_path / "mine.txt").write_text("not the cache's")
    Cache(tmp_path).make_room()
    assert {path.name for path in tmp_path.iterdir()} == {".qdqtool-new", "mine.txt"}
    Cache(tmp_path).clear()
    assert {path.name for path in tmp_path.iterdir()} == {"mine.txt"}


# Several processes


def test_two_runs_at_once_do_no_harm(tmp_path: Path, straight: dict[str, bytes]) -> None:
    onnx.save(NETWORK, tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=X)
    command = [sys.executable, "-m", "qdqtool", "quantize", "net.onnx", "--data", "data.npz", "-q"]
    command += ["--provider", "cpu", "--calibrator", "minmax"]
    environment = os.environ | {"QDQTOOL_CACHE_DIR": str(tmp_path / "kept")}
    runs = [
        subprocess.Popen([*command, "--target", target, "-o", f"{target}.onnx"], cwd=tmp_path, env=environment)
        for target in ("cpu", "tensorrt")
    ]
    assert [run.wait(60) for run in runs] == [0, 0]
    assert {target: (tmp_path / f"{target}.onnx").read_bytes() for target in straight} == straight


def test_what_another_process_kept_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    start = ObserveJob.start

    def meanwhile(job: ObserveJob) -> Any:
        monkeypatch.setattr(ObserveJob, "start", start)
        calibrate({"x": X}, cache=tmp_path, targets=["cpu"])
        return start(job)

    monkeypatch.setattr(ObserveJob, "start", meanwhile)
    calibrate({"x": X}, cache=tmp_path, targets=["tensorrt"])
    taken = watch(monkeypatch)
    for target in ("cpu", "tensorrt"):
        calibrate({"x": X}, cache=tmp_path, targets=[target])
    assert taken == []

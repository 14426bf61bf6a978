"""A run that was interrupted goes on where it was, and gives what an undisturbed one gives."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool.data.fit import Feeds
from qdqtool.data.source import Data, open_data
from qdqtool.errors import DataError
from qdqtool.graphs import model as models
from qdqtool.observation import observe as observing
from qdqtool.observation.cache import Cache, Entry
from qdqtool.observation.calibration import Calibration
from qdqtool.observation.collect import Collected, collect
from qdqtool.observation.engine import Local
from qdqtool.observation.observe import Observing
from qdqtool.statistics.tensor import Statistics
from tests.builders import parse
from tests.calibrated import NETWORK, content, data, observed, positions, quantize, watch

COUNT = 80
X = data(COUNT)["x"]
NAMES = ["x", "r0", "c1", "r1", "l"]


@pytest.fixture(autouse=True)
def saved_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was found is saved after every batch, not first after two seconds."""
    monkeypatch.setattr(observing, "_FIRST_SAVE", 0.0)
    monkeypatch.setattr(observing, "_SAVING_SHARE", 1e9)


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "kept")


def collected(
    names: Sequence[str] = NAMES, source: Data | None = None, memory: int = 30_000, **options: Any
) -> Collected:
    """Few samples in a batch, one batch at a time: so the order of batches is known."""
    given = open_data({"x": X}, models.inputs(NETWORK)) if source is None else source
    how = Observing(memory, Local(1))
    return collect(onnx.shape_inference.infer_shapes(NETWORK), names, given, options=how, **options)


def interrupted(batches: int, *names: str, **options: Any) -> list[int]:
    """Run so many batches; the next one fails. Returns the positions that were run."""
    with pytest.MonkeyPatch.context() as patch:
        taken = watch(patch, fail_after=batches)
        with pytest.raises(InterruptedError, match="the power failed"):
            collected(names or NAMES, **options)
    return positions(taken)


@pytest.fixture(scope="module")
def undisturbed() -> Collected:
    return collected()


def assert_same(found: Collected, wanted: Collected) -> None:
    assert found.calibration == wanted.calibration
    for name, stats in wanted.calibration.statistics.tensors.items():
        assert found.calibration.statistics[name].records.tobytes() == stats.records.tobytes()
    assert [sample.digest for sample in found.held] == [sample.digest for sample in wanted.held]


def test_only_the_rest_is_run(cache: Cache, undisturbed: Collected, monkeypatch: pytest.MonkeyPatch) -> None:
    before = interrupted(9, cache=cache)
    assert len(before) > COUNT // 4
    taken = watch(monkeypatch)
    found = collected(cache=cache)
    after = positions(taken)
    assert len(after) < COUNT - len(before) // 2  # the batch behind the last checkpoint may have been lost
    assert {*before, *after} == {*range(COUNT)}
    assert found.notes == (f"an interrupted run was resumed: {COUNT - len(after)} samples had been observed already",)
    assert_same(found, undisturbed)
    assert [path.suffix for path in cache.sizes()] == [".stats"]  # no partial is left
    assert "-" not in next(iter(cache.sizes())).name


def test_it_may_be_interrupted_again_and_again(
    cache: Cache, undisturbed: Collected, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = [len(interrupted(3, cache=cache)) for _ in range(3)]
    taken = watch(monkeypatch)
    assert_same(collected(cache=cache), undisturbed)
    assert len(positions(taken)) < COUNT - sum(done) // 2


def test_chosen_samples_resume_too(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted(4, cache=cache, samples=60)
    taken = watch(monkeypatch)
    found = collected(cache=cache, samples=60)
    assert 0 < len(positions(taken)) < 60
    assert found.calibration.statistics.samples == 60
    assert_same(found, collected(samples=60))


def test_data_that_fail_on_a_later_pass_lose_nothing(cache: Cache, undisturbed: Collected) -> None:
    passes = 0

    def replay() -> Iterator[Feeds]:
        nonlocal passes
        passes += 1
        for index, row in enumerate(X):
            if passes == 3 and index == 50:  # behind the hash of all data and the trial of joining
                raise OSError("the disk is gone")
            yield {"x": row[None]}

    with pytest.raises(OSError, match="the disk is gone"):
        collected(source=Data("arrays in memory", replay, count=COUNT), cache=cache)
    found = collected(cache=cache)
    assert "was resumed" in found.notes[0]
    assert_same(found, undisturbed)


@pytest.mark.parametrize(
    "change",
    [{"names": NAMES[:-1]}, {"names": [*NAMES, "s"]}, {"axes": {"r1": 1}}, {"samples": 70}],
    ids=["fewer tensors", "more tensors", "channels", "chosen samples"],
)
def test_a_partial_of_something_else_is_left_alone(
    cache: Cache, change: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    interrupted(5, cache=cache)
    taken = watch(monkeypatch)
    found = collected(**change, cache=cache)
    assert len(positions(taken)) == found.calibration.statistics.samples
    assert found.notes == ()
    assert_same(found, collected(**change))


def test_a_damaged_partial_costs_time_alone(cache: Cache, undisturbed: Collected) -> None:
    interrupted(5, cache=cache)
    (path,) = cache.sizes()
    path.write_bytes(path.read_bytes()[:-50])
    found = collected(cache=cache)
    assert found.notes == ()
    assert_same(found, undisturbed)


def test_a_later_sweep_keeps_those_before(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["x", "r0", "c1", "s", "r1", "l"]
    how: dict[str, Any] = {"memory": 10_000}
    with pytest.MonkeyPatch.context() as patch:
        taken = watch(patch)
        whole = collected(names, **how)
    groups = [*dict.fromkeys(batch.tensors for batch in taken)]
    assert groups == [("x", "r0", "c1"), ("s", "r1"), ("l",)]
    each = sum(batch.tensors == groups[0] for batch in taken)
    interrupted(each + each // 2, *names, cache=cache, **how)
    taken = watch(monkeypatch)
    found = collected(names, cache=cache, **how)
    assert observed(taken) == {"s", "r1", "l"}
    second = [batch for batch in taken if batch.tensors == groups[1]]
    assert 0 < len(positions(second)) < COUNT
    assert found.notes[-1].startswith("statistics of 3 of 6 tensors were kept")
    assert "was resumed" in found.notes[-2]
    assert_same(found, whole)


def test_what_is_kept_holds_the_same_samples(cache: Cache, undisturbed: Collected) -> None:
    collected(cache=cache)
    found = collected(cache=cache)
    assert "kept from an earlier run" in found.notes[0]
    assert_same(found, undisturbed)


def test_a_tensor_that_follows_from_another_does_so_even_if_nobody_wants_that_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    body = "s = Mul(x, k) r = Relu(s) n = Neg(r) y = Transpose <perm = [1, 0]> (n)"
    proto = parse(body, "float[N, 8] x", "float[8, N] y", {"k": np.array(0.3, np.float32)})
    taken = watch(monkeypatch)

    def found(*names: str) -> Calibration:
        taken.clear()
        return collect(proto, names, open_data({"x": X[:, :, 0, 0]}, models.inputs(proto))).calibration

    every = found("x", "s", "r", "n", "y")
    assert observed(taken) == {"x", "r"}
    for name, source in {"s": "x", "n": "r", "y": "r"}.items():
        assert found(name) == every.of([name])
        assert observed(taken) == {source}
    assert every.statistics["s"].hi == np.float32(0.3) * X[:, :, 0, 0].max()


def test_nothing_wanted_is_nothing_kept(cache: Cache) -> None:
    found = collected([], cache=cache)
    assert found.calibration.statistics.tensors == {}
    assert found.calibration.statistics.samples == COUNT
    assert len(found.held) == observing.HELD
    assert cache.sizes() == {}


def test_no_samples_is_an_error(cache: Cache) -> None:
    with pytest.raises(DataError, match="nothing holds no samples"):
        collected(source=Data("nothing", lambda: iter(())), cache=cache)


def test_a_short_run_has_no_checkpoint(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observing, "_FIRST_SAVE", 1000.0)
    interrupted(9, cache=cache)
    assert cache.sizes() == {}


def test_checkpoints_take_a_small_share_of_the_time(cache: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(observing, "_SAVING_SHARE", 1e-9)  # so the next one is due in years
    kept: list[int] = []
    keep = Entry.keep

    def counted(entry: Entry, statistics: Statistics, **options: Any) -> None:
        kept.append(statistics.samples)
        keep(entry, statistics, **options)

    monkeypatch.setattr(Entry, "keep", counted)
    collected(cache=cache)
    assert len(kept) == 1


# A process that is killed

SLOW = """
import sys, time
from qdqtool import runtime
from qdqtool.observation import observe
from qdqtool.cli.main import main

observe._FIRST_SAVE = 0.0
run = runtime.run

def slow(active, names, feeds):
    time.sleep(0.02)
    return run(active, names, feeds)

runtime.run = slow
main(sys.argv[1:])
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_a_killed_run_goes_on_and_gives_the_same_bytes(tmp_path: Path, own_cache: Path) -> None:
    onnx.save(NETWORK, tmp_path / "net.onnx")
    x = data(200)["x"]
    np.savez(tmp_path / "data.npz", x=x)
    (tmp_path / "slow.py").write_text(SLOW)
    command = [sys.executable, "slow.py", "quantize", "net.onnx", "--data", "data.npz", "--target", "cpu"]
    command += ["--calibrator", "minmax", "--memory", "40kB", "-o", "net.qdq.onnx", "--report", "out"]
    deadline = time.monotonic() + 60
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL) as process:
        while not [*own_cache.glob("*-*.stats")] and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert process.returncode < 0
    assert [*own_cache.glob("*-*.stats")]
    assert not (tmp_path / "net.qdq.onnx").exists()
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    written = (tmp_path / "net.qdq.onnx").read_bytes()
    assert written == content(quantize({"x": x}))
    assert "an interrupted run was resumed" in (tmp_path / "out" / "report.json").read_text()
    assert not [*own_cache.glob("*-*.stats")]

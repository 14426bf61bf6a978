import contextlib
import gc
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdqtool.data import fit
from qdqtool.data.source import open_data
from qdqtool.errors import DataError
from qdqtool.graphs.model import InputInfo

X = InputInfo("x", np.dtype(np.float32), ("N", 3))
KINDS = ("npy", "npz", "compressed")


def ramp(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def save(folder: Path, kind: str, array: np.ndarray) -> Path:
    path = folder / ("a.npy" if kind == "npy" else "a.npz")
    if kind == "npy":
        np.save(path, array)
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(path, x=array)
    return path


# Values are checked at once, a part at a time, and converted as they pass


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [0, 57, 99])
def test_a_value_too_large_is_found_wherever_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, bad: int
) -> None:
    monkeypatch.setattr(fit, "_CHUNK", 100)
    values = ramp(100, 3, dtype=np.float64)
    assert len(open_data(save(tmp_path, kind, values), [X])) == 100
    values[bad, 1] = 1e39
    for source in (save(tmp_path, kind, values), {"x": values}):
        with pytest.raises(DataError, match="some values are too large for float32"):
            open_data(source, [X])


def test_integers_out_of_range_are_told_over_all_samples(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fit, "_CHUNK", 100)
    wanted = InputInfo("x", np.dtype(np.int8), ("N", 3))
    values = ramp(100, 3, dtype=np.int64)
    values[50] = -7
    with pytest.raises(DataError, match="values -7 to 299 do not fit int8"):
        open_data(save(tmp_path, "npy", values), [wanted])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("width", [3, 40_000])
def test_samples_of_any_size_and_order_are_converted_as_they_pass(tmp_path: Path, kind: str, width: int) -> None:
    wanted = InputInfo("x", np.dtype(np.float32), ("N", width))
    for values in (ramp(5, width, dtype=">f8"), np.asfortranarray(ramp(5, width)), ramp(5, 1, width)):
        feeds = list(open_data(save(tmp_path, kind, values), [wanted]))
        assert all(f["x"].dtype == np.float32 and f["x"].shape == (1, width) for f in feeds)
        np.testing.assert_array_equal(np.concatenate([f["x"] for f in feeds]), values.reshape(5, width))


def test_a_feed_keeps_no_more_than_itself_in_memory_and_cannot_be_written(tmp_path: Path) -> None:
    for source in (save(tmp_path, "npz", ramp(1000, 3)), {"x": ramp(1000, 3, dtype=np.float64)}):
        for feeds in open_data(source, [X]):
            assert feeds["x"].base is None
            assert not feeds["x"].flags.writeable


def test_a_single_sample_in_fortran_order(tmp_path: Path) -> None:
    sample = np.asfortranarray(ramp(3, 4, 5))
    np.save(tmp_path / "a.npy", sample)
    (feeds,) = open_data(tmp_path, [InputInfo("x", np.dtype(np.float32), ("N", 3, 4, 5))])
    np.testing.assert_array_equal(feeds["x"], sample[np.newaxis])


# Files are opened for as long as they are needed


def test_a_file_that_becomes_shorter_is_named(tmp_path: Path) -> None:
    path = save(tmp_path, "npy", ramp(20_000, 3))
    data = open_data(path, [X])
    os.truncate(path, 1000)
    with pytest.raises(DataError, match=r"a\.npy became shorter while it was in use"):
        list(data)


def test_a_full_disk_is_not_taken_for_a_bad_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save(tmp_path, "compressed", ramp(4, 3))

    def full(**_: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr("tempfile.TemporaryFile", full)
    with pytest.raises(DataError, match=r"a\.npz cannot be unpacked into .*No space left.*TMPDIR"):
        open_data(path, [X])


@pytest.mark.parametrize("kind", KINDS)
def test_closing_ends_a_pass_and_leaves_its_feeds(tmp_path: Path, kind: str) -> None:
    with open_data(save(tmp_path, kind, ramp(40_000, 3)), [X]) as data:
        passing = iter(data)
        feeds = next(passing)
    with pytest.raises(DataError, match=r"a\.np. was closed"):
        list(passing)
    assert feeds["x"].tolist() == [[0, 1, 2]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.float32, np.int64])
def test_no_file_stays_open(tmp_path: Path, kind: str, dtype: Any) -> None:
    # pytest turns the ResourceWarning of a file that nobody closed into an error.
    path = save(tmp_path, kind, np.asfortranarray(ramp(4, 3, dtype=dtype)))
    for source in (path, tmp_path):
        with contextlib.suppress(DataError):
            next(iter(open_data(source, [X])))
        gc.collect()


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="the system does not list open files")
@pytest.mark.parametrize("kind", ["npy", "npz"])
def test_of_a_folder_one_file_is_open_at_a_time(tmp_path: Path, kind: str) -> None:
    first = save(tmp_path, kind, ramp(2, 3))
    for i in range(9):
        shutil.copy(first, tmp_path / f"{i}{first.suffix}")
    before = len(os.listdir("/proc/self/fd"))
    counts = [len(os.listdir("/proc/self/fd")) for _ in open_data(tmp_path, [X])]
    assert counts == [before + 1] * 20

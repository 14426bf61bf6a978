"""A statistics file gives back what was written, bit for bit; any other file is refused by name."""

from __future__ import annotations

import dataclasses
import io
import json
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import qdqtool
from qdqtool.data.batching import Batching
from qdqtool.errors import StatisticsError
from qdqtool.observation import statistics_file
from qdqtool.observation.calibration import Calibration, ModelKey, Source
from qdqtool.statistics.tensor import Statistics, TensorStatistics

Array = npt.NDArray[np.float32]
BATCHING = Batching(rows=True, size=8, bytes_each=100)
ODD = [0.0, -0.0, 1e-45, -1e-45, 1e-40, 3.4028235e38, -3.4028235e38, np.nan, np.inf, -np.inf, 1.0, -0.1]


def calibration(
    values: dict[str, Array], axes: dict[str, int] | None = None, at: Sequence[int] | None = None
) -> Calibration:
    """Statistics of tensors whose samples, along axis 0, lie at these positions of the data."""
    count = max((len(array) for array in values.values()), default=3)
    keys = [(bytes([index, 1] * 8), position) for index, position in enumerate(at or range(count))]
    tensors = {}
    for name, array in values.items():
        tensors[name] = TensorStatistics((axes or {}).get(name))
        tensors[name].observe(array, keys)
    source = Source("calib.npz (3 samples)", "d" * 64, count)
    return Calibration(ModelKey("a" * 64, "b" * 64), Statistics(tensors, count), (source,), BATCHING, "runtime 1, cpu")


def assert_identical(one: Calibration, other: Calibration) -> None:
    assert one == other
    for name, stats in one.statistics.tensors.items():
        twin = other.statistics[name]
        assert stats.records.tobytes() == twin.records.tobytes()  # with the positions, which equality leaves out
        assert stats.first_non_finite == twin.first_non_finite
        for part in ("lo", "hi", "count"):
            assert getattr(stats.bins, part).tobytes() == getattr(twin.bins, part).tobytes()


def normal(*shape: int) -> Array:
    return np.random.default_rng([7, *shape]).standard_normal(shape).astype(np.float32)


BAD = normal(5, 3)
BAD[1, 2], BAD[3, 0], BAD[3, 1] = np.nan, np.inf, -np.inf
CASES = {
    "several": calibration({"b": normal(6, 4, 4), "a": normal(6, 2)}),
    "channels": calibration({"a": normal(6, 4, 5), "plain": normal(6, 7)}, {"a": 1}),
    "channels that held nothing": calibration({"a": np.full((2, 3, 4), np.nan, np.float32)}, {"a": 1}),
    "NaN and Inf": calibration({"a": BAD, "fine": normal(5, 3)}),
    "odd values": calibration({"a": np.array([ODD, ODD[::-1]], np.float32)}),
    "zeros": calibration({"a": np.zeros((4, 3), np.float32)}),
    "zero-size tensors": calibration({"a": normal(3, 0), "b": normal(3, 2)}),
    "no tensors": calibration({}),
    "any order of samples": calibration({"a": normal(4, 3), "b": normal(4, 2)}, at=[7, 0, 12, 3]),
    "names of all kinds": calibration({"/a/b:0": normal(2, 2), "größe\n": normal(2, 2), "../x": normal(2, 2)}),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_written_is_read(case: str, tmp_path: Path) -> None:
    path = statistics_file.write(CASES[case], tmp_path / "a.stats")
    found = statistics_file.read(path)
    assert_identical(found, CASES[case])
    assert statistics_file.write(found, tmp_path / "b.stats").read_bytes() == path.read_bytes()


@settings(deadline=None)
@given(
    values=st.integers(1, 5).flatmap(
        lambda n: st.dictionaries(
            st.text(max_size=5),
            hnp.arrays(np.float32, st.tuples(st.just(n), st.integers(0, 6)), elements=st.floats(width=32)),
            max_size=3,
        )
    )
)
def test_any_values_are(values: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> None:
    written = calibration(values)
    found = statistics_file.read(statistics_file.write(written, tmp_path_factory.getbasetemp() / "any.stats"))
    assert_identical(found, written)


def test_what_is_read_goes_on_growing_and_merging(tmp_path: Path) -> None:
    rows = normal(6, 4, 3)
    whole = calibration({"a": rows}, {"a": 1})
    first = calibration({"a": rows[:2]}, {"a": 1}, at=[0, 1])
    found = statistics_file.read(statistics_file.write(first, tmp_path / "a.stats")).statistics["a"]
    found.observe(rows[2:], [(bytes([index, 1] * 8), index) for index in range(2, 6)])
    assert found == whole.statistics["a"]
    assert found.bins.total == rows.size


def test_equal_statistics_make_equal_files(tmp_path: Path) -> None:
    one = CASES["several"]
    other = calibration({"a": normal(6, 2), "b": normal(6, 4, 4)})
    assert [*one.statistics.tensors] != [*other.statistics.tensors]
    found = [statistics_file.write(c, tmp_path / name).read_bytes() for c, name in ((one, "a"), (other, "b"))]
    assert found[0] == found[1]


# The format, as documented


def test_the_file_is_json_and_plain_arrays(tmp_path: Path) -> None:
    path = statistics_file.write(CASES["channels"], tmp_path / "a.stats")
    with zipfile.ZipFile(path) as archive:
        header = json.loads(archive.read("header.json"))
        arrays = {
            name: np.load(io.BytesIO(archive.read(name)), allow_pickle=False)
            for name in archive.namelist()
            if name != "header.json"
        }
    assert header["format"] == "qdqtool statistics"
    assert header["version"] == 1
    assert header["made_by"] == f"qdqtool {qdqtool.__version__}"
    assert [tensor["name"] for tensor in header["tensors"]] == ["a", "plain"]
    assert [tensor["axis"] for tensor in header["tensors"]] == [1, None]
    assert arrays["samples.npy"]["position"].tolist() == list(range(6))
    assert arrays["extremes.npy"].shape == (2, 6, 2)
    assert arrays["extremes.npy"][1, :, 1].tolist() == normal(6, 7).max(axis=1).tolist()
    assert arrays["offsets.npy"][-1] == arrays["bins.npy"].size == arrays["counts.npy"].size
    values = np.unique(normal(6, 7).view(np.uint32) >> 13, return_counts=True)
    start, end = arrays["offsets.npy"][1:]
    assert sorted(arrays["bins.npy"][start:end]) == values[0].tolist()
    assert arrays["counts.npy"][start:end].sum() == values[1].sum()
    assert {name.split("/")[1] for name in arrays if name.startswith("channels/")} == {"0"}


# What is no statistics file


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("whole") / "a.stats"
    return statistics_file.write(CASES["channels"], path).read_bytes()


@settings(deadline=None, max_examples=300)
@given(place=st.floats(0, 1, exclude_max=True), flip=st.integers(1, 255))
def test_a_changed_byte_is_found_or_does_no_harm(
    whole: bytes, place: float, flip: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    damaged = bytearray(whole)
    damaged[int(place * len(whole))] ^= flip
    path = tmp_path_factory.getbasetemp() / "damaged.stats"
    path.write_bytes(damaged)
    try:
        found = statistics_file.read(path)
    except StatisticsError:
        return
    assert_identical(found, CASES["channels"])


@settings(deadline=None)
@given(share=st.floats(0, 1, exclude_max=True))
def test_a_truncated_file_is_refused(whole: bytes, share: float, tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "short.stats"
    path.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(StatisticsError, match=r"short\.stats is no readable statistics file .*observe again"):
        statistics_file.read(path)


def rewritten(path: Path, content: bytes, **changes: Any) -> None:
    """The file with another header, and otherwise whole."""
    with zipfile.ZipFile(io.BytesIO(content)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            text = old.read(name)
            new.writestr(name, json.dumps(json.loads(text) | changes) if name == "header.json" else text)


def npz() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, x=np.ones(3))
    return buffer.getvalue()


TENSOR = {"zeros": 0, "nan": 0, "inf": 0, "first_non_finite": None, "axis": 1}
FOREIGN: dict[str, tuple[bytes | dict[str, Any], str]] = {
    "text": (b"ceci n'est pas des statistiques", "is no readable statistics file"),
    "an empty file": (b"", "is no readable statistics file"),
    "arrays": (npz(), "is no statistics file; make one with 'qdqtool observe'"),
    "another format": ({"format": "zip of zips"}, "is no statistics file"),
    "a newer version": ({"version": 2}, "has version 2 of the format, this program reads 1; observe again"),
    "more tensors than arrays": ({"tensors": [TENSOR | {"name": n} for n in "abc"]}, "is no readable statistics file"),
    "channels without arrays": (
        {"tensors": [TENSOR | {"name": n} for n in "ab"]},
        "is no readable statistics file .*saved sums are damaged",
    ),
}


@pytest.mark.parametrize("case", FOREIGN)
def test_another_file_is_refused_by_name(whole: bytes, case: str, tmp_path: Path) -> None:
    path, (made, message) = tmp_path / "x.stats", FOREIGN[case]
    if isinstance(made, bytes):
        path.write_bytes(made)
    else:
        rewritten(path, whole, **made)
    with pytest.raises(StatisticsError, match=rf"x\.stats {message}"):
        statistics_file.read(path)


def test_a_folder_and_nothing_at_all_are_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(StatisticsError, match=rf"{tmp_path.name} is no readable statistics file"):
        statistics_file.read(tmp_path)
    with pytest.raises(StatisticsError, match=r"statistics file .*x\.stats does not exist"):
        statistics_file.read(tmp_path / "x.stats")


def test_nothing_is_unpickled(whole: bytes, tmp_path: Path) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array([print], object), allow_pickle=True)
    path = tmp_path / "evil.stats"
    with zipfile.ZipFile(io.BytesIO(whole)) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            new.writestr(name, buffer.getvalue() if name == "counts.npy" else old.read(name))
    with pytest.raises(StatisticsError, match="allow_pickle=False"):
        statistics_file.read(path)


# Writing


def test_what_cannot_be_written_says_so_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, whole: bytes
) -> None:
    with pytest.raises(StatisticsError, match=r"cannot write .*nowhere.a\.stats"):
        statistics_file.write(CASES["several"], tmp_path / "nowhere" / "a.stats")
    (tmp_path / "folder").mkdir()
    with pytest.raises(StatisticsError, match=r"cannot write .*folder"):
        statistics_file.write(CASES["several"], tmp_path / "folder")
    (tmp_path / "kept.stats").write_bytes(whole)

    def full(self: zipfile.ZipFile, info: zipfile.ZipInfo, content: bytes) -> None:
        if info.filename == "counts.npy":
            raise OSError(28, "No space left on device")
        written(self, info, content)

    written = zipfile.ZipFile.writestr
    monkeypatch.setattr(zipfile.ZipFile, "writestr", full)
    with pytest.raises(StatisticsError, match=r"cannot write .*kept\.stats: .*No space left"):
        statistics_file.write(CASES["several"], tmp_path / "kept.stats")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "kept.stats"]
    assert (tmp_path / "kept.stats").read_bytes() == whole


def test_tensors_of_different_samples_make_no_file(tmp_path: Path) -> None:
    one, other = calibration({"a": normal(3, 2)}), calibration({"b": normal(3, 2)}, at=[3, 4, 5])
    both = dataclasses.replace(one, statistics=one.statistics | other.statistics)
    with pytest.raises(StatisticsError, match="not all observed on the same samples"):
        statistics_file.write(both, tmp_path / "a.stats")
    assert list(tmp_path.iterdir()) == []

import contextlib
import io
import os
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qdqtool.data import arrays
from qdqtool.data.arrays import DiskArray, open_npy, open_npz
from qdqtool.data.source import load_labels, open_data
from qdqtool.errors import DataError
from qdqtool.graphs.model import InputInfo

X = InputInfo("x", np.dtype(np.float32), ("N", 3))
KINDS = ("npy", "npz", "compressed")
Array = np.ndarray


def ramp(*shape: int, dtype: Any = np.float32) -> Array:
    return np.arange(np.prod(shape)).reshape(shape).astype(dtype)


def save(folder: Path, kind: str, array: Array) -> Path:
    path = folder / ("a.npy" if kind == "npy" else "a.npz")
    if kind == "npy":
        np.save(path, array)
    else:
        (np.savez if kind == "npz" else np.savez_compressed)(path, x=array)
    return path


@pytest.fixture
def stack() -> Iterator[contextlib.ExitStack]:
    with contextlib.ExitStack() as opened:
        yield opened


def opened(path: Path, stack: contextlib.ExitStack) -> DiskArray:
    return open_npy(path, stack) if path.suffix == ".npy" else open_npz(path, lambda name: name == "x", stack)["x"]


# The same values as numpy.load


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "array",
    [
        ramp(5, 3),
        ramp(7),
        np.array(2.5),
        np.asfortranarray(ramp(5, 3)),
        np.asfortranarray(ramp(5, 2, 3, 4, dtype=">i2")),
        np.asfortranarray(ramp(1, 6, 2, dtype=np.complex128)),
        ramp(4, 3, dtype=">f8"),
        ramp(4, 2, 3, dtype=np.float16).transpose(1, 2, 0),
        ramp(5, 3) > 4,
        np.zeros((0, 3)),
        np.zeros((4, 0, 3)),
        np.asfortranarray(np.zeros((4, 0, 3))),
        np.array(["a", "Grüße"]),
        np.array(["2020-02-02"], "M8[D]"),
    ],
    ids=lambda array: f"{array.dtype.str}{list(array.shape)}{'F' if array.flags.fnc else ''}",
)
def test_values_are_those_of_numpy(tmp_path: Path, stack: contextlib.ExitStack, kind: str, array: Array) -> None:
    on_disk = opened(save(tmp_path, kind, array), stack)
    assert (on_disk.shape, on_disk.dtype) == (array.shape, array.dtype)
    found = [(on_disk.read(), array)]
    if array.ndim:
        found += [(on_disk[a:b], array[a:b]) for a, b in [(0, 1), (1, 3), (2, 99), (99, 100)]]
        found.append((on_disk.as_row()[0:1], array[np.newaxis]))
    for got, wanted in found:
        assert (got.dtype, got.shape, got.tobytes()) == (wanted.dtype, wanted.shape, wanted.tobytes())
        assert got.flags.c_contiguous
        assert got.flags.aligned


@pytest.mark.parametrize("block", [1, 100, 1000])
@pytest.mark.parametrize("shape", [(5, 2, 3, 4), (40, 3), (3, 40), (1, 30), (30, 1)])
def test_fortran_order_is_rewritten_block_by_block(
    tmp_path: Path, stack: contextlib.ExitStack, monkeypatch: pytest.MonkeyPatch, block: int, shape: tuple[int, ...]
) -> None:
    monkeypatch.setattr(arrays, "_BLOCK", block)
    array = ramp(*shape)
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        header = {"descr": "<f4", "fortran_order": True, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(array.tobytes(order="F"))
    on_disk = opened(path, stack)
    np.testing.assert_array_equal(on_disk.read(), array)
    np.testing.assert_array_equal(on_disk[1:3], array[1:3])


@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_version_of_the_header(tmp_path: Path, stack: contextlib.ExitStack, version: tuple[int, int]) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, ramp(4, 3), version=version)
    np.testing.assert_array_equal(opened(tmp_path / "a.npy", stack).read(), ramp(4, 3))


def test_an_npz_of_many_arrays_with_any_names(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    given = {"x": ramp(4, 3), "größe": ramp(5), "输入": ramp(2, 2), "a/b:0": ramp(1), "labels": ramp(3)}
    np.savez(tmp_path / "a.npz", **given)  # type: ignore[arg-type]  # its stub takes allow_pickle for an array
    found = open_npz(tmp_path / "a.npz", lambda name: name != "labels", stack)
    assert sorted(found) == sorted(given.keys() - {"labels"})
    for name, array in found.items():
        np.testing.assert_array_equal(array.read(), given[name])


def npy_bytes(array: Array) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_archives_as_others_write_them(tmp_path: Path, stack: contextlib.ExitStack, method: int) -> None:
    path = tmp_path / "a.npz"
    path.write_bytes(b"some program that unpacks the rest")
    with zipfile.ZipFile(path, "a", method) as archive:
        archive.comment = b"a comment"
        with archive.open("other.npy", "w", force_zip64=True) as member:
            member.write(npy_bytes(ramp(9)))
        archive.writestr("x.npy", npy_bytes(ramp(4, 3)) + b"more bytes than the header tells")
    np.testing.assert_array_equal(opened(path, stack).read(), ramp(4, 3))


def test_values_are_read_when_they_are_asked_for(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    path = save(tmp_path, "npy", ramp(20_000, 3))
    on_disk = opened(path, stack)
    with path.open("r+b") as file:
        file.seek(-4, os.SEEK_END)
        file.write(np.float32(99).tobytes())
    assert on_disk[19_999:].tolist() == [[59_997, 59_998, 99]]
    assert not np.shares_memory(on_disk[0:1], on_disk[0:1])


def test_threads_may_read_at_the_same_time(tmp_path: Path, stack: contextlib.ExitStack) -> None:
    values = ramp(2000, 3000)
    on_disk = opened(save(tmp_path, "npy", values), stack)

    def read(thread: int) -> bool:
        order = np.random.default_rng(thread).permutation(len(values))
        return all(np.array_equal(on_disk[i : i + 1], values[i : i + 1]) for i in order.tolist())

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(4)))


# What is refused


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.array([[1, None, 2]]), "holds Python objects"),
        (np.zeros((2, 3), [("a", "f4"), ("b", "O")]), "holds Python objects"),
        (np.zeros((2, 3), [("a", "f4"), ("b", "i2")]), "is not converted to float32"),
        (np.zeros((2, 3), "V0"), "is not converted to float32"),
    ],
)
def test_objects_and_records_are_refused(tmp_path: Path, kind: str, array: Array, message: str) -> None:
    with pytest.raises(DataError, match=message):
        open_data(save(tmp_path, kind, array), [X])


def test_records_with_letters_of_any_alphabet_are_refused_like_others(tmp_path: Path) -> None:
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array(file, np.zeros((2, 3), [("größe输", "f4")]), version=(3, 0))
    with pytest.raises(DataError, match="is not converted to float32"):
        open_data(tmp_path / "a.npy", [X])


def header(text: str, version: int = 1) -> bytes:
    length = len(text).to_bytes(2 if version == 1 else 4, "little")
    return np.lib.format.MAGIC_PREFIX + bytes([version, 0]) + length + text.encode()


@pytest.mark.parametrize(
    "content",
    [
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, 3)}") + bytes(99),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3)}", 9) + bytes(99),
        header("{'descr': '|V0', 'fortran_order': True, 'shape': (4, 3)}") + bytes(99),
        header("{'descr': '<f4', 'shape': (4, 3)}") + bytes(99),
        header("{'descr': '<f4', 'fortran_order': False, 'shape': (4, 3)}") + bytes(47),
    ],
)
def test_bad_headers_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.npy").write_bytes(content)
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", content)
    for name in ("a.npy", "a.npz"):
        with pytest.raises(DataError, match=rf"{name} is no readable"):
            open_data(tmp_path / name, [X])


def test_a_directory_that_promises_more_than_there_is(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x.npy", npy_bytes(ramp(4, 3))[:-4])
        archive.getinfo("x.npy").file_size += 4
    with pytest.raises(DataError, match=r"a\.npz is no readable"):
        open_data(tmp_path / "a.npz", [X])


def test_a_member_that_is_no_array_is_named(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "a.npz", "w") as archive:
        archive.writestr("x.npy", npy_bytes(ramp(4, 3)))
        archive.writestr("notes.txt", "some text")
    with pytest.raises(DataError, match=r"a\.npz: 'notes\.txt' in it is no array"):
        open_data(tmp_path / "a.npz", [X])


@pytest.mark.parametrize("kind", ["npz", "compressed"])
def test_damaged_values_do_not_pass_for_data(tmp_path: Path, kind: str) -> None:
    values = np.random.default_rng(0).random((400, 3), np.float32)
    path = save(tmp_path, kind, values)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"a\.npz is no readable"):
        open_data(path, [X])


def test_labels_are_not_read_with_the_data(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", x=ramp(4, 3), labels=np.full(4, 0x51515151))
    path = tmp_path / "a.npz"
    path.write_bytes(path.read_bytes().replace(b"\x51\x51\x51\x51", b"\x51\x51\x51\x52"))
    assert len(open_data(path, [X])) == 4
    with pytest.raises(DataError, match=r"a\.npz is no readable"):
        load_labels(path)

"""Arrays on disk (.npy, .npz), read as they are needed: memory does not grow with the file.

Rows are read into arrays of their own rather than mapped: the pages of a mapping stay in memory once they were looked
at, a member of an .npz begins at any byte while kernels want their operands aligned, and a mapped file that somebody
shortens ends the process. What does not lie in the file row by row, deflated members and Fortran order, is rewritten
once into an anonymous temporary file, in blocks.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import os
import shutil
import struct
import tempfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Final

import numpy as np

from qdqtool.errors import DataError

_CHUNK: Final = 1 << 20  # bytes copied, or summed, at once
_BLOCK: Final = 4 << 20  # bytes transposed at once; the larger, the longer the pieces read and written
_MAGIC: Final = np.lib.format.MAGIC_PREFIX
_VERSIONS: Final = ((1, 0), (2, 0), (3, 0))
_File = io.BufferedReader | io.BufferedRandom


class _Disk:
    """A file that several arrays and threads share: each read says where."""

    def __init__(self, file: _File, path: Path) -> None:
        self.file, self._path = file, path
        self._lock = threading.Lock()

    def read(self, offset: int, size: int) -> np.ndarray:
        """``size`` bytes as a fresh array, aligned as numpy aligns; DataError where the file has become shorter."""
        raw = np.empty(size, np.uint8)
        with self._lock:
            self.file.seek(offset)
            found = self.file.readinto(raw.data)
        if found < size:
            raise DataError(f"{self._path} became shorter while it was in use; leave it as it is during the run")
        return raw


@dataclass(frozen=True)
class DiskArray:
    """An array in an open file: ``shape`` and ``dtype`` at once, values when they are asked for.

    ``array[start:stop]`` reads these rows, and ``read()`` everything, into a fresh C-contiguous array.

    Attributes:
        shape: as of the array that was saved.
        dtype: likewise, with its byte order.
        offset: bytes before the first value.
        axes: the axes in the order in which they lie in the file, the slowest first; the first is always axis 0.
        disk: the file.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    offset: int
    axes: tuple[int, ...]
    disk: _Disk

    def __getitem__(self, rows: slice, /) -> np.ndarray:
        start, stop, step = rows.indices(self.shape[0])
        assert step == 1
        each = math.prod(self.shape[1:]) * self.dtype.itemsize
        return self._read(self.offset + start * each, (max(stop - start, 0), *self.shape[1:]))

    def read(self) -> np.ndarray:
        """The whole array."""
        return self._read(self.offset, self.shape)

    def as_row(self) -> DiskArray:
        """The same array as the only row of one, shape (1, ...)."""
        return replace(self, shape=(1, *self.shape), axes=(0, *(axis + 1 for axis in self.axes)))

    def _read(self, offset: int, shape: tuple[int, ...]) -> np.ndarray:
        raw = self.disk.read(offset, math.prod(shape) * self.dtype.itemsize)
        stored = np.ndarray([shape[axis] for axis in self.axes], self.dtype, buffer=raw.data)
        return np.asarray(stored.transpose(np.argsort(self.axes)), order="C")


def open_npy(path: Path, stack: contextlib.ExitStack) -> DiskArray:
    """The array of an .npy file; ``stack`` closes it.

    Raises:
        DataError: the file is unreadable, damaged as far as its header and size tell, or holds Python objects.
    """
    with _reading(path):
        file = stack.enter_context(path.open("rb"))
        header = _Header.read(file, path)
        offset = file.tell()
        header.check_room(os.fstat(file.fileno()).st_size - offset)
        return _by_rows(header, _Disk(file, path), offset, path, stack)


def open_npz(path: Path, wanted: Callable[[str], bool], stack: contextlib.ExitStack) -> dict[str, DiskArray]:
    """The wanted arrays of an .npz file by name; ``stack`` closes it and the temporary files made for it.

    Every wanted member is read once and its checksum compared, so that damaged values never pass for data. That goes
    at the speed of the disk, above 1 GB/s from the page cache, and the first pass over the samples finds them there.

    Raises:
        DataError: the file is unreadable or damaged, a member is no array or holds Python objects, or the folder for
            temporary files is full.
    """
    with _reading(path):
        file = stack.enter_context(path.open("rb"))
        if file.peek(len(_MAGIC)).startswith(_MAGIC):
            raise DataError(f"{path} holds one array without a name; write it with numpy.savez, or name it .npy")
        disk = _Disk(file, path)
        with zipfile.ZipFile(file) as archive:
            names = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            return {name: _member(archive, info, disk, path, stack) for name, info in names.items() if wanted(name)}


def _member(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, disk: _Disk, path: Path, stack: contextlib.ExitStack
) -> DiskArray:
    with archive.open(info) as stream:
        if not stream.peek(len(_MAGIC)).startswith(_MAGIC):  # type: ignore[attr-defined]  # typeshed knows it as IO
            raise DataError(f"{path}: {info.filename!r} in it is no array; write the file again with numpy.savez")
        header = _Header.read(stream, path)
        start = stream.tell()
        header.check_room(info.file_size - start)
        # zipfile compares the checksum at the end of a member, so both ways read to there.
        if info.compress_type == zipfile.ZIP_STORED:
            while stream.read(_CHUNK):
                pass
            return _by_rows(header, disk, _member_offset(disk.file, info) + start, path, stack)
        unpacked = stack.enter_context(_temporary(path))
        with _writing(path):
            shutil.copyfileobj(stream, unpacked, _CHUNK)
            header.check_room(unpacked.tell())
    return _by_rows(header, _Disk(unpacked, path), 0, path, stack)


def _member_offset(file: _File, info: zipfile.ZipInfo) -> int:
    """Where a member's bytes begin: behind a header of its own, whose length the archive's directory lacks."""
    file.seek(info.header_offset + 26)
    name, extra = struct.unpack("<HH", file.read(4))
    return info.header_offset + 30 + int(name) + int(extra)


@dataclass(frozen=True)
class _Header:
    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype

    @classmethod
    def read(cls, file: IO[bytes], path: Path) -> _Header:
        version = np.lib.format.read_magic(file)
        if version not in _VERSIONS:
            raise ValueError(f"version {version} is not known")
        # Version 3 is version 2 with other letters in the names of a record's fields, and records are never data.
        first = version == (1, 0)
        read = np.lib.format.read_array_header_1_0 if first else np.lib.format.read_array_header_2_0
        header = cls(*read(file))
        if header.dtype.hasobject:
            raise DataError(f"{path} holds Python objects; save plain arrays of numbers")
        if min(header.shape, default=0) < 0:
            raise ValueError("a negative size")
        return header

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def check_room(self, found: int) -> None:
        if found < self.bytes:
            raise ValueError(f"{found} bytes of values, not {self.bytes}")


def _by_rows(header: _Header, disk: _Disk, offset: int, path: Path, stack: contextlib.ExitStack) -> DiskArray:
    """The array at ``offset``; in Fortran order, where axis 0 varies fastest, from a transposed copy."""
    axes = tuple(range(len(header.shape)))
    if not header.fortran or len(axes) < 2:
        return DiskArray(header.shape, header.dtype, offset, axes, disk)
    copy = stack.enter_context(_temporary(path))
    with _writing(path):
        _transpose(header, disk, offset, copy)
    return DiskArray(header.shape, header.dtype, 0, (0, *axes[:0:-1]), _Disk(copy, path))


def _transpose(header: _Header, disk: _Disk, offset: int, copy: _File) -> None:
    """Write a matrix [values of a row, rows] to ``copy`` as [rows, values of a row], in blocks of about equal sides."""
    size, rows = header.dtype.itemsize, header.shape[0]
    values = math.prod(header.shape[1:])
    side = max(1, math.isqrt(_BLOCK // size))
    high = max(side, _BLOCK // (size * max(rows, 1)))
    wide = max(side, _BLOCK // (size * max(values, 1)))
    for value, row in itertools.product(range(0, values, high), range(0, rows, wide)):
        block = np.empty((min(high, values - value), min(wide, rows - row)), header.dtype)
        for i, line in enumerate(block):
            line[:] = disk.read(offset + ((value + i) * rows + row) * size, line.nbytes).view(header.dtype)
        for i, piece in enumerate(np.ascontiguousarray(block.T).view(np.uint8)):
            copy.seek(((row + i) * values + value) * size)
            copy.write(piece.data)


def _temporary(path: Path) -> io.BufferedRandom:
    with _writing(path):
        return tempfile.TemporaryFile(prefix="qdqtool-")


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{path} cannot be unpacked into {tempfile.gettempdir()} ({error}); make room there, or set the "
            "environment variable TMPDIR to another folder"
        ) from error


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except (DataError, MemoryError):
        raise
    except Exception as error:  # numpy, zipfile and the tokenizer of headers raise a dozen unrelated kinds here
        kind = type(error).__name__
        raise DataError(f"{path} is no readable .npz or .npy file ({kind}); write it again with numpy.savez") from error

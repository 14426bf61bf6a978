"""One-shot data kept on disk as they first pass, so that later steps can read them again."""

from __future__ import annotations

import os
import tempfile
import threading
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qdqtool.data.fit import Feeds
from qdqtool.errors import DataError

if TYPE_CHECKING:
    from qdqtool.graphs.model import InputInfo


class Spool:
    """The feeds of a one-shot iterator, kept in an anonymous temporary file as they first pass."""

    def __init__(self, feeds: Iterator[Feeds], inputs: Sequence[InputInfo]) -> None:
        self._feeds = feeds
        self._dtypes = {info.name: info.dtype for info in inputs}
        self._file = tempfile.TemporaryFile(prefix="qdqtool-")  # noqa: SIM115 (closed by the owner's finalizer)
        self.close = self._file.close
        self._starts: list[int] = []
        self._failure = ""
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[Feeds]:
        index = 0
        while (feeds := self._feed(index)) is not None:
            yield feeds
            index += 1

    def _feed(self, index: int) -> Feeds | None:
        with self._lock:
            if index == len(self._starts) and not self._pull():
                return None
            # Read back even on the first pass: a generator may fill the same buffer again for its next feed.
            self._file.seek(self._starts[index])
            return {name: self._read(dtype) for name, dtype in self._dtypes.items()}

    def _read(self, dtype: np.dtype) -> np.ndarray:
        array: np.ndarray = np.lib.format.read_array(self._file, allow_pickle=False)
        return array if dtype == np.object_ else array.view(dtype)

    def _pull(self) -> bool:
        """Append the next feed to the file; False at the end."""
        if self._failure:
            raise DataError(f"the data failed on an earlier pass and cannot be replayed: {self._failure}")
        try:
            feeds = next(self._feeds, None)
            if feeds is not None:
                start = self._file.seek(0, os.SEEK_END)
                for name, dtype in self._dtypes.items():
                    # As bare bytes: .npy has no names for ml_dtypes, and cannot even read back a float8_e5m2.
                    bare = feeds[name] if dtype == np.object_ else feeds[name].view(f"V{feeds[name].itemsize}")
                    np.lib.format.write_array(self._file, bare, allow_pickle=False)
                self._starts.append(start)
        except BaseException as error:
            # A generator that raised is exhausted: the next pass would take what is there for everything.
            self._failure = str(error) or type(error).__name__
            raise
        return feeds is not None

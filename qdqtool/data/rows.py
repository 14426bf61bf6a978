"""Arrays of samples, in memory or on disk -> one feed after another, of the types that the model takes."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import numpy as np

from qdqtool.data.arrays import DiskArray, open_npy, open_npz
from qdqtool.data.fit import Feeds, Rows, as_array, check, convert, is_input, only_input, sample_shapes
from qdqtool.errors import DataError

if TYPE_CHECKING:
    from qdqtool.graphs.model import InputInfo

LABELS: Final = "labels"
"""The key of what a metric compares with; no input, unless the model has one of that name."""

_BLOCK: Final = 1 << 16  # bytes read and converted at once: rows of a few bytes are slow to read one by one


@dataclass(frozen=True)
class Samples:
    """Arrays of ``count`` samples each, as they were given; a sample gets its input's type as it passes."""

    arrays: Mapping[str, Rows]
    inputs: Sequence[InputInfo]
    count: int

    @classmethod
    def of(cls, given: Mapping[str, object], inputs: Sequence[InputInfo], where: str) -> Samples:
        """What fits the inputs; ``where`` is what an error calls the data. Numbers of samples must agree too.

        Raises:
            DataError: with all that is wrong, and what the model wants beside what was given.
        """
        arrays = {
            str(name): value if isinstance(value, DiskArray) else as_array(value, str(name), where)
            for name, value in given.items()
        }
        check(arrays, inputs, where, sample_shapes)
        counts = {info.name: arrays[info.name].shape[0] for info in inputs}
        if len(set(counts.values())) > 1:
            found = ", ".join(f"{name} has {count}" for name, count in counts.items())
            raise DataError(
                f"{where}: the inputs differ in their number of samples, axis 0 ({found}); give equally many, and "
                "where axis 0 is no batch give one rank more, each item a whole feed"
            )
        return cls(arrays, inputs, max(counts.values(), default=0))

    def __iter__(self) -> Iterator[Feeds]:
        each = sum(math.prod(a.shape[1:]) * a.dtype.itemsize for a in self.arrays.values())
        together = max(1, _BLOCK // max(each, 1))
        for start in range(0, self.count, together):
            blocks = {info.name: self._block(info, start, start + together) for info in self.inputs}
            for i in range(min(together, self.count - start)):
                yield {name: feed(i) for name, feed in blocks.items()}

    def _block(self, info: InputInfo, start: int, stop: int) -> Callable[[int], np.ndarray]:
        """The samples of one input from ``start`` to ``stop``, by their position from there."""
        array = self.arrays[info.name]
        block = convert(array[start:stop], info.dtype)
        # A view of the caller's array costs nothing; one of a block read here would keep the whole block in memory.
        lent = len(block) == 1 or (isinstance(array, np.ndarray) and np.may_share_memory(block, array))
        whole = block.ndim > len(info.shape)

        def feed(i: int) -> np.ndarray:
            row = block[i, ...] if whole else block[i : i + 1]
            if not lent:
                row = row.copy()
                row.flags.writeable = False
            return row

        return feed


def open_samples(
    path: Path, inputs: Sequence[InputInfo], stack: contextlib.ExitStack, *, lone: bool = False
) -> Samples:
    """The samples of an .npz or .npy file, readable until ``stack`` closes it.

    ``lone``: an .npy may be one sample without the model's batch axis.
    """
    if path.suffix.lower() == ".npz":
        found = open_npz(path, lambda name: name != LABELS or is_input(name, inputs), stack)
        return Samples.of(found, inputs, str(path))
    info = only_input(inputs, f"{path}: an .npy file")
    array = open_npy(path, stack)
    if lone and len(array.shape) == len(info.shape) - 1 and (info.shape[0] == 1 or not isinstance(info.shape[0], int)):
        array = array.as_row()
    return Samples.of({info.name: array}, inputs, str(path))

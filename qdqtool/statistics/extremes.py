"""The extremes of every tensor in every distinct sample, samples in the order of their hashes.

That order is a random one, but always the same however the data are sorted. Tensors nearly always saw the same samples
in the same order, which is then looked at once; those of a branch that was not taken lack some.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import numpy.typing as npt

from qdqtool.spec import FloatArray, IntArray

if TYPE_CHECKING:
    from qdqtool.statistics.tensor import TensorStatistics

_DIGITS: Final = 12
_SHOWN: Final = 6


@dataclass(frozen=True)
class SampleId:
    """Which sample: its position in the data, from 0, and the first hexadecimal digits of its content's hash."""

    position: int
    digest: str

    @classmethod
    def of(cls, position: int, digest: bytes) -> SampleId:
        """From the position and hash that statistics record."""
        return cls(int(position), digest.hex()[:_DIGITS])

    def __str__(self) -> str:
        return f"sample {self.position} ({self.digest[:_SHOWN]}…)"


@dataclass(frozen=True)
class _Order:
    """One order in which samples came.

    Attributes:
        rows: index of the first record of every distinct sample, samples in the order of their hashes.
        samples, positions: hash and least position of each.
    """

    rows: IntArray
    samples: npt.NDArray[np.bytes_]
    positions: IntArray

    @classmethod
    def of(cls, samples: npt.NDArray[np.bytes_], positions: IntArray) -> _Order:
        order = np.lexsort((positions, samples))
        found, first = np.unique(samples[order], return_index=True)
        rows = order[first]
        return cls(rows, found, positions[rows])


class Extremes:
    """Least and greatest value of each tensor in each distinct sample.

    Attributes:
        count: distinct samples over all tensors.
        repeats: samples whose content had come before.
    """

    def __init__(self, tensors: Mapping[str, TensorStatistics]) -> None:
        self._records = {name: stats.records for name, stats in tensors.items()}
        self._keys = {name: _key(records) for name, records in self._records.items()}
        one_of = {key: self._records[name] for name, key in self._keys.items()}
        orders = {key: _Order.of(records["sample"], records["position"]) for key, records in one_of.items()}
        none = _Order.of(np.empty(0, "S16"), np.empty(0, np.int64))
        every = [none, *orders.values()]
        self._all = _Order.of(np.concatenate([o.samples for o in every]), np.concatenate([o.positions for o in every]))
        places = {key: np.searchsorted(self._all.samples, order.samples) for key, order in orders.items()}
        self._rows = {key: (places[key], order.rows) for key, order in orders.items()}
        self.count = int(self._all.samples.size)
        self.repeats = max((len(one_of[key]) - order.rows.size for key, order in orders.items()), default=0)

    def of(self, tensor: str) -> tuple[FloatArray, FloatArray]:
        """Least and greatest finite value in each sample, float64 (count,); NaN where it has none."""
        lo, hi = np.full((2, self.count), np.nan)
        places, rows = self._rows[self._keys[tensor]]
        for field, values in (
            ("lo", lo),
            ("hi", hi),
        ):  # copied first: to gather from scattered memory takes thrice as long
            values[places] = self._records[tensor][field].copy()[rows]
        return lo, hi

    def sample(self, index: int) -> SampleId:
        """The sample at one place of the arrays that :meth:`of` gives."""
        return SampleId.of(int(self._all.positions[index]), bytes(self._all.samples[index]))


def _key(records: npt.NDArray[Any]) -> int:
    return hash((records["sample"].tobytes(), records["position"].tobytes()))

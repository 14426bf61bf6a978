"""Statistics counted on the GPU, where the runtime leaves what it computed: only what was found comes back.

A tensor that was observed stays on the device and is handed by DLPack to an array library there, CuPy or PyTorch. It is
counted in a table of every bin there is (:mod:`qdqtool.statistics.histogram`), and the extremes of each sample are
taken: the same bits as on the host, as counts are integers and extremes are values that were seen. The code is one for
both libraries, which spell almost everything alike, and runs on the CPU too, where its tests run it. Not yet run on a
GPU.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import numpy as np
import numpy.typing as npt

from qdqtool.data.batching import Batch
from qdqtool.statistics.histogram import MANTISSA_BITS, Histogram
from qdqtool.statistics.tensor import RECORD, TensorStatistics

AT_ONCE: Final = 2
"""Batches at once on a device: one is counted while another runs; a third would only take its memory."""
_SHIFT: Final = 23 - MANTISSA_BITS
_BINS: Final = 1 << (9 + MANTISSA_BITS)
_CHUNK: Final = 1 << 22  # elements counted together; bounds the temporaries on the device


@dataclass(frozen=True)
class Library:
    """An array library that works where the runtime leaves its outputs.

    Attributes:
        device: that place, as the runtime names it. "cpu" runs the same code on a machine without a GPU.
    """

    module: ClassVar[str]
    device: str = "cuda"

    @property
    def xp(self) -> Any:
        """The module, imported where it is first used."""
        return importlib.import_module(self.module)

    def table(self) -> Any:
        """A counter for every bin, all 0, 4 MiB on the device."""
        raise NotImplementedError

    def add(self, table: Any, keys: Any) -> None:
        """Add 1 to a counter for each key; exact in any order, as counters are integers of 64 bits."""
        raise NotImplementedError

    def host(self, values: Any) -> npt.NDArray[Any]:
        """A copy on the host, complete when this returns, and so is all that was begun before it on this thread."""
        raise NotImplementedError

    def free_bytes(self) -> int:
        """Memory of the device that nobody has taken, bytes."""
        raise NotImplementedError

    def why_not(self) -> str | None:
        """Why it cannot be used here, in a few words; None where it has just counted a value on the device."""
        try:
            table = self.table()
            self.add(table, self.table()[:1].view(self.xp.int64))
            return None if int(self.host(table)[0]) == 1 else f"{self.module} counts wrongly"
        except ModuleNotFoundError as error:
            return f"{error.name} is not installed"
        except Exception as error:  # what is wrong with CUDA, each library raises in its own way
            return f"{self.module}: {next(iter(str(error).strip().splitlines()), type(error).__name__)}"


@dataclass(frozen=True)
class CuPy(Library):
    """CuPy, and whatever else follows numpy as closely."""

    module: ClassVar[str] = "cupy"

    def table(self) -> Any:
        """A counter for every bin."""
        return self.xp.zeros(_BINS, dtype=self.xp.uint64)  # atomics take no signed 64-bit integers

    def add(self, table: Any, keys: Any) -> None:
        """Count; not by bincount, which where it uses CUB wants a table for every block of threads."""
        self.xp.add.at(table, keys, 1)

    def host(self, values: Any) -> npt.NDArray[Any]:
        """A copy on the host."""
        found: npt.NDArray[Any] = values.get()
        return found

    def free_bytes(self) -> int:
        """Memory that nobody has taken."""
        return int(self.xp.cuda.runtime.memGetInfo()[0])


@dataclass(frozen=True)
class Torch(Library):
    """PyTorch."""

    module: ClassVar[str] = "torch"

    def table(self) -> Any:
        """A counter for every bin."""
        return self.xp.zeros(_BINS, dtype=self.xp.int64, device=self.device)

    def add(self, table: Any, keys: Any) -> None:
        """Count; not by bincount, which looks for the extremes of its keys and waits for them first."""
        table.index_add_(0, keys, self.xp.ones_like(table[:1]).expand(keys.shape[0]))

    def host(self, values: Any) -> npt.NDArray[Any]:
        """A copy on the host."""
        found: npt.NDArray[Any] = values.cpu().numpy()
        return found

    def free_bytes(self) -> int:
        """Memory that nobody has taken."""
        return int(self.xp.cuda.mem_get_info()[0])


def find(provider: str) -> tuple[Library | None, str | None]:
    """The array library to count with.

    Args:
        provider: execution provider that computes the activations, already known to load.

    Returns:
        The first library that works on the provider's device, None on the CPU or where none does; and in that last case
        one line for the user.
    """
    if provider == "cpu":
        return None, None
    reasons = []
    for library in (CuPy(), Torch()) if _hands_out_memory() else ():
        why = library.why_not()
        if why is None:
            return library, None
        reasons.append(why)
    found = "; ".join(reasons) or "onnxruntime hands over memory of the GPU from 1.26 on"
    return None, (
        f"activations were copied from the GPU and counted on the CPU, which takes longer ({found}); "
        "with qdqtool[cupy], or PyTorch for CUDA, they are counted on the GPU"
    )


def _hands_out_memory() -> bool:
    import onnxruntime

    return hasattr(onnxruntime.OrtValue, "__dlpack__")


class DeviceStatistics:
    """What was seen of one tensor that stays on a device: bit for bit what :class:`TensorStatistics` finds in it."""

    def __init__(self, library: Library) -> None:
        self._library = library
        self._table: Any = None
        self._nan = 0
        self._inf = 0
        self._first: tuple[int, bytes] | None = None
        self._records: list[npt.NDArray[Any]] = [np.empty(0, RECORD)]

    def observe(self, values: Any, batch: Batch) -> None:
        """Add a batch; nothing reads ``values`` any more when this returns.

        Args:
            values: float tensor of any shape on the library's device, complete, handed over by DLPack (an OrtValue).
            batch: what it was computed from; values of repeated samples are not counted.
        """
        xp = self._library.xp
        flat = xp.from_dlpack(values).reshape(-1)
        kept, times = batch.share(flat.shape[0])
        samples = batch.keys
        each = kept * times // len(samples)
        rows = xp.broadcast_to(flat[:kept], (times, kept)).reshape(len(samples), each)
        record = np.empty(len(samples), RECORD)
        record["sample"], record["position"] = [s for s, _ in samples], [p for _, p in samples]
        record["lo"] = record["hi"] = np.nan
        block = max(1, _CHUNK // max(each, 1))
        for start in range(0, len(samples), block) if each else ():
            part = slice(start, start + block)
            record["lo"][part], record["hi"][part] = self._count(rows[part], samples[part])
        self._records.append(record)

    def _count(
        self, rows: Any, samples: Sequence[tuple[bytes, int]]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
        """Count the values of some samples, NaN and Inf in bins of their own; returns each sample's extremes."""
        xp = self._library.xp
        if self._table is None:
            self._table = self._library.table()
        rows = xp.asarray(rows, dtype=xp.float32)
        bits = rows.reshape(-1).view(xp.int32)
        for start in range(0, bits.shape[0], _CHUNK):
            keys = bits[start : start + _CHUNK] >> _SHIFT
            keys &= _BINS - 1  # the shift has copied the sign into what it left free
            self._library.add(self._table, keys)
        # The library works on a stream that the runtime does not know, and the runtime may use the memory of the values
        # again as soon as they are let go: so what waits for the stream, bringing extremes to the host, comes last.
        lo, hi = (self._library.host(extreme(rows, axis=1)) for extreme in (xp.amin, xp.amax))
        for row in np.flatnonzero(~(np.isfinite(lo) & np.isfinite(hi))).tolist():
            lo[row], hi[row] = self._finite_extremes(rows[row], samples[row])
        return lo + np.float32(0), hi + np.float32(0)  # -0.0 becomes 0.0

    def _finite_extremes(self, values: Any, sample: tuple[bytes, int]) -> tuple[float, float]:
        """Least and greatest finite value of a sample with NaN or Inf, which are counted; NaN where it has none."""
        xp = self._library.xp
        finite = values[xp.isfinite(values)]
        nan = int(xp.isnan(values).sum())
        self._nan += nan
        self._inf += values.shape[0] - finite.shape[0] - nan
        found = (sample[1], sample[0])
        self._first = min(self._first or found, found)
        return (float(finite.min()), float(finite.max())) if finite.shape[0] else (np.nan, np.nan)

    def result(self) -> TensorStatistics:
        """What was found, on the host."""
        histogram = Histogram()
        if self._table is not None:
            histogram = Histogram.of_table(self._library.host(self._table).astype(np.int64))
        return TensorStatistics.of(
            histogram, np.concatenate(self._records), nan=self._nan, inf=self._inf, first_non_finite=self._first
        )

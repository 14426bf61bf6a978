"""Samples out of whatever the user feeds, and batches out of samples: their form changes neither speed nor result."""

from __future__ import annotations

import bisect
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from qdqtool.data.fit import Feeds
from qdqtool.graphs.model import InputInfo

MAX_BATCH: Final = 16  # more is hardly faster, and would take more memory for many samples than for few
_BATCH_BYTES: Final = 48 << 20  # observed activations of one batch, where nobody says otherwise
_FEW: Final = 4
_TOGETHER_BYTES: Final = 2 << 30
Runner = Callable[[Feeds], Mapping[str, npt.NDArray[Any]]]


@dataclass(frozen=True)
class Sample:
    """One sample as the model takes it, with the hash of its content (16 bytes) and its position in the data."""

    feeds: Feeds
    digest: bytes
    position: int


@dataclass(frozen=True)
class Batch:
    """Samples that run together; where the model's batch is fixed, the last sample is repeated to fill it.

    Attributes:
        feeds: what the session gets.
        samples: the samples in it.
        rows: rows along the batch axis of ``feeds``, with the repeated ones.
        real_rows: how many of them are no repeats; None: one for each sample.
    """

    feeds: Feeds
    samples: tuple[Sample, ...]
    rows: int
    real_rows: int | None = None

    @property
    def keys(self) -> list[tuple[bytes, int]]:
        """Hash and position of every sample, as statistics record them."""
        return [(s.digest, s.position) for s in self.samples]

    def real(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The part of an output that belongs to the samples, not to repeats; shape (rows, ...) or as it was."""
        count = len(self.samples) if self.real_rows is None else self.real_rows
        if values.size % self.rows:  # nothing in it belongs to one sample: each saw all of it
            return values if self.real_rows is not None else np.broadcast_to(values, (count, *values.shape))
        if self.rows == count:
            return values
        if values.shape[0] == self.rows:
            return values[:count]
        return values.reshape(self.rows, -1)[:count]

    def share(self, size: int) -> tuple[int, int]:
        """What :meth:`real` keeps of ``size`` values in memory order: so many from the first on, and so many times."""
        count = len(self.samples) if self.real_rows is None else self.real_rows
        if size % self.rows:
            return size, count if self.real_rows is None else 1
        return size // self.rows * count, 1


@dataclass(frozen=True)
class Batching:
    """How samples are cut out of feeds and joined.

    Attributes:
        rows: every row along axis 0 of all inputs is a sample; else a feed is one.
        size: samples a batch.
        fixed: the model takes exactly ``size`` samples.
        fill: rows to which a short feed is filled where feeds are taken whole and the model's batch is fixed; 0: not.
        bytes_each: bytes of observed activations a sample, as far as known.
        together_bytes: bytes that a batch may hold where only one activation is kept at a time.
    """

    rows: bool
    size: int
    fixed: bool = False
    fill: int = 0
    bytes_each: int = 0
    together_bytes: int = _TOGETHER_BYTES

    def samples(self, feeds: Iterable[Feeds]) -> Iterator[Sample]:
        """The samples in ``feeds``, in order."""
        position = 0
        for feed in feeds:
            for sample in self._rows(feed) if self.rows else (feed,):
                yield Sample(sample, digest(sample), position)
                position += 1

    def together(self, count: int) -> Batching:
        """Batching for a step that wants ``count`` samples in one batch and keeps one activation at a time."""
        if self.fixed or not self.rows or (self.size == 1 and not self.bytes_each):
            return self
        return replace(self, size=max(self.size, min(count, self.together_bytes // max(self.bytes_each, 1))))

    def settled(self, bytes_each: int) -> Batching:
        """The same cut, in batches whose size follows from the bytes of a sample alone, not from the machine."""
        if self.fixed or not self.bytes_each:  # its size is the model's, or nothing may be joined
            return self
        return Batching(rows=self.rows, size=_size(bytes_each, _BATCH_BYTES), bytes_each=max(bytes_each, 1))

    def alone(self) -> Batching:
        """The same cut with one sample at a time, unless the model prescribes how many."""
        return self if self.fixed else replace(self, size=1, bytes_each=0)

    def small(self) -> Batching:
        """Batching for a step that holds every activation of two models at once."""
        return self if self.fixed else replace(self, size=min(self.size, _FEW))

    @staticmethod
    def _rows(feed: Feeds) -> Iterator[Feeds]:
        for i in range(min(len(array) for array in feed.values())):
            yield {name: array[i : i + 1] for name, array in feed.items()}

    def batches(self, samples: Iterable[Sample]) -> Iterator[Batch]:
        """Samples of one shape joined, ``size`` at a time."""
        waiting: dict[tuple[object, ...], list[Sample]] = {}
        for sample in samples:
            group = waiting.setdefault(_shapes(sample.feeds), [])
            group.append(sample)
            if len(group) == self.size:
                yield self._join(group)
                group.clear()
        for group in waiting.values():
            if group:
                yield self._join(group)

    def _join(self, group: Sequence[Sample]) -> Batch:
        if len(group) == 1 and not self.fixed:
            return self._filled(group[0])
        padded = [*group, *[group[-1]] * (self.size - len(group))] if self.fixed else group
        feeds = {name: np.concatenate([s.feeds[name] for s in padded]) for name in group[0].feeds}
        return Batch(feeds, tuple(group), len(padded))

    def _filled(self, sample: Sample) -> Batch:
        """One whole feed; where the model's batch is fixed and the feed is short, its last row is repeated."""
        rows = min((array.shape[0] for array in sample.feeds.values() if array.ndim), default=1)
        if rows >= self.fill:
            return Batch(sample.feeds, (sample,), 1)
        index = np.minimum(np.arange(self.fill), rows - 1)
        return Batch({name: array[index] for name, array in sample.feeds.items()}, (sample,), self.fill, rows)


def digest(feeds: Feeds) -> bytes:
    """Hash of a feed's content: names, types, shapes and bytes; 16 bytes, never ending in a zero byte."""
    state = hashlib.blake2b(digest_size=15)
    for name in sorted(feeds):
        array = np.asarray(feeds[name], order="C")  # unlike ascontiguousarray it leaves rank 0 alone
        state.update(f"{name}\0{array.dtype.str}\0{array.shape}\0".encode())
        state.update(array.reshape(-1).view(np.uint8).data)
    return state.digest() + b"\1"


class Held:
    """Up to ``count`` samples of least hash among those added: the same ones however the data are ordered.

    Samples with NaN or infinite inputs come last.
    """

    def __init__(self, count: int) -> None:
        self._count = count
        self._kept: list[tuple[bool, bytes, int, Sample]] = []

    def add(self, sample: Sample) -> None:
        """Keep the sample if it is among the least so far."""
        full = len(self._kept) == self._count
        if full and not self._kept[-1][0] and sample.digest > self._kept[-1][1]:
            return  # whatever it holds
        entry = (not _finite(sample), sample.digest, sample.position, sample)
        if not full or entry[:3] < self._kept[-1][:3]:
            bisect.insort(self._kept, entry, key=lambda kept: kept[:3])
            del self._kept[self._count :]

    @property
    def samples(self) -> list[Sample]:
        """Those kept, in the order of their hashes."""
        return [entry[3] for entry in self._kept]


def choose(samples: Iterable[Sample], count: int) -> list[Sample]:
    """The ``count`` samples of least hash, as :class:`Held` keeps them."""
    held = Held(count)
    for sample in samples:
        held.add(sample)
    return held.samples


def _finite(sample: Sample) -> bool:
    return all(bool(np.isfinite(array).all()) for array in sample.feeds.values() if array.dtype.kind == "f")


def _shapes(feeds: Feeds) -> tuple[object, ...]:
    return tuple((name, array.shape) for name, array in feeds.items())


def plan_batching(
    inputs: Sequence[InputInfo], feeds: Iterable[Feeds], run: Runner, batch_bytes: int = _BATCH_BYTES
) -> Batching:
    """Find out how the model can be batched, by a trial on two samples where its inputs leave the first axis free.

    A free first axis need not be a batch (a Softmax over axis 0 mixes samples): samples are joined only if two of them
    give the same outputs joined and apart.

    Args:
        inputs: what the model wants.
        feeds: the data; only its first samples are looked at.
        run: runs the model and gives every output and observed tensor; called from two threads at once.
        batch_bytes: what these may take together for one batch, unless one sample alone has more.
    """
    fixed = _fixed_rows(inputs)
    if fixed:
        first = next(iter(feeds), None)
        rows = first is not None and all(array.shape[0] < fixed for array in first.values())
        return Batching(rows=rows, size=fixed if rows else 1, fixed=rows, fill=0 if rows else fixed)
    if not tried(inputs):
        return Batching(rows=False, size=1)
    pair: dict[tuple[object, ...], Sample] = {}
    for sample in Batching(rows=True, size=1).samples(feeds):
        other = pair.get(_shapes(sample.feeds))
        if other is not None and other.digest != sample.digest:
            return _trial(other, sample, run, batch_bytes)
        pair[_shapes(sample.feeds)] = sample
        if sample.position >= 2 * MAX_BATCH:
            break
    return Batching(rows=True, size=1) if _all_single(feeds) else Batching(rows=False, size=1)


def tried(inputs: Sequence[InputInfo]) -> bool:
    """Whether every input leaves its first axis free, so that a trial must tell whether samples may be joined."""
    return bool(inputs) and not any(isinstance(info.shape[0] if info.shape else 0, int) for info in inputs)


def _fixed_rows(inputs: Sequence[InputInfo]) -> int:
    """The batch that every input of the model prescribes; 0 where there is none."""
    axes = {info.shape[0] if info.shape else 0 for info in inputs}
    fixed = next(iter(axes)) if len(axes) == 1 else None
    return fixed if isinstance(fixed, int) and fixed > 1 else 0


def first_feed(inputs: Sequence[InputInfo], feeds: Iterable[Feeds]) -> Feeds:
    """The data's first feed, filled up where the model's batch is fixed."""
    plan = Batching(rows=False, size=1, fill=_fixed_rows(inputs))
    return next(plan.batches(plan.samples(feeds))).feeds


def _all_single(feeds: Iterable[Feeds]) -> bool:
    first = next(iter(feeds), None)
    return first is not None and all(len(array) == 1 for array in first.values())


def _trial(first: Sample, second: Sample, run: Runner, batch_bytes: int) -> Batching:
    both_feeds = {name: np.concatenate([first.feeds[name], second.feeds[name]]) for name in first.feeds}
    with ThreadPoolExecutor(1, "qdqtool") as pool:
        running = pool.submit(run, both_feeds)
        apart = [run(sample.feeds) for sample in (first, second)]
        joined = running.result()
    for name, both in joined.items():
        for index, alone in enumerate(values[name] for values in apart):
            if both.size != 2 * alone.size or not _agree(both.reshape(2, -1)[index], alone.reshape(-1)):
                return Batching(rows=False, size=1)
    bytes_each = sum(values.nbytes for values in apart[0].values())
    return Batching(rows=True, size=_size(bytes_each, batch_bytes), bytes_each=bytes_each)


def _size(bytes_each: int, batch_bytes: int) -> int:
    """Samples in a batch."""
    return int(min(MAX_BATCH, max(1, batch_bytes // max(bytes_each, 1))))


def _agree(joined: npt.NDArray[Any], alone: npt.NDArray[Any]) -> bool:
    if np.array_equal(joined, alone):  # to the bit, as most runtimes give it
        return True
    if joined.dtype.kind not in "fV":
        return False
    a, b = joined.astype(np.float64), alone.astype(np.float64)
    scale = np.abs(b[np.isfinite(b)]).max(initial=0.0)
    return bool(np.allclose(a, b, rtol=1e-3, atol=1e-4 * scale, equal_nan=True))

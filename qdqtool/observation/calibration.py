"""Statistics with what they belong to: the prepared model, the data, the runtime. What a statistics file holds."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx

from qdqtool.data.batching import Batching
from qdqtool.errors import StatisticsError
from qdqtool.statistics.tensor import Statistics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qdqtool.data.batching import Sample
    from qdqtool.data.fit import Feeds
    from qdqtool.data.source import Data


@dataclass(frozen=True)
class ModelKey:
    """Content of a prepared model, apart from documentation and metadata: SHA-256 of its graph and of its weights."""

    graph: str
    weights: str

    @classmethod
    def of(cls, proto: onnx.ModelProto) -> ModelKey:
        """The key of a model; node and tensor names are part of it, as statistics are by name."""
        bare = onnx.ModelProto()
        bare.opset_import.extend(sorted(proto.opset_import, key=lambda entry: entry.domain))
        bare.functions.extend(proto.functions)
        bare.graph.node.extend(proto.graph.node)
        for node in bare.graph.node:
            node.ClearField("doc_string")
            node.ClearField("metadata_props")
        bare.graph.input.extend(proto.graph.input)
        bare.graph.output.extend(proto.graph.output)
        weights = hashlib.sha256()
        for tensor in sorted(proto.graph.initializer, key=lambda t: t.name):
            weights.update(tensor.SerializeToString(deterministic=True))
        for sparse in sorted(proto.graph.sparse_initializer, key=lambda t: t.values.name):
            weights.update(sparse.SerializeToString(deterministic=True))
        return cls(hashlib.sha256(bare.SerializeToString(deterministic=True)).hexdigest(), weights.hexdigest())


@dataclass(frozen=True)
class Source:
    """Data that statistics come from: in words, a hash of the samples whatever their order, and their number."""

    description: str
    digest: str
    samples: int
    synthetic: bool = False


@dataclass(frozen=True)
class Calibration:
    """Statistics of a prepared model's tensors over calibration data.

    Attributes:
        model: what was observed.
        statistics: of every tensor observed.
        sources: the data, part after part; positions of samples count through all of them.
        batching: how samples were cut out of feeds and joined.
        runtime: what computed the values, as in ``onnxruntime 1.31.1, cpu``.
    """

    model: ModelKey
    statistics: Statistics
    sources: tuple[Source, ...]
    batching: Batching
    runtime: str

    @property
    def synthetic(self) -> bool:
        """Whether any of the data were random."""
        return any(source.synthetic for source in self.sources)

    @property
    def description(self) -> str:
        """The data in words."""
        return " + ".join(source.description for source in self.sources)

    def has(self, tensor: str, axis: int | None = None) -> bool:
        """Whether a tensor was observed, and where an axis is given, each channel along it."""
        stats = self.statistics.tensors.get(tensor)
        return stats is not None and (axis is None or (stats.channels is not None and stats.channels.axis == axis))

    def require(self, model: ModelKey, tensors: Sequence[str], axes: Mapping[str, int], where: str) -> None:
        """Raise StatisticsError, with the reason, unless these are statistics of this model and all these tensors."""
        differing = _differing(self.model, model)
        if differing is not None:
            raise StatisticsError(
                f"{where}: the statistics do not belong to this model: they were observed on {differing}; "
                "run 'qdqtool observe' on this model"
            )
        missing = [name for name in tensors if not self.has(name, axes.get(name))]
        if missing:
            raise StatisticsError(
                f"{where}: no statistics of {_some(missing)}; observe again for the target and the recipe that you "
                "quantize with (qdqtool observe --target, --recipe)"
            )

    def joins(self, other: Calibration) -> bool:
        """Whether samples were cut out of the data alike, so that its statistics can stand beside these."""
        return (self.batching.rows, self.batching.fixed) == (other.batching.rows, other.batching.fixed)

    def with_tensors(self, other: Statistics) -> Calibration:
        """These statistics and those of more tensors on the same samples."""
        tensors = {**self.statistics.tensors, **other.tensors}
        return replace(self, statistics=Statistics(tensors, self.statistics.samples))

    def of(self, tensors: Sequence[str]) -> Calibration:
        """What an observation of these tensors alone, on any machine, gives."""
        found = Statistics({name: self.statistics[name] for name in tensors}, self.statistics.samples)
        values = sum(stats.count + stats.nan + stats.inf for stats in found.tensors.values())
        return replace(self, statistics=found, batching=self.batching.settled(4 * values // max(found.samples, 1)))


def source_of(data: Data, statistics: Statistics, samples: Iterable[Sample]) -> Source:
    """Where statistics come from; ``samples`` are looked at where no tensor was observed that recorded them."""
    records = next((stats.records["sample"].tolist() for stats in statistics.tensors.values()), None)
    digests = sorted(records if records is not None else [sample.digest for sample in samples])
    return Source(data.description, hashlib.sha256(b"".join(digests)).hexdigest(), statistics.samples, data.synthetic)


def digest_of(feeds: Iterable[Feeds]) -> str:
    """Hash of all feeds in their order, hexadecimal."""
    from qdqtool.data.batching import digest

    state = hashlib.sha256()
    for feed in feeds:
        state.update(digest(feed))
    return state.hexdigest()


def merged(parts: Mapping[str, Calibration]) -> Calibration:
    """One calibration out of several on parts of the data.

    Args:
        parts: by a name for messages, in the order of the data: positions of samples count on from part to part.

    Raises:
        StatisticsError: they are of different models, tensors or runtimes, or two of them of the same data.
    """
    (first_name, first), *others = parts.items()
    for (one, part), (other, later) in itertools.combinations(parts.items(), 2):
        if {s.digest for s in part.sources} & {s.digest for s in later.sources}:
            raise StatisticsError(f"{one} and {other} are of the same data, which would count twice; leave one out")
    result, batching = first.statistics, first.batching
    for name, part in others:
        reason = _apart(first, part)
        if reason is not None:
            raise StatisticsError(f"{first_name} and {name} cannot be merged: {reason}")
        result = result | part.statistics.shifted(max(result.positions, default=-1) + 1)
        if part.batching.bytes_each and not batching.bytes_each:  # one sample alone cannot tell that it may be joined
            batching = part.batching
    sources = tuple(source for part in parts.values() for source in part.sources)
    return replace(first, statistics=result, sources=sources, batching=batching).of([*result.tensors])


def _apart(one: Calibration, other: Calibration) -> str | None:
    """Why one run cannot have given both, in words; None where it can."""
    differing = _differing(one.model, other.model)
    if differing is not None:
        return f"the second is of {differing}"
    shapes = [{name: s.channels and s.channels.axis for name, s in c.statistics.tensors.items()} for c in (one, other)]
    if shapes[0] != shapes[1]:
        names = sorted({name for name, _ in shapes[0].items() ^ shapes[1].items()})
        return f"they differ in what was observed ({_some(names)}); observe both for the same targets and recipe"
    if one.runtime != other.runtime:
        return f"the first was made by {one.runtime}, the second by {other.runtime}; use one of them"
    cuts = [(c.batching.rows, c.batching.fixed, c.batching.fill) for c in (one, other)]
    if cuts[0] != cuts[1]:
        return "in one of them a sample is a row of the data, in the other a whole feed; observe all data in one run"
    return None


def _differing(model: ModelKey, wanted: ModelKey) -> str | None:
    """What a model is beside the one wanted, in words; None where it is the same."""
    if model.graph != wanted.graph:
        return "another graph (or its preparation has changed since)"
    return None if model.weights == wanted.weights else "the same graph with other weights, or equalized otherwise"


def _some(names: Sequence[str], most: int = 3) -> str:
    """A few of the names, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more tensors"

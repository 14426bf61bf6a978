"""Statistics with what they belong to: the prepared model, the data, the runtime. What a statistics file holds."""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import onnx

from qdqtool.batching import Batching
from qdqtool.errors import StatisticsError
from qdqtool.statistics import Statistics

if TYPE_CHECKING:
    from collections.abc import Iterable

    from qdqtool.data import Data
    from qdqtool.fit import Feeds


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

    def require(self, model: ModelKey, tensors: Sequence[str], where: str) -> None:
        """Raise StatisticsError, with the reason, unless these are statistics of this model and all these tensors."""
        reason = None
        if self.model.graph != model.graph:
            reason = "they were observed on another graph (or its preparation has changed since)"
        elif self.model.weights != model.weights:
            reason = "they were observed on the same graph with other weights"
        if reason is not None:
            raise StatisticsError(
                f"{where}: the statistics do not belong to this model: {reason}; run 'qdqtool observe' on this model"
            )
        missing = [name for name in tensors if name not in self.statistics.tensors]
        if missing:
            raise StatisticsError(
                f"{where}: no statistics of {_some(missing)}; observe again for the target that you quantize for "
                "(qdqtool observe --target)"
            )

    def with_tensors(self, other: Statistics) -> Calibration:
        """These statistics and those of more tensors on the same samples."""
        tensors = {**self.statistics.tensors, **other.tensors}
        return replace(self, statistics=Statistics(tensors, self.statistics.samples))

    def only(self, tensors: Sequence[str]) -> Statistics:
        """Statistics of these tensors alone."""
        return Statistics({name: self.statistics[name] for name in tensors}, self.statistics.samples)


def source_of(data: Data, statistics: Statistics) -> Source:
    """Where statistics come from."""
    records = next((stats.records for stats in statistics.tensors.values()), None)
    digests = b"" if records is None else b"".join(sorted(records["sample"].tolist()))
    return Source(data.description, hashlib.sha256(digests).hexdigest(), statistics.samples, data.synthetic)


def digest_of(feeds: Iterable[Feeds]) -> str:
    """Hash of all feeds in their order, hexadecimal."""
    from qdqtool.batching import digest

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
    names = [*parts]
    first = parts[names[0]]
    for one, other in itertools.combinations(names, 2):
        twice = {s.digest for s in parts[one].sources} & {s.digest for s in parts[other].sources}
        if twice:
            raise StatisticsError(f"{one} and {other} are of the same data, which would count twice; leave one out")
    result = first.statistics
    for name in names[1:]:
        part = parts[name]
        part.require(first.model, [], name)
        if part.statistics.tensors.keys() != first.statistics.tensors.keys():
            differing = part.statistics.tensors.keys() ^ first.statistics.tensors.keys()
            raise StatisticsError(
                f"{names[0]} and {name} are of different tensors: only one has {_some(sorted(differing))}; "
                "observe both for the same targets"
            )
        if part.runtime != first.runtime:
            raise StatisticsError(f"{names[0]} was made by {first.runtime}, {name} by {part.runtime}; use one of them")
        result = result | part.statistics.shifted(max(result.positions, default=-1) + 1)
    return replace(first, statistics=result, sources=tuple(s for name in names for s in parts[name].sources))


def _some(names: Sequence[str], most: int = 3) -> str:
    """A few of the names, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more tensors"

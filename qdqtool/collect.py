"""Statistics of a prepared model: from the cache as far as they are there, the rest observed and kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from qdqtool import calibration as calibrations
from qdqtool import observe as observing
from qdqtool import runtime
from qdqtool.batching import Held, Sample
from qdqtool.cache import Cache
from qdqtool.calibration import Calibration, ModelKey
from qdqtool.data import Data
from qdqtool.errors import DataError
from qdqtool.observe import HELD, Observing, Progress
from qdqtool.statistics import Statistics


@dataclass(frozen=True)
class Collected:
    """What :func:`collect` gives.

    Attributes:
        calibration: statistics of the tensors asked for.
        held: samples chosen by content, for the steps that need data again.
        notes: what the user should know: sweeps, what came from the cache, where a run was resumed.
    """

    calibration: Calibration
    held: tuple[Sample, ...]
    notes: tuple[str, ...]


def collect(
    proto: onnx.ModelProto,
    tensors: Sequence[str],
    data: Data,
    *,
    axes: Mapping[str, int] | None = None,
    samples: int | None = None,
    provider: str = "cpu",
    options: Observing | None = None,
    cache: Cache | None = None,
    progress: Progress | None = None,
) -> Collected:
    """Statistics of ``tensors`` over the data, observing only what no earlier run has observed.

    Args:
        proto: the prepared float model.
        tensors: names of float tensors.
        data: calibration data.
        axes: tensor -> channel axis, where each channel's statistics are wanted too.
        samples: use only so many samples, chosen by the hash of their content; None: all.
        provider: execution provider, already known to load.
        options: memory and engine.
        cache: where statistics are kept; None: nowhere.
        progress: told after every batch.

    Raises:
        DataError: no sample came.
        ModelError: the runtime cannot run the model on the data.
    """
    axes = axes or {}
    key, made_by = ModelKey.of(proto), runtime.describe(provider)
    entry = known = None
    if cache is not None:
        entry = cache.entry(key, calibrations.digest_of(data), samples, made_by)
        known = entry.load()
    missing = [name for name in tensors if known is None or not _has(known.statistics, name, axes.get(name))]
    notes = []
    if known is not None and not missing:
        held = _held(known, data, samples)
    else:
        found = observing.observe(
            proto,
            missing,
            data,
            axes={name: axis for name, axis in axes.items() if name in missing},
            samples=samples,
            provider=provider,
            options=options,
            progress=progress,
            keeper=entry,
        )
        held = found.held
        if len(found.sweeps.groups) > 1:
            notes.append(found.sweeps.describe())
        if found.resumed:
            notes.append(f"an interrupted run was resumed: {found.resumed} samples had been observed already")
        known = (
            known.with_tensors(found.statistics)
            if known is not None
            else Calibration(key, found.statistics, (), found.batching, made_by)
        )
    if len(missing) < len(tensors):
        notes.append(
            f"statistics of {len(tensors) - len(missing)} tensors were kept from an earlier run (--no-cache observes "
            "them again)"
        )
    known = dataclasses.replace(known, sources=(calibrations.source_of(data, known.statistics),))
    if entry is not None and missing:
        entry.complete(known)
    return Collected(dataclasses.replace(known, statistics=known.only(tensors)), held, tuple(notes))


def _has(statistics: Statistics, tensor: str, axis: int | None) -> bool:
    """Whether a tensor was observed as it is wanted now."""
    stats = statistics.tensors.get(tensor)
    return stats is not None and (axis is None or (stats.channels is not None and stats.channels.axis == axis))


def _held(known: Calibration, data: Data, samples: int | None) -> tuple[Sample, ...]:
    """The samples that observing would have held."""
    held = Held(HELD)
    for sample in observing.chosen(known.batching, data, samples):
        held.add(sample)
    if not held.samples:
        raise DataError(f"{data.description} holds no samples; calibration needs at least one")
    return tuple(held.samples)

"""Statistics of a prepared model: from the cache as far as they are there, the rest observed and kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import onnx

from qdqtool import runtime
from qdqtool.data.batching import Held, Sample
from qdqtool.data.source import Data
from qdqtool.errors import DataError
from qdqtool.observation import calibration as calibrations
from qdqtool.observation import observe as observing
from qdqtool.observation.cache import Cache
from qdqtool.observation.calibration import Calibration, ModelKey
from qdqtool.observation.derive import Derivation, all_derivations, derived
from qdqtool.observation.fence import fences
from qdqtool.observation.observe import HELD, Observing, Progress


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
    follows = all_derivations(proto)
    fenced = fences(proto, _divided(follows, tensors, axes, None)[0], follows)
    entry = known = None
    if cache is not None:
        entry = cache.entry(key, calibrations.digest_of(data), samples, made_by, fenced)
        known = entry.load()
    missing = [name for name in tensors if known is None or not known.has(name, axes.get(name))]
    unseen, steps = _divided(follows, missing, axes, known)
    notes: list[str] = []
    if known is not None and not unseen:
        held = _held(known, data, samples)
    else:
        found = observing.observe(
            proto,
            unseen,
            data,
            axes={name: axis for name, axis in axes.items() if name in unseen},
            samples=samples,
            provider=provider,
            options=options,
            progress=progress,
            keeper=entry,
            fenced=fenced,
        )
        held = found.held
        notes += found.notes
        if found.resumed:
            notes.append(f"an interrupted run was resumed: {found.resumed} samples had been observed already")
        made = Calibration(key, found.statistics, (), found.batching, made_by)
        if known is not None and not known.joins(made):  # these tensors do not let the data be cut as those before
            return collect(
                proto, tensors, data, axes=axes, samples=samples, provider=provider, options=options, progress=progress
            )
        known = made if known is None else known.with_tensors(found.statistics)
    if len(missing) < len(tensors):
        notes.append(
            f"statistics of {len(tensors) - len(missing)} of {len(tensors)} tensors were kept from an earlier run "
            "(--no-cache observes them again)"
        )
    statistics = derived(known.statistics, steps)
    source = calibrations.source_of(data, statistics, observing.chosen(known.batching, data, samples))
    known = dataclasses.replace(known, statistics=statistics, sources=(source,))
    if entry is not None and missing:
        entry.complete(known)
    return Collected(known.of(tensors), held, tuple(notes))


def _divided(
    follows: Mapping[str, Derivation], names: Sequence[str], axes: Mapping[str, int], known: Calibration | None
) -> tuple[list[str], dict[str, Derivation]]:
    """Tensors to observe so that all the named ones become known, and how the others follow from these.

    A tensor that can follow does so whether or not its source is wanted too: bits must not depend on what else is.
    """
    unseen, steps = dict.fromkeys(name for name in names if name in axes), set()
    for wanted in names:
        name = wanted
        while name in follows and (name == wanted or known is None or not known.has(name)):
            steps.add(name)
            name = follows[name].source
        if known is None or not known.has(name, axes.get(name)):
            unseen[name] = None
    return [*unseen], {name: step for name, step in follows.items() if name in steps}


def _held(known: Calibration, data: Data, samples: int | None) -> tuple[Sample, ...]:
    """The samples that observing would have held."""
    held = Held(HELD)
    for sample in observing.chosen(known.batching, data, samples):
        held.add(sample)
    if not held.samples:
        raise DataError(f"{data.description} holds no samples; calibration needs at least one")
    return tuple(held.samples)

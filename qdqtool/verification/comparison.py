"""How near the quantized model is to the float one: SQNR of outputs and tensors, agreement, and the task's score."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from qdqtool import runtime
from qdqtool.data import batching
from qdqtool.data.batching import Sample
from qdqtool.data.fit import Feeds
from qdqtool.data.source import Data, open_data
from qdqtool.errors import DataError, GateError
from qdqtool.graphs import model as models
from qdqtool.graphs.model import ModelSource
from qdqtool.observation import observe
from qdqtool.verification import tensor_error
from qdqtool.verification.kernel_error import KernelError, kernel_errors
from qdqtool.verification.metric import DRAWS, Scores, find_metric, scored
from qdqtool.verification.significance import Difference
from qdqtool.verification.sqnr import Sqnr

Array = npt.NDArray[Any]
_SATURATED: Final = 0.5  # dB that are lost where sums saturate, at least
VERIFIED: Final = 16
"""Calibration samples on which a new model is verified."""


@dataclass(frozen=True)
class Comparison:
    """Float against quantized model on the same samples.

    Attributes:
        samples: how many.
        fused: SQNR in dB of each output, the quantized model run as the runtime optimizes it (integer kernels).
        emulated: the same with graph optimization off: every Q and DQ computed as written, in float.
        wide: fused, with sums that cannot saturate (:data:`qdqtool.runtime.WIDE_SUMS`); measured on processors whose
            16-bit sums may, else empty.
        tensors: SQNR in dB of tensors that both models have by name, emulated.
        local: the same where each layer alone is quantized and reads what the float model computes.
        apart: SQNR in dB of each output as fused, against the same output emulated.
        kernels: which fused kernels are behind that, see :mod:`qdqtool.verification.kernel_error`; None where they
            were not compared.
        agreement: share of samples whose greatest entry of the first output is at the same place; None where that has
            no meaning.
        metric: name of the task's metric, with the score of the float model, of the quantized model as fused and as
            emulated (higher is better).
        difference: of the scores, fused less float; None where no interval can be given.
        provider: execution provider on which all this was measured.
    """

    samples: int
    fused: Mapping[str, float]
    emulated: Mapping[str, float]
    tensors: Mapping[str, float] = field(default_factory=dict)
    agreement: float | None = None
    metric: str | None = None
    float_score: float | None = None
    quantized_score: float | None = None
    provider: str = "cpu"
    difference: Difference | None = None
    local: Mapping[str, float] = field(default_factory=dict)
    wide: Mapping[str, float] = field(default_factory=dict)
    emulated_score: float | None = None
    apart: Mapping[str, float] = field(default_factory=dict)
    kernels: tuple[KernelError, ...] | None = None

    @property
    def worst_db(self) -> float:
        """Least SQNR among the outputs as fused."""
        return min(self.fused.values(), default=math.inf)

    def gate(
        self, *, min_sqnr: float | None = None, max_drop: float | None = None, min_agreement: float | None = None
    ) -> None:
        """Raise GateError with every limit that is broken; see :meth:`broken`."""
        broken = self.broken(min_sqnr=min_sqnr, max_drop=max_drop, min_agreement=min_agreement)
        if broken:
            raise GateError("; ".join(broken))

    def broken(
        self, *, min_sqnr: float | None = None, max_drop: float | None = None, min_agreement: float | None = None
    ) -> list[str]:
        """Every limit that is broken, in words.

        Args:
            min_sqnr: dB, of every output as fused.
            max_drop: of the metric, in its own units.
            min_agreement: share of samples, 0 to 1; an output without a greatest entry agrees on none.
        """
        broken = []
        if min_sqnr is not None and self.worst_db < min_sqnr:
            broken.append(f"an SQNR of {self.worst_db:.1f} dB is below --min-sqnr {min_sqnr:g} dB")
        if max_drop is not None and self.float_score is not None and self.quantized_score is not None:
            drop = self.float_score - self.quantized_score
            if drop > max_drop:
                broken.append(f"{self.metric} loses {drop:.4g}, more than --max-drop {max_drop:g}")
        if min_agreement is not None and (self.agreement or 0.0) < min_agreement:
            broken.append(f"an agreement of {self.agreement or 0.0:.4f} is below --min-agreement {min_agreement:g}")
        return broken

    @property
    def warning(self) -> str | None:
        """That integer sums saturate on this processor, where they do, and what helps."""
        if self.worst_db >= min(self.wide.values(), default=-math.inf) - _SATURATED:
            return None
        return (
            f"this processor has no VNNI, and 16-bit sums of u8 x s8 products saturate in it: {self.worst_db:.1f} dB "
            f"where sums that cannot give {min(self.wide.values()):.1f} dB; open sessions with "
            f"session.x64quantprecision=1, or quantize with reduce_range"
        )


def compare(
    reference: ModelSource,
    quantized: ModelSource,
    data: object,
    *,
    labels: Array | None = None,
    metric: str | None = None,
    tensors: bool = True,
    provider: str = "cpu",
    progress: observe.Progress | None = None,
    draws: int = DRAWS,
) -> Comparison:
    """Run both models over the data.

    Args:
        reference: the float model, path or ModelProto.
        quantized: its quantized form, same inputs and outputs.
        data: evaluation data, in any form that calibration data may have.
        labels: one label a sample, needed by ``metric``.
        metric: "top1", "top5" or "package.module:function"; see :func:`qdqtool.verification.metric.find_metric`.
        tensors: also compare the tensors in between and the fused kernels, on the first samples.
        provider: execution provider, already known to load.
        progress: told after every batch.
        draws: where the metric is one number over all samples, how often it is computed anew on samples drawn with
            replacement, for the interval of the difference; 0: none is given.

    Raises:
        DataError: no samples, labels that do not fit, or a metric that gives neither one number nor one a sample.
        RecipeError: unknown metric.
    """
    reference, quantized = models.load(reference), models.load(quantized)
    data = open_data(data, models.inputs(reference))
    score = None if metric is None else find_metric(metric)
    if score is not None and labels is None:
        raise DataError(f"metric {metric!r} needs labels: an .npz with the inputs by name and the key 'labels'")
    sessions = _sessions(reference, quantized, provider)
    names = runtime.comparable(sessions[0])
    _same_outputs(names, [output.name for output in sessions[1].get_outputs()])

    def run(feeds: Feeds) -> Mapping[str, Array]:
        return dict(zip(names, runtime.run(sessions[0], names, feeds), strict=True))

    plan = batching.plan_batching(models.inputs(reference), data, run)
    seen = _run_all(sessions, names, plan, data, progress)
    if not seen.samples:
        raise DataError(f"{data.description} holds no samples")
    # Samples of one shape ran together; labels come as the data do.
    order = np.argsort([sample.position for sample in seen.samples])
    if score is not None and labels is not None and len(labels) != len(order):
        raise DataError(f"there are {len(labels)} labels for {len(order)} samples; metric {metric!r} needs one each")
    outputs = [_joined(names, kept, plan.rows, order) for kept in seen.outputs]
    scores = Scores() if score is None or labels is None else scored(metric, score, outputs, labels, draws=draws)
    found = Comparison(
        samples=len(seen.samples),
        fused=decibels(seen.sums[0]),
        emulated=decibels(seen.sums[1]),
        wide=decibels(*seen.sums[2:]),
        apart=decibels(seen.apart),
        agreement=_agreement(outputs[:2], names[0]),
        metric=metric,
        float_score=scores.reference,
        quantized_score=scores.fused,
        emulated_score=scores.emulated,
        difference=scores.difference,
        provider=provider,
    )
    first = list(plan.small().batches(seen.samples[:VERIFIED])) if tensors else []
    return _with_tensors(found, reference, quantized, first) if tensors else found


def _with_tensors(
    found: Comparison, reference: onnx.ModelProto, quantized: onnx.ModelProto, batches: Sequence[batching.Batch]
) -> Comparison:
    """The comparison with that of tensors in between and of fused kernels, on a few batches."""
    return replace(
        found,
        tensors=tensor_error.cumulative(reference, quantized, batches, found.provider),
        local=tensor_error.local(reference, quantized, batches, found.provider),
        kernels=kernel_errors(quantized, batches, found.provider),
    )


def _sessions(reference: onnx.ModelProto, quantized: onnx.ModelProto, provider: str) -> list[Any]:
    """Sessions of the float model, of the quantized one fused and emulated, and where sums saturate of one without."""
    return [
        runtime.session(reference, provider=provider),
        runtime.session(quantized, provider=provider),
        runtime.session(quantized, provider=provider, optimize=False),
        *wide_sessions(quantized, provider),
    ]


def wide_sessions(quantized: onnx.ModelProto, provider: str) -> list[Any]:
    """A session whose integer sums cannot saturate, on processors where others may; none elsewhere."""
    saturates = provider == "cpu" and runtime.saturates_u8s8()
    return [runtime.session(quantized, config=runtime.WIDE_SUMS)] if saturates else []


def decibels(*sums: Mapping[str, Sqnr]) -> dict[str, float]:
    """SQNR in dB by output; of no form none."""
    return {name: one.db for form in sums for name, one in form.items()}


@dataclass
class _Seen:
    """What running all models over the data gave.

    Attributes:
        sums: SQNR by output for each form of the quantized model.
        apart: the same of its fused form against its emulated one.
        outputs: of the float model, the fused and the emulated form: outputs by batch.
        samples: in the order they ran.
    """

    sums: list[dict[str, Sqnr]]
    apart: dict[str, Sqnr]
    outputs: tuple[list[list[Array]], ...] = field(default_factory=lambda: ([], [], []))
    samples: list[Sample] = field(default_factory=list)


def _run_all(
    sessions: Sequence[Any],
    names: Sequence[str],
    plan: batching.Batching,
    data: Data,
    progress: observe.Progress | None,
) -> _Seen:
    """Run the float session and those of the quantized model; the first samples keep their feeds to compare tensors."""
    forms = [{name: Sqnr() for name in names} for _ in sessions]
    seen = _Seen(forms[1:], forms[0])
    for batch in plan.batches(plan.samples(data)):
        want, *found = ([batch.real(v) for v in runtime.run(s, names, batch.feeds)] for s in sessions)
        for sums, got in zip(seen.sums, found, strict=True):
            for name, x, y in zip(names, want, got, strict=True):
                sums[name].add(x, y)
        for name, x, y in zip(names, found[1], found[0], strict=True):
            seen.apart[name].add(x, y)
        for kept, values in zip(seen.outputs, (want, *found), strict=False):
            kept.append(values)
        for sample in batch.samples:
            seen.samples.append(sample if len(seen.samples) < VERIFIED else replace(sample, feeds={}))
        if progress is not None:
            progress("compare", len(seen.samples), data.count)
    return seen


def _same_outputs(float_names: Sequence[str], quantized_names: Sequence[str]) -> None:
    missing = [name for name in float_names if name not in quantized_names]
    if missing:
        raise DataError(
            f"the quantized model has no output {missing[0]!r}; it has {', '.join(quantized_names)}. "
            f"Are these two forms of one model?"
        )


def _joined(
    names: Sequence[str], batches: Sequence[Sequence[Array]], rows: bool, order: npt.NDArray[np.intp]
) -> dict[str, Array]:
    """Outputs over all samples, in the data's order along axis 0; those whose shapes differ are left out."""
    found = {}
    for index, name in enumerate(names):
        parts = [np.atleast_1d(batch[index]) for batch in batches]
        if not rows:
            parts = [part if part.ndim and part.shape[0] == 1 else part[None] for part in parts]
        if len({part.shape[1:] for part in parts}) == 1:
            joined = np.concatenate(parts)
            found[name] = joined[order] if len(joined) == len(order) else joined
    return found


def _agreement(outputs: Sequence[Mapping[str, Array]], name: str) -> float | None:
    reference, quantized = (o.get(name) for o in outputs)
    if reference is None or quantized is None or reference.ndim < 2 or reference.dtype.kind != "f":
        return None
    a, b = (values.reshape(len(values), -1) for values in (reference, quantized))
    return float((a.argmax(1) == b.argmax(1)).mean()) if a.shape[1] > 1 else None

"""How near the quantized model is to the float one: SQNR of outputs and tensors, agreement, and the task's score."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

from qdqtool import batching, observe, runtime
from qdqtool import model as models
from qdqtool.batching import Batch, Sample
from qdqtool.data import Data, open_data
from qdqtool.errors import DataError, RecipeError, nearest
from qdqtool.fit import Feeds
from qdqtool.model import ModelSource

Array = npt.NDArray[Any]
Metric = Callable[[Mapping[str, Array], Array], Any]
VERIFIED: Final = 16
"""Calibration samples on which a new model is verified."""


@dataclass
class Sqnr:
    """Signal to quantization noise ratio, summed over batches: 10 log10(sum x^2 / sum (x - x_q)^2) in dB."""

    signal: float = 0.0
    noise: float = 0.0

    def add(self, reference: Array, value: Array) -> None:
        """Add a batch; where the reference is not finite (a mask of -inf) the value must equal it, uncounted."""
        x, y = reference.astype(np.float64), value.astype(np.float64)
        finite = np.isfinite(x)
        if not finite.all():
            same = np.array_equal(x[~finite], y[~finite], equal_nan=True)
            self.noise += 0.0 if same else math.inf
            x, y = x[finite], y[finite]
        self.signal += float(np.vdot(x, x))
        with np.errstate(invalid="ignore"):
            error = x - y
            self.noise += float(np.vdot(error, error)) if np.isfinite(error).all() else math.inf

    @property
    def db(self) -> float:
        """dB; inf where both are equal (an all-zero signal too), -inf where an all-zero signal has noise."""
        if self.noise == 0.0:
            return math.inf
        if self.signal == 0.0 or math.isinf(self.noise):
            return -math.inf
        return 10 * math.log10(self.signal / self.noise)


@dataclass(frozen=True)
class Comparison:
    """Float against quantized model on the same samples.

    Attributes:
        samples: how many.
        fused: SQNR in dB of each output, the quantized model run as the runtime optimizes it (integer kernels).
        emulated: the same with graph optimization off: every Q and DQ computed as written, in float.
        tensors: SQNR in dB of tensors that both models have by name, emulated.
        agreement: share of samples whose greatest entry of the first output is at the same place; None where that has
            no meaning.
        metric: name of the task's metric, with the score of either model (higher is better).
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

    @property
    def worst_db(self) -> float:
        """Least SQNR among the outputs as fused."""
        return min(self.fused.values(), default=math.inf)


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
) -> Comparison:
    """Run both models over the data.

    Args:
        reference: the float model, path or ModelProto.
        quantized: its quantized form, same inputs and outputs.
        data: evaluation data, in any form that calibration data may have.
        labels: one label a sample, needed by ``metric``.
        metric: "top1", "top5" or "package.module:function"; see :func:`find_metric`.
        tensors: also compare the tensors in between, on the first samples.
        provider: execution provider, already known to load.
        progress: told after every batch.

    Raises:
        DataError: no samples, or labels that do not fit.
        RecipeError: unknown metric.
    """
    reference, quantized = models.load(reference), models.load(quantized)
    data = open_data(data, models.inputs(reference))
    score = None if metric is None else find_metric(metric)
    if score is not None and labels is None:
        raise DataError(f"metric {metric!r} needs labels: an .npz with the inputs by name and the key 'labels'")
    sessions = [
        runtime.session(reference, provider=provider),
        runtime.session(quantized, provider=provider),
        runtime.session(quantized, provider=provider, optimize=False),
    ]
    names = [output.name for output in sessions[0].get_outputs()]
    _same_outputs(names, [output.name for output in sessions[1].get_outputs()])

    def run(feeds: Feeds) -> Mapping[str, Array]:
        return dict(zip(names, runtime.run(sessions[0], names, feeds), strict=True))

    plan = batching.plan_batching(models.inputs(reference), data, run)
    seen = _run_all(sessions, names, plan, data, progress)
    if not seen.samples:
        raise DataError(f"{data.description} holds no samples")
    # Samples of one shape ran together; labels come as the data do.
    order = np.argsort([sample.position for sample in seen.samples])
    outputs = [_joined(names, kept, plan.rows, order) for kept in (seen.reference, seen.quantized)]
    scores: list[float | None] = [None, None]
    if score is not None and labels is not None:
        scores = [_score(score, found, labels, len(seen.samples), metric) for found in outputs]
    first = plan.small().batches(seen.samples[:VERIFIED])
    return Comparison(
        samples=len(seen.samples),
        fused={name: s.db for name, s in seen.fused.items()},
        emulated={name: s.db for name, s in seen.emulated.items()},
        tensors=tensor_sqnr(reference, quantized, first, provider) if tensors else {},
        agreement=_agreement(outputs, names[0]),
        metric=metric,
        float_score=scores[0],
        quantized_score=scores[1],
        provider=provider,
    )


@dataclass
class _Seen:
    """What running all models over the data gave: SQNR by output, outputs batch by batch, and the samples."""

    fused: dict[str, Sqnr]
    emulated: dict[str, Sqnr]
    reference: list[list[Array]] = field(default_factory=list)
    quantized: list[list[Array]] = field(default_factory=list)
    samples: list[Sample] = field(default_factory=list)


def _run_all(
    sessions: Sequence[Any],
    names: Sequence[str],
    plan: batching.Batching,
    data: Data,
    progress: observe.Progress | None,
) -> _Seen:
    """Run the float, fused and emulated session; the first samples keep their feeds for comparing tensors."""
    seen = _Seen({name: Sqnr() for name in names}, {name: Sqnr() for name in names})
    for batch in plan.batches(plan.samples(data)):
        want, got, emulated = ([batch.real(v) for v in runtime.run(s, names, batch.feeds)] for s in sessions)
        for name, x, y, z in zip(names, want, got, emulated, strict=True):
            seen.fused[name].add(x, y)
            seen.emulated[name].add(x, z)
        seen.reference.append(want)
        seen.quantized.append(got)
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


def _score(metric: Metric, outputs: Mapping[str, Array], labels: Array, samples: int, name: str | None) -> float:
    if len(labels) != samples:
        raise DataError(f"there are {len(labels)} labels for {samples} samples; metric {name!r} needs one each")
    return float(np.mean(metric(outputs, labels)))


def find_metric(name: str) -> Metric:
    """A metric by name: ``f(outputs by name, labels)`` -> one score a sample or one number, higher is better.

    Raises:
        RecipeError: unknown name, or a function that cannot be imported.
    """
    if name in METRICS:
        return METRICS[name]
    module, _, function = name.partition(":")
    if not function:
        raise RecipeError(
            f"unknown metric {name!r}; known: {', '.join(METRICS)}, or package.module:function.{nearest(name, METRICS)}"
        )
    try:
        found: Metric = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError) as error:
        raise RecipeError(f"metric {name!r} cannot be imported: {error}") from error
    return found


def _top(k: int) -> Metric:
    def metric(outputs: Mapping[str, Array], labels: Array) -> Array:
        scores = next(iter(outputs.values()))
        scores = scores.reshape(len(scores), -1)
        best = (
            np.argpartition(-scores, min(k, scores.shape[1]) - 1, axis=1)[:, :k] if k > 1 else scores.argmax(1)[:, None]
        )
        hits: Array = (best == labels.reshape(-1, 1)).any(axis=1) * 100.0
        return hits

    return metric


METRICS: Final[Mapping[str, Metric]] = {"top1": _top(1), "top5": _top(5)}


def tensor_sqnr(
    reference: onnx.ModelProto, quantized: onnx.ModelProto, batches: Iterable[Batch], provider: str = "cpu"
) -> dict[str, float]:
    """SQNR in dB of every float tensor that both models have by name, as readers in the quantized one see it."""
    pairs = _shared_tensors(reference, quantized)
    if not pairs:
        return {}
    float_session = runtime.session(observe.with_outputs(reference, pairs), provider=provider)
    quantized_session = runtime.session(
        observe.with_outputs(quantized, pairs.values()), provider=provider, optimize=False
    )
    sums = {name: Sqnr() for name in pairs}
    for batch in batches:
        want = runtime.run(float_session, list(pairs), batch.feeds)
        got = runtime.run(quantized_session, list(pairs.values()), batch.feeds)
        for name, x, y in zip(pairs, want, got, strict=True):
            sums[name].add(batch.real(x), batch.real(y))
    return {name: s.db for name, s in sums.items()}


def _shared_tensors(reference: onnx.ModelProto, quantized: onnx.ModelProto) -> dict[str, str]:
    """Name in the float model -> name in the quantized one, for float results of nodes at the top level."""
    made = {name: node for node in quantized.graph.node for name in node.output}
    read_by_q = {node.input[0]: node.output[0] for node in quantized.graph.node if node.op_type == "QuantizeLinear"}
    by_codes = {node.input[0]: node.output[0] for node in quantized.graph.node if node.op_type == "DequantizeLinear"}
    types = {v.name: v.type.tensor_type.elem_type for v in (*reference.graph.value_info, *quantized.graph.value_info)}
    found = {}
    for node in reference.graph.node:
        for name in node.output:
            if name in made and types.get(name) == onnx.TensorProto.FLOAT:
                found[name] = by_codes.get(read_by_q.get(name, ""), name)
    return found

"""Run a quantized model beside its float one: accuracy, the task's score, and latency, for a baseline."""

from __future__ import annotations

import os

import onnx

from qdqtool.data.source import load_labels, open_data
from qdqtool.errors import DataError
from qdqtool.graphs import model as models
from qdqtool.lint.baseline import Measures
from qdqtool.verification import latency
from qdqtool.verification.comparison import compare

SECONDS = 2.0
"""Time to measure latency for, at least 100 runs of each model."""


def measure(
    reference: str | os.PathLike[str],
    quantized: onnx.ModelProto,
    data: str,
    *,
    metric: str | None = None,
    provider: str = "cpu",
    seconds: float = SECONDS,
) -> Measures:
    """Measure a quantized model.

    Args:
        reference: the float model's file.
        quantized: the quantized model.
        data: evaluation data, with labels where there is a metric.
        metric: "top1", "top5" or "package.module:function".
        provider: execution provider, already known to load.
        seconds: time to measure latency for.

    Raises:
        QdqError: data or metric do not fit the model.
    """
    labels = None if metric is None else load_labels(data)
    if metric is not None and labels is None:
        raise DataError(f"metric {metric!r} needs labels: {data} must be an .npz with the key 'labels', one a sample")
    original = models.load(reference)
    inputs = models.inputs(original)
    with open_data(data, inputs) as opened:
        found = compare(original, quantized, opened, labels=labels, metric=metric, tensors=False, provider=provider)
        feeds = latency.batch_of(inputs, opened, 1)
    timed = latency.bench({"float": original, "quantized": quantized}, feeds, provider=provider, seconds=seconds)
    ratio = timed.ratios["quantized"]
    return Measures(
        samples=found.samples,
        provider=provider,
        sqnr_db=dict(found.fused),
        metric=metric,
        score=found.quantized_score,
        latency_ratio=ratio.value,
        latency_interval=(ratio.lo, ratio.hi),
    )

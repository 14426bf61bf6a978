"""The task's metric on either side of divided evaluation data: one half to stop by, the other to report."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx

from qdqtool.data.batching import Batching
from qdqtool.data.fit import Feeds
from qdqtool.data.source import Data
from qdqtool.errors import DataError
from qdqtool.verification.comparison import Comparison, compare


@dataclass(frozen=True)
class Task:
    """Evaluation data with labels, and a metric on them.

    Attributes:
        original: the float model.
        data: the evaluation data.
        batching: how samples are cut out of them.
        labels: one a sample, in the data's order.
        metric: its name.
        sides: for each sample, in the data's order, whether it is for reporting.
        provider: execution provider, already known to load.
    """

    original: onnx.ModelProto
    data: Data
    batching: Batching
    labels: npt.NDArray[Any]
    metric: str
    sides: npt.NDArray[np.bool_]
    provider: str

    @classmethod
    def of(
        cls,
        original: onnx.ModelProto,
        data: Data,
        batching: Batching,
        *,
        labels: npt.NDArray[Any] | None,
        metric: str,
        provider: str,
    ) -> Task:
        """Divide the data by the hash of the samples' content, as :func:`qdqtool.repairs.probes.divide` does.

        Raises:
            DataError: labels are missing, or are not one a sample.
        """
        if labels is None:
            raise DataError(
                f"metric {metric!r} needs labels: an evaluation .npz with the inputs by name and the key 'labels'"
            )
        digests = [sample.digest for sample in batching.samples(data)]
        if len(labels) != len(digests):
            raise DataError(
                f"there are {len(labels)} labels for {len(digests)} samples; metric {metric!r} needs one each"
            )
        reporting = set(sorted(set(digests))[1::2])
        if not reporting:
            raise DataError(f"{data.description}: one sample alone cannot tell choosing from reporting; give more")
        return cls(original, data, batching, labels, metric, np.array([d in reporting for d in digests]), provider)

    def measure(self, proto: onnx.ModelProto, *, reporting: bool) -> Comparison:
        """Compare a quantized model with the float one on one side."""
        wanted = self.sides if reporting else ~self.sides

        def replay() -> Iterator[Feeds]:
            for sample, mine in zip(self.batching.samples(self.data), wanted, strict=True):
                if mine:
                    yield sample.feeds

        part = Data(f"half of {self.data.description}", replay, count=int(wanted.sum()))
        labels = self.labels[wanted]
        return compare(
            self.original, proto, part, labels=labels, metric=self.metric, tensors=False, provider=self.provider
        )

"""What a page shows beside the report: histograms, one row a node, the file's ledger. Collected from a run's state."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx

from qdqtool.passes_api import Callback, Pass, State, Timing
from qdqtool.report.histograms import TensorHistogram, histograms
from qdqtool.report.layers import Layer, layers
from qdqtool.report.ledger import Ledger, ledger
from qdqtool.report.values import Report
from qdqtool.verification import tensor_error
from qdqtool.verification.comparison import VERIFIED


@dataclass(frozen=True)
class PageData:
    """What a page shows beside the report."""

    layers: tuple[Layer, ...]
    histograms: tuple[TensorHistogram, ...]
    ledger: Ledger


class Keeper:
    """A callback of the pass manager that keeps the state, from which a page takes what the report leaves out.

    Args:
        then: another callback, called after it.
    """

    def __init__(self, then: Callback | None = None) -> None:
        self.state: State | None = None
        self._then = then

    def __call__(self, step: Pass, state: State, timing: Timing) -> None:
        """Keep the state."""
        self.state = state
        if self._then is not None:
            self._then(step, state, timing)


def with_tensors(state: State, report: Report, proto: onnx.ModelProto) -> Report:
    """The report with the SQNR of tensors in between, measured on the samples that the model was verified on.

    It stays as it is where none were kept, or where evaluation data told already.
    """
    told = report.evaluation is not None and report.evaluation.tensors
    if report.verification is None or told or not state.held or state.batching is None or state.original is None:
        return report
    batches = list(state.batching.small().batches(state.held[:VERIFIED]))
    provider = report.verification.provider
    found = replace(
        report.verification,
        tensors=tensor_error.cumulative(state.original, proto, batches, provider),
        local=tensor_error.local(state.original, proto, batches, provider),
    )
    return replace(report, verification=found)


def collect(state: State, report: Report, proto: onnx.ModelProto) -> PageData:
    """Gather what a page shows of a finished run."""
    accounts = ledger(proto)
    return PageData(layers(state, report, proto, accounts.layers), histograms(state), accounts)

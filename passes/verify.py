"""Verify the quantized model before it is written: checker, loading, placement, finite outputs, SQNR on samples."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx

from qdqtool import runtime
from qdqtool.errors import GateError, ModelError, RuntimeUnavailableError
from qdqtool.graphs import model as models
from qdqtool.passes_api import Fact, State
from qdqtool.verification import listing, partition, placement
from qdqtool.verification.comparison import VERIFIED, Comparison, decibels, wide_sessions
from qdqtool.verification.sqnr import Sqnr


@dataclass(frozen=True)
class Verify:
    """Check, load and run the quantized model against the float one on held calibration samples."""

    name: ClassVar[str] = "verify"
    needs: ClassVar[frozenset[Fact]] = frozenset({Fact.QDQ})
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset()

    def run(self, state: State) -> int:
        """Set what the state holds of placement and, with samples, ``verified``; returns their number.

        Raises:
            ModelError: the model is invalid, does not load, or gives NaN or Inf where the float model does not.
            GateError: it falls below the recipe's ``min_sqnr``.
        """
        assert state.quantized is not None
        assert state.original is not None
        proto = models.to_proto(state.quantized, state.header)
        try:
            models.check(proto)
            fused = self._place(proto, state)
        except ModelError as error:
            raise ModelError(
                f"the quantized model was not written, because pass {self.name!r} refuses it: {error}"
            ) from error
        if not state.held or state.batching is None:
            return 0
        sessions = (
            runtime.session(state.original, provider=state.provider),
            fused,
            runtime.session(proto, provider=state.provider, optimize=False),
            *wide_sessions(proto, state.provider),
        )
        names = runtime.comparable(sessions[0])
        sums = [{name: Sqnr() for name in names} for _ in sessions[1:]]
        samples = state.held[:VERIFIED]
        for batch in state.batching.batches(samples):
            want, *others = ([batch.real(v) for v in runtime.run(active, names, batch.feeds)] for active in sessions)
            for index, name in enumerate(names):
                for total, got in zip(sums, others, strict=True):
                    if np.isfinite(want[index]).all() and not np.isfinite(got[index]).all():
                        raise ModelError(
                            f"the quantized model was not written: its output {name!r} holds NaN or Inf where the "
                            f"float model's does not (pass {self.name!r}); exclude layers with extreme values, or "
                            f"report this model"
                        )
                    total[name].add(want[index], got[index])
        fused_db, emulated_db, wide_db = decibels(sums[0]), decibels(sums[1]), decibels(*sums[2:])
        state.verified = Comparison(len(samples), fused_db, emulated_db, provider=state.provider, wide=wide_db)
        state.notes += filter(None, [state.verified.warning])
        self._gate(state)
        return len(samples)

    def _place(self, proto: onnx.ModelProto, state: State) -> Any:
        """Load the model, look where everything runs, and return the session."""
        optimized, fused = placement.load(proto, provider=state.provider, config=partition.RECORD)
        state.kernels = placement.operators(optimized)
        if state.provider != "cpu":
            with contextlib.suppress(RuntimeUnavailableError):  # an older runtime does not tell
                state.partition = partition.read(fused, optimized, state.provider)
        where: dict[str, Any] = {"provider": state.provider, "partition": state.partition}
        if state.target.for_cpu and state.plan is not None:
            if state.provider != "cpu":
                optimized, where = placement.load(proto)[0], {}
            state.placement = placement.place(proto, optimized, state.plan, state.target)
        reasons = {skip.node: skip.reason for skip in state.skipped}
        state.listing = listing.listing(proto, optimized, skipped=reasons, **where)
        biases = partition.returning_biases(proto) if partition.on_gpu(state.target) else []
        if biases:
            state.notes.append(partition.bias_note(len(biases)))
        return fused

    def _gate(self, state: State) -> None:
        least = state.recipe.min_sqnr
        assert state.verified is not None
        if least is not None and state.verified.worst_db < least:
            raise GateError(
                f"the quantized model was not written: its SQNR of {state.verified.worst_db:.1f} dB on "
                f"{state.verified.samples} calibration samples is below --min-sqnr {least:g} dB. "
                f"Try another calibrator, or leave sensitive layers in float with --exclude"
            )

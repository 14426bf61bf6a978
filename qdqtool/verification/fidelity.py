"""How near the model as it is quantized so far comes to the float one, for steps that try something out."""

from __future__ import annotations

import math

from qdqtool import runtime
from qdqtool.graphs import model as models
from qdqtool.passes_api import State
from qdqtool.planning.insert import insert
from qdqtool.verification.comparison import VERIFIED
from qdqtool.verification.sqnr import Sqnr


def fidelity(state: State) -> float:
    """SQNR in dB of the outputs on held samples, as the runtime fuses the model; the mean of all outputs.

    Outputs that are equal, or hold no float, count nothing; inf where none is left. Needs plan, parameters and samples.
    """
    assert state.plan is not None
    assert state.params is not None
    assert state.batching is not None
    assert state.original is not None
    quantized = models.to_proto(insert(state.graph, state.plan, state.params), state.header)
    sessions = [runtime.session(proto, provider=state.provider) for proto in (state.original, quantized)]
    names = runtime.comparable(sessions[0])
    sums = [Sqnr() for _ in names]
    for batch in state.batching.batches(state.held[:VERIFIED]):
        want, got = (runtime.run(session, names, batch.feeds) for session in sessions)
        for total, x, y in zip(sums, want, got, strict=True):
            total.add(batch.real(x), batch.real(y))
    found = [total.db for total in sums if math.isfinite(total.db)]
    return sum(found) / len(found) if found else math.inf

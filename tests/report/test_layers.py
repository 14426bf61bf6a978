from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from qdqtool.report.layers import Layer
from qdqtool.verification.placement import is_integer_kernel
from tests.report.runs import EVIL, Again, Run


def by_name(run: Run) -> dict[str, Layer]:
    return {layer.name: layer for layer in run.data.layers if layer.runs != "conversion"}


def test_nodes_come_in_the_order_of_the_graph(finished: Run) -> None:
    names = [layer.name for layer in finished.data.layers if layer.runs != "conversion"]
    assert names == [EVIL, "relu", "second", "sum", "erf", "pool", "flat", "last"]


def test_each_says_where_it_runs_and_why_if_not_in_integers(finished: Run) -> None:
    found = by_name(finished)
    assert found[EVIL].runs == "integer"
    assert found[EVIL].kernel == "QLinearConv"
    assert found["relu"].runs == "gone"
    assert found["erf"].runs == "float"
    assert "Erf" in found["erf"].reason
    kernels = Counter(one.kernel for one in finished.data.layers if is_integer_kernel(one.kernel))
    assert kernels.total() == finished.report.integer_kernels


def test_bits_work_and_bytes(finished: Run) -> None:
    conv = by_name(finished)["second"]
    assert (conv.weight_bits, conv.activation_bits, conv.channel_bits) == (8, 8, ())
    assert conv.macs == 8 * 8 * 8 * 8 * 9
    assert conv.bytes == finished.data.ledger.layers["second"]
    assert by_name(finished)["erf"].weight_bits is None


def test_noise_alone_is_less_than_noise_with_all_before(finished: Run) -> None:
    found = by_name(finished)
    known = [layer for layer in found.values() if layer.local_db is not None and layer.cumulative_db is not None]
    assert len(known) > 3
    assert all(layer.local_db >= layer.cumulative_db - 0.5 for layer in known)  # type: ignore[operator]  # checked above
    emulated = finished.report.verification
    assert emulated is not None
    assert found["last"].cumulative_db == pytest.approx(emulated.emulated["y"])


def test_conversions_that_are_left_stand_where_they_are_in_the_graph(finished: Run) -> None:
    assert finished.report.placement is not None
    left = [layer for layer in finished.data.layers if layer.runs == "conversion"]
    assert left[0].name == "x"
    assert "x" in left[0].reason
    assert sum(len(layer.op.split(", ")) for layer in left) == len(finished.report.placement.conversions)


def test_a_file_for_a_runtime_that_is_not_here_is_planned(again: Again) -> None:
    found = by_name(again(target="tensorrt"))
    assert found["first"].runs == "planned"
    assert found["erf"].runs != "planned"


def test_four_bits(again: Again) -> None:
    found = by_name(again(precision="w4a8"))
    assert found["second"].weight_bits == 4
    assert found["second"].activation_bits == 8
    assert np.isfinite(found["second"].local_db or 0)

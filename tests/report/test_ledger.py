from __future__ import annotations

from pathlib import Path

import pytest

from qdqtool.graphs import model as models
from qdqtool.report.ledger import BIASES, FLOATS, METADATA, NODES, RANGES, SCALES, WEIGHTS, ledger
from tests.report.runs import Again, Run


def test_every_byte_of_the_file_is_accounted_for(finished: Run, tmp_path: Path) -> None:
    found = finished.data.ledger
    written = models.save(finished.proto, tmp_path / "m.onnx")
    assert found.total == written.stat().st_size
    assert sum(found.parts.values()) == found.total
    assert min(found.parts.values()) > 0
    assert {WEIGHTS, SCALES, BIASES, RANGES, NODES, METADATA} <= found.parts.keys()


def test_constants_belong_to_the_layer_that_reads_them(finished: Run) -> None:
    found = finished.data.ledger
    codes = sum(tensor.ByteSize() for tensor in finished.proto.graph.initializer)
    assert sum(found.layers.values()) == codes - found.parts[RANGES]
    assert found.layers["second"] > 8 * 8 * 9
    assert found.layers["second"] > found.layers["last"]


@pytest.mark.parametrize("precision", ["fp16", "w4a16", "w4a8"])
def test_other_precisions_too(again: Again, precision: str) -> None:
    found = ledger(again(precision=precision).proto)
    assert sum(found.parts.values()) == found.total
    assert (FLOATS in found.parts) == (precision in ("fp16", "w4a16"))

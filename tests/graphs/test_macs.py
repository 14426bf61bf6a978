"""Multiply-accumulates of single layers, and the share of them in integers."""

from __future__ import annotations

import numpy as np
import pytest

from qdqtool import pipeline
from qdqtool.graphs import macs
from tests.builders import Array, normal, parse


def counted(body: str, shapes: dict[str, tuple[int, ...]], x: str, y: str, fed: Array | None = None) -> dict[str, int]:
    proto = parse(body, x, y, {name: np.zeros(shape, np.float32) for name, shape in shapes.items()})
    found = macs.count(proto, (), None if fed is None else {"x": fed})
    assert not found.unknown
    return dict(found.layers)


@pytest.mark.parametrize(
    ("body", "shapes", "x", "y", "expected"),
    [
        ("[a] y = MatMul(x, w)", {"w": (8, 5)}, "float[3, 8] x", "float[3, 5] y", 3 * 8 * 5),
        ("[a] y = Gemm <transA = 1> (x, w)", {"w": (8, 5)}, "float[8, 3] x", "float[3, 5] y", 3 * 8 * 5),
        (
            "[a] y = Conv <group = 2, pads = [1, 1, 1, 1]> (x, w)",
            {"w": (6, 2, 3, 3)},
            "float[1, 4, 7, 7] x",
            "float[1, 6, 7, 7] y",
            6 * 7 * 7 * 2 * 9,
        ),
        (
            "[a] y = ConvTranspose <strides = [2, 2]> (x, w)",
            {"w": (4, 6, 2, 2)},
            "float[1, 4, 7, 7] x",
            "float[1, 6, 14, 14] y",
            4 * 7 * 7 * 6 * 4,
        ),
        (
            "[a] y = LSTM <hidden_size = 5> (x, w, r)",
            {"w": (1, 20, 3), "r": (1, 20, 5)},
            "float[7, 2, 3] x",
            "float[7, 1, 2, 5] y",
            7 * 2 * 4 * 5 * (3 + 5),
        ),
        (
            '[a] y = GRU <hidden_size = 5, direction = "bidirectional"> (x, w, r)',
            {"w": (2, 15, 3), "r": (2, 15, 5)},
            "float[7, 2, 3] x",
            "float[7, 2, 2, 5] y",
            2 * 7 * 2 * 3 * 5 * (3 + 5),
        ),
    ],
)
def test_one_layer(body: str, shapes: dict[str, tuple[int, ...]], x: str, y: str, expected: int) -> None:
    assert counted(body, shapes, x, y) == {"a": expected}


def test_a_sample_tells_the_symbolic_dimensions() -> None:
    body = "[t] t = Transpose <perm = [0, 2, 1]> (x) [a] y = MatMul(x, t)"
    shapes: dict[str, tuple[int, ...]] = {}
    assert counted(body, shapes, "float[N, T, 8] x", "float[N, T, T] y") == {"a": 8}
    fed = np.zeros((1, 6, 8), np.float32)
    assert counted(body, shapes, "float[N, T, 8] x", "float[N, T, T] y", fed) == {"a": 6 * 6 * 8}


def test_a_layer_of_unknown_shape_is_named() -> None:
    proto = parse("t = acme.Odd(x) [a] y = MatMul(t, t)", "float[N, 8] x", "float[N, 8] y", {}, domain="acme")
    assert macs.count(proto, ()).unknown == ("a",)


def test_the_report_says_how_much_runs_in_integers() -> None:
    weights = {"w": normal(16, 32), "v": normal(32, 4)}
    body = "[a] t = MatMul(x, w) [s] u = Tanh(t) [b] y = MatMul(u, v)"
    proto = parse(body, "float[N, 16] x", "float[N, 4] y", weights)
    data = {"x": normal(32, 16)}
    for left_out, integer in ([], 16 * 32 + 32 * 4), (["a"], 32 * 4):
        report = pipeline.quantize(proto, data, target="cpu", cache=False, nodes_to_exclude=left_out).report
        assert report.macs is not None
        assert (report.macs.total, report.macs.integer) == (16 * 32 + 32 * 4, integer)
        assert report.to_dict()["macs"]["integer"] == integer

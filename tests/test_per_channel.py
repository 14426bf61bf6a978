"""Activations with a scale for each channel: emulated in float, since no kernel takes them, and said so."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

import qdqtool
from qdqtool.errors import RecipeError, StatisticsError
from qdqtool.registry import make
from qdqtool.spec import FORMATS, QuantSpec, per_channel
from qdqtool.statistics.tensor import TensorStatistics

RNG = np.random.default_rng(3)
SPREAD = np.logspace(-3, 0, 16).astype(np.float32)


def model() -> onnx.ModelProto:
    """A convolution whose channels differ by a factor of 1,000, and one that makes up for it."""
    proto = onnx.parser.parse_model("""<ir_version: 8, opset_import: ["": 17]>
        g (float[N, 3, 12, 12] x) => (float[N, 16, 8, 8] y) {
            a = Conv (x, w1, b1) r = Relu(a) y = Conv <group = 16> (r, w2, b2) }""")
    values = {
        "w1": RNG.standard_normal((16, 3, 3, 3)) * SPREAD[:, None, None, None],
        "b1": RNG.standard_normal(16) * SPREAD,
        "w2": RNG.standard_normal((16, 1, 3, 3)) / SPREAD[:, None, None, None],
        "b2": RNG.standard_normal(16),
    }
    for name, array in values.items():
        proto.graph.initializer.append(numpy_helper.from_array(array.astype(np.float32), name))
    return proto


X = RNG.standard_normal((48, 3, 12, 12)).astype(np.float32)


def quantized(**recipe: Any) -> qdqtool.Result:
    return qdqtool.quantize(model(), {"x": X}, **{"target": "cpu", "calibrator": "minmax", **recipe})


@pytest.mark.parametrize("calibrator", ["minmax", "mse", "aciq", "aciq_laplace", "aciq_gauss"])
@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_a_scale_for_each_channel_keeps_small_channels(calibrator: str, target: str) -> None:
    one = quantized(target=target, per_channel=False)
    each = quantized(calibrator=calibrator, target=target, tensors={"r": {"granularity": "per_channel"}})
    assert one.report.verification is not None
    assert each.report.verification is not None
    assert each.report.verification.worst_db > one.report.verification.worst_db + 10
    assert any("a scale for each channel" in skip.reason for skip in each.report.skipped)
    scales = {t.name: t for t in each.model.graph.initializer}
    nodes = [n for n in each.model.graph.node if n.op_type == "QuantizeLinear" and n.input[0] == "r"]
    assert [list(scales[n.input[1]].dims) for n in nodes] == [[16]]


def test_its_layers_are_not_counted_among_integer_kernels() -> None:
    result = quantized(tensors={"r": {"granularity": "per_channel"}})
    assert len(result.report.layers) == 1


def test_a_calibrator_that_cannot_says_who_can() -> None:
    with pytest.raises(RecipeError, match=r"'entropy' chooses one range for a whole tensor.*minmax, mse, aciq_laplace"):
        quantized(calibrator="entropy", tensors={"r": {"granularity": "per_channel"}})


def observed(values: np.ndarray) -> TensorStatistics:
    stats = TensorStatistics(axis=1)
    stats.observe(values, [(bytes(15) + b"\1", 0)])
    return stats


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("name", ["minmax", "aciq_laplace", "aciq_gauss"])
@pytest.mark.parametrize("kind", ["two-sided", "rectified"])
def test_each_channel_gets_about_what_it_would_get_as_a_tensor(name: str, symmetric: bool, kind: str) -> None:
    values = (np.random.default_rng(0).laplace(size=(1, 5, 4000)) * np.array([[[1], [3], [0.1], [7], [2]]])).astype(
        "f4"
    )
    values = {"two-sided": values, "rectified": np.maximum(values, 0)}[kind]
    calibrator = make("calibrators", name, {})
    found = calibrator.choose(observed(values), QuantSpec(FORMATS["int8"], symmetric, granularity=per_channel(1)))
    for channel in range(5):
        alone = calibrator.choose(observed(values[:, channel : channel + 1]), QuantSpec(FORMATS["int8"], symmetric))
        np.testing.assert_allclose([found.lo[channel], found.hi[channel]], [alone.lo, alone.hi], rtol=0.03, atol=1e-3)


def test_aciq_takes_the_prior_that_fits_each_channel() -> None:
    rng = np.random.default_rng(0)
    values = np.stack([rng.laplace(size=9000), rng.standard_normal(9000)])[None].astype(np.float32)
    spec = QuantSpec(FORMATS["int4"], symmetric=True, granularity=per_channel(1))
    both, laplace, gauss = (make("calibrators", n, {}).choose(observed(values), spec) for n in
                            ("aciq", "aciq_laplace", "aciq_gauss"))  # fmt: skip
    assert both.hi.tolist() == [laplace.hi[0], gauss.hi[1]]


def test_channels_that_are_always_zero_or_unseen_are_no_trouble() -> None:
    values = np.zeros((1, 3, 8), np.float32)
    values[:, 1] = np.nan
    values[:, 2] = -1
    for name in ("minmax", "aciq", "aciq_laplace", "aciq_gauss"):
        found = make("calibrators", name, {}).choose(
            observed(values), QuantSpec(FORMATS["uint8"], symmetric=False, granularity=per_channel(1))
        )
        assert np.isfinite(found.lo).all()
        assert np.isfinite(found.hi).all()
        assert (found.lo <= found.hi).all()


def test_statistics_without_channels_are_refused() -> None:
    stats = TensorStatistics()
    stats.observe(np.ones((1, 4), np.float32), [(b"a", 0)])
    with pytest.raises(StatisticsError, match="only the whole tensor was observed"):
        make("calibrators", "minmax", {}).choose(stats, QuantSpec(FORMATS["int8"], True, granularity=per_channel(1)))

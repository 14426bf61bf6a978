"""Sums of u8 x s8 products in 16 bits saturate on x86 without VNNI: what a file for the CPU gives there."""

from __future__ import annotations

import numpy as np
import pytest

from qdqtool import pipeline, runtime
from qdqtool.verification import comparison
from tests.builders import conv_chain, feeds, normal, parse, run, sqnr

GOOD = 35.0
MODELS = {
    "convolutions": conv_chain(3),
    "products": parse(
        "[a] t = MatMul(x, w) [r] u = Relu(t) [b] y = MatMul(u, v)",
        "float[N, 64] x",
        "float[N, 8] y",
        {"w": normal(64, 64), "v": normal(64, 8)},
    ),
}


@pytest.mark.parametrize("reduced", [False, True])
@pytest.mark.parametrize("model_name", MODELS)
def test_wide_sums_give_what_the_others_give_where_none_saturates(model_name: str, reduced: bool) -> None:
    proto = MODELS[model_name]
    data = feeds(proto)
    model = pipeline.quantize(proto, data, target="cpu", cache=False, reduce_range=reduced).model
    (name,) = [output.name for output in proto.graph.output]
    want = run(proto, data)[name]
    session = runtime.session(model, config=runtime.WIDE_SUMS)
    wide = runtime.run(session, [name], data)[0]
    assert sqnr(want, wide) > GOOD - 3 * reduced
    if not runtime.saturates_u8s8():
        np.testing.assert_array_equal(wide, run(model, data)[name])


def test_a_processor_whose_sums_may_saturate_is_measured_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    proto = MODELS["convolutions"]
    monkeypatch.setattr(runtime, "saturates_u8s8", lambda: True)  # its kernels are those of this processor all the same
    report = pipeline.quantize(proto, feeds(proto), target="cpu", cache=False).report
    assert report.verification is not None
    assert report.verification.wide == pytest.approx(report.verification.fused, abs=1e-3)
    assert report.verification.warning is None


def test_where_sums_saturate_comparing_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    found = comparison.Comparison(4, {"y": 12.0}, {"y": 40.0}, wide={"y": 40.5})
    assert found.warning is not None
    assert "12.0 dB" in found.warning
    assert "40.5 dB" in found.warning
    assert "session.x64quantprecision=1" in found.warning
    assert comparison.Comparison(4, {"y": 40.4}, {"y": 40.0}, wide={"y": 40.5}).warning is None
    assert comparison.Comparison(4, {"y": 12.0}, {"y": 40.0}).warning is None
    proto, data = MODELS["products"], feeds(MODELS["products"])
    model = pipeline.quantize(proto, data, target="cpu", cache=False).model
    assert comparison.compare(proto, model, data).wide == {}
    monkeypatch.setattr(runtime, "saturates_u8s8", lambda: True)
    assert comparison.compare(proto, model, data).wide["y"] > GOOD

"""What --fix mends, that the outputs stay, and what it leaves alone."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from qdqtool.lint import linting, subject
from qdqtool.planning.target import TARGETS
from tests.builders import constants, ops, run, sqnr
from tests.lint.models import checked, model, sample, values

V = values()
AGAIN = {
    "[out_dq] y = DequantizeLinear(rq, rs, rz)": "d = DequantizeLinear(rq, rs, rz) q = QuantizeLinear(d, rs, rz) "
    "e = DequantizeLinear(q, rs, rz) p = QuantizeLinear(e, rs, rz) y = DequantizeLinear(p, rs, rz)"
}


def mended(proto: onnx.ModelProto) -> tuple[onnx.ModelProto, dict[str, int]]:
    found = subject.load(proto)
    done = linting.fix(found, TARGETS["cpu"])
    onnx.checker.check_model(found, full_check=True)
    return found, done


def same(before: onnx.ModelProto, after: onnx.ModelProto) -> None:
    for optimize in (True, False):
        want, got = (run(proto, sample(), optimize=optimize) for proto in (before, after))
        np.testing.assert_array_equal(want["y"], got["y"])


def test_the_intact_model_stays_as_it_is() -> None:
    proto = subject.load(model())
    before = proto.SerializeToString(deterministic=True)
    assert linting.fix(proto, TARGETS["cpu"]) == {}
    assert proto.SerializeToString(deterministic=True) == before


def test_unused_initializers_go() -> None:
    proto = model({"left": np.ones((30, 50), np.float32)})
    after, done = mended(proto)
    assert done == {"QDQ009": 1}
    assert constants(after).keys() == values().keys()
    same(proto, after)
    assert checked(after).findings == ()


def test_what_a_caller_may_override_stays() -> None:
    proto = model({"left": np.ones(3, np.float32)})
    proto.graph.input.append(onnx.helper.make_tensor_value_info("left", onnx.TensorProto.FLOAT, [3]))
    after, done = mended(proto)
    assert done == {}
    (finding,) = checked(after).findings
    assert not finding.fixable


def test_what_a_body_reads_is_used() -> None:
    line = """d = DequantizeLinear(rq, rs, rz)
    y = If (cond) <
        then_branch = a () => (float[N, 8, 6, 6] p) { p = Mul(d, k) },
        else_branch = b () => (float[N, 8, 6, 6] q) { q = Identity(d) }
    >"""
    proto = model({"k": np.ones(1, np.float32)}, {"y = DequantizeLinear(rq, rs, rz)": line})
    proto.graph.input.append(onnx.helper.make_tensor_value_info("cond", onnx.TensorProto.BOOL, []))
    assert mended(proto)[1] == {}


def test_a_row_of_pairs_becomes_one() -> None:
    proto = model(texts=AGAIN)
    after, done = mended(proto)
    assert done == {"QDQ006": 2}
    assert ops(after).count("QuantizeLinear") == 2
    assert ops(after).count("DequantizeLinear") == 4
    same(proto, after)
    assert checked(after).findings == ()


def test_pairs_with_other_parameters_stay() -> None:
    ((old, new),) = AGAIN.items()
    requantized = new.replace("q = QuantizeLinear(d, rs, rz)", "q = QuantizeLinear(d, s, rz)")
    proto = model({"s": np.array(0.03, np.float32)}, {old: requantized})
    after, done = mended(proto)
    assert done == {"QDQ006": 1}  # the last pair, whose parameters are those of the one before it
    assert ops(after).count("QuantizeLinear") == 3
    same(proto, after)


@pytest.mark.parametrize(
    "scale",
    [2 * V["bs"], 0.3 * V["bs"], np.full(8, 2e-5, np.float32)],
    ids=["twice", "a third", "one for all"],
)
def test_a_bias_is_stored_at_the_scale_of_its_sums(scale: np.ndarray) -> None:
    proto = model({"bs": scale.astype(np.float32)})
    after, done = mended(proto)
    assert done == {"QDQ007": 1}
    assert checked(after).findings == ()  # and with that, that the layer runs in integers again
    stored = constants(after)
    np.testing.assert_allclose(stored["bs"], V["bs"], rtol=1e-6)
    np.testing.assert_allclose(stored["bq"] * stored["bs"], V["bq"] * scale, atol=0.51 * V["bs"].max())
    want, got = (run(p, sample(), optimize=False)["y"] for p in (proto, after))
    assert np.abs(want - got).max() <= 1.001 * 0.02  # a step of the output at most
    assert sqnr(want, got) > 40
    assert sqnr(want, run(after, sample())["y"]) > 40


def test_a_bias_with_a_zero_point() -> None:
    proto = model({"bz": np.full(8, 5000, np.int32)})
    after, done = mended(proto)
    assert done == {"QDQ007": 1}
    np.testing.assert_array_equal(constants(after)["bq"], V["bq"] - 5000)
    assert not constants(after)["bz"].any()


def test_a_bias_that_would_not_fit_is_left_alone() -> None:
    proto = model({"bs": 1e6 * V["bs"]})
    assert mended(proto)[1] == {}
    (finding,) = [one for one in checked(proto).findings if one.rule == "QDQ007"]
    assert not finding.fixable


def test_a_bias_whose_scale_is_read_elsewhere_is_left_alone() -> None:
    proto = model({"bs": V["ws"]}, {"(bq, bs, bz)": "(bq, ws, bz)"})
    assert "QDQ007" not in mended(proto)[1]

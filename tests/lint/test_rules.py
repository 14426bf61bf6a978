"""Every rule catches a model that is broken in its way, names the place, and is content with the intact one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool.errors import ModelError, RecipeError
from qdqtool.lint import linting, subject
from qdqtool.lint.findings import Severity
from qdqtool.lint.rules import RULES, chosen
from tests.builders import Array, parse
from tests.lint.models import checked, found, model, values

V = values()
INT32_MAX = 2**31 - 1


def number(value: float, dtype: Any = np.float32) -> Array:
    return np.array(value, dtype)


def test_the_intact_model_is_clean() -> None:
    seen = checked(model())
    assert seen.findings == ()
    assert seen.conversions == 6
    assert seen.target == "cpu"


CASES: list[Any] = [
    pytest.param("QDQ001", {"rs": number(0)}, {}, "out_q", "zero", id="zero scale"),
    pytest.param("QDQ001", {"rs": number(-0.02)}, {}, "out_q", "negative", id="negative scale"),
    pytest.param("QDQ001", {"rs": number(np.inf)}, {}, "out_q", "not finite", id="infinite scale"),
    pytest.param("QDQ001", {"rs": number(1e-40)}, {}, "out_q", "denormal", id="denormal scale"),
    pytest.param(
        "QDQ001", {"ws": np.where(np.arange(8) == 3, 0, V["ws"])}, {}, None, "zero in 1 of 8 places", id="one channel"
    ),
    pytest.param("QDQ002", {"ws": V["ws"][:7], "wz": V["wz"][:7]}, {}, None, "[7]", id="scale length"),
    pytest.param("QDQ002", {"wz": V["wz"][:7]}, {}, None, "zero point has shape [7]", id="zero point length"),
    pytest.param("QDQ002", {}, {"wd = DequantizeLinear <axis = 0>": "wd = DequantizeLinear <axis = 5>"}, None,
                 "none of the tensor's 4 dimensions", id="axis out of range"),
    pytest.param("QDQ003", {}, {"wd = DequantizeLinear <axis = 0>": "wd = DequantizeLinear <axis = 1>"}, "conv",
                 "scales along axis 1", id="weight axis"),
    pytest.param("QDQ004", {"z": number(0, np.int8)}, {"y = DequantizeLinear(rq, rs, rz)":
                 "y = DequantizeLinear(rq, rs, z)"}, "out_dq", "int8 and its codes are uint8", id="zero point type"),
    pytest.param("QDQ005", {"s": number(0.03)}, {"y = DequantizeLinear(rq, rs, rz)":
                 "y = DequantizeLinear(rq, s, rz)"}, "out_dq", "another scale", id="unequal pair"),
    pytest.param("QDQ006", {}, {"[out_dq] y = DequantizeLinear(rq, rs, rz)": "d = DequantizeLinear(rq, rs, rz) "
                 "[again] q = QuantizeLinear(d, rs, rz) y = DequantizeLinear(q, rs, rz)"}, "again",
                 "the same parameters", id="double Q/DQ"),
    pytest.param("QDQ006", {"s": number(0.03)}, {"[out_dq] y = DequantizeLinear(rq, rs, rz)":
                 "d = DequantizeLinear(rq, rs, rz) [again] q = QuantizeLinear(d, s, rz) "
                 "y = DequantizeLinear(q, s, rz)"}, "again", "other parameters", id="requantized"),
    pytest.param("QDQ007", {"bs": 2 * V["bs"]}, {}, "conv", "2 times S_x·S_w", id="bias scale"),
    pytest.param("QDQ007", {"bz": np.full(8, 5, np.int32)}, {}, "conv", "zero point", id="bias zero point"),
    pytest.param("QDQ008", {"bq": np.where(np.arange(8) < 2, INT32_MAX, V["bq"]).astype(np.int32)}, {}, "conv",
                 "2 of 8 codes of its bias are clipped", id="bias clipped"),
    pytest.param("QDQ008", {"bq": V["bq"] + np.int32(INT32_MAX - 20_000)}, {}, "conv", "may sum to", id="bias near"),
    pytest.param("QDQ009", {"left": np.ones((3, 5), np.float32)}, {}, None, "float [3, 5]: 15 values", id="unused"),
    pytest.param("QDQ011", {}, {"[out_q] rq = QuantizeLinear(r, rs, rz)": "",
                 "[out_dq] y = DequantizeLinear(rq, rs, rz)": "y = Neg(r)"}, "conv", "not quantized", id="no output Q"),
    pytest.param("QDQ012", {"rz": number(100, np.uint8)}, {}, "conv", "Relu 'relu' behind it stays", id="Relu stays"),
    pytest.param("QDQ013", {}, {"[out_dq] y = DequantizeLinear(rq, rs, rz)": "d = DequantizeLinear(rq, rs, rz) "
                 "t = Tanh(d) q = QuantizeLinear(t, xs, xz) [idle] e = DequantizeLinear(q, xs, xz) y = Tanh(e)"},
                 "idle", "no integer kernel", id="idle pair"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "changes", "texts", "node", "words"), CASES)
def test_a_broken_model_is_caught(
    rule: str, changes: Mapping[str, Array], texts: Mapping[str, str], node: str | None, words: str
) -> None:
    hits = found(model({name: np.asarray(v) for name, v in changes.items()}, texts))
    assert rule in hits
    shown = [finding for finding in hits[rule] if node is None or finding.node == node]
    assert any(words in finding.message for finding in shown), hits[rule]
    unread = {"QDQ009"} if words == "not quantized" else set()  # the scale that the lines taken out had read
    # What follows: the runtime runs the node in float, or does not load the model.
    assert hits.keys() - {rule} <= {"QDQ012", "QDQ014"} | unread


def test_an_invalid_model_is_reported_and_looked_at_all_the_same() -> None:
    proto = model({"left": np.ones(3, np.float32)})
    node = next(node for node in proto.graph.node if node.name == "relu")
    del node.input[:]
    seen = checked(proto)
    assert {finding.rule for finding in seen.findings} >= {"QDQ000", "QDQ009", "QDQ014"}
    assert any("could not look at this invalid model" in note for note in seen.notes)
    with pytest.raises(ModelError, match="checker refuses"):
        linting.fix(subject.load(proto), None)


def test_every_rule_has_a_broken_model() -> None:
    others = {"QDQ000", "QDQ010", "QDQ014", "QDQ015", "QDQ016", "QDQ101", "QDQ102", "QDQ103", "QDQ104", "QDQ105"}
    assert {case.values[0] for case in CASES} | others == {rule.id for rule in RULES}


@pytest.mark.parametrize(
    ("opset", "changes", "words"),
    [
        (12, {}, "scales for each channel exist from opset 13 on"),
        (20, {"xz": number(0, np.uint16)}, "uint16 codes exist from opset 21 on"),
        (17, {"xs": number(2 / 255, np.float16)}, "scales in float16 exist from opset 19 on"),
    ],
)
def test_types_newer_than_the_opset(opset: int, changes: Mapping[str, Array], words: str) -> None:
    hits = found(model(changes, opset=opset))["QDQ010"]
    assert any(words in finding.message for finding in hits)


def test_a_bias_close_to_the_limit_is_a_warning() -> None:
    (finding,) = found(model({"bq": V["bq"] + np.int32(INT32_MAX - 20_000)}))["QDQ008"]
    assert finding.severity is Severity.WARNING
    assert "QDQ008" not in found(model({"bq": V["bq"] + np.int32(10**9)}))


def test_a_matrix_product_s_bias_behind_its_add() -> None:
    body = """
    xq = QuantizeLinear(x, xs, xz)
    xd = DequantizeLinear(xq, xs, xz)
    wd = DequantizeLinear(wq, ws, wz)
    [mm] m = MatMul(xd, wd)
    bd = DequantizeLinear(bq, bs)
    [add] a = Add(m, bd)
    yq = QuantizeLinear(a, xs, xz)
    y = DequantizeLinear(yq, xs, xz)
    """
    rng = np.random.default_rng(0)
    constants = {
        "xs": number(0.01), "xz": number(128, np.uint8), "ws": number(0.003), "wz": number(0, np.int8),
        "wq": rng.integers(-127, 128, (8, 4)).astype(np.int8),
        "bs": number(0.00003), "bq": np.arange(4, dtype=np.int32),
    }  # fmt: skip
    shapes = ("float[N, 5, 8] x", "float[N, 5, 4] y")
    assert found(parse(body, *shapes, constants)) == {}
    (finding,) = found(parse(body, *shapes, {**constants, "bs": number(0.0003)}))["QDQ007"]
    assert finding.node == "mm"
    assert "10 times S_x·S_w" in finding.message


def test_types_that_a_target_cannot_run() -> None:
    on_tensorrt = found(model(), "tensorrt")
    assert {f.tensor for f in on_tensorrt["QDQ014"]} == {"x", "xq", "bq", "r", "rq"}
    assert all("TensorrtExecutionProvider has no" in f.message for f in on_tensorrt["QDQ014"])
    assert {f.tensor for f in found(model(), "cuda")["QDQ014"]} == {"bq"}  # int32 alone


def test_operators_that_the_runtime_does_not_know() -> None:
    text = {"y = DequantizeLinear(rq, rs, rz)": "d = DequantizeLinear(rq, rs, rz) y = own.Nothing(d)"}
    (finding,) = found(model(texts=text, domain="own"))["QDQ014"]
    assert "Nothing" in finding.message
    assert finding.severity is Severity.ERROR


def test_a_kernel_that_another_provider_may_have() -> None:
    proto = parse("y = Sin(x)", "bfloat16[N, 8] x", "bfloat16[N, 8] y", {}, opset=22)
    (on_cpu,), (on_cuda,) = found(proto)["QDQ014"], found(proto, "cuda")["QDQ014"]
    assert on_cpu.severity is Severity.ERROR
    assert on_cuda.severity is Severity.NOTE


@pytest.mark.parametrize(("target", "severity"), [("tensorrt", Severity.ERROR), ("cuda", Severity.WARNING)])
def test_zero_points_where_the_target_takes_none(target: str, severity: Severity) -> None:
    hits = found(model(), target)["QDQ015"]
    assert {finding.tensor for finding in hits} == {"x", "xq"}
    assert {finding.severity for finding in hits} == {severity}
    assert "QDQ015" not in found(model())


def _joined(op: str, second: float) -> onnx.ModelProto:
    body = f"""
    aq = QuantizeLinear(a, s, z) ad = DequantizeLinear(aq, s, z)
    bq = QuantizeLinear(b, t, z) bd = DequantizeLinear(bq, t, z)
    [join] c = {op} (ad, bd)
    cq = QuantizeLinear(c, s, z) y = DequantizeLinear(cq, s, z)
    """
    constants = {"s": number(0.02), "t": number(second), "z": number(0, np.int8)}
    dims = "[N, 8]" if op == "Add" else "[N, 16]"
    return parse(body, "float[N, 8] a, float[N, 8] b", f"float{dims} y", constants)


@pytest.mark.parametrize("op", ["Add", "Concat <axis = 1>"])
def test_scales_that_must_be_equal(op: str) -> None:
    (finding,) = found(_joined(op, 0.03), "tensorrt")["QDQ016"]
    assert finding.node == "join"
    assert "(0.02, 0.03)" in finding.message
    assert "QDQ016" not in found(_joined(op, 0.02), "tensorrt")
    assert "QDQ016" not in found(_joined(op, 0.03), "cpu")


@pytest.mark.parametrize(("dtype", "clean"), [(np.uint8, True), (np.int8, False)])
def test_what_the_runtime_alone_knows_to_be_float(dtype: Any, clean: bool) -> None:
    body = """
    xq = QuantizeLinear(x, s, z) xd = DequantizeLinear(xq, s, z)
    [add] a = Add(xd, xd)
    aq = QuantizeLinear(a, t, z) ad = DequantizeLinear(aq, t, z)
    [mul] b = Mul(ad, xd)
    bq = QuantizeLinear(b, t, z) y = DequantizeLinear(bq, t, z)
    """
    constants = {"s": number(0.02), "t": number(0.04), "z": number(3, dtype)}
    hits = found(parse(body, "float[N, 8] x", "float[N, 8] y", constants))
    assert (hits == {}) is clean
    if not clean:
        assert {finding.node for finding in hits["QDQ012"]} == {"add", "mul"}
        assert "int8" in hits["QDQ012"][0].message


def test_weights_that_are_folded_at_load() -> None:
    text = {"(xd, wd, bd)": "(x, wd)", "xq = QuantizeLinear(x, xs, xz)": "", "xd = DequantizeLinear(xq, xs, xz)": "",
            "bd = DequantizeLinear <axis = 0> (bq, bs, bz)": ""}  # fmt: skip
    hits = found(model(texts=text))["QDQ013"]
    assert {finding.severity for finding in hits} == {Severity.WARNING, Severity.NOTE}
    (note,) = [finding for finding in hits if finding.severity is Severity.NOTE]
    assert note.tensor == "wq"


@pytest.mark.parametrize(("block", "clean"), [(32, True), (24, False), (512, False)])
def test_blocks_that_the_target_fuses(block: int, clean: bool) -> None:
    rows = 3072
    body = f"wd = DequantizeLinear <axis = 0, block_size = {block}> (wq, ws) y = MatMul(x, wd)"
    codes = onnx.helper.make_tensor("wq", onnx.TensorProto.INT4, [rows, 16], bytes(rows * 8), raw=True)
    scales = np.ones((rows // block, 16), np.float32)
    proto = parse(body, f"float[N, {rows}] x", "float[N, 16] y", {"ws": scales}, opset=21)
    proto.graph.initializer.append(codes)
    assert (found(proto, "cpu") == {}) is clean


def test_without_a_target_the_rest_is_checked_and_said() -> None:
    seen = checked(model({"rs": number(0), "rz": number(100, np.uint8)}), None)
    assert {finding.rule for finding in seen.findings} == {"QDQ001"}
    assert "QDQ012" in seen.notes[0]


def test_bodies_are_checked_too() -> None:
    body = """
    t = QuantizeLinear(x, s, z) u = DequantizeLinear(t, s, z)
    [if] y = If (c) <
        then_branch = a () => (float[N, 8] p) { [inner] v = QuantizeLinear(u, s, z) p = DequantizeLinear(v, s, z) },
        else_branch = b () => (float[N, 8] q) { q = Identity(u) }
    >
    """
    constants = {"s": number(0.1), "z": number(0, np.uint8)}
    proto = parse(body, "float[N, 8] x, bool c", "float[N, 8] y", constants)
    (finding,) = found(proto)["QDQ006"]
    assert finding.node == "inner"


def test_constants_in_nodes_are_constants() -> None:
    proto = model()
    for index in reversed(range(len(proto.graph.initializer))):
        value = proto.graph.initializer[index]
        proto.graph.node.insert(0, onnx.helper.make_node("Constant", [], [value.name], value=value))
        del proto.graph.initializer[index]
    assert found(proto) == {}


def test_rules_are_chosen_by_id_or_name() -> None:
    assert [rule.id for rule in chosen(["QDQ009", "bias-scale"])] == ["QDQ007", "QDQ009"]
    assert {rule.id for rule in RULES} - {rule.id for rule in chosen(ignore=["qdq001"])} == {"QDQ001"}
    with pytest.raises(RecipeError, match=r"no rule 'bias-scal'.*Did you mean 'bias-scale'"):
        chosen(["bias-scal"])


def test_ids_and_names_are_unique() -> None:
    assert len({rule.id for rule in RULES}) == len({rule.name for rule in RULES}) == len(RULES)

"""Control flow: bodies of If, Loop and Scan are quantized as any graph, and compared with the float model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool.errors import RecipeError
from qdqtool.graphs.scopes import bodies
from qdqtool.pipeline import Result, quantize
from tests.builders import Array, Arrays, normal, parse, run, weight

CONSTANTS: dict[str, Array] = {
    "w": weight(8, 3, 3, 3),
    "v": weight(8, 8, 3, 3, seed=1),
    "u": weight(8, 8, 3, 3, seed=2),
    "b": normal(8, scale=0.1),
}
CONV = "<pads = [1, 1, 1, 1]>"
TWO_BRANCHES = f"""
    a = Conv {CONV} (x, w, b)
    r = Relu(a)
    y = If (flag) <
        then_branch = then () => (float[N, 8, H, W] t) {{
            c = Conv {CONV} (r, v, b)
            d = Relu(c)
            t = Conv {CONV} (d, u, b)
        }},
        else_branch = other () => (float[N, 8, H, W] t) {{ [e] c = Conv {CONV} (r, u, b) [s] t = Sigmoid(c) }}
    >
"""
X = "float[N, 3, H, W] x, bool flag"
Y = "float[N, 8, H, W] y"


def samples(count: int = 16, *, both: bool = True) -> list[Arrays]:
    """Feeds of one image; the flag is set in every other one, or in all."""
    return [{"x": normal(1, 3, 8, 8, seed=i), "flag": np.array(not both or i % 2 == 0)} for i in range(count)]


def sqnr(proto: onnx.ModelProto, result: Result, fed: list[Arrays], output: str = "y") -> float:
    """SQNR in dB of an output over all feeds."""
    pairs = [(run(proto, one)[output], run(result.model, one)[output]) for one in fed]
    noise = sum(float(((want - got) ** 2).sum()) for want, got in pairs)
    return 10 * float(np.log10(sum(float((want**2).sum()) for want, _ in pairs) / noise))


def in_bodies(proto: onnx.ModelProto, op: str) -> int:
    """How many nodes of an operator there are in control-flow bodies."""
    return sum(node.op_type == op for body in bodies(proto.graph) for node in body.node)


def made(proto: onnx.ModelProto, fed: object, **fields: Any) -> Result:
    """The model quantized for the CPU, unless ``fields`` say otherwise."""
    return quantize(proto, fed, **{"target": "cpu", "provider": "cpu", "cache": False, **fields})


def reasons(result: Result) -> Mapping[str, str]:
    """Node -> why it stays float."""
    return {skip.node: skip.reason for skip in result.report.skipped}


@pytest.mark.parametrize("target", ["cpu", "cuda", "tensorrt"])
def test_branches_are_quantized(target: str) -> None:
    proto = parse(TWO_BRANCHES, X, Y, CONSTANTS)
    result = made(proto, samples(), target=target)
    assert sqnr(proto, result, samples()) > 28
    assert sum(op == "Conv" for op in result.plan.kernels.values()) == 4
    assert in_bodies(result.model, "DequantizeLinear") >= 6


def test_integer_kernels_of_branches_are_counted() -> None:
    result = made(parse(TWO_BRANCHES, X, Y, CONSTANTS), samples())
    assert result.report.kernels["QLinearConv"] == 4
    assert result.report.placement is not None
    assert not result.report.placement.floats
    assert len(result.report.placement.kernels) == 5


def test_a_branch_that_never_ran_stays_float() -> None:
    proto = parse(TWO_BRANCHES, X, Y, CONSTANTS)
    result = made(proto, samples(both=False))
    found = {name: reason for name, reason in reasons(result).items() if "never ran" in reason}
    assert found == dict.fromkeys(("e", "s"), "its branch never ran on the calibration data")
    assert sum(op == "Conv" for op in result.plan.kernels.values()) == 3
    assert "QuantizeLinear" not in {node.op_type for node in branch(result.model, "else_branch").node}
    assert sqnr(proto, result, samples(both=False)) > 28
    assert sqnr(proto, result, samples()[1:2]) > 28  # of what goes into it


def branch(proto: onnx.ModelProto, name: str) -> onnx.GraphProto:
    """A body of the one If of the top graph."""
    return next(a.g for node in proto.graph.node if node.op_type == "If" for a in node.attribute if a.name == name)


def test_a_weight_that_both_branches_read_is_stored_once() -> None:
    body = f"""
        y = If (flag) <
            then_branch = then () => (float[N, 8, H, W] t) {{ c = Conv {CONV} (x, w, b) t = Relu(c) }},
            else_branch = other () => (float[N, 8, H, W] e) {{ d = Conv {CONV} (x, w, b) e = Sigmoid(d) }}
        >
    """
    proto = parse(body, X, Y, {name: CONSTANTS[name] for name in "wb"})
    result = made(proto, samples())
    assert sqnr(proto, result, samples()) > 28
    assert result.report.kernels["QLinearConv"] == 2
    graphs = (result.model.graph, *bodies(result.model.graph))
    codes = [t for g in graphs for t in g.initializer if tuple(t.dims) == (8, 3, 3, 3)]
    assert [t.data_type for t in codes] == [onnx.TensorProto.INT8]


def test_a_tensor_that_a_body_and_the_top_graph_read() -> None:
    body = f"""
        a = Conv {CONV} (x, w, b)
        r = Relu(a)
        i = If (flag) <
            then_branch = then () => (float[N, 8, H, W] t) {{ t = Conv {CONV} (r, v, b) }},
            else_branch = other () => (float[N, 8, H, W] e) {{ e = Sigmoid(r) }}
        >
        o = Conv {CONV} (r, u, b)
        y = Add(i, o)
    """
    proto = parse(body, X, Y, CONSTANTS)
    result = made(proto, samples())
    assert sqnr(proto, result, samples()) > 28
    assert result.report.kernels["QLinearConv"] == 3
    quantizers = [node for node in result.model.graph.node if node.op_type == "QuantizeLinear"]
    assert sum(node.input[0] == "r" for node in quantizers) == 1  # and the body reads its codes
    assert in_bodies(result.model, "QuantizeLinear") == 2


def test_the_relu_behind_a_convolution_that_a_body_reads_too_stays() -> None:
    body = f"""
        a = Conv {CONV} (x, w, b)
        r = Relu(a)
        i = If (flag) <
            then_branch = then () => (float[N, 8, H, W] t) {{ t = Neg(a) }},
            else_branch = other () => (float[N, 8, H, W] e) {{ e = Identity(a) }}
        >
        y = Add(i, r)
    """
    proto = parse(body, X, Y, {name: CONSTANTS[name] for name in "wb"})
    assert sqnr(proto, made(proto, samples()), samples()) > 28


NESTED = f"""
    m = ReduceMean <keepdims = 0> (x)
    zero = Constant <value_float = 0.0> ()
    big = Greater(m, zero)
    y = If (flag) <
        then_branch = then () => (float[N, 8, H, W] t) {{
            a = Conv {CONV} (x, w, b)
            r = Relu(a)
            t = If (big) <
                then_branch = inner () => (float[N, 8, H, W] t) {{ c = Conv {CONV} (r, v, b) t = Relu(c) }},
                else_branch = last () => (float[N, 8, H, W] t) {{ c = Conv {CONV} (r, u, b) t = Tanh(c) }}
            >
        }},
        else_branch = other () => (float[N, 8, H, W] t) {{ c = Conv {CONV} (x, w, b) t = Sigmoid(c) }}
    >
"""


@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_nested_branches_that_use_the_same_names(target: str) -> None:
    proto = parse(NESTED, X, Y, CONSTANTS)
    fed = samples(32)
    result = made(proto, fed, target=target)
    assert sqnr(proto, result, fed) > 28
    assert sum(op == "Conv" for op in result.plan.kernels.values()) == 4
    assert not any("never ran" in reason for reason in reasons(result).values())
    if target == "cpu":
        assert result.report.kernels["QLinearConv"] == 4


def test_statistics_of_a_branch_count_only_where_it_ran() -> None:
    proto = parse(TWO_BRANCHES, X, Y, CONSTANTS)
    loud = [{**one, "x": one["x"] * (1 if one["flag"] else 100)} for one in samples()]
    ranges = [{t.tensor: t.observed for t in made(proto, fed).report.tensors} for fed in (samples(), loud)]
    assert ranges[1]["r"] != ranges[0]["r"]
    assert ranges[1]["d"] == ranges[0]["d"] is not None
    assert ranges[0]["d"] == pytest.approx(extremes(proto, "d"), rel=1e-5)


def extremes(proto: onnx.ModelProto, name: str) -> tuple[float, float]:
    """Least and greatest value of a tensor of the first branch, where it runs."""
    top = [node for node in proto.graph.node if node.op_type != "If"]
    inner = list(branch(proto, "then_branch").node)
    plain = onnx.helper.make_graph(
        [*top, *inner], "g", proto.graph.input[:1], [onnx.helper.make_tensor_value_info(name, 1, None)]
    )
    plain.initializer.extend(proto.graph.initializer)
    model = onnx.helper.make_model(plain, opset_imports=proto.opset_import, ir_version=8)
    values = [run(model, {"x": one["x"]})[name] for one in samples() if one["flag"]]
    return float(np.min(values)), float(np.max(values))


def ranges(result: Result) -> dict[str, tuple[float, float]]:
    """Scale ends of every quantized tensor by its place in the plan."""
    return {tensor.key: (tensor.lo, tensor.hi) for tensor in result.report.tensors}


def test_what_else_is_observed_changes_no_bit() -> None:
    proto = parse(NESTED, X, Y, CONSTANTS)
    whole = made(proto, samples(), bias_correction=False)
    several = made(proto, samples(), bias_correction=False, memory=3_000)
    assert any("the data pass" in note for note in several.report.notes)
    assert ranges(several) == ranges(whole)


def test_statistics_of_branches_are_kept(tmp_path: Path) -> None:
    proto = parse(NESTED, X, Y, CONSTANTS)
    first = made(proto, samples(), target="tensorrt", cache=tmp_path)
    second = made(proto, samples(), cache=tmp_path)
    assert any("kept from an earlier run" in note for note in second.report.notes)
    assert ranges(second) == ranges(made(proto, samples()))
    assert ranges(first) == ranges(made(proto, samples(), target="tensorrt"))


def test_biases_of_branches_are_corrected() -> None:
    narrow = {"v": 6.0, "w": 1.0, "u": 1.0, "b": 1.0}  # a few large weights leave the others few codes
    constants = {name: np.where(values > 0.8, narrow[name], 1) * values for name, values in CONSTANTS.items()}
    proto = parse(NESTED, X, Y, {name: values.astype(np.float32) for name, values in constants.items()})
    fed = samples(32)
    plain = made(proto, fed, bias_correction=False, per_channel=False)
    corrected = made(proto, fed, per_channel=False)
    assert mean_error(proto, corrected, fed) < 0.7 * mean_error(proto, plain, fed)


def mean_error(proto: onnx.ModelProto, result: Result, fed: list[Arrays]) -> float:
    """Root mean square over channels of the mean error of the output, over the feeds of the first branch."""
    taken = [one for one in fed if one["flag"]]
    errors = [(run(proto, one)["y"] - run(result.model, one)["y"]).mean(axis=(0, 2, 3)) for one in taken]
    return float(np.sqrt((np.mean(errors, axis=0) ** 2).mean()))


def test_channels_of_a_tensor_in_a_body_are_not_told_apart() -> None:
    proto = parse(TWO_BRANCHES, X, Y, CONSTANTS)
    with pytest.raises(RecipeError, match="cannot have a scale for each channel"):
        made(proto, samples(), target="tensorrt", tensors={"d": {"granularity": "per_channel"}})


def test_nodes_of_branches_are_left_out_by_name() -> None:
    proto = parse(TWO_BRANCHES, X, Y, CONSTANTS)
    result = made(proto, samples(), nodes_to_exclude=["e"])
    assert "e" not in result.plan.kernels
    assert reasons(result)["e"] == "excluded by name (e)"


def test_a_model_with_branches_takes_samples_one_by_one() -> None:
    body = f"""
        m = ReduceMean <keepdims = 0> (x)
        zero = Constant <value_float = 0.0> ()
        flag = Greater(m, zero)
        y = If (flag) <
            then_branch = then () => (float[N, 8, H, W] t) {{ c = Conv {CONV} (x, w, b) t = Relu(c) }},
            else_branch = other () => (float[N, 8, H, W] t) {{ c = Conv {CONV} (x, w, b) t = Sigmoid(c) }}
        >
    """
    proto = parse(body, "float[N, 3, H, W] x", Y, {name: CONSTANTS[name] for name in "wb"})
    fed = [{"x": one["x"]} for one in samples(32)]
    result = made(proto, fed)
    assert sqnr(proto, result, fed) > 28
    joined = made(proto, {"x": np.concatenate([one["x"] for one in fed])})
    assert ranges(joined) == ranges(result)


def test_a_classifier_in_a_branch_is_prepared_as_at_the_top() -> None:
    body = """
        y = If (flag) <
            then_branch = then () => (float[1, 8] t) {
                [pool] g = GlobalAveragePool(x)
                [head] h = Conv(g, k)
                t = Flatten(h)
            },
            else_branch = other () => (float[1, 8] e) { [mean] m = GlobalAveragePool(x) [last] e = Flatten(m) }
        >
    """
    proto = parse(body, "float[1, 8, 6, 6] x, bool flag", "float[1, 8] y", {"k": weight(8, 8, 1, 1)})
    fed = [{"x": normal(1, 8, 6, 6, seed=i), "flag": np.array(i % 2 == 0)} for i in range(16)]
    result = made(proto, fed)
    assert result.plan.kernels["head"] == "Gemm"
    assert result.report.kernels["QGemm"] == 1
    assert sqnr(proto, result, fed) > 25


@pytest.mark.zoo
def test_a_real_model_made_of_nested_branches(zoo: Any) -> None:
    case = zoo.load("silero_vad")
    fed = list(zoo.feeds(case, 40))
    # What goes in and out of the spectrum spans more than 8 bits: its two layers stay float.
    result = made(case.model, fed, nodes_to_exclude=[".*/stft/Conv", ".*/encoder/0/.*"])
    assert result.report.verification is not None
    assert min(result.report.verification.fused.values()) > 25
    assert result.report.kernels["QLinearConv"] == 4
    kept = [reason for reason in reasons(result).values() if "never ran" in reason]
    assert kept

"""Plans as values: which uses and outputs are quantized on a target, and why others are not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from qdqtool import pipeline
from qdqtool.errors import RecipeError
from qdqtool.passes_api import State
from qdqtool.planning.plan import DerivedFrom, Plan, SharedWith
from qdqtool.spec import QuantSpec
from tests.builders import Array, conv, conv_values, normal, parse, weight

IMAGE = "float[N, 8, 8, 8]"
IMAGES = (f"{IMAGE} x", f"{IMAGE} y")
VALUES = conv_values(3) | {
    "head": weight(10, 8),
    "head_bias": normal(10),
    "m": weight(16, 16),
    "m_bias": normal(16),
    "wide": normal(4, 16),
    "zero": np.array(0, np.float32),
    "six": np.array(6, np.float32),
    "half": np.array([0.5], np.float32),
    "flat": np.array([0, -1]),
    "ends": np.array([0, 0, 1, 1, 0, 0, 1, 1]),
}
CHAIN = f"{conv('a', 'x')} [r] r = Relu(a) {conv('y', 'r', 1)}"


def planned(body: str, x: str = IMAGES[0], y: str = IMAGES[1], *, opset: int = 17, **fields: Any) -> State:
    used = {name: value for name, value in VALUES.items() if f"{name})" in body or f"{name}," in body}
    fields = {"target": "cpu", "bias_correction": False, **fields}
    state, _ = pipeline.dry_run(parse(body, x, y, used, opset=opset), **fields)
    return state


def plan(state: State) -> Plan:
    assert state.plan is not None
    return state.plan


def keys(body: str, x: str = IMAGES[0], y: str = IMAGES[1], **fields: Any) -> str:
    """The plan as text: keys in order, each with whose range it shares or from whose scales its own follows."""
    words = []
    for key, entry in plan(planned(body, x, y, **fields)).entries.items():
        if isinstance(entry, SharedWith):
            words.append(f"{key}={entry.key}")
        elif isinstance(entry, DerivedFrom):
            words.append(f"{key}<{entry.activation},{entry.weight}")
        else:
            words.append(str(key))
    return " ".join(words).replace("::", ".")


def spec(state: State, key: str) -> QuantSpec:
    (found,) = (entry for k, entry in plan(state).entries.items() if str(k) == key)
    assert isinstance(found, QuantSpec)
    return found


def skips(state: State) -> dict[str, str]:
    return {skip.node: skip.reason for skip in state.skipped}


RESIDUAL = f"{CHAIN.replace('y', 'b')} [s] s = Add(r, b) [y] y = Relu(s)"
DOWNSAMPLE = f"{CHAIN.replace('y', 'b')} {conv('d', 'x', 2)} [s] s = Add(b, d) [y] y = Relu(s)"
CONCAT = f"{conv('a', 'x')} {conv('b', 'x', 1)} [k] k = Concat <axis = 2> (a, b) {conv('y', 'k', 2)}"
TALL = "float[N, 8, 16, 8] y"
MOVES = f"""{conv("a", "x")} [p] p = MaxPool <kernel_shape = [2, 2]> (a) [t] t = Transpose <perm = [0, 1, 3, 2]> (p)
    [f] y = Reshape(t, flat)"""
HEAD = f"""{conv("a", "x")} [r] r = Relu(a) [p] p = GlobalAveragePool(r) [f] f = Flatten(p)
    [fc] y = Gemm <transB = 1> (f, head, head_bias)"""
ATTENTION = """[q] q = MatMul(x, m) [k] k = MatMul(x, m) [v] v = MatMul(x, m) [t] t = Transpose <perm = [0, 2, 1]> (k)
    [s] s = MatMul(q, t) [d] d = Div(s, six) [p] p = Softmax(d) [o] o = MatMul(p, v) [w] w = MatMul(o, m)
    [bias] y = Add(w, m_bias)"""
TOKENS = ("float[N, 4, 16] x", "float[N, 4, 16] y")


@pytest.mark.parametrize(
    ("body", "x", "y", "cpu", "tensorrt"),
    [
        pytest.param(
            CHAIN, *IMAGES, ".a.0 .a.1 .a.2<.a.0,.a.1 .r .y.1 .y.2<.r,.y.1 .y", ".a.0 .a.1 .y.0 .y.1", id="relu"
        ),
        pytest.param(
            RESIDUAL,
            *IMAGES,
            ".a.0 .a.1 .a.2<.a.0,.a.1 .r .b.1 .b.2<.r,.b.1 .b .y",
            ".a.0 .a.1 .b.0 .b.1 .s.0",
            id="residual: on tensorrt only the branch that does not come from the convolution",
        ),
        pytest.param(
            DOWNSAMPLE,
            *IMAGES,
            ".a.0 .a.1 .a.2<.a.0,.a.1 .r .b.1 .b.2<.r,.b.1 .b .d.0 .d.1 .d.2<.d.0,.d.1 .d .y",
            ".a.0 .a.1 .b.0 .b.1 .d.0 .d.1 .s.1",
            id="residual of two convolutions",
        ),
        pytest.param(
            CONCAT,
            IMAGES[0],
            TALL,
            ".a.0 .a.1 .a.2<.a.0,.a.1 .a=.k .b.0 .b.1 .b.2<.b.0,.b.1 .b=.k .k .y.1 .y.2<.k,.y.1 .y",
            ".a.0 .a.1 .b.0 .b.1 .y.0 .y.1",
            id="a concat shares its range",
        ),
        pytest.param(
            f"{CONCAT} z = Neg(b)",
            IMAGES[0],
            f"{TALL}, {IMAGE} z",
            ".a.0 .a.1 .a.2<.a.0,.a.1 .a .b.0 .b.1 .b.2<.b.0,.b.1 .b .k .y.1 .y.2<.k,.y.1 .y",
            ".a.0 .a.1 .b.0 .b.1 .y.0 .y.1",
            id="not where an input has another reader",
        ),
        pytest.param(
            MOVES,
            IMAGES[0],
            "float[N, K] y",
            ".a.0 .a.1 .a.2<.a.0,.a.1 .a .p=.a .t=.p .y=.t",
            ".a.0 .a.1",
            id="what only moves values keeps their range",
        ),
        pytest.param(
            HEAD,
            IMAGES[0],
            "float[N, 10] y",
            ".a.0 .a.1 .a.2<.a.0,.a.1 .r .p .f=.p .fc.1 .fc.2<.f,.fc.1",
            ".a.0 .a.1 .fc.0 .fc.1",
            id="the last Gemm puts out float",
        ),
        pytest.param(
            ATTENTION,
            *TOKENS,
            ".q.0 .q.1 .q .k.0 .k.1 .k .v.0 .v.1 .v .t=.k .o.0 .o .w.1 .bias.1<.o,.w.1",
            ".q.0 .q.1 .k.0 .k.1 .v.0 .v.1 .s.0 .s.1 .o.0 .o.1 .w.0 .w.1",
            id="scores and softmax stay float",
        ),
        pytest.param(
            CHAIN.replace("Relu(a)", "Clip(a, zero, six)"),
            *IMAGES,
            ".a.0 .a.1 .a.2<.a.0,.a.1 .r .y.1 .y.2<.r,.y.1 .y",
            ".a.0 .a.1 .y.0 .y.1",
            id="clip",
        ),
        pytest.param(
            CHAIN.replace("Relu(a)", "LeakyRelu(a)"),
            *IMAGES,
            ".a.0 .a.1 .a.2<.a.0,.a.1 .a .r .y.1 .y.2<.r,.y.1 .y",
            ".a.0 .a.1 .y.0 .y.1",
            id="leaky relu",
        ),
        pytest.param(
            CHAIN,
            IMAGES[0],
            f"{IMAGE} y, {IMAGE} a",
            ".a.0 .a.1 .a.2<.a.0,.a.1 .a .y.0 .y.1 .y.2<.y.0,.y.1 .y",
            ".a.0 .a.1 .y.0 .y.1",
            id="a graph output before a Relu is not clipped",
        ),
        pytest.param(
            f"{conv('a', 'x')} [p] p = Pad(a, ends) {conv('y', 'p', 1)}",
            IMAGES[0],
            "float[N, 8, 10, 10] y, float[N, 8, 10, 10] p",
            ".a.0 .a.1 .a.2<.a.0,.a.1 .a .p=.a .y.1 .y.2<.p,.y.1 .y",
            ".a.0 .a.1 .y.0 .y.1",
            id="pad",
        ),
        pytest.param(
            "[r] r = Relu(x) [s] s = Sigmoid(r) [y] y = Mul(r, s)",
            *IMAGES,
            "",
            "",
            id="nothing but activation functions",
        ),
    ],
)
def test_keys(body: str, x: str, y: str, cpu: str, tensorrt: str) -> None:
    assert keys(body, x, y, target="cpu") == cpu
    assert keys(body, x, y, target="tensorrt") == tensorrt
    assert keys(body, x, y, target="cuda") == tensorrt


def test_bounds_come_from_the_activation_function() -> None:
    assert spec(planned(CHAIN), "::r").bound == (0.0, float("inf"))
    assert spec(planned(CHAIN.replace("Relu(a)", "Clip(a, zero, six)")), "::r").bound == (0.0, 6.0)
    assert spec(planned(CHAIN.replace("Relu(a)", "Clip(a, , six)")), "::r").bound == (-float("inf"), 6.0)
    assert spec(planned(CHAIN.replace("Relu(a)", "Sigmoid(a)")), "::r").bound == (0.0, 1.0)


def test_errors_below_zero_count_as_the_leaky_relus_that_read_them_pass_them_on() -> None:
    alone = planned(f"{conv('a', 'x')} y = LeakyRelu <alpha = 0.1> (a)")
    assert spec(alone, "::a").negative_weight == pytest.approx(0.01)
    assert spec(alone, "::y").negative_weight == 1
    two = planned(f"{conv('a', 'x')} r = LeakyRelu <alpha = 0.1> (a) s = LeakyRelu <alpha = 0.5> (a) y = Add(r, s)")
    assert spec(two, "::a").negative_weight == 0.25
    others = planned(f"{conv('a', 'x')} r = LeakyRelu <alpha = 0.1> (a) y = Add(r, a)")
    assert spec(others, "::a").negative_weight == 1
    output = planned(f"{conv('a', 'x')} y = LeakyRelu <alpha = 0.1> (a)", y=f"{IMAGE} a, {IMAGE} y")
    assert spec(output, "::a").negative_weight == 1


def test_a_clip_that_does_not_hold_zero_stays() -> None:
    state = planned(CHAIN.replace("Relu(a)", "Clip(a, half, six)"))
    assert "::a" in {str(key) for key in plan(state).entries}
    assert skips(state)["r"] == "Clip has no integer kernel on target cpu"


def test_types_are_the_targets() -> None:
    for target, activation in (("cpu", "uint8 asymmetric per_tensor"), ("tensorrt", "int8 symmetric per_tensor")):
        state = planned(CHAIN, target=target)
        assert str(spec(state, "::a::0")) == activation
        assert str(spec(state, "::a::1")) == "int8 symmetric per_channel(axis 0)"
    assert str(spec(planned(CHAIN, per_channel=False), "::a::1")) == "int8 symmetric per_tensor"
    assert (spec(planned(CHAIN, reduce_range=True), "::a::1").qmax) == 63


def test_the_channel_axis_of_a_weight() -> None:
    body = "[fc] h = Gemm(x, m) [mm] i = MatMul(h, m) [t] y = Gemm <transB = 1> (i, m)"
    state = planned(body, "float[N, 16] x", "float[N, 16] y")
    assert [spec(state, f"::{name}::1").granularity.axis for name in ("fc", "mm", "t")] == [1, 1, 0]


def test_observed_tensors_and_constants() -> None:
    found = plan(planned(CONCAT, y=TALL))
    assert found.observed() == ("x", "k", "y")
    assert {str(key) for key in found.constants} == {f"::{n}::{i}" for n in "aby" for i in (1, 2)}
    assert dict(found.kernels) == {"a": "Conv", "b": "Conv", "k": "Concat", "y": "Conv"}


@pytest.mark.parametrize(
    ("fields", "node", "reason"),
    [
        ({"nodes_to_exclude": ["y"]}, "y", "excluded by name (y)"),
        ({"nodes_to_exclude": "[xyz]"}, "y", "excluded by name (y)"),
        ({"op_types_to_quantize": ["Gemm"]}, "y", "Conv is not among op_types_to_quantize"),
        ({"nodes_to_quantize": ["a"]}, "y", "not among nodes_to_quantize"),
    ],
)
@pytest.mark.parametrize("target", ["cpu", "tensorrt"])
def test_what_the_user_leaves_out(fields: dict[str, Any], node: str, reason: str, target: str) -> None:
    state = planned(CHAIN, target=target, **fields)
    assert skips(state)[node] == reason
    assert not {str(key) for key in plan(state).entries} & {"::y::0", "::y::1", "::y::2", "::y"}


def test_a_fused_node_is_excluded_by_any_of_its_parts() -> None:
    body = "[mm] c = MatMul(x, m) [bias] y = Add(c, m_bias)"
    state = planned(body, "float[N, 16] x", "float[N, 16] y", nodes_to_exclude=["bias"])
    assert not plan(state).entries
    assert skips(state)["mm"] == "excluded by name (bias)"


def test_an_excluded_activation_function_is_not_taken_into_its_layer() -> None:
    assert keys(CHAIN, nodes_to_exclude=["r"]) == ".a.0 .a.1 .a.2<.a.0,.a.1 .a .y.0 .y.1 .y.2<.y.0,.y.1 .y"


def test_overrides_of_tensors() -> None:
    tensors = {
        "r": {"dtype": "uint16"},
        "w0": {"granularity": "per_tensor"},
        "x": {"range": [-1, 2]},
        "y": {"symmetric": True},
    }
    state = planned(CHAIN, tensors=tensors)
    assert str(spec(state, "::r")) == "uint16 asymmetric per_tensor"
    assert str(spec(state, "::a::1")) == "int8 symmetric per_tensor"
    assert spec(state, "::a::0").fixed == (-1.0, 2.0)
    assert spec(state, "::y").symmetric
    assert plan(state).observed() == ("r", "y")
    channels = planned(CHAIN, per_channel=False, tensors={"w0": {"granularity": "per_channel"}})
    assert spec(channels, "::a::1").granularity.axis == 0
    assert spec(channels, "::y::1").granularity.axis is None


def test_overrides_of_nodes_concern_their_inputs_alone() -> None:
    state = planned(CHAIN, nodes={"y": {"dtype": "int16", "granularity": "per_tensor"}})
    assert str(spec(state, "::y::0")) == "int16 asymmetric per_tensor"
    assert str(spec(state, "::r")) == "uint8 asymmetric per_tensor"
    assert str(spec(state, "::y::1")) == "int8 symmetric per_tensor"
    assert str(spec(state, "::a::1")) == "int8 symmetric per_channel(axis 0)"


@pytest.mark.parametrize(
    ("body", "name", "message"),
    [
        (MOVES, "t", "it has the same codes as 'a'; override that tensor"),
        (CHAIN, "b0", "this bias is int32, and its scale follows from the layer's input and weight"),
        (CHAIN, "a", "the plan does not quantize this tensor"),
        (CHAIN, "b00", "matches no tensor. Did you mean 'b0'?"),
    ],
)
def test_overrides_without_an_effect_are_errors(body: str, name: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        planned(body, y="float[N, K] y" if body is MOVES else IMAGES[1], tensors={name: {"dtype": "int16"}})


def test_an_activation_may_have_a_scale_for_each_channel() -> None:
    state = planned(CHAIN, tensors={"x": {"granularity": "per_channel"}})
    assert state.plan is not None
    assert state.plan.channel_axes() == {"x": 1}


def test_an_overridden_input_of_a_concat_does_not_share() -> None:
    assert " .a .b.0" in keys(CONCAT, y=TALL, tensors={"a": {"range": [-1, 1]}})


def test_float64_stays_float() -> None:
    values: dict[str, Array] = {name: value.astype(np.float64) for name, value in conv_values(1).items()}
    proto = parse(conv("y", "x"), "double[N, 8, 8, 8] x", "double[N, 8, 8, 8] y", values)
    state, _ = pipeline.dry_run(proto, target="cpu", bias_correction=False, smoothing="off")
    assert not plan(state).entries
    assert skips(state) == {"y": "'x' is float64, not float32"}


@pytest.mark.parametrize(
    ("body", "y", "node", "reason"),
    [
        (f"{CHAIN} [z] z = Tanh(y)", f"{IMAGE} z", "z", "Tanh has no integer kernel on target cpu"),
        ("[p] y = MaxPool <kernel_shape = [1, 1]> (x)", IMAGES[1], "p", "its inputs are float here"),
        (
            f"{conv('a', 'x')} [p] y = Pad(a, ends, half)",
            "float[N, 8, 10, 10] y",
            "p",
            "it pads with a value other than 0",
        ),
        (f"{conv('a', 'x')} [s] t = Shape(a) [z] y = Reshape(a, t)", IMAGES[1], "s", ""),
    ],
)
def test_reasons(body: str, y: str, node: str, reason: str) -> None:
    found = skips(planned(body, y=y))
    assert (node in found) == bool(reason)
    assert found.get(node, "").startswith(reason)


@pytest.mark.parametrize(
    ("body", "x", "reason"),
    [
        ("[fc] y = Gemm(x, m, wide)", "float[4, 16] x", "its bias is no constant vector, as integer kernels need it"),
        ("[fc] y = Gemm(x, m, b)", "float[4, 16] x, float[16] b", "its bias is no constant vector"),
        ("[fc] y = Gemm <beta = 2.0> (x, m, b)", "float[4, 16] x, float[16] b", "its bias is no constant vector"),
        (
            "[fc] y = Gemm <alpha = 2.0> (x, b, m_bias)",
            "float[4, 16] x, float[16, 16] b",
            "integer kernels know no alpha",
        ),
    ],
)
def test_a_bias_that_no_integer_kernel_takes(body: str, x: str, reason: str) -> None:
    state = planned(body, x, "float[4, 16] y")
    assert skips(state)["fc"].startswith(reason)
    assert not plan(state).entries
    assert plan(planned(body, x, "float[4, 16] y", target="tensorrt")).entries


def test_an_integer_max_pool_needs_opset_12() -> None:
    body = f"{conv('a', 'x')} [p] y = MaxPool <kernel_shape = [1, 1]> (a)"
    assert "::y" in {str(key) for key in plan(planned(body)).entries}
    assert "::y" in {str(key) for key in plan(planned(body, opset=11)).entries}  # it is raised to 13


def test_a_concat_of_bounded_and_free_inputs_keeps_their_ranges() -> None:
    body = f"{conv('a', 'x')} [r] r = Relu(a) {conv('b', 'x', 1)} [k] y = Concat <axis = 2> (r, b)"
    assert keys(body, y=TALL) == ".a.0 .a.1 .a.2<.a.0,.a.1 .r .b.0 .b.1 .b.2<.b.0,.b.1 .b .y"


def test_control_flow_bodies_are_left_and_their_reads_counted() -> None:
    branches = f"then_branch = t () => ({IMAGE} p) {{ p = Neg(a) }}, else_branch = e () => ({IMAGE} q) {{ q = Abs(a) }}"
    body = f"{CHAIN} [if] z = If (f) <{branches}>"
    assert keys(body, f"{IMAGE} x, bool f", f"{IMAGE} y, {IMAGE} z") == (
        ".a.0 .a.1 .a.2<.a.0,.a.1 .a .y.0 .y.1 .y.2<.y.0,.y.1 .y"
    )

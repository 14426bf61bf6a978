"""Old models are raised to opset 13 without changing what they compute."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool.errors import ModelError
from qdqtool.passes.raise_opset import RaiseOpset

SOFTMAXES = [
    (opset, f"y = {op}{axis}(x)")
    for op in ("Softmax", "LogSoftmax", "Hardmax")
    for opset, axis in (
        (7, ""),
        (7, " <axis = 2> "),
        (11, ""),
        (11, " <axis = 0> "),
        (11, " <axis = -1> "),
        (11, " <axis = -2> "),
    )
]
RESIZES = [
    case
    for mode in ("nearest", "linear")
    for case in (
        (7, f'y = Upsample <mode = "{mode}", scales = [1.0, 1.0, 2.0, 1.5]> (x)'),
        (9, f'y = Upsample <mode = "{mode}"> (x, s)'),
        (10, f'y = Resize <mode = "{mode}"> (x, s)'),
        (10, f'y = Resize <mode = "{mode}"> (x, shrink)'),
    )
]
OTHERS = [
    (7, "y = Clip <min = 0.0, max = 0.5> (x)"),
    (7, "y = Clip <max = 0.5> (x)"),
    (7, "y = Dropout <ratio = 0.3> (x)"),
    (7, "y = BatchNormalization <epsilon = 0.1> (x, c, c, c, c)"),
    (9, "y = BatchNormalization (x, c, c, c, c)"),
    (7, "y = Slice <axes = [2, 3], starts = [0, 1], ends = [3, 9999]> (x)"),
    (9, "a = Unsqueeze <axes = [0, 2]> (x) b = Squeeze <axes = [0]> (a) y = Squeeze(b)"),
    (7, "y = Pad <pads = [0, 0, 1, 1, 0, 0, 0, 0], value = 1.5> (x)"),
    (7, 'y = Pad <pads = [0, 0, 1, 1, 0, 0, 0, 0], mode = "reflect"> (x)'),
    (11, "y = ReduceSum <axes = [2], keepdims = 0> (x)"),
    (7, "y = ReduceMean <axes = [2, 3]> (x)"),
    (7, "y, z = Split <axis = 2, split = [1, 3]> (x)"),
    (7, "y, i = TopK <axis = 2, k = 2> (x)"),
    (7, "y = Flatten(x)"),
]


@pytest.mark.parametrize("target", [13, 17])
@pytest.mark.parametrize(("opset", "body"), SOFTMAXES + RESIZES + OTHERS)
def test_operators_compute_the_same(passes: Any, opset: int, body: str, target: int) -> None:
    source = f"""<ir_version: 6, opset_import: ["" : {opset}]> g (float[2, 3, 4, 4] x) => (float[A, B, C, D] y)
    <float[4] s = {{1, 1, 2, 1.5}}, float[4] shrink = {{1, 1, 0.6, 0.5}}, float[3] c = {{1, 2, 3}}> {{ {body} }}"""
    proto = onnx.parser.parse_model(source)
    proto.graph.output[0].type.tensor_type.ClearField("shape")
    rank = passes.evaluate(proto, passes.random_feeds(proto))["y"].ndim
    proto.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None] * rank))
    result, state = passes(proto, RaiseOpset(target))
    assert state.graph.opset == target
    assert {entry.domain: entry.version for entry in result.opset_import} == {"": target}


@pytest.mark.parametrize(
    "body", ["y = Clip <min = 0.0, max = 0.5> (x)", "y = Pad <pads = [0, 1, 0, 0], value = 1.5> (x)"]
)
@pytest.mark.parametrize("dtype", ["float16", "double"])
def test_new_operands_have_the_type_of_the_tensor(passes: Any, body: str, dtype: str) -> None:
    if "Clip" in body and dtype == "double":
        pytest.skip("the runtime has no Clip of opset 7 for double")
    passes(
        f'<ir_version: 6, opset_import: ["" : 7]> g ({dtype}[2, 3] x) => ({dtype}[2, K] y) {{ {body} }}', RaiseOpset()
    )


def test_newer_models_stay_as_they_are(passes: Any) -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] y) { y = Relu(x) }'
    )
    state = passes.state(proto)
    before = state.graph
    assert RaiseOpset().run(state) == 0
    assert state.graph is before


def test_names_metadata_and_large_weights_survive(passes: Any) -> None:
    proto, state = passes(
        """<ir_version: 3, opset_import: ["" : 9], metadata_props: ["classes" : "cat,dog"], producer_name: "maker">
        g (float[N, 3, 8, 8] x) => (float[N, K, A, B] y) {
            [conv] a = Conv <pads = [1, 1, 1, 1]> (x, w) [up] b = Upsample <mode = "nearest"> (a, s) [again]
                d = Upsample <mode = "linear"> (b, s)
            [act] y = Relu(d)
        }""",
        RaiseOpset(),
        weights={
            "w": np.random.default_rng(0).standard_normal((64, 3, 3, 3)).astype("f"),
            "s": np.array([1, 1, 2, 2], "f"),
        },
    )
    assert [(n.name, n.op_type, n.output[0]) for n in proto.graph.node if n.op_type != "Constant"] == [
        ("conv", "Conv", "a"),
        ("up", "Resize", "b"),
        ("again", "Resize", "d"),
        ("act", "Relu", "y"),
    ]
    assert passes.constant(proto, "w").shape == (64, 3, 3, 3)
    assert [value.name for value in proto.graph.input] == ["x"]
    assert proto.producer_name == "maker"
    assert proto.metadata_props[0].value == "cat,dog"
    assert state.notes == ["raised the model from opset 9 to 13"]


def test_initializers_listed_as_inputs(passes: Any) -> None:
    proto = onnx.parser.parse_model(
        """<ir_version: 3, opset_import: ["" : 7]> g (float[2, 3] x, float[3] b) => (float[2, 3] y)
                <float[3] b = {1, 2, 3}> {
            a = Add(x, b) y = Clip <min = 0.0> (a)
        }"""
    )
    result, _ = passes(proto, RaiseOpset())
    assert [value.name for value in result.graph.input] == ["x"]


def test_control_flow_bodies_are_converted(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 6, opset_import: ["" : 10]> g (bool c, float[2, 3, 4] x) => (float[2, 3, A] y)
                <float[3] s = {1, 1, 2}> {
            y = If (c) <then_branch = t () => (float[2, 3, 8] p) { [soft] h = Hardmax <axis = 1> (x) [up]
                p = Resize <mode = "linear"> (h, s) },
                        else_branch = e () => (float[2, 3, 8] q) {
                            [clip] k = Clip <min = 0.0> (x) [max] l = Softmax <axis = 1> (k)
                                q = Concat <axis = 2> (l, k) }>
        }""",
        RaiseOpset(),
    )
    names = {node.name for a in proto.graph.node[0].attribute for node in a.g.node}
    assert {"soft", "up", "clip", "max"} <= names


def test_loop_bodies_are_converted(passes: Any) -> None:
    passes(
        """<ir_version: 6, opset_import: ["" : 11]> g (float[2, 3, 4] x) => (float[2, 3, 4] y)
                <int64 m = {3}, bool t = {1}> {
            y = Loop (m, t, x) <body = b (int64 i, bool go, float[2, 3, 4] v) => (bool on, float[2, 3, 4] w) {
                on = Identity(go) u = Softmax <axis = 1> (v) w = Add(u, x)
            }>
        }""",
        RaiseOpset(),
    )


def test_custom_domains_are_kept(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 6, opset_import: ["" : 11, "com.microsoft" : 1]> g (float[2, 3] x) => (float[2, 3] y) {
            [gelu] a = com.microsoft.Gelu(x) [max] y = Softmax <axis = 0> (a)
        }""",
        RaiseOpset(),
    )
    assert {entry.domain: entry.version for entry in proto.opset_import} == {"": 13, "com.microsoft": 1}
    assert proto.graph.node[0].domain == "com.microsoft"


REFUSED = [
    (7, "y = MeanVarianceNormalization(x)", "MeanVarianceNormalization has no way beyond opset 8"),
    (7, "y = BatchNormalization <spatial = 0> (x, x, x, x, x)", "BatchNormalization 'BatchNormalization_0' of opset 7"),
    (7, "y, m = Dropout(x) z = Relu(m)", "Dropout 'Dropout_0' of opset 7 cannot be raised: its mask is read"),
    (10, "y = Resize(x, mixed)", "enlarges one axis and shrinks another"),
]


@pytest.mark.parametrize(("opset", "body", "message"), REFUSED)
def test_what_cannot_be_raised_is_refused_by_name(passes: Any, opset: int, body: str, message: str) -> None:
    source = f"""<ir_version: 6, opset_import: ["" : {opset}]> g (float[2, 3, 4, 4] x) => (float[2, 3, A, B] y)
    <float[4] mixed = {{1, 1, 2, 0.5}}> {{ {body} }}"""
    state = passes.state(onnx.parser.parse_model(source))
    with pytest.raises(ModelError, match=message) as caught:
        RaiseOpset().run(state)
    assert "Export the model again with opset_version=17" in str(caught.value)


def test_an_invalid_result_is_refused(passes: Any) -> None:
    source = (
        '<ir_version: 6, opset_import: ["" : 9]> g (float[2] x) => (float[2] y) { a = Cast <to = 7> (x) y = Add(a, x) }'
    )
    with pytest.raises(ModelError, match="raised from opset 9 to 13, the model is not valid"):
        RaiseOpset().run(passes.state(onnx.parser.parse_model(source)))


def test_a_scan_with_a_batch_axis_is_refused_by_name(passes: Any) -> None:
    source = """<ir_version: 6, opset_import: ["" : 8]> g (float[1, 2] i, float[1, 3, 2] x)
            => (float[1, 2] y, float[1, 3, 2] z) {
        [sum] y, z = Scan <num_scan_inputs = 1, body = b (float[2] a, float[2] n) => (float[2] s, float[2] o)
            { s = Add(a, n) o = Identity(s) }> ("", i, x)
    }"""
    with pytest.raises(ModelError, match="Scan 'sum' of opset 8 cannot be raised: its batch axis has no successor"):
        RaiseOpset().run(passes.state(onnx.parser.parse_model(source)))


def test_new_operands_are_initializers_and_the_axis_known_to_be_last_needs_no_reshape(passes: Any) -> None:
    proto, _ = passes(
        """<ir_version: 6, opset_import: ["" : 9]> g (float[N, 5, 4] x) => (float[N, 5, 4] y) {
            a = Clip <min = 0.0, max = 6.0> (x) y = Softmax <axis = 2> (a)
        }""",
        RaiseOpset(),
    )
    assert passes.ops(proto) == ["Clip", "Softmax"]
    assert len(proto.graph.initializer) == 2

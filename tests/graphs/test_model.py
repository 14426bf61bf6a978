"""Loading, saving, and the trip through the graph in memory: what a user put into a file comes out again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper

from qdqtool.errors import ModelError
from qdqtool.graphs import model

W = np.arange(12, dtype=np.float32).reshape(3, 4)


def parse(body: str, *, opset: int = 17, ir: int = 8, **weights: np.ndarray) -> onnx.ModelProto:
    head = f'<ir_version: {ir}, opset_import: ["": {opset}]>'
    proto = onnx.parser.parse_model(f"{head} g (float[N, 3] x) => (float[N, 4] y) {{ {body} }}")
    proto.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in weights.items())
    return proto


def layer(**changes: Any) -> onnx.ModelProto:
    return parse("[layer] y = MatMul(x, w)", w=W, **changes)


def round_trip(proto: onnx.ModelProto) -> onnx.ModelProto:
    return model.to_proto(*model.to_graph(model.load(proto)))


def names(proto: onnx.ModelProto) -> list[str]:
    return [node.name for node in proto.graph.node]


# Loading


def test_load_copies_what_is_in_memory() -> None:
    proto = layer()
    before = proto.SerializeToString()
    model.to_graph(model.load(proto))[0].nodes[0].name = "other"
    assert proto.SerializeToString() == before


def test_load_reads_external_data(tmp_path: Path) -> None:
    proto = parse("y = MatMul(x, w)", w=np.tile(W, (1, 1)))
    big = parse("[l] y = MatMul(x, w)", w=np.zeros((3, 4), np.float32))
    big.graph.initializer.append(numpy_helper.from_array(np.arange(2000, dtype=np.float32), "unused"))
    path = model.save(big, tmp_path / "big.onnx", external_data=True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["big.onnx", "big.onnx.data"]
    assert path.stat().st_size < 1000
    loaded = model.load(path)
    np.testing.assert_array_equal(numpy_helper.to_array(loaded.graph.initializer[1]), np.arange(2000))
    assert model.fingerprint(loaded) == model.fingerprint(big)
    assert model.fingerprint(loaded) != model.fingerprint(proto)


def test_missing_external_data_is_named(tmp_path: Path) -> None:
    proto = layer()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(2000, np.float32), "unused"))
    path = model.save(proto, tmp_path / "m.onnx", external_data=True)
    (tmp_path / "m.onnx.data").unlink()
    with pytest.raises(ModelError, match=r"external data of .*m.onnx cannot be read"):
        model.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "does not exist"),
        (b"", "no graph outputs|holds no graph"),
        (b"\x08\x08\x12\x05hello world, this is no protobuf", "is no ONNX model, or is truncated"),
        (layer().SerializeToString()[:-7], "truncated|no graph outputs"),
        (layer().SerializeToString()[:40], "truncated|no graph"),
    ],
    ids=["missing", "empty", "text", "last bytes lost", "first bytes only"],
)
def test_files_that_hold_no_model(tmp_path: Path, content: bytes | None, message: str) -> None:
    path = tmp_path / "model.onnx"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ModelError, match=message) as caught:
        model.load(path)
    assert str(path) in str(caught.value)


def test_a_folder_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is a folder; name the .onnx file inside it"):
        model.load(tmp_path)


@pytest.mark.parametrize("version", [model.MIN_OPSET, model.MAX_OPSET])
def test_opsets_at_the_limits_load(version: int) -> None:
    assert model.opset(model.load(layer(opset=version))) == version


@pytest.mark.parametrize(
    ("version", "message"),
    [(model.MAX_OPSET + 1, "newest that the runtime loads is 26.*opset_version <= 26"), (6, "oldest supported is 7")],
)
def test_opsets_beyond_the_limits_are_refused(version: int, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model.load(layer(opset=version))


def test_a_model_without_opset_counts_as_opset_1() -> None:
    proto = layer()
    del proto.opset_import[:]
    assert model.opset(proto) == 1
    proto.opset_import.append(helper.make_opsetid("ai.onnx", 13))
    assert model.opset(proto) == 13


def test_a_newer_format_version_is_lowered_to_what_the_runtime_loads() -> None:
    assert model.load(layer(ir=model.MAX_IR + 1)).ir_version == model.MAX_IR
    assert model.load(layer(ir=7)).ir_version == 7


def test_a_model_of_other_domains_alone_gets_a_version_of_the_default_one() -> None:
    proto = layer()
    del proto.opset_import[:]
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 3))
    with pytest.raises(ModelError, match="uses opset 1"):
        model.load(proto)  # MatMul is of the default domain
    proto.graph.node[0].CopyFrom(helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", scale=[2.0]))
    loaded = model.load(proto)
    assert {entry.domain: entry.version for entry in loaded.opset_import} == {"ai.onnx.ml": 3, "": 13}
    assert {entry.domain for entry in round_trip(proto).opset_import} == {"ai.onnx.ml", ""}


# Inputs


def test_inputs_are_what_a_caller_must_feed() -> None:
    proto = layer()
    proto.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [3, 4]))
    proto.graph.input.append(helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, [None, 2, "T"]))
    found = model.inputs(proto)
    assert [str(info) for info in found] == ["x: float32[N, 3]", "ids: int64[?, 2, T]"]
    assert all(info.ranked for info in found)
    assert found[0].dtype == np.float32


def test_a_sequence_input_is_refused() -> None:
    proto = layer()
    sequence = helper.make_sequence_type_proto(helper.make_tensor_type_proto(onnx.TensorProto.FLOAT, [1]))
    proto.graph.input.append(helper.make_value_info("many", sequence))
    with pytest.raises(ModelError, match="'many' is no tensor"):
        model.inputs(proto)


# The trip through the graph in memory


def test_initializers_listed_as_inputs_become_constants() -> None:
    proto = layer(ir=3)
    proto.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [3, 4]))
    graph, header = model.to_graph(model.load(proto))
    assert [tensor.name for tensor in graph.inputs] == ["x"]
    result = model.to_proto(graph, header)
    assert [value.name for value in result.graph.input] == ["x"]
    assert [tensor.name for tensor in result.graph.initializer] == ["w"]
    onnx.checker.check_model(result)


def test_documentation_and_metadata_survive() -> None:
    proto = layer()
    proto.doc_string, proto.model_version, proto.domain = "what it is", 7, "org.example"
    proto.producer_name, proto.producer_version = "trainer", "3.1"
    proto.graph.doc_string = "the graph"
    helper.set_model_props(proto, {"names": "{0: 'cat'}", "task": "classify"})
    proto.graph.metadata_props.add(key="origin", value="here")
    node = proto.graph.node[0]
    node.doc_string = "a layer"
    node.metadata_props.add(key="pkg", value="torch.nn")

    result = round_trip(proto)
    for field in ("doc_string", "model_version", "domain", "producer_name", "producer_version"):
        assert getattr(result, field) == getattr(proto, field)
    assert result.graph.doc_string == "the graph"
    assert model.metadata(result) == {"names": "{0: 'cat'}", "task": "classify"}
    assert [(p.key, p.value) for p in result.graph.metadata_props] == [("origin", "here")]
    assert result.graph.node[0].doc_string == "a layer"
    assert [(p.key, p.value) for p in result.graph.node[0].metadata_props] == [("pkg", "torch.nn")]


def test_metadata_are_added_to_the_users_own() -> None:
    proto = layer()
    helper.set_model_props(proto, {"names": "cat", "qdqtool.version": "old"})
    graph, header = model.to_graph(model.load(proto))
    result = model.to_proto(graph, header, {"qdqtool.version": "new", "more": "yes"})
    assert model.metadata(result) == {"names": "cat", "qdqtool.version": "new", "more": "yes"}


def test_nodes_without_a_name_or_with_anothers_get_one() -> None:
    proto = parse(
        "a = Relu(x) [Relu_2] b = Relu(a) c = Relu(b) [twin] d = Relu(c) [twin] e = Relu(d) y = MatMul(e, w)", w=W
    )
    result = round_trip(proto)
    assert names(result) == ["Relu_0", "Relu_2", "Relu_2_", "twin", "Relu_4", "MatMul_5"]
    assert names(round_trip(result)) == names(result)


def test_names_are_unique_across_control_flow_bodies() -> None:
    then, other = (onnx.parser.parse_graph(f"g () => (float[N, 3] {r}) {{ [same] {r} = Relu(x) }}") for r in "pq")
    proto = parse("c = Constant <value = bool {1}> () z = Identity(x) y = MatMul(z, w)", w=W)
    node = helper.make_node("If", ["c"], ["z"], "same", then_branch=then, else_branch=other)
    proto.graph.node[1].CopyFrom(node)
    found = names(round_trip(proto)) + [
        inner.name for a in round_trip(proto).graph.node[1].attribute for inner in a.g.node
    ]
    assert len(found) == len(set(found))
    assert "same" in found


@pytest.mark.parametrize(("opset", "given", "expected"), [(13, 4, 6), (17, 8, 8), (21, 8, 10), (17, 14, 13)])
def test_ir_version_fits_opset_and_runtime(opset: int, given: int, expected: int) -> None:
    proto = layer(opset=opset, ir=given)
    if given < 4:
        proto.graph.input.append(helper.make_tensor_value_info("w", onnx.TensorProto.FLOAT, [3, 4]))
    result = round_trip(proto)
    assert result.ir_version == expected
    assert model.opset(result) == opset


@pytest.mark.parametrize("number", ["INT4", "UINT4", "FLOAT8E4M3FN", "BFLOAT16", "INT16", "FLOAT16"])
def test_constants_of_every_width_survive(number: str) -> None:
    code = getattr(onnx.TensorProto, number)
    tensor = helper.make_tensor("k", code, [6], [0, 1, 2, 3, 4, 5])
    proto = layer(opset=21, ir=10)
    proto.graph.initializer.append(tensor)
    proto.graph.node.append(helper.make_node("Identity", ["k"], ["k2"], "hand_on"))
    proto.graph.output.append(helper.make_tensor_value_info("k2", code, [6]))
    result = round_trip(proto)
    kept = next(t for t in result.graph.initializer if t.name == "k")
    assert kept.data_type == code
    np.testing.assert_array_equal(numpy_helper.to_array(kept), numpy_helper.to_array(tensor))
    onnx.checker.check_model(result)


def test_other_operator_sets_keep_their_versions() -> None:
    proto = layer()
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    result = round_trip(proto)
    assert {entry.domain: entry.version for entry in result.opset_import} == {"": 17, "com.microsoft": 1}


# Saving


def test_saving_is_whole_or_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.onnx"
    model.save(layer(), path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(ModelError, match=r"cannot write .*model.onnx.*No space left"):
        model.save(parse("y = MatMul(x, v)", v=2 * W), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_the_last_step_of_saving_is_one_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = model.save(layer(), tmp_path / "model.onnx")
    before = path.read_bytes()

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.save(parse("y = MatMul(x, v)", v=2 * W), path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["model.onnx"]


def test_saving_does_not_change_the_model(tmp_path: Path) -> None:
    proto = layer()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(2000, np.float32), "unused"))
    before = proto.SerializeToString()
    model.save(proto, tmp_path / "a.onnx", external_data=True)
    model.save(proto, tmp_path / "b.onnx")
    assert proto.SerializeToString() == before
    assert (tmp_path / "b.onnx").read_bytes() == proto.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    ("name", "message"), [("", "it is a folder"), ("no/model.onnx", "the folder .*no does not exist")]
)
def test_places_that_cannot_be_written(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        model.save(layer(), tmp_path / name)


# Over 2 GiB, with a limit small enough to test


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> onnx.ModelProto:
    proto = layer()
    proto.graph.initializer.append(numpy_helper.from_array(np.arange(3000, dtype=np.float32), "big"))
    monkeypatch.setattr(model, "_PROTOBUF_LIMIT", model._ROOM + 8000)
    return proto


def test_large_models_are_saved_with_external_data_by_themselves(tmp_path: Path, large: onnx.ModelProto) -> None:
    path = model.save(large, tmp_path / "m.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.onnx", "m.onnx.data"]
    assert model.load(path).SerializeToString() == large.SerializeToString()


def test_large_models_are_measured_and_checked_in_parts(large: onnx.ModelProto) -> None:
    assert not model.fits_protobuf(large)
    assert model.size(large) == pytest.approx(large.ByteSize(), abs=100)
    model.check(large)
    other = onnx.ModelProto()
    other.CopyFrom(large)
    assert model.fingerprint(other) == model.fingerprint(large)
    other.graph.initializer[1].raw_data = bytes(12000)
    assert model.fingerprint(other) != model.fingerprint(large)
    large.graph.node[0].op_type = "NoSuchOperator"
    with pytest.raises(ModelError, match=r"checker refuses.*NoSuchOperator"):
        model.check(large)


def test_the_copy_for_shape_inference_holds_small_constants_only() -> None:
    proto = layer()
    proto.graph.initializer.append(numpy_helper.from_array(np.zeros(3000, np.float32), "big"))
    light = model.without_large_constants(proto)
    assert [tensor.name for tensor in light.graph.initializer] == ["w"]
    assert [str(info) for info in model.inputs(light)] == ["x: float32[N, 3]", "big: float32[3000]"]

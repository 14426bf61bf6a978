"""quantize() as a whole: what the result says of itself, that it repeats, and that nothing half done is written."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
import pytest
from onnx import helper, numpy_helper

import qdqtool
from qdqtool import pipeline
from qdqtool.data.source import open_data
from qdqtool.errors import DataError, GateError, ModelError, PipelineError, QdqError, RecipeError
from qdqtool.graphs import model as models
from qdqtool.passes_api import Pass, State, Timing
from qdqtool.recipe import Recipe

Array = npt.NDArray[np.float32]
BODY = """
    a = Conv <pads = [1, 1, 1, 1]> (x, w1) n = BatchNormalization(a, gamma, beta, mean, var) r = Relu(n)
    [branch] b = Conv <pads = [1, 1, 1, 1]> (r, w2, b2) s = Add(b, r) t = Relu(s)
    p = GlobalAveragePool(t) f = Flatten(p) [head] y = Gemm <transB = 1> (f, w3, b3)
"""


def net(seed: int = 0) -> onnx.ModelProto:
    rng = np.random.default_rng(seed)
    weights = {
        "w1": rng.standard_normal((8, 3, 3, 3)) / 4,
        "w2": rng.standard_normal((8, 8, 3, 3)) / 8,
        "w3": rng.standard_normal((5, 8)),
        "b2": rng.standard_normal(8) / 4,
        "b3": rng.standard_normal(5),
        **{name: rng.standard_normal(8) / 4 for name in ("beta", "mean")},
        **{name: rng.uniform(0.5, 2, 8) for name in ("gamma", "var")},
    }
    head = '<ir_version: 8, opset_import: ["": 17]>'
    proto = onnx.parser.parse_model(f"{head} net (float[N, 3, 8, 8] x) => (float[N, 5] y) {{ {BODY} }}")
    for name, value in weights.items():
        proto.graph.initializer.append(numpy_helper.from_array(value.astype(np.float32), name))
    helper.set_model_props(proto, {"names": "{0: 'cat'}"})
    proto.doc_string = "a small net"
    return proto


NET = net()
X: Array = np.random.default_rng(1).standard_normal((48, 3, 8, 8)).astype(np.float32)


def quantize(model: Any = NET, data: object = None, **fields: Any) -> pipeline.Result:
    return qdqtool.quantize(model, {"x": X} if data is None else data, provider="cpu", **{"target": "cpu", **fields})


@pytest.fixture(scope="module")
def result() -> pipeline.Result:
    return quantize()


def content(result: pipeline.Result) -> bytes:
    return result.model.SerializeToString(deterministic=True)


# What the result is


def test_the_result_is_a_quantized_form_of_the_model(result: pipeline.Result) -> None:
    onnx.checker.check_model(result.model, full_check=True)
    operators = [node.op_type for node in result.model.graph.node]
    assert "QuantizeLinear" in operators
    assert "BatchNormalization" not in operators
    assert not {"w1", "w2", "w3"} & {t.name for t in result.model.graph.initializer}
    assert [value.name for value in result.model.graph.output] == ["y"]
    session = onnxruntime.InferenceSession(result.model.SerializeToString(), providers=["CPUExecutionProvider"])
    (got,) = session.run(["y"], {"x": X[:3]})
    reference = onnxruntime.InferenceSession(NET.SerializeToString(), providers=["CPUExecutionProvider"])
    (want,) = reference.run(["y"], {"x": X[:3]})
    assert 10 * math.log10((want**2).sum() / ((want - got) ** 2).sum()) > 30


def test_the_report_says_what_was_done(result: pipeline.Result) -> None:
    report = result.report
    assert report.samples == 48
    assert not report.synthetic
    assert report.opset == 17
    assert report.verification is not None
    assert report.verification.samples == 16
    assert report.verification.worst_db > 30
    assert report.versions["qdqtool"] == qdqtool.__version__
    assert set(report.layers) >= {"branch", "head"}
    assert report.integer_kernels >= 4
    assert {t.kind for t in report.tensors} == {"activation", "constant"}
    assert all(t.method for t in report.tensors)
    assert {t.observed for t in report.tensors if t.tensor == "x"} == {(float(X.min()), float(X.max()))}
    assert [t.pass_name for t in report.timings][-1] == "verify"
    assert report.seconds > 0


def test_every_byte_is_accounted_for(result: pipeline.Result) -> None:
    sizes = result.report.sizes
    assert sizes.float_bytes == NET.ByteSize()
    assert sizes.quantized_bytes == result.model.ByteSize() == sum(sizes.parts.values())
    assert sizes.parts["int8 constants"] > 8 * 8 * 9


def test_the_report_is_json(result: pipeline.Result) -> None:
    read = json.loads(result.report.to_json())
    assert read["recipe"]["target"] == "cpu"
    assert read["verification"]["fused"]["y"] == pytest.approx(result.report.verification.fused["y"])  # type: ignore[union-attr]
    assert read["float_sha256"] == result.report.float_sha256


# Metadata


def test_metadata_tell_where_the_file_comes_from(result: pipeline.Result, tmp_path: Path) -> None:
    found = models.metadata(result.model)
    assert found["names"] == "{0: 'cat'}"
    assert result.model.doc_string == "a small net"
    assert found[pipeline.VERSION_KEY] == qdqtool.__version__
    assert json.loads(found[pipeline.RECIPE_KEY])["target"] == "cpu"
    assert pipeline.SYNTHETIC_KEY not in found
    path = models.save(NET, tmp_path / "float.onnx", external_data=True)
    assert found[pipeline.FLOAT_KEY] == models.fingerprint(models.load(path)) == models.fingerprint(NET)


def test_the_recipe_in_the_file_gives_the_same_file(result: pipeline.Result) -> None:
    recipe = json.loads(models.metadata(result.model)[pipeline.RECIPE_KEY])
    assert content(qdqtool.quantize(NET, {"x": X}, provider="cpu", recipe=recipe)) == content(result)
    assert Recipe.of(recipe) == result.recipe


def test_quantizing_again_gives_the_same_bytes(result: pipeline.Result, tmp_path: Path) -> None:
    path = models.save(NET, tmp_path / "net.onnx")
    np.savez(tmp_path / "data.npz", x=X)
    assert content(quantize(path, tmp_path / "data.npz")) == content(result)
    shuffled = X[np.random.default_rng(2).permutation(len(X))]
    assert content(quantize(data=[{"x": shuffled[i : i + 7]} for i in range(0, 48, 7)])) == content(result)
    assert content(quantize(data=iter([{"x": row[None]} for row in X]))) == content(result)


def test_what_was_given_stays_as_it_was() -> None:
    proto, data = net(3), X.copy()
    before = proto.SerializeToString()
    quantize(proto, {"x": data})
    assert proto.SerializeToString() == before
    np.testing.assert_array_equal(data, X)


def test_open_data_stay_open() -> None:
    with open_data(iter([{"x": X[:8]}]), models.inputs(NET)) as data:
        quantize(data=data)
        assert sum(1 for _ in data) == 1


# Saving


def test_save_writes_the_file_alone(result: pipeline.Result, tmp_path: Path) -> None:
    path = result.save(tmp_path / "net.qdq.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["net.qdq.onnx"]
    assert path.read_bytes() == content(result)
    with pytest.raises(ModelError, match=r"the folder .* does not exist"):
        result.save(tmp_path / "no" / "net.onnx")


def test_save_puts_tensors_beside_the_file_on_request(tmp_path: Path) -> None:
    wide = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 64] x) => (float[N, 64] y) { y = MatMul(x, w) }'
    )
    rng = np.random.default_rng(5)
    wide.graph.initializer.append(numpy_helper.from_array(rng.standard_normal((64, 64), np.float32), "w"))
    data = {"x": rng.standard_normal((16, 64), np.float32)}
    result = quantize(wide, data, external_data=True)
    result.save(tmp_path / "wide.onnx")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["wide.onnx", "wide.onnx.data"]
    session = onnxruntime.InferenceSession(tmp_path / "wide.onnx", providers=["CPUExecutionProvider"])
    assert np.isfinite(session.run(None, {"x": data["x"][:1]})[0]).all()


# Choices


@pytest.mark.parametrize("target", ["cpu", "cuda", "tensorrt"])
@pytest.mark.parametrize("calibrator", ["minmax", "entropy", "percentile"])
def test_targets_and_calibrators(target: str, calibrator: str) -> None:
    found = quantize(target=target, calibrator=calibrator)
    assert found.report.recipe["calibrator"] == {"name": calibrator}
    assert found.report.verification is not None
    assert found.report.verification.worst_db > 25


def test_fields_override_the_recipe_and_defaults_are_the_documented_ones() -> None:
    recipe = Recipe(target="tensorrt", samples=5)
    found = qdqtool.quantize(NET, {"x": X}, recipe=recipe, samples=8, provider="cpu")
    assert found.recipe == Recipe(target="tensorrt", samples=8)
    assert found.report.samples == 8
    assert (Recipe().target, Recipe().precision, Recipe().calibrator.name) == ("cuda", "w8a8", "mse")


def test_excluded_nodes_stay_float_and_are_reported() -> None:
    found = quantize(nodes_to_exclude=["head", "Conv_0"])
    reasons = {skip.node: skip.reason for skip in found.report.skipped}
    assert reasons["head"] == "excluded by name (head)"
    assert reasons["Conv_0"] == "excluded by name (Conv_0)"
    assert not {"head", "Conv_0"} & set(found.report.layers)
    kept = {node.name: node for node in found.model.graph.node}
    weight = next(t for t in found.model.graph.initializer if t.name == kept["head"].input[1])
    assert weight.data_type == onnx.TensorProto.FLOAT


def test_a_plan_needs_no_data() -> None:
    state, timings = pipeline.dry_run(NET, target="cpu")
    assert state.plan is not None
    assert set(state.plan.kernels) >= {"branch", "head"}
    assert state.statistics is None
    assert timings[-1].pass_name == "plan-smoothing"


def test_the_callback_sees_every_pass_and_its_errors_name_it() -> None:
    seen: list[str] = []
    quantize(callback=lambda step, *_: seen.append(step.name))
    assert seen[0] == "lift-constants"
    assert seen[-3:] == ["correct-bias", "insert-qdq", "verify"]

    def stop(step: Pass, state: State, _: Timing) -> None:
        if step.name == "plan":
            raise ValueError(f"{len(state.graph.nodes)} nodes")

    with pytest.raises(PipelineError, match=r"pass 'plan' failed: ValueError: \d+ nodes \(ran before it: lift"):
        quantize(callback=stop)


# Refusals


def test_a_model_below_the_gate_is_not_given_out() -> None:
    assert quantize(min_sqnr=20.0).report.recipe["min_sqnr"] == 20
    with pytest.raises(GateError, match=r"was not written: its SQNR of \d\d\.\d dB on 16 .*below --min-sqnr 90 dB"):
        quantize(min_sqnr=90.0)


def test_synthetic_data_are_used_only_when_asked_for_and_marked() -> None:
    with pytest.raises(DataError, match=r"needs calibration data.*'synthetic:N'"):
        qdqtool.quantize(NET, None, target="cpu", provider="cpu")
    found = quantize(data="synthetic:4")
    assert found.report.synthetic
    assert found.report.samples == 4
    assert models.metadata(found.model)[pipeline.SYNTHETIC_KEY] == "ranges come from random data"
    assert content(quantize(data="synthetic:4")) == content(found)
    assert content(quantize(data="synthetic:4", seed=1)) != content(found)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"targett": "cpu"}, r"unknown recipe field 'targett'\. Did you mean 'target'\?"),
        ({"target": "cpuu"}, r"unknown target 'cpuu'; known: cpu, cuda, tensorrt\. Did you mean 'cpu'\?"),
        ({"calibrator": "entropie"}, r"unknown calibrator 'entropie'.*Did you mean 'entropy'\?"),
        ({"nodes_to_exclude": ["heat"]}, r"nodes_to_exclude 'heat' matches no name\. Did you mean 'head'\?"),
        ({"op_types_to_quantize": ["Cnov"]}, r"op_types_to_quantize 'Cnov' is no operator.*Did you mean 'Conv'\?"),
        ({"tensors": {"yy": {"dtype": "int8"}}}, r"tensors override 'yy' matches no tensor"),
        ({"nodes": {"heads": {"symmetric": True}}}, r"nodes override 'heads' matches no name\. Did you mean 'head'\?"),
    ],
)
def test_misspelt_choices_are_errors(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        quantize(**fields)


def test_a_misspelt_calibrator_costs_no_calibration() -> None:
    def data() -> Any:
        raise AssertionError("the data were read")
        yield

    with pytest.raises(RecipeError, match="unknown calibrator"):
        quantize(data=data(), calibrator="mess")


def test_data_that_do_not_fit_show_what_the_model_wants() -> None:
    with pytest.raises(DataError, match=r"(?s)does not fit the model.*x: float32\[N, 3, 8, 8\].*image: float32\[48, 3"):
        quantize(data={"image": X})


def test_every_error_has_one_base() -> None:
    assert issubclass(qdqtool.QdqError, Exception)
    for kind in (ModelError, DataError, RecipeError, PipelineError, GateError):
        assert issubclass(kind, QdqError)


def test_a_model_without_anything_to_quantize_is_handed_through() -> None:
    proto = onnx.parser.parse_model(
        '<ir_version: 8, opset_import: ["": 17]> g (float[N, 3] x) => (float[N, 3] y) { y = Sin(x) }'
    )
    found = quantize(proto, {"x": np.eye(3, dtype=np.float32)})
    assert [node.op_type for node in found.model.graph.node] == ["Sin"]
    assert found.report.verification is not None
    assert found.report.verification.worst_db == math.inf
    assert found.report.to_dict()["verification"]["fused"]["y"] == "inf"

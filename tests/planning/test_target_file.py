"""A target of the user's own is a TOML table: strict, complete in the recipe, and as good as one that is built in."""

from __future__ import annotations

import dataclasses
import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

import qdqtool
from qdqtool import pipeline
from qdqtool.cli.main import main
from qdqtool.errors import RecipeError
from qdqtool.graphs import model as models
from qdqtool.planning import target_file
from qdqtool.planning.target import TARGETS, Emit, OpRule, Target
from qdqtool.recipe import Recipe
from tests.builders import conv_chain, feeds, normal, parse, quantized, weight

NET = conv_chain(2)
TOML = """
name = "my_accelerator"
summary = "convolutions alone"
providers = ["CPUExecutionProvider"]
activation = "uint8"
activation_symmetric = false
bias_int32 = true
absorbed = ["Relu"]

[rules.Conv]
weight = true
follows = false

[rules.Add]
activations = "all"

[rules.Softmax]
bound = [0, 1.0]

[rules.Reshape]
output = "same"
"""
OWN = Target(
    name="my_accelerator",
    summary="convolutions alone",
    providers=("CPUExecutionProvider",),
    activation="uint8",
    activation_symmetric=False,
    bias_int32=True,
    absorbed=frozenset({"Relu"}),
    rules=(
        OpRule("Conv", weight=True, follows=False),
        OpRule("Add", None),
        OpRule("Softmax", bound=(0.0, 1.0)),
        OpRule("Reshape", output=Emit.SAME),
    ),
)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A file with a target of the user's own."""
    path = tmp_path / "my_accelerator.toml"
    path.write_text(TOML, encoding="utf-8")
    return path


# The table


@pytest.mark.parametrize("known", TARGETS.values(), ids=TARGETS)
def test_a_target_that_is_built_in_survives_toml(known: Target) -> None:
    assert target_file.of(tomllib.loads(target_file.to_toml(known))) == known
    assert target_file.of(json.loads(json.dumps(target_file.values(known)))) == known


rules = st.builds(
    OpRule,
    op=st.sampled_from(["Concat", "Mul", "Sigmoid", "Where"]),
    activations=st.none() | st.lists(st.integers(0, 5), max_size=3, unique=True).map(tuple),
    output=st.sampled_from(Emit),
    follows=st.booleans(),
    bound=st.none() | st.tuples(st.floats(-9, 0), st.floats(0.5, 9) | st.just(float("inf"))),
    min_opset=st.integers(0, 30),
)


@settings(deadline=None, max_examples=50)
@given(
    rules=st.lists(rules, max_size=3, unique_by=lambda rule: rule.op).map(tuple),
    summary=st.text(st.characters(codec="utf-8"), max_size=9),
    absorbed=st.frozensets(st.sampled_from(["Relu", "Clip"])),
    residual=st.booleans(),
)
def test_any_target_survives_toml(**fields: Any) -> None:
    one = dataclasses.replace(OWN, **fields)
    assert target_file.of(tomllib.loads(target_file.to_toml(one))) == one


def test_what_users_write_is_what_programs_build(own: Path) -> None:
    assert target_file.read(own) == OWN
    given: list[object] = [own, str(own), tomllib.loads(TOML), OWN]
    assert [target_file.resolve(one) for one in given] == [OWN] * 4
    assert target_file.resolve("tensorrt") is TARGETS["tensorrt"]


def test_a_printed_target_explains_every_field() -> None:
    text = target_file.to_toml(TARGETS["cpu"])
    comments = " ".join(line.removeprefix("#").strip() for line in text.splitlines() if line.startswith("#"))
    for kind in (Target, OpRule, *target_file._nested().values()):
        for field in dataclasses.fields(kind):
            if field.init and field.name != "op":
                assert f"{field.name}: " in comments, f"{kind.__name__}.{field.name} has no line under Attributes"
    assert all(f"{word} (" in comments for word in ("always", "wanted", "same", "never"))
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"activatoin": "uint8"}, r"unknown target field 'activatoin'\. Did you mean 'activation'\? Known: name, summ"),
        ({"by_op": {}}, r"unknown target field 'by_op'"),
        ({"rules": {"Conv": {"wieght": True}}}, r"field 'rules\.Conv\.wieght'\. Did you mean 'weight'\? Known: activa"),
        ({"rules": {"Conv": {"op": "Gemm"}}}, r"unknown target field 'rules\.Conv\.op'"),
        ({"weights": {"asymetric": True}}, r"field 'weights\.asymetric'\. Did you mean 'asymmetric'\?"),
        ({"a": 1, "b": 2}, r"'a'.*; .*'b'"),
        ({"bias_int32": 1}, r"field 'bias_int32': Input should be a valid boolean \(given: 1\)"),
        ({"providers": "CPUExecutionProvider"}, r"field 'providers': Input should be a valid (array|tuple)"),
        (
            {"rules": {"Conv": {"activations": [0.5]}}},
            r"'rules\.Conv\.activations\.0': .*valid integer \(given: 0\.5\)",
        ),
        ({"rules": {"Conv": {"bound": [0]}}}, r"'rules\.Conv\.bound\.1': Field required"),
        (
            {"rules": {"Conv": {"output": "alway"}}},
            r"'rules\.Conv\.output' is 'alway'; known: .*Did you mean 'always'\?",
        ),
        ({"rules": {"Conv": {"output": 3}}}, r"'rules\.Conv\.output' is 3; known: always"),
        ({"rules": ["Conv"]}, r"field 'rules' must hold a table for each operator, as in \[rules\.Conv\]"),
        ({"rules": {"Conv": True}}, r"field 'rules' must hold a table for each operator"),
        ({"summary": object()}, r"holds text, numbers, booleans, lists and tables alone: .*object"),
        ({"name": None}, r"field 'name': Input should be a valid string"),
        ({"name": "a b"}, r"target 'a b': its name must be made of letters"),
        ({"name": "cpu"}, r"target 'cpu': this name is built in with other rules; give your target a name of its own"),
        ({"activation": "int9"}, r"activation is 'int9'; known number formats: int8.*Did you mean 'int"),
        ({"activation": "int32"}, r"activation is 'int32'"),
        ({"weight": "int4"}, r"weight is 'int4'; known number formats: int8, uint8\."),
        ({"absorbed": ["Tanh"]}, r"absorbed names 'Tanh', but only Relu and Clip can vanish"),
        ({"residual": True, "rules": {"Add": {}}}, r"residual decides about Add, which has a rule besides"),
        ({"rules": {"Cnov": {}}}, r"rules\.Cnov: ONNX has no operator of this name\. Did you mean 'Conv'\?"),
        ({"rules": {"Add": {"weight": True}}}, r"rules\.Add: weight goes with Conv, ConvTranspose, GRU, Gemm,"),
        ({"rules": {"Conv": {"weight": True, "weight_only": True}}}, r'weight_only goes with .*output = "never"'),
        ({"rules": {"Pad": {"kernel": False}}}, r'kernel = false goes with output = "same"'),
        ({"rules": {"Sigmoid": {"bound": [0.5, 1.0]}}}, r"bound must ascend and hold 0, not \[0\.5, 1\.0\]"),
        ({"rules": {"Sigmoid": {"activations": [-1]}}}, r"activations counts inputs from 0 on, not \[-1\]"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        target_file.of({**target_file.values(OWN), **change})


def test_two_rules_for_one_operator() -> None:
    with pytest.raises(RecipeError, match="'my_accelerator': an operator has two rules"):
        target_file.resolve(dataclasses.replace(OWN, rules=(OpRule("Add"), OpRule("Add", None))))


def test_what_is_no_target() -> None:
    with pytest.raises(RecipeError, match=r"a target is a name, a \.toml file or a table, not int"):
        target_file.resolve(3)
    with pytest.raises(RecipeError, match="Did you mean 'cpu'"):
        target_file.resolve("cpuu")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"name = ", "is no valid TOML"),
        (b"\xff", "cannot be read"),
        (b"nam = 'x'", r"mine\.toml: unknown target field 'nam'\. Did you mean 'name'\?"),
        (b"name = 'x'", r"mine\.toml: target field 'summary': .*"),
    ],
)
def test_files_that_hold_no_target(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(content)
    with pytest.raises(RecipeError, match=message) as caught:
        target_file.read(path)
    assert "mine.toml" in str(caught.value)
    with pytest.raises(RecipeError, match=r"no\.toml cannot be read"):
        target_file.read(tmp_path / "no.toml")


# In recipes


def test_a_recipe_holds_the_table_itself(own: Path, tmp_path: Path) -> None:
    recipe = Recipe.of({"target": str(own)})
    assert recipe.target == OWN
    assert recipe == Recipe.of({"target": tomllib.loads(TOML)}) == Recipe(target=OWN)
    assert recipe.values()["target"] == target_file.values(OWN)
    for text in (Recipe.of(tomllib.loads(recipe.to_toml())), Recipe.of(json.loads(recipe.to_json()))):
        assert text == recipe
    (tmp_path / "recipe.toml").write_text('target = "my_accelerator.toml"\n', encoding="utf-8")
    assert Recipe.of(Recipe.read(tmp_path / "recipe.toml")) == recipe  # found beside the recipe


def test_a_table_of_a_target_that_is_built_in_is_its_name() -> None:
    recipe = Recipe.of({"target": target_file.values(TARGETS["cpu"])})
    assert recipe == Recipe(target="cpu")
    assert recipe.values() == {"target": "cpu"}


def test_what_is_wrong_in_a_recipe_s_target_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"recipe field 'target': unknown target field 'nam'\. Did you mean 'name'\?"):
        Recipe.of({"target": {"nam": "x"}})
    with pytest.raises(RecipeError, match=r"recipe field 'target': target .*no\.toml cannot be read"):
        Recipe.of({"target": str(tmp_path / "no.toml")})
    with pytest.raises(RecipeError, match=r"recipe field 'target': a target is a name, .*, not int"):
        Recipe.of({"target": 3})


def test_formats_that_need_a_newer_opset_raise_it() -> None:
    assert Recipe(target=OWN).min_opset == 13
    wide = dataclasses.replace(OWN, activation="uint16")
    assert Recipe(target=wide).min_opset == 21
    assert Recipe(target=dataclasses.replace(OWN, weight="uint8")).weight_format.name == "uint8"
    result = quantized(NET, target=wide)
    assert models.opset(result.model) == 21
    assert {tensor.spec.split()[0] for tensor in result.report.tensors if tensor.kind == "activation"} == {"uint16"}


# In runs


def test_a_file_made_for_it_is_verified_and_made_again_from_its_recipe(own: Path) -> None:
    first = quantized(NET, target=str(own))
    own.unlink()
    assert first.report.placement is not None
    assert set(first.report.placement.kernels.values()) == {"QLinearConv"}
    stored = Recipe.of(json.loads(models.metadata(first.model)[pipeline.RECIPE_KEY]))
    again = qdqtool.quantize(NET, feeds(NET), recipe=stored, provider="cpu")
    assert again.model == first.model


def test_only_its_own_rules_hold() -> None:
    body = "[fc] h = Gemm <transB = 1> (x, head) [soft] y = Softmax(h)"
    proto = parse(body, "float[N, 8] x", "float[N, 10] y", {"head": weight(10, 8)})
    state, _ = pipeline.dry_run(proto, target=OWN)
    assert state.plan is not None
    assert not state.plan.entries
    assert {skip.reason for skip in state.skipped if skip.node == "fc"} == {
        "Gemm has no integer kernel on target my_accelerator"
    }


def test_of_another_runtime_nothing_is_claimed() -> None:
    result = quantized(NET, target=dataclasses.replace(OWN, name="vitis", providers=("VitisAIExecutionProvider",)))
    assert result.report.placement is None
    assert result.report.layers == {"c0": "Conv", "c1": "Conv"}


def test_observing_for_it(own: Path) -> None:
    data = {"x": normal(8, 8, 8, 8)}
    alone = qdqtool.calibrate(NET, data, targets=[own], cache=False)
    assert set(alone.statistics.tensors) == {"x", "r0", "r1"}
    found = qdqtool.quantize(NET, statistics=alone, target=str(own), provider="cpu", bias_correction=False)
    assert len(found.report.layers) == 2
    signed = dataclasses.replace(OWN, name="mute", absorbed=frozenset())
    every = qdqtool.calibrate(NET, data, recipe={"target": signed}, provider="cpu", cache=False)
    assert set(every.statistics.tensors) >= {"c0", "c1", "r0"}


# On the command line


@pytest.fixture
def work(own: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run the tool in, with a target, a model and data."""
    folder = own.parent
    monkeypatch.chdir(folder)
    models.save(NET, folder / "model.onnx")
    np.savez(folder / "calib.npz", x=feeds(NET, 4)["x"])
    return folder


def run(*arguments: str) -> Any:
    return CliRunner().invoke(main, list(arguments))


@pytest.mark.parametrize("name", TARGETS)
def test_showing_a_target(name: str) -> None:
    shown = run("targets", "--show", name)
    assert shown.exit_code == 0
    assert target_file.of(tomllib.loads(shown.stdout)) == TARGETS[name]


def test_a_run_on_the_command_line(work: Path) -> None:
    done = run("quantize", "model.onnx", "--data", "calib.npz", "--target", "my_accelerator.toml")
    assert done.exit_code == 0, done.output
    assert "target my_accelerator, w8a8" in done.stdout
    assert "all 2 planned kernels run in integers" in done.stdout
    printed = run("recipe", "model.qdq.onnx").stdout
    assert Recipe.of(tomllib.loads(printed)).target == OWN
    seen = run("observe", "model.onnx", "--data", "calib.npz", "--target", "my_accelerator.toml", "-o", "own.stats")
    assert "statistics of 3 tensors" in seen.stdout
    plan = run("quantize", "model.onnx", "--dry-run", "--target", "my_accelerator.toml")
    assert "target my_accelerator" in plan.stdout
    assert work.is_dir()


def test_a_target_s_file_is_not_overwritten(work: Path) -> None:
    name = "my_accelerator.toml"
    for command in (("quantize",), ("observe",)):
        done = run(*command, "model.onnx", "--data", "calib.npz", "--target", name, "-o", name)
        assert done.exit_code == 2
        assert "is an input of this run and would be overwritten" in done.stderr
    assert (work / name).read_text(encoding="utf-8") == TOML


def test_a_misspelt_file(work: Path) -> None:
    done = run("quantize", "model.onnx", "--data", "calib.npz", "--target", "my_acelerator.toml")
    assert done.exit_code == 2
    assert "target my_acelerator.toml cannot be read" in done.stderr
    assert work.is_dir()

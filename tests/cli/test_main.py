"""The commands as a user meets them: exit status, messages, files, and what is on which stream."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnx.parser
import pytest
from click.testing import CliRunner, Result

from qdqtool import pipeline, runtime
from qdqtool.cli.main import main

MODEL = """<ir_version: 8, opset_import: ["" : 17]>
g (float[N, 3, 8, 8] image) => (float[N, 4] logits) {
    c1 = Conv<pads = [1, 1, 1, 1]>(image, w1, b1)
    r1 = Relu(c1)
    pooled = GlobalAveragePool(r1)
    flat = Flatten(pooled)
    logits = Gemm(flat, w2, b2)
}"""
LISTS = ("passes", "calibrators", "targets")
Run = Callable[..., Result]


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with model.onnx, calib.npz and eval.npz (labels: what the float model says), and the current one."""
    rng = np.random.default_rng(0)
    proto = onnx.parser.parse_model(MODEL)
    for index, node in enumerate(proto.graph.node):
        node.name = f"layer/{node.op_type.lower()}_{index}"
    shapes = {"w1": (8, 3, 3, 3), "b1": (8,), "w2": (8, 4), "b2": (4,)}
    for name, shape in shapes.items():
        value = rng.standard_normal(shape).astype(np.float32)
        proto.graph.initializer.append(onnx.numpy_helper.from_array(value, name))
    onnx.save(proto, tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", image=rng.standard_normal((12, 3, 8, 8)).astype(np.float32))
    images = rng.standard_normal((20, 3, 8, 8)).astype(np.float32)
    logits = runtime.run(runtime.session(proto), None, {"image": images})[0]
    np.savez(tmp_path / "eval.npz", image=images, labels=logits.argmax(1))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def run(work: Path) -> Run:
    """Run the tool in the work folder: ``run("quantize", "model.onnx", ...)``."""

    def invoke(*arguments: str | Path) -> Result:
        return CliRunner().invoke(main, [str(a) for a in arguments])

    return invoke


def quantize(run: Run, *more: str | Path) -> Result:
    return run("quantize", "model.onnx", "--data", "calib.npz", "--target", "cpu", *more)


class TestQuantize:
    def test_writes_a_model_that_loads_and_says_what_it_did(self, run: Run, work: Path) -> None:
        result = quantize(run)
        assert result.exit_code == 0, result.output
        runtime.session(onnx.load(work / "model.qdq.onnx"))
        for part in ("model.onnx -> model.qdq.onnx", "target cpu, w8a8, calibrator mse", "12 calibration samples"):
            assert part in result.stdout
        for part in (
            " dB",
            "fused",
            "emulated",
            "on the CPU provider",
            "QLinearConv 1",
            "Took ",
            "Wrote model.qdq.onnx",
        ):
            assert part in result.stdout
        assert sorted(p.name for p in work.iterdir()) == ["calib.npz", "eval.npz", "model.onnx", "model.qdq.onnx"]

    def test_verbose_lists_ranges_and_passes(self, run: Run) -> None:
        text = quantize(run, "-v").stdout
        assert "Ranges" in text
        assert "per_channel(axis 0)" in text
        assert "insert-qdq" in text
        assert "int8 constants" in text

    def test_quiet_prints_nothing(self, run: Run) -> None:
        result = quantize(run, "-q")
        assert (result.exit_code, result.output) == (0, "")

    def test_json_is_alone_on_stdout(self, run: Run) -> None:
        result = run("quantize", "model.onnx", "--data", "calib.npz", "--json")
        report = json.loads(result.stdout)
        assert report["recipe"]["target"] == "cuda"
        assert report["verification"]["fused"]["logits"] > 20
        assert "--target cpu makes a CPU file" in result.stderr
        assert "Wrote model.qdq.onnx" in result.stderr

    def test_report_folder_gets_the_same_json(self, run: Run, work: Path) -> None:
        result = quantize(run, "--report", "out/deep", "--json")
        assert (work / "out/deep/report.json").read_text() == result.stdout
        assert sorted(p.name for p in (work / "out/deep").iterdir()) == ["report.html", "report.json"]

    def test_evaluation_is_shown_and_reported(self, run: Run) -> None:
        result = quantize(run, "--eval", "eval.npz", "--metric", "top1", "--json")
        evaluation = json.loads(result.stdout)["evaluation"]
        assert evaluation["samples"] == 20
        assert evaluation["float_score"] == 100
        assert "20 of evaluation" in result.stderr
        assert "100.0 %" in result.stderr
        assert "points" in result.stderr
        assert "agreement" in result.stderr

    def test_save_each_writes_a_model_a_pass(self, run: Run, work: Path) -> None:
        assert quantize(run, "--save-each", "steps").exit_code == 0
        names = sorted(p.name for p in (work / "steps").iterdir())
        assert names[0] == "01-lift-constants.onnx"
        assert names[-1].endswith("-verify.onnx")
        has_q = {n: any(x.op_type == "QuantizeLinear" for x in onnx.load(work / "steps" / n).graph.node) for n in names}
        inserted = next(n for n in names if n.endswith("-insert-qdq.onnx"))
        assert [n for n in names if has_q[n]] == names[names.index(inserted) :]

    def test_synthetic_data_are_marked_loudly(self, run: Run, work: Path) -> None:
        result = run("quantize", "model.onnx", "--data", "synthetic:4", "--target", "cpu")
        assert "SYNTHETIC DATA" in result.stdout
        assert pipeline.SYNTHETIC_KEY in {p.key for p in onnx.load(work / "model.qdq.onnx").metadata_props}
        quiet = run("quantize", "model.onnx", "--data", "synthetic:4", "--target", "cpu", "-q")
        assert "random samples" in quiet.stderr

    def test_figures_for_another_target_are_marked(self, run: Run) -> None:
        result = run("quantize", "model.onnx", "--data", "calib.npz", "--target", "tensorrt", "--provider", "cpu")
        assert "made for tensorrt; these figures are the CPU provider's" in result.stdout
        assert "Placed for integers on tensorrt" in result.stdout


class TestDefaultTarget:
    def test_hint_where_no_cuda_provider_loads(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime, "resolve_provider", lambda _: ("cpu", "No CUDA provider"))
        result = run("quantize", "model.onnx", "--data", "calib.npz")
        assert result.exit_code == 0
        assert result.stderr.count("made for CUDA and TensorRT") == 1
        assert "target cuda, w8a8, calibrator mse" in result.stdout

    def test_no_hint_with_a_target_or_with_cuda(self, run: Run, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime, "resolve_provider", lambda _: ("cpu", "No CUDA provider"))
        (work / "recipe.toml").write_text('target = "cuda"\n')
        assert quantize(run).stderr == ""
        assert run("quantize", "model.onnx", "--data", "calib.npz", "--recipe", "recipe.toml").stderr == ""
        monkeypatch.setattr(runtime, "resolve_provider", lambda _: ("cpu", None))
        assert run("quantize", "model.onnx", "--data", "calib.npz").stderr == ""

    def test_conflicting_packages_are_a_warning(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(runtime, "conflicting_packages", lambda: "Both are installed")
        result = quantize(run, "-q")
        assert (result.exit_code, result.stderr) == (0, "warning: Both are installed\n")


class TestDryRun:
    def test_needs_no_data_and_writes_nothing(self, run: Run, work: Path) -> None:
        before = sorted(work.iterdir())
        result = run("quantize", "model.onnx", "--dry-run", "--target", "tensorrt")
        assert result.exit_code == 0, result.output
        assert "Conv 1" in result.stdout
        assert "Stayed float" in result.stdout
        assert "layer/conv_0::0" in result.stdout
        assert sorted(work.iterdir()) == before

    def test_json_and_report(self, run: Run, work: Path) -> None:
        result = run("quantize", "model.onnx", "--dry-run", "--target", "cpu", "--json", "--report", "out")
        plan = json.loads(result.stdout)
        assert plan["layers"]["layer/conv_0"] == "Conv"
        assert {"spec", "derived_from", "shared_with"} <= {key for entry in plan["entries"] for key in entry}
        assert json.loads((work / "out/plan.json").read_text()) == plan

    def test_long_plans_are_cut_unless_verbose(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("qdqtool.report.terminal.PLAN_ROWS", 2)
        short = run("quantize", "model.onnx", "--dry-run", "--target", "cpu").stdout
        assert "more; -v lists all" in short
        assert "more; -v" not in run("quantize", "model.onnx", "--dry-run", "--target", "cpu", "-v").stdout


class TestRecipe:
    def test_round_trip_gives_the_same_bytes(self, run: Run, work: Path) -> None:
        options = ["--calibrator", "percentile", "--set", "percentile=99.9", "--samples", "10", "--exclude", ".*gemm.*"]
        options += [
            "--tensor",
            "image:range=[-3, 3.5]",
            "--no-bias-correction",
            "--seed",
            "3",
            "--op-types",
            "Conv,Gemm",
        ]
        assert quantize(run, *options, "-o", "first.onnx").exit_code == 0
        printed = run("recipe", "first.onnx")
        assert printed.exit_code == 0, printed.output
        values = tomllib.loads(printed.stdout)
        assert values["calibrator"] == {"name": "percentile", "percentile": 99.9}
        assert values["tensors"]["image"]["range"] == [-3.0, 3.5]
        (work / "recipe.toml").write_text(printed.stdout)
        again = run("quantize", "model.onnx", "--data", "calib.npz", "--recipe", "recipe.toml", "-o", "second.onnx")
        assert again.exit_code == 0, again.output
        assert (work / "first.onnx").read_bytes() == (work / "second.onnx").read_bytes()

    def test_a_float_model_has_none(self, run: Run) -> None:
        result = run("recipe", "model.onnx")
        assert result.exit_code == 2
        assert "holds no recipe" in result.stderr

    def test_options_override_the_file(self, run: Run, work: Path) -> None:
        (work / "recipe.toml").write_text('target = "tensorrt"\nper_channel = false\n')
        result = quantize(run, "--recipe", "recipe.toml", "--json")
        assert json.loads(result.stdout)["recipe"]["target"] == "cpu"
        assert json.loads(result.stdout)["recipe"]["per_channel"] is False


WRONG: list[tuple[list[str], str]] = [
    (["--target", "cpux"], "Did you mean 'cpu'"),
    (["--precision", "w3a3"], "precision"),
    (["--calibrator", "percentil"], "Did you mean 'percentile'"),
    (["--set", "percentile=9"], "calibrator 'mse' has no option 'percentile'; it takes no options"),
    (["--calibrator", "percentile", "--set", "percentil=9"], "it takes percentile. Did you mean 'percentile'"),
    (["--calibrator", "percentile", "--set", "percentile=high"], "option percentile"),
    (["--set", "99.9"], "is not FIELD=VALUE"),
    (["--tensor", "image"], "is not NAME:FIELD=VALUE"),
    (["--tensor", "image:dtyp=int8"], "Did you mean 'dtype'"),
    (["--tensor", "imag:dtype=int8"], "Did you mean 'image'"),
    (["--exclude", "layer/conv"], "Did you mean 'layer/conv_0'"),
    (["--exclude", "("], "is no regular expression"),
    (["--samples", "0"], "'--samples'"),
    (["--provider", "gpu"], "'--provider'"),
    (["--metric", "top1"], "--metric needs --eval"),
    (["--eval", "calib.npz", "--metric", "top1"], "needs labels"),
    (["--eval", "eval.npz", "--metric", "top2"], "unknown metric 'top2'; known: top1"),
    (["--eval", "nothing.npz"], "does not exist"),
    (["--recipe", "nothing.toml"], "nothing.toml cannot be read"),
    (["--data", "nothing.npz"], "does not exist"),
    (["--data", "other.npz"], "Did you mean 'image'"),
    (["-o", "nowhere/x.onnx"], "the folder nowhere does not exist"),
    (["-o", "."], "it is a folder"),
    (["-o", "model.onnx"], "model.onnx is an input of this run"),
    (["-o", "./calib.npz"], "calib.npz is an input of this run"),
    (["--report", "model.onnx/out"], "model.onnx is a file"),
    (["--save-each", "calib.npz"], "calib.npz is a file"),
]


class TestWrongInput:
    @pytest.mark.parametrize(("options", "message"), WRONG, ids=[" ".join(options) for options, _ in WRONG])
    def test_exits_2_with_the_message_alone(self, run: Run, work: Path, options: list[str], message: str) -> None:
        np.savez(work / "other.npz", imag=np.zeros((2, 3, 8, 8), np.float32))
        before = {p: p.read_bytes() for p in work.iterdir()}
        result = quantize(run, *options)
        assert result.exit_code == 2
        assert message in result.stderr
        assert result.stdout == ""
        assert "Traceback" not in result.output
        assert {p: p.read_bytes() for p in work.iterdir()} == before

    def test_missing_model(self, run: Run) -> None:
        result = run("quantize", "mode.onnx", "--data", "calib.npz")
        assert result.exit_code == 2
        assert "model file mode.onnx does not exist" in result.stderr

    def test_missing_data(self, run: Run) -> None:
        result = run("quantize", "model.onnx")
        assert result.exit_code == 2
        assert "Missing option '--data'" in result.stderr

    def test_misspelt_recipe_key(self, run: Run, work: Path) -> None:
        (work / "recipe.toml").write_text('calibrater = "mse"\n')
        result = quantize(run, "--recipe", "recipe.toml")
        assert result.exit_code == 2
        assert "recipe.toml: unknown recipe field 'calibrater'. Did you mean 'calibrator'?" in result.stderr

    def test_evaluation_that_fails_late_says_that_the_model_was_written(self, run: Run, work: Path) -> None:
        loaded = dict(np.load(work / "eval.npz"))
        np.savez(work / "short.npz", image=loaded["image"], labels=loaded["labels"][:5])
        result = quantize(run, "--eval", "short.npz", "--metric", "top1")
        assert result.exit_code == 2
        assert (
            "model.qdq.onnx was written, but its evaluation failed: there are 5 labels for 20 samples" in result.stderr
        )


class TestGate:
    def test_nothing_is_written_below_it(self, run: Run, work: Path) -> None:
        before = sorted(work.iterdir())
        result = quantize(run, "--min-sqnr", "90", "--report", "out")
        assert result.exit_code == 1
        assert "below --min-sqnr 90 dB" in result.stderr
        assert sorted(work.iterdir()) == before

    def test_above_it_all_is_well(self, run: Run) -> None:
        assert quantize(run, "--min-sqnr", "10").exit_code == 0


class TestValidate:
    @pytest.fixture(autouse=True)
    def quantized(self, run: Run) -> None:
        assert quantize(run, "-q").exit_code == 0

    def test_shows_outputs_tensors_agreement_and_score(self, run: Run) -> None:
        result = run("validate", "model.onnx", "model.qdq.onnx", "--data", "eval.npz", "--metric", "top1")
        assert result.exit_code == 0, result.output
        for part in ("logits", " dB", "agreement", "top1", "100.0 %", "20 samples", "Tensors in between", "r1"):
            assert part in result.stdout

    def test_json_alone(self, run: Run) -> None:
        result = run("validate", "model.onnx", "model.qdq.onnx", "--data", "eval.npz", "--json", "-q", "--no-tensors")
        found = json.loads(result.stdout)
        assert found["samples"] == 20
        assert found["tensors"] == {}
        assert result.stderr == ""

    def test_equal_models_are_equal(self, run: Run) -> None:
        result = run("validate", "model.onnx", "model.onnx", "--data", "eval.npz", "--json")
        assert json.loads(result.stdout)["fused"] == {"logits": "inf"}
        assert "equal" in result.stderr

    def test_gate(self, run: Run) -> None:
        result = run("validate", "model.onnx", "model.qdq.onnx", "--data", "eval.npz", "--min-sqnr", "90")
        assert result.exit_code == 1
        assert "below --min-sqnr 90 dB" in result.stderr
        assert "logits" in result.stdout

    def test_every_broken_gate_is_named(self, run: Run) -> None:
        files = ("validate", "model.onnx", "model.qdq.onnx", "--data", "eval.npz")
        result = run(*files, "--min-sqnr", "90", "--min-agreement", "1.5", "--metric", "top1", "--max-drop", "-1")
        assert result.exit_code == 1
        for part in ("--min-sqnr 90", "--min-agreement 1.5", "top1 loses 0, more than --max-drop -1"):
            assert part in result.stderr
        assert run(*files, "--min-agreement", "0.5", "--metric", "top1", "--max-drop", "0.5").exit_code == 0
        assert run(*files, "--max-drop", "0.5").exit_code == 2

    def test_other_models_are_refused(self, run: Run, work: Path) -> None:
        proto = onnx.load(work / "model.qdq.onnx")
        proto.graph.output[0].name = "scores"
        next(n for n in proto.graph.node if "logits" in n.output).output[0] = "scores"
        onnx.save(proto, work / "other.onnx")
        result = run("validate", "model.onnx", "other.onnx", "--data", "eval.npz")
        assert result.exit_code == 2
        assert "no output 'logits'" in result.stderr


class TestLists:
    def test_calibrators_with_their_options(self, run: Run) -> None:
        text = run("calibrators").stdout
        assert "percentile=99.99" in text
        assert "``" not in text
        assert "MISSING" not in text

    def test_passes_and_targets(self, run: Run) -> None:
        assert "fold-batchnorm" in run("passes").stdout
        assert "tensorrt" in run("targets").stdout

    def test_plugins_are_marked_with_their_distribution(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        from importlib import metadata

        plugin: type = dataclass(type("Mse2", (), {"name": "mse2", "__doc__": "Twice as good."}))
        point = SimpleNamespace(
            name="mse2", value="acme:Mse2", dist=SimpleNamespace(name="acme-quant"), load=lambda: plugin
        )
        monkeypatch.setattr(metadata, "entry_points", lambda group: [point])
        monkeypatch.setattr("qdqtool.registry.entry_points", lambda group: [point])
        assert "Twice as good.  (plugin of acme-quant)" in run("calibrators").stdout


class TestProcess:
    def test_interrupt_leaves_nothing(self, run: Run, work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*_: object, **__: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(pipeline, "quantize", interrupted)
        before = sorted(work.iterdir())
        result = quantize(run, "--report", "out")
        assert result.exit_code == 130
        assert result.stderr.strip() == "interrupted"
        assert sorted(work.iterdir()) == before

    @pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
    def test_a_real_interrupt(self, work: Path) -> None:
        # Whoever runs the tests in the background may ignore interrupts, and so do all that these start.
        code = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
        start = [sys.executable, "-c", f"{code}; runpy.run_module('qdqtool', run_name='__main__', alter_sys=True)"]
        command = [*start, "quantize", "model.onnx", "--data", "synthetic:1000000"]
        with subprocess.Popen([*command, "--save-each", "steps"], stderr=subprocess.PIPE, text=True) as process:
            deadline = time.monotonic() + 60
            while not list(work.glob("steps/*-plan.onnx")) and time.monotonic() < deadline:
                time.sleep(0.05)  # the passes before observing are done once the plan is saved
            os.kill(process.pid, signal.SIGINT)
            _, error = process.communicate(timeout=60)
        assert process.returncode == 130
        assert error.strip().endswith("interrupted")
        assert "Traceback" not in error
        assert not (work / "model.qdq.onnx").exists()

    def test_help_imports_nothing_heavy(self) -> None:
        code = "import sys, qdqtool.cli.main; sys.stdout.write(' '.join(sys.modules))"
        loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
        assert "click" in loaded
        assert not {"onnx", "onnxruntime", "pydantic", "scipy", "numpy", "rich"} & set(loaded)

    def test_help_has_examples_and_sections(self, run: Run) -> None:
        listed = [line.split()[0] for line in run("--help").stdout.partition("Commands:\n")[2].splitlines()]
        commands = ("quantize", "search", "validate", "repair", "recipe", "check", "bench", "observe", "merge", "cache")
        assert listed == [*commands, *LISTS]
        text = run("quantize", "--help").stdout
        assert "Nodes and tensors:" in text
        assert "  qdqtool quantize model.onnx --dry-run --target tensorrt\n" in text
        for command in listed[1:]:
            assert "Examples:\n  qdqtool " in run(command, "--help").stdout

"""What the documentation says can be done can be done: code, commands, recipes and links."""

from __future__ import annotations

import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import qdqtool
from qdqtool.calibrator_api import Calibrator
from qdqtool.cli.main import main
from qdqtool.passes_api import Pass
from qdqtool.planning.target import TARGETS
from qdqtool.recipe import Recipe
from qdqtool.registry import catalogue
from qdqtool.statistics.tensor import TensorStatistics

ROOT = Path(__file__).parents[1]
SAMPLE = ROOT / "samples" / "01_quantize_a_model"
PAGES = sorted(path for path in (*ROOT.glob("*.md"), *ROOT.glob("samples/*/README.md")))
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def cases(language: str) -> list[Any]:
    found = []
    for page in PAGES:
        for number, block in enumerate(blocks(page.read_text(encoding="utf-8"), language)):
            found.append(pytest.param(block, id=f"{page.relative_to(ROOT)}-{number}"))
    return found


def commands() -> list[str]:
    lines = [line.partition("  #")[0].strip() for case in cases("console") for line in case.values[0].splitlines()]
    return sorted({line for line in lines if line.startswith("qdqtool ")})


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if not target.startswith(("http://", "https://", "#")):
            assert (page.parent / target.partition("#")[0]).exists(), target


@pytest.mark.parametrize("block", cases("python"))
def test_python_compiles_and_imports_what_exists(block: str) -> None:
    compile(block, "<documentation>", "exec")
    imports = [line for line in block.splitlines() if line.startswith(("import ", "from "))]
    exec("\n".join(imports), {})
    for name in re.findall(r"\bqdqtool\.(\w+)\(", block):
        assert name in qdqtool.__all__


def test_the_readmes_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = next(block for block in blocks(README, "python") if "qdqtool.quantize" in block)
    for name, source in (("model.onnx", "digits.onnx"), ("calibration.npz",) * 2, ("eval.npz", "evaluation.npz")):
        (tmp_path / name).write_bytes((SAMPLE / source).read_bytes())
    monkeypatch.chdir(tmp_path)
    first = re.escape('nodes_to_exclude=["head/.*"]')
    assert len(re.findall(first, code)) == 1
    exec(re.sub(first, "nodes_to_exclude=[]", code), {})
    assert (tmp_path / "model.qdq.onnx").is_file()


@pytest.mark.parametrize("line", commands())
def test_commands_and_their_options_exist(line: str) -> None:
    _, command, *arguments = shlex.split(line, comments=True)
    known = main.commands[command]
    options = {option for parameter in known.params for option in (*parameter.opts, *parameter.secondary_opts)}
    assert {argument for argument in arguments if argument.startswith("-")} <= options
    shown = CliRunner().invoke(main, [command, "--help"])
    assert shown.exit_code == 0


def test_every_command_is_in_the_readme() -> None:
    assert {line.split()[1] for line in commands()} == set(main.commands)


@pytest.mark.parametrize("block", [case for case in cases("toml") if "project" not in case.values[0]])
def test_recipes_are_valid(block: str) -> None:
    Recipe.of(tomllib.loads(block))


def test_tables_name_what_exists() -> None:
    rows = {name for row in re.findall(r"^\| (`.*?) \|", README, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert rows == {*TARGETS, *catalogue("calibrators")}
    for name in (Recipe().target, Recipe().calibrator.name):
        assert f"`{name}` (default)" in README


def test_the_example_pass_and_calibrator_work() -> None:
    pages = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    made: list[Any] = []
    for block in blocks(pages, "python"):
        names: dict[str, Any] = {"__name__": __name__}
        exec(block, names)
        made += [value() for value in names.values() if isinstance(value, type) and value.__module__ == __name__]
    a_pass, a_calibrator = made
    assert isinstance(a_pass, Pass)
    assert isinstance(a_calibrator, Calibrator)
    seen = TensorStatistics()
    seen.observe(np.arange(5, dtype=np.float32), [(b"sample", 0)])
    assert float(a_calibrator.choose(seen, None).hi) == pytest.approx(3.6)  # type: ignore[arg-type]  # it reads no spec

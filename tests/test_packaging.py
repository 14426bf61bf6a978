"""What a user installs: every module under one import name, even from a checkout without links, and a fast start."""

from __future__ import annotations

import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HOMES = {"qdqtool": "qdqtool", "passes": "qdqtool/passes", "calibrators": "qdqtool/calibrators"}
LINKS = {"passes": "../passes", "calibrators": "../calibrators"}
DEPENDENCIES = sysconfig.get_paths()["purelib"]


def source_modules() -> dict[str, Path]:
    """Path inside the wheel -> file of every module, found without following the two links."""
    found = {}
    for folder, home in HOMES.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            relative = path.relative_to(ROOT / folder)
            if not (folder == "qdqtool" and relative.parts[0] in LINKS):
                found[f"{home}/{relative.as_posix()}"] = path
    return found


def import_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


IMPORTABLE = [name for path in source_modules() if not (name := import_name(path)).endswith("__main__")]


def run(*args: str | Path, cwd: Path) -> str:
    done = subprocess.run([str(a) for a in args], cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def python(code: str, *paths: str | Path, cwd: Path) -> str:
    """Run code in a fresh interpreter that sees ``paths`` before the dependencies, and nothing of this checkout."""
    start = f"import sys; sys.path[:0] = {[*map(str, paths)]!r}; sys.path.append({DEPENDENCIES!r})\n"
    return run(sys.executable, "-I", "-S", "-W", "error", "-c", start + code, cwd=cwd)


@pytest.fixture(scope="module", params=["with links", "without links"])
def checkout(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what is built from; without links they are the text files that git writes with core.symlinks=false."""
    root = tmp_path_factory.mktemp("checkout")
    ignore = shutil.ignore_patterns("__pycache__", *LINKS)
    shutil.copytree(ROOT / "qdqtool", root / "qdqtool", ignore=ignore)
    for folder, target in LINKS.items():
        shutil.copytree(ROOT / folder, root / folder, ignore=shutil.ignore_patterns("__pycache__"))
        link = root / "qdqtool" / folder
        if request.param == "with links":
            link.symlink_to(target)
        else:
            link.write_text(target)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, root)
    return root


@pytest.fixture(scope="module")
def wheel(checkout: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, made from the source distribution, so that it holds everything too."""
    out = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, checkout, cwd=out)
    (found,) = out.glob("*.whl")
    return found


def test_the_wheel_holds_every_module_under_one_name(wheel: Path) -> None:
    files = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert {name for name in files if name.endswith(".py")} == source_modules().keys()
    assert {name.split("/")[0] for name in files} == {"qdqtool"}
    assert "qdqtool/py.typed" in files
    template = {path.name for path in (ROOT / "qdqtool/report/html/template").iterdir()}
    assert {f"qdqtool/report/html/template/{name}" for name in template} <= files


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    archive = zipfile.ZipFile(wheel)
    info = next(name.split("/")[0] for name in archive.namelist() if ".dist-info/" in name)
    metadata = archive.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    assert "Requires-Python: >=3.11" in metadata
    assert "qdqtool = qdqtool.cli.main:main" in archive.read(f"{info}/entry_points.txt").decode()
    assert any(name.startswith(info) and name.endswith("LICENSE") for name in archive.namelist())


def test_every_module_imports_from_the_installed_wheel(wheel: Path, tmp_path: Path) -> None:
    site = tmp_path / "site"
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check")
    run(*pip, "--target", site, wheel, cwd=tmp_path)
    code = f"""
import importlib, pathlib
for name in {IMPORTABLE!r}:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to({str(site)!r}), module.__file__
from qdqtool.registry import catalogue
print(len(catalogue("passes")), len(catalogue("calibrators")))
"""
    passes, calibrators = map(int, python(code, site, cwd=tmp_path).split())
    assert passes >= 15
    assert calibrators >= 9


def test_an_editable_install_finds_the_catalogues(checkout: Path, tmp_path: Path) -> None:
    build = f"from setuptools import build_meta; build_meta.build_editable({str(tmp_path)!r})"
    run(sys.executable, "-c", build, cwd=checkout)
    (made,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(made).extractall(tmp_path / "site")
    code = f"""
import importlib, pathlib, site
site.addsitedir({str(tmp_path / "site")!r})
for name in {IMPORTABLE!r}:
    module = importlib.import_module(name)
    assert pathlib.Path(module.__file__).is_relative_to({str(checkout)!r}), module.__file__
"""
    python(code, tmp_path / "site", cwd=tmp_path)  # first, because this environment may have a finder of the same name


def test_the_links_are_where_the_modules_are() -> None:
    for folder in LINKS:
        link = ROOT / "qdqtool" / folder
        if link.is_file():
            pytest.skip("this checkout has no symbolic links")
        assert link.is_symlink()
        assert link.resolve() == ROOT / folder


HEAVY = {"onnx", "onnxruntime", "onnx_graphsurgeon", "scipy", "pydantic", "numpy", "rich"}


@pytest.mark.parametrize(
    ("code", "allowed"),
    [
        ("import qdqtool", set()),
        ("import qdqtool; qdqtool.QdqError; dir(qdqtool)", set()),
        ("import sys; sys.argv = ['qdqtool', '--help']; import qdqtool.__main__", set()),
        ("import sys; sys.argv = ['qdqtool', 'quantize', '--help']; import qdqtool.__main__", set()),
        ("from qdqtool.recipe import Recipe; Recipe()", {"pydantic", "numpy"}),
    ],
    ids=["import", "errors", "help", "quantize help", "recipe"],
)
def test_starting_imports_nothing_heavy(code: str, allowed: set[str], tmp_path: Path) -> None:
    found = "import sys, atexit; atexit.register(lambda: print('LOADED', *{m.split('.')[0] for m in sys.modules}))\n"
    output = run(sys.executable, "-c", f"{found}{code}", cwd=tmp_path)
    loaded = set(output.splitlines()[-1].split()) & HEAVY
    assert loaded <= allowed


def test_every_public_name_is_there() -> None:
    import qdqtool

    for name in qdqtool.__all__:
        assert getattr(qdqtool, name) is not None
        assert not (ROOT / "qdqtool" / f"{name}.py").exists(), f"importing the module {name} would hide the name"
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        qdqtool.quantise  # noqa: B018 (the attribute access is what is tested)

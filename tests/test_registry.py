"""The catalogues: built-in entries in their order, plugins by entry point, and no silent clash."""

from __future__ import annotations

import dataclasses
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from typing import Any, ClassVar

import pytest

from qdqtool import registry
from qdqtool.calibrator_api import Calibrator, Stat
from qdqtool.errors import PipelineError, RecipeError
from qdqtool.passes_api import Pass, describe
from qdqtool.registry import catalogue, make
from qdqtool.spec import QuantSpec, Range
from qdqtool.statistics.tensor import TensorStatistics


@dataclass(frozen=True)
class Half:
    """Half of what was seen."""

    share: float = 0.5

    name: ClassVar[str] = "half"
    needs: ClassVar[frozenset[Stat]] = frozenset({Stat.EXTREMES})

    def choose(self, stats: TensorStatistics, spec: QuantSpec) -> Range:
        """Return the range times the share."""
        del spec
        return Range(self.share * stats.lo, self.share * stats.hi)  # type: ignore[arg-type]  # a number becomes an array


Plugins = Callable[..., None]


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Plugins:
    """Pretends that distributions offer entry points; all live in a module made for the test."""

    def install(group: str, **entries: Any) -> None:
        module = types.ModuleType("a_plugin")
        points = []
        for name, entry in entries.items():
            setattr(module, name, entry)
            points.append(EntryPoint(name, f"a_plugin:{name}", group))
        monkeypatch.setitem(sys.modules, "a_plugin", module)
        monkeypatch.setattr(registry, "entry_points", lambda group: [p for p in points if p.group == group])

    return install


def test_built_in_entries_come_in_the_order_of_their_table() -> None:
    assert list(catalogue("calibrators"))[:3] == ["minmax", "moving_average", "percentile"]
    found = list(catalogue("passes"))
    assert found.index("plan") < found.index("observe") < found.index("choose-ranges") < found.index("insert-qdq")


@pytest.mark.parametrize("kind", ["passes", "calibrators"])
def test_every_entry_is_what_its_catalogue_promises(kind: str) -> None:
    for name, entry in catalogue(kind).items():
        made: Any = make(kind, name, {})
        assert isinstance(entry, type)
        assert dataclasses.is_dataclass(entry)
        assert made.name == name
        with pytest.raises((AttributeError, TypeError)):
            made.anything = 1  # frozen
        assert isinstance(made, Pass if kind == "passes" else Calibrator)
    for name, summary in describe(catalogue(kind)).items():
        assert summary.strip(), name


def test_a_plugin_is_found_made_and_listed(plugins: Plugins) -> None:
    plugins("qdqtool.calibrators", half=Half)
    assert list(catalogue("calibrators"))[-1] == "half"
    assert make("calibrators", "half", {"share": 0.25}) == Half(0.25)
    assert describe(catalogue("calibrators"))["half"] == "Half of what was seen."
    assert "half" not in catalogue("passes")


def test_a_plugin_cannot_take_a_name_that_is_taken(plugins: Plugins) -> None:
    plugins("qdqtool.calibrators", mse=Half)
    with pytest.raises(PipelineError, match=r"a_plugin:mse offers 'mse'.*but qdqtool itself has that name already"):
        catalogue("calibrators")


def test_two_plugins_of_one_name_are_both_named(monkeypatch: pytest.MonkeyPatch) -> None:
    points = [EntryPoint("half", f"{module}:Half", "qdqtool.calibrators") for module in ("one", "two")]
    monkeypatch.setitem(sys.modules, "one", types.SimpleNamespace(Half=Half))
    monkeypatch.setattr(registry, "entry_points", lambda group: points)
    with pytest.raises(PipelineError, match=r"two:Half offers 'half' in qdqtool\.calibrators, but one:Half has"):
        catalogue("calibrators")


def test_a_plugin_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    point = EntryPoint("gone", "no_such_module:Gone", "qdqtool.passes")
    monkeypatch.setattr(registry, "entry_points", lambda group: [point])
    with pytest.raises(PipelineError, match=r"plugin 'gone' of no_such_module:Gone cannot be imported: No module"):
        catalogue("passes")


def test_a_plugin_must_call_itself_as_its_entry_point_does(plugins: Plugins) -> None:
    plugins("qdqtool.calibrators", other=Half)
    with pytest.raises(PipelineError, match=r"plugin 'other' of .* calls itself 'half'; use one name"):
        catalogue("calibrators")


@pytest.mark.parametrize(
    ("kind", "name", "options", "message"),
    [
        ("calibrators", "entropi", {}, r"unknown calibrator 'entropi'; known: minmax, .*Did you mean 'entropy'\?"),
        ("passes", "insert-qqq", {}, r"unknown pass 'insert-qqq'; known: .*Did you mean 'insert-qdq'\?"),
        (
            "calibrators",
            "percentile",
            {"percentil": 99.0},
            r"calibrator 'percentile' has no option 'percentil'; it takes percentile\. Did you mean 'percentile'\?",
        ),
        ("calibrators", "minmax", {"share": 1}, r"calibrator 'minmax' has no option 'share'; it takes no options"),
        ("calibrators", "percentile", {"percentile": "high"}, r"option percentile: Input should be a valid number"),
        ("calibrators", "percentile", {"percentile": 7.0}, r"percentile is 7\.0; give one above 50 and at most 100"),
        ("calibrators", "moving_average", {"constant": 0.0}, r"give a weight above 0 and at most 1"),
        ("passes", "verify", {"name": "x"}, r"pass 'verify' has no option 'name'; it takes no options"),
    ],
)
def test_unknown_names_and_options(kind: str, name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        make(kind, name, options)


def test_options_become_fields() -> None:
    assert make("calibrators", "percentile", {"percentile": 99.5}).percentile == 99.5
    assert make("passes", "raise-opset", {"minimum": 17}).minimum == 17

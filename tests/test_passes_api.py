"""The manager checks a chain before it runs, names the guilty pass, and tells a callback what each one did."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import pytest

from qdqtool.chains import preparation, quantization
from qdqtool.errors import GateError, ModelError, PipelineError
from qdqtool.passes_api import GRAPH_FACTS, Fact, Pass, PassManager, Skip, State, Timing
from qdqtool.recipe import Recipe


def step(
    name: str,
    *,
    needs: set[Fact] | None = None,
    gives: set[Fact] | None = None,
    drops: set[Fact] | None = None,
    action: Callable[[State], int] = lambda _: 0,
) -> Pass:
    """A pass made for a test."""
    facts = [frozenset(chosen or ()) for chosen in (needs, gives, drops)]
    members: dict[str, Any] = {"name": name, **dict(zip(("needs", "gives", "drops"), facts, strict=True))}
    members["run"] = lambda self, state: action(state)
    return cast(Pass, type("Step", (), members)())


def state() -> State:
    empty: Any = None
    return State(graph=empty, header=empty, recipe=empty, target=empty)


def note(text: str, changes: int = 0) -> Callable[[State], int]:
    """What a pass does that only leaves a note."""

    def action(seen: State) -> int:
        seen.notes.append(text)
        return changes

    return action


PLAN = step("plan", gives={Fact.PLAN})
OBSERVE = step("observe", needs={Fact.PLAN, Fact.DATA}, gives={Fact.STATISTICS})
FUSE = step("fuse", drops={Fact.PLAN, Fact.STATISTICS})
CHOOSE = step("choose", needs={Fact.STATISTICS}, gives={Fact.PARAMS})
DATA = frozenset({Fact.DATA})


def test_facts_are_followed_through_the_chain() -> None:
    assert PassManager([PLAN, OBSERVE, CHOOSE]).check(DATA) == {Fact.DATA, Fact.PLAN, Fact.STATISTICS, Fact.PARAMS}
    assert PassManager([PLAN, FUSE]).check() == frozenset()
    assert PassManager([]).check(DATA) == DATA


@pytest.mark.parametrize(
    ("chain", "facts", "message"),
    [
        (
            [OBSERVE, PLAN],
            DATA,
            "pass 'observe' needs that every use that will be quantized is planned; move 'plan' before it",
        ),
        (
            [PLAN, OBSERVE],
            frozenset(),
            "pass 'observe' needs that calibration data can be replayed; give calibration data",
        ),
        ([CHOOSE], DATA, "pass 'choose' needs that every planned activation is observed; add a pass that gives it"),
        (
            [PLAN, OBSERVE, FUSE, CHOOSE],
            DATA,
            "pass 'choose' needs that every planned activation is observed; 'fuse' before it undoes that; "
            "run the pass that gives it again in between",
        ),
    ],
    ids=["order", "no data", "nobody gives it", "undone"],
)
def test_a_chain_that_cannot_work_is_refused_before_it_runs(
    chain: list[Pass], facts: frozenset[Fact], message: str
) -> None:
    first = step("first", action=note("first"))
    untouched = state()
    with pytest.raises(PipelineError) as caught:
        PassManager([first, *chain]).run(untouched, facts)
    assert str(caught.value) == message
    assert untouched.notes == []


@pytest.mark.parametrize("bias_correction", [True, False])
def test_the_pipelines_own_chain_holds(bias_correction: bool) -> None:
    recipe = Recipe(bias_correction=bias_correction)
    whole = PassManager([*preparation(), *quantization(recipe)])
    assert whole.check(DATA) >= {Fact.PLAN, Fact.STATISTICS, Fact.PARAMS, Fact.QDQ}
    with pytest.raises(PipelineError, match="'observe' needs that calibration data can be replayed"):
        whole.check()


def test_a_pass_that_fails_is_named_with_what_ran_before_it() -> None:
    def fail(_: State) -> int:
        raise KeyError("conv1")

    chain = [step("one"), step("two"), step("three", action=fail), step("four")]
    with pytest.raises(
        PipelineError, match=r"pass 'three' failed: KeyError: 'conv1' \(ran before it: one, two\)"
    ) as caught:
        PassManager(chain).run(state())
    assert isinstance(caught.value.__cause__, KeyError)
    with pytest.raises(PipelineError, match=r"ran before it: nothing"):
        PassManager(chain[2:]).run(state())


@pytest.mark.parametrize("kind", [ModelError, GateError])
def test_the_tools_own_errors_pass_through(kind: type[Exception]) -> None:
    def refuse(_: State) -> int:
        raise kind("what to do next")

    with pytest.raises(kind, match=r"^what to do next$"):
        PassManager([step("refuse", action=refuse)]).run(state())


def test_an_interrupt_is_not_an_error_of_the_pass() -> None:
    def interrupt(_: State) -> int:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        PassManager([step("slow", action=interrupt)]).run(state())


def test_every_pass_is_timed_and_the_callback_told() -> None:
    told: list[tuple[str, int, str]] = []

    def callback(done: Pass, seen: State, timing: Timing) -> None:
        told.append((done.name, timing.changes, ",".join(seen.notes)))

    chain = [step("a", action=note("a", 3)), step("b", action=note("b", 0))]
    timings = PassManager(chain, callback).run(state())
    assert told == [("a", 3, "a"), ("b", 0, "a,b")]
    assert [(t.pass_name, t.changes) for t in timings] == [("a", 3), ("b", 0)]
    assert all(0 <= t.seconds < 10 for t in timings)


def test_a_callback_that_finds_fault_names_the_pass() -> None:
    def checker(done: Pass, _: State, __: Timing) -> None:
        if done.name == "guilty":
            raise AssertionError("outputs differ by 0.5")

    with pytest.raises(PipelineError, match=r"pass 'guilty' failed: AssertionError: outputs differ"):
        PassManager([step("fine"), step("guilty")], checker).run(state())


def test_skips_and_merges_are_recorded() -> None:
    found = state()
    found.skip("fold", "conv1", "its result is read twice")
    assert found.skipped == [Skip("fold", "conv1", "its result is read twice")]
    found.merged("conv", "bn")
    found.merged("conv", "scale", "bn")
    assert found.origins == {"conv": ("conv", "bn", "scale")}
    found.merged("relu_conv", "conv")
    assert found.origins == {"relu_conv": ("relu_conv", "conv", "bn", "scale")}


def test_a_pass_is_a_frozen_dataclass_with_four_members() -> None:
    @dataclass(frozen=True)
    class Mine:
        """Do nothing, politely."""

        strength: float = 0.5
        others: tuple[str, ...] = field(default=())

        name: ClassVar[str] = "mine"
        needs: ClassVar[frozenset[Fact]] = frozenset()
        gives: ClassVar[frozenset[Fact]] = frozenset()
        drops: ClassVar[frozenset[Fact]] = GRAPH_FACTS

        def run(self, state: State) -> int:
            """Change nothing."""
            return len(state.notes)

    assert isinstance(Mine(), Pass)
    assert not isinstance(object(), Pass)
    assert [t.pass_name for t in PassManager([Mine()]).run(state())] == ["mine"]

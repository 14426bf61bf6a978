"""The harness itself: it tells what is equal, refused, not run and wrong, and counts that."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

from qdqtool import chains
from qdqtool.passes_api import Fact, State
from tests.backend import harness, summary
from tests.backend.harness import Outcome
from tests.builders import parse


def case(proto: onnx.ModelProto, *inputs: Any) -> SimpleNamespace:
    return SimpleNamespace(model=proto, data_sets=[(inputs, [])], model_dir=None, url=None, rtol=1e-5, atol=1e-7)


def relu(opset: int = 17) -> onnx.ModelProto:
    return parse("y = Relu(x)", "float[N] x", "float[N] y", {}, opset=opset)


X = np.array([-1.0, 2.0], np.float32)


class Breaking:
    """A pass that makes another model of it."""

    name: ClassVar[str] = "breaking"
    needs: ClassVar[frozenset[Fact]] = frozenset()
    gives: ClassVar[frozenset[Fact]] = frozenset()
    drops: ClassVar[frozenset[Fact]] = frozenset()

    def run(self, state: State) -> int:
        state.graph.nodes[0].op = "Neg"
        return 1


class Failing(Breaking):
    """A pass that fails."""

    def run(self, state: State) -> int:
        raise ValueError("broken")


def test_a_case_that_works() -> None:
    assert harness.run(case(relu(), X)) == Outcome(runs=True, equal=True, quantized=True)


def test_a_refusal_has_its_reason() -> None:
    found = harness.run(case(relu(6), X))
    assert (found.runs, found.equal, found.quantized, found.failure) == (True, False, False, "")
    assert "the oldest supported is 7" in found.reason


def test_what_the_runtime_does_not_run_has_its_reason() -> None:
    found = harness.run(case(parse("y = Nothing(x)", "float[N] x", "float[N] y", {}), X))
    assert not found.runs
    assert "Nothing" in found.reason


@pytest.mark.parametrize(
    ("step", "message"), [(Breaking(), "output 0 of the prepared model differs"), (Failing(), "broken")]
)
def test_a_pass_that_is_wrong_or_fails_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, step: Breaking, message: str
) -> None:
    monkeypatch.setattr(chains, "preparation", lambda *_: [step])
    found = harness.run(case(relu(), X))
    assert found.runs
    assert not found.equal
    assert message in found.failure


def test_random_results_are_held_to_their_shapes() -> None:
    proto = parse("r = RandomNormalLike(x) y = Add(r, x)", "float[N] x", "float[N] y", {})
    assert harness.run(case(proto, X)) == Outcome(runs=True, equal=True, quantized=True)


def test_counts_at_the_end() -> None:
    outcomes = {
        "a": Outcome(runs=True, equal=True, quantized=True),
        "b": Outcome(runs=True, equal=True, reason="input 'x' is no tensor"),
        "c": Outcome(runs=True, failure="ValueError: broken"),
        "d": Outcome(runs=False, reason="no kernel for Add(6)"),
    }
    lines: list[str] = []
    reports: list[Any] = [SimpleNamespace(when="teardown", user_properties=[])]
    kept: list[Any] = []
    summary.record(lambda key, value: kept.append((key, value)), outcomes)
    reports.append(SimpleNamespace(when="call", user_properties=kept))
    terminal = SimpleNamespace(stats={"passed": reports}, section=lines.append, write_line=lines.append)
    summary.pytest_terminal_summary(terminal)
    assert lines == [
        "ONNX backend cases",
        "3 run: 2 equal once prepared, 1 quantized, 1 refused, 1 failed; 1 not run by onnxruntime",
        "refused    1: input _ is no tensor",
        "not run    1: no kernel for Add(_)",
    ]

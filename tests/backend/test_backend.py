"""Every backend case of the ONNX package, prepared and quantized: ``pytest tests/backend --backend=all``."""

from __future__ import annotations

from typing import Any

import pytest

from tests.backend import harness
from tests.backend.summary import record

PARTS = 40
SMALL = "real/test_squeezenet"
"""The whole network that runs with every tenth of the other cases."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    wanted = metafunc.config.getoption("--backend")
    # Making the cases takes seconds, so that only who runs some makes them: every tenth of them in one process.
    parts = [pytest.param((part, PARTS), id=f"part{part}") for part in range(PARTS)]
    one = [pytest.param((0, harness.EVERY), id="tenth", marks=pytest.mark.xdist_group("backend"))]
    real = [pytest.param(name, id=name, marks=pytest.mark.xdist_group("backend-real")) for name in harness.REAL]
    some = {"all": [*parts, *real], "tenth": [*one, next(p for p in real if p.id == SMALL)]}
    metafunc.parametrize("wanted", some.get(wanted, [pytest.param(wanted, id=wanted)]))


def test_cases_are_equal_once_prepared_and_quantized_or_refused(wanted: Any, record_property: Any) -> None:
    found = harness.cases()
    if isinstance(wanted, str):
        names = [wanted]
    else:
        part, parts = wanted
        names = [name for name in found if name not in harness.REAL][part::parts]
    outcomes = {name: harness.run(found[name]) for name in names}
    record(record_property, outcomes)
    failures = [f"{name}: {outcome.failure}" for name, outcome in outcomes.items() if outcome.failure]
    assert not failures, "\n".join(failures)

"""What is said of where a quantized model runs."""

from __future__ import annotations

import dataclasses
import io
from typing import Any

import pytest
from rich.console import Console, Group

from qdqtool.planning import target_file
from qdqtool.planning.target import TARGETS
from qdqtool.report import placed
from qdqtool.report.values import Report, Sizes
from qdqtool.verification.comparison import Comparison
from qdqtool.verification.listing import Placed
from qdqtool.verification.partition import Partition
from qdqtool.verification.placement import Placement


def page(target: object = "cpu", **changes: Any) -> str:
    values: dict[str, Any] = {
        "versions": {},
        "recipe": {"target": target},
        "float_sha256": "0",
        "samples": 1,
        "synthetic": False,
        "opset": 17,
        "tensors": (),
        "layers": {"a": "Conv", "b": "Conv", "c": "Add"},
        "weight_only": (),
        "skipped": (),
        "notes": (),
        "sizes": Sizes(4, 1, {}),
        "verification": None,
        "kernels": {"QLinearConv": 2, "Relu": 1},
        "timings": (),
        **changes,
    }
    stream = io.StringIO()
    Console(file=stream, width=120).print(Group(*placed.integers(Report(**values))))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines())


def test_all_is_well() -> None:
    found = Placement("cpu", {"a": "QLinearConv", "b": "QLinearConv"})
    assert page(placement=found) == (
        "\nIn integers  2 of 3 operators in the graph that the CPU provider runs\n"
        "  QLinearConv 2\n  others: Relu 1\n  all 2 planned kernels run in integers"
    )


def test_what_needs_no_kernel_is_counted_apart() -> None:
    found = Placement("cpu", {"a": "QLinearConv"}, gone=("t", "u"))
    assert "  all 3 planned kernels run in integers; 2 of them need none any more: t, u" in page(placement=found)


def test_what_does_not_run_in_integers_is_listed_by_reason() -> None:
    reasons = {"b": "rare", "c": "common", "d": "common"}
    shown = page(placement=Placement("cpu", {"a": "QLinearConv"}, floats=reasons))
    assert "  1 of 4 planned kernels run in integers; these do not:\n" in shown
    assert shown.index("common") < shown.index("c, d") < shown.index("rare")


def test_nothing_was_planned() -> None:
    assert "no kernel was planned" in page(placement=Placement("cpu"))


def test_an_older_report_says_nothing_of_it() -> None:
    assert "planned" not in page()


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("cuda", "The CUDA provider has no integer kernels for them; which TensorRT makes, only TensorRT tells."),
        ("tensorrt", "which of them become integer kernels, only TensorrtExecutionProvider tells."),
    ],
)
def test_nothing_is_claimed_of_a_runtime_that_is_not_here(target: str, said: str) -> None:
    shown = page(target)
    assert f"Placed for integers on {target}  3 operators: Conv 2, Add 1" in shown
    assert said in shown


def test_a_target_of_the_user_s_own_has_its_name() -> None:
    own = dataclasses.replace(TARGETS["tensorrt"], name="mine", providers=())
    shown = page(target_file.values(own))
    assert "Placed for integers on mine" in shown
    assert "only mine tells" in shown


def test_what_fell_to_the_cpu() -> None:
    verification = Comparison(1, {"y": 30.0}, {"y": 30.0}, provider="cuda")
    well = Partition("cuda", gpu=True, nodes={"CUDAExecutionProvider": {"a": "Conv"}})
    shown = page("cuda", partition=well, verification=verification)
    assert "1 on CUDAExecutionProvider; 0 fell to the CPU, 0 copies" in shown
    assert "no GPU" not in shown
    fallen = dataclasses.replace(well, fallen={"d": "DequantizeLinear"}, copies=("t",))
    shown = page("cuda", partition=fallen, verification=verification)
    assert "1 fell to the CPU, 1 copies; on the CPU: d" in shown


@pytest.mark.parametrize(
    ("target", "provider", "fits"),
    [("cpu", "cpu", True), ("cpu", "cuda", False), ("cuda", "tensorrt", True), ("tensorrt", "cuda", False)],
)
def test_on_which_provider_figures_are_a_target_s(target: str, provider: str, fits: bool) -> None:
    assert placed.fits(TARGETS[target], provider) is fits


def test_rows_with_the_same_reason_are_one_line() -> None:
    rows = [Placed("a", "node", "Conv", "integer", "QLinearConv", "CPUExecutionProvider")]
    for name in ("b", "c"):
        reason = f"its input '{name}_in' is not quantized"
        rows.append(Placed(name, "node", "Add", "float", "Add", "CPUExecutionProvider", reason, "quantize it"))
    stream = io.StringIO()
    Console(file=stream, width=120).print(Group(*placed.listed_rows(rows)))
    shown = stream.getvalue()
    assert "Where nodes run  2 float, 1 integer" in shown
    assert "2  float, CPU: its input ... is not quantized; to change it, quantize it" in shown
    assert "b, c" in shown
    assert "pairs" not in shown

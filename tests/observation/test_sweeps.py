"""However little memory there is, the same statistics come out: in more sweeps, told before they begin."""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from qdqtool import runtime
from qdqtool.data.source import Data, open_data
from qdqtool.errors import DataError
from qdqtool.graphs import model as models
from qdqtool.observation import sweeps
from qdqtool.observation.engine import Local
from qdqtool.observation.observe import Observation, Observing, observe, pruned
from qdqtool.observation.sweeps import known_sizes, parse_bytes, plan_sweeps
from tests.builders import Array, conv_chain, conv_values, normal, parse, run, single
from tests.calibrated import NETWORK, calibrate, content, data, quantize

# Amounts


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4 * 10**9),
        ("512 MiB", 512 << 20),
        ("1.5g", 1_500_000_000),
        ("2 Ki", 2048),
        ("1e9", 10**9),
        ("1E+3kb", 10**6),
        (" 7b ", 7),
        (12345, 12345),
        (1e22, 10**22),
    ],
)
def test_amounts_of_memory(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", "GB", "four", "-1GB", "0", "0.1", "1.2.3", "4TB", "4i", "1e999", "nan", "inf", "1 2", "1,5GB"]
)
def test_no_amounts_of_memory(text: str) -> None:
    with pytest.raises(DataError, match="is no amount of memory; give bytes, or as in 4GB or 512MiB"):
        parse_bytes(text)


@given(st.one_of(st.text(max_size=8), st.text("0123456789.eE+ kKMGiIbB", max_size=8)))
def test_any_text_is_an_amount_or_is_refused(text: str) -> None:
    with contextlib.suppress(DataError):
        assert parse_bytes(text) > 0


# Plans


@given(
    sizes=st.lists(st.integers(0, 1000), min_size=1, max_size=12),
    budget=st.integers(1, 20_000),
    threads=st.integers(1, 8),
    held=st.sampled_from([1, sweeps.TRIAL]),
)
def test_every_sweep_keeps_the_budget_or_has_one_tensor(sizes: list[int], budget: int, threads: int, held: int) -> None:
    plan = plan_sweeps({str(i): size for i, size in enumerate(sizes)}, budget, threads, held)
    assert [int(name) for group in plan.groups for name in group] == [*range(len(sizes))]
    for group in plan.groups:
        each = [sizes[int(name)] for name in group]
        assert held * sum(each) <= budget or sum(size > 0 for size in each) == 1
        assert sum(each) <= plan.bytes_each
    for group, after in zip(plan.groups, plan.groups[1:], strict=False):
        assert held * sum(sizes[int(name)] for name in (*group, after[0])) > budget
    assert plan.threads == 1 or plan.threads * plan.bytes_each <= budget
    assert plan.threads * plan.batch_bytes <= budget
    assert plan.beyond == {str(i): held * size for i, size in enumerate(sizes) if held * size > budget}
    assert len(plan.notes()) == (len(plan.groups) > 1) + bool(plan.beyond)


def test_half_of_the_memory_is_enough_for_any_test() -> None:
    assert plan_sweeps({"a": 10**6, "b": 10**6}, None, 2).groups == (("a", "b"),)
    assert plan_sweeps({}, None, 2).groups == ((),)


def test_what_the_user_should_know() -> None:
    assert plan_sweeps({"a": 10, "b": 10}, 80, 2).notes() == []
    assert plan_sweeps({"a": 1000, "b": 1000, "c": 500}, 8000, 2).notes() == [
        "the data pass 2 times, for up to 2 tensors each time, to keep observed activations within 8.0 kB"
    ]
    _, beyond = plan_sweeps({"a": 1000, "b": 5000, "c": 3000}, 8000, 2).notes()
    assert beyond == (
        "8.0 kB for observed activations are exceeded: 'b' alone takes 20.0 kB for the 4 samples of a trial whether "
        "they may be joined, and 1 more tensor likewise"
    )
    assert plan_sweeps({"a": 5000}, 1000, 2, held=1).notes() == [
        "1.0 kB for observed activations are exceeded: 'a' alone takes 5.0 kB"
    ]


SHAPES = parse(
    "a = Relu(x) b = Reshape(a, flat) c = NonZero(a) d = Cast <to = 1> (c) y = Relu(b)",
    "float[N, 2, 3] x",
    "float[M, 3] y",
    {"flat": np.array([-1, 3], np.int64)},
)


def test_sizes_are_known_where_every_shape_is_but_for_the_batch() -> None:
    inferred = onnx.shape_inference.infer_shapes(SHAPES)
    assert known_sizes(inferred, ["x", "a"]) == {"x": 24, "a": 24}
    assert known_sizes(inferred, ["x", "a"], rows=False) is None
    assert known_sizes(inferred, ["y"]) is None  # its axis 0 is not the batch
    assert known_sizes(inferred, ["a", "d"]) is None
    assert known_sizes(SHAPES, ["a"]) is None
    fixed = parse("y = Relu(x)", "float[4, 3] x", "float[4, 3] y", {})
    assert known_sizes(fixed, ["x", "y"], rows=False) == {"x": 48, "y": 48}


# The same statistics, in several sweeps


BODIES = parse(
    """a = Mul(x, two) b = Relu(a) c = Mul(b, late)
       y = If (yes) <
         then_branch = g1 () => (float[N, 4] t) {
           i = Mul(a, inner)
           t = If (yes) <then_branch = g2 () => (float[N, 4] u) { u = Add(i, b) },
                         else_branch = g3 () => (float[N, 4] v) { v = Identity(x) }>
         },
         else_branch = g4 () => (float[N, 4] w) { w = Identity(c) }
       >
       z = Mul(y, two) o = Add(z, c)""",
    "float[N, 4] x",
    "float[N, 4] o",
    {
        "two": np.array(2, np.float32),
        "inner": np.array(3, np.float32),
        "late": np.array(5, np.float32),
        "yes": np.array(True),
    },
)
UNJOINED = parse(
    "s = Softmax <axis = 0> (x) m = MatMul(s, w) y = Relu(m)",
    "float[T, 8] x",
    "float[T, 6] y",
    {"w": normal(8, 6)},
)
FIXED = parse("m = MatMul(x, w) r = Relu(m) y = MatMul(r, w)", "float[4, 8] x", "float[4, 8] y", {"w": normal(8, 8)})
ROWS = normal(22, 8)
CASES: dict[str, tuple[onnx.ModelProto, object, list[str]]] = {
    "convolutions": (conv_chain(3, 4, 6), {"x": normal(20, 4, 6, 6)}, ["x", "c0", "r0", "c1", "r1", "c2", "r2"]),
    "fused otherwise": (NETWORK, data(), ["x", "r0", "c1", "s", "r1", "c2", "l", "p", "f", "y"]),
    "an input in the middle": (NETWORK, data(), ["r0", "c1", "x", "l", "y"]),
    "bodies": (BODIES, {"x": ROWS[:, :4]}, ["a", "b", "c", "y", "z", "o"]),
    "a batch that cannot be joined": (UNJOINED, [{"x": ROWS[:9]}, {"x": ROWS[9:]}], ["x", "s", "m", "y"]),
    "a fixed batch": (FIXED, {"x": ROWS}, ["x", "m", "r", "y"]),
    "unknown shapes": (SHAPES, {"x": normal(10, 2, 3)}, ["a", "b", "d", "y"]),
}


def seen(proto: onnx.ModelProto, source: object, tensors: list[str], **options: Any) -> Observation:
    with open_data(source, models.inputs(proto)) as opened:
        return observe(proto, tensors, opened, options=Observing(**options))


@pytest.mark.parametrize("inferred", [True, False], ids=["shapes", "no shapes"])
@pytest.mark.parametrize("case", CASES)
def test_sweeps_find_what_one_finds(case: str, inferred: bool) -> None:
    proto, source, tensors = CASES[case]
    proto = onnx.shape_inference.infer_shapes(proto) if inferred else proto
    whole = seen(proto, source, tensors)
    assert len(whole.sweeps.groups) == 1
    apart = seen(proto, source, tensors, memory=1)  # a sweep for each tensor that takes memory
    assert len(apart.sweeps.groups) == len(tensors) - ("x" in tensors)
    some = seen(proto, source, tensors, memory=3 * whole.sweeps.held * whole.sweeps.bytes_each // 4, engine=Local(3))
    assert 1 < len(some.sweeps.groups) < len(apart.sweeps.groups)
    for other in (apart, some):
        assert other.statistics == whole.statistics
        assert [s.digest for s in other.held] == [s.digest for s in whole.held]


def test_a_whole_feed_is_measured_with_all_its_rows() -> None:
    proto = onnx.shape_inference.infer_shapes(UNJOINED)
    found = seen(proto, [{"x": ROWS[:9]}, {"x": ROWS[9:]}], ["s", "m"])
    assert not found.batching.rows
    assert found.sweeps.bytes_each == 4 * 9 * (8 + 6)


@pytest.mark.parametrize("memory", [60_000, 30_000, 9_300])
def test_no_more_is_observed_at_once_than_memory_allows(memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the last sweep, of a small tensor, would allow for larger batches than those before."""
    proto = conv_chain(2, 8, 6)
    proto.graph.node.append(onnx.helper.make_node("GlobalAveragePool", ["r1"], ["small"]))
    names = ["c0", "r0", "c1", "r1", "small"]
    lock, at_once, held = threading.Lock(), 0, [0]
    run = runtime.run

    def watched(active: Any, wanted: list[str], feeds: Mapping[str, Array]) -> list[Array]:
        nonlocal at_once
        with lock:
            at_once += 1
        time.sleep(0.002)
        outputs = run(active, wanted, feeds)
        with lock:
            size = sum(values.nbytes for name, values in zip(wanted, outputs, strict=True) if name in names)
            held.append(at_once * size)
            at_once -= 1
        return outputs

    monkeypatch.setattr(runtime, "run", watched)
    proto = onnx.shape_inference.infer_shapes(proto)
    found = seen(proto, {"x": normal(40, 8, 6, 6)}, names, memory=memory, engine=Local(8))
    assert found.sweeps.beyond == {}
    assert memory // 4 < max(held) <= memory


def test_memory_decides_nothing_about_the_quantized_model() -> None:
    once = quantize(data())
    often = quantize(data(), memory="5kB")
    assert once.report.notes == ()
    assert often.report.notes == (
        "the data pass 4 times, for up to 2 tensors each time, to keep observed activations within 5.0 kB",
    )
    assert json.loads(often.report.to_json())["notes"] == list(often.report.notes)
    assert content(often) == content(once)
    found, wanted = calibrate(data(), memory=20_000), calibrate(data())
    assert (found, found.batching) == (wanted, wanted.batching)


# The plan is told before the work


def test_the_plan_is_told_before_the_first_batch() -> None:
    told: list[str] = []

    def progress(step: str, done: int, total: int | None) -> None:
        told.append(f"{step}: {done}")

    calibrate(data(), memory=3000, told=told.append, progress=progress)
    assert [re.split(", | the 4", line)[0] for line in told[:2]] == [
        "the data pass 5 times",
        "3.0 kB for observed activations are exceeded: 'r0' alone takes 4.6 kB for",
    ]
    assert told[2].startswith("observe (sweep 1 of 5): ")
    assert told[-1] == f"observe (sweep 5 of 5): {len(data()['x'])}"
    told.clear()
    calibrate(data(), told=told.append)
    assert told == []


# A sweep's part of the model


@pytest.mark.parametrize("wanted", [["a"], ["b"], ["c"], ["y"], ["z", "a"]])
def test_a_part_computes_what_the_whole_does(wanted: list[str]) -> None:
    part = pruned(BODIES, wanted)
    assert [output.name for output in part.graph.output] == wanted
    whole = pruned(BODIES, ["a", "b", "c", "y", "z", "o"])
    for fed in single({"x": ROWS[:3, :4]}):
        expected = run(whole, fed)
        for name, value in run(part, fed).items():
            np.testing.assert_array_equal(value, expected[name])


def test_a_part_holds_no_more_than_it_needs() -> None:
    chain = conv_chain(3)
    part = pruned(chain, ["r1"])
    assert [node.op_type for node in part.graph.node] == ["Conv", "Relu"] * 2
    assert {t.name for t in part.graph.initializer} == {*conv_values(2)}
    assert [t.name for t in pruned(BODIES, ["b"]).graph.initializer] == ["two"]


def test_one_copy_of_the_weights_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []
    session = runtime.session

    def watched(proto: onnx.ModelProto, **options: Any) -> Any:
        made.append(" ".join(node.op_type for node in proto.graph.node if node.op_type != "Size"))
        return session(proto, **options)

    monkeypatch.setattr(runtime, "session", watched)
    proto = onnx.shape_inference.infer_shapes(conv_chain(2))
    names = ["c0", "r0", "c1", "r1"]
    seen(proto, {"x": normal(4, 8, 8, 8)}, names, memory=1)
    assert made == ["Conv", "Conv Relu", "Conv Relu Conv", "Conv Relu Conv Relu"] * 2  # for the trial, and the data
    made.clear()
    seen(proto, {"x": normal(4, 8, 8, 8)}, names)
    assert made == ["Conv Relu Conv Relu"]


def test_sweeps_of_nothing_are_an_error() -> None:
    with pytest.raises(DataError, match="nothing holds no samples"):
        observe(NETWORK, ["r0", "r1"], Data("nothing", lambda: iter(())), options=Observing(1))

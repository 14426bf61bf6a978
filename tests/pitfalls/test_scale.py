"""Deep models: every step is linear in the number of layers."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import pytest

from qdqtool import chains, pipeline
from qdqtool.arithmetic import affine
from qdqtool.arithmetic.blockwise import pack
from qdqtool.passes import PlanQuantization
from qdqtool.passes_api import PassManager, State
from qdqtool.planning.insert import insert
from qdqtool.spec import QuantizedWeight, QuantParams
from tests.builders import normal, parse

LAYERS = 800


def deep(layers: int) -> onnx.ModelProto:
    """Conv, Relu, Conv, Relu, ... of one weight and one bias that all layers share: the worst case for look-ups."""
    steps = [f"c{i} = Conv(x{i}, w, b) x{i + 1} = Relu(c{i})" for i in range(layers)]
    shape = "[N, 2, 2, 2]"
    values = {"w": normal(2, 2, 1, 1), "b": normal(2)}
    return parse(" ".join(steps), f"float{shape} x0", f"float{shape} x{layers}", values)


def prepared(layers: int) -> State:
    recipe = pipeline.make_recipe(None, {"target": "cpu"})
    state, facts = pipeline.load(deep(layers), recipe, "cpu")
    PassManager([*chains.preparation(), PlanQuantization()]).run(state, facts)
    return state


def parameters(state: State) -> dict[Any, QuantParams | QuantizedWeight]:
    """Some numbers for every key, so that nothing needs to be observed."""
    assert state.plan is not None
    found: dict[Any, QuantParams | QuantizedWeight] = {}
    tensors = state.graph.tensors()
    for key, spec in state.plan.specs():
        if key in state.plan.constants:
            values = tensors[state.plan.tensors[key]].values
            params = affine.params_from_range(affine.tensor_range(values, spec), spec)
            found[key] = QuantizedWeight(affine.quantize(values, params), params)
        else:
            found[key] = QuantParams(spec, np.array(0.02, np.float32), np.array(0 if spec.bound else 128, np.int64))
    return found


def calls(action: Callable[[], object]) -> int:
    """How many Python functions an action calls: a measure of its work that does not depend on the machine."""
    count = Counter[str]()
    sys.setprofile(lambda frame, event, arg: count.update([event]))
    try:
        action()
    finally:
        sys.setprofile(None)
    return count["call"] + count["c_call"]


def test_preparing_planning_and_inserting_800_layers() -> None:
    start = time.perf_counter()
    state = prepared(LAYERS)
    assert state.plan is not None
    assert len(state.plan.kernels) == LAYERS
    graph = insert(state.graph, state.plan, parameters(state))
    print(f"{LAYERS} layers: {time.perf_counter() - start:.2f} s")
    found = Counter(node.op for node in graph.nodes)
    assert (found["Conv"], found["Relu"]) == (LAYERS, LAYERS)
    assert found["QuantizeLinear"] == LAYERS + 1
    assert found["DequantizeLinear"] == LAYERS + 1 + 2  # the weight and the bias once, as all parameters agree


@pytest.mark.parametrize("step", ["prepare and plan", "insert"])
def test_work_grows_linearly(step: str) -> None:
    work = []
    for layers in (20, 40, 80):
        if step == "insert":
            state = prepared(layers)
            plan, params = state.plan, parameters(state)
            assert plan is not None
            work.append(calls(lambda s=state, p=plan, q=params: insert(s.graph, p, q)))  # type: ignore[misc]
        else:
            work.append(calls(lambda n=layers: prepared(n)))  # type: ignore[misc]
    assert (work[2] - work[1]) / (work[1] - work[0]) < 2.2


def test_4_bits_are_packed_without_a_loop() -> None:
    codes = np.random.default_rng(0).integers(-8, 8, 1_000_000)
    assert calls(lambda: pack(codes, 4)) < 100

"""Time of preparing, planning and inserting Q/DQ into chains of Conv and Relu, by depth; the runtime's loading apart.

python -m benchmarks.depth [layers ...]
"""

from __future__ import annotations

import sys
import time

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from qdqtool import chains, pipeline
from qdqtool.data.source import open_data
from qdqtool.graphs import model as models
from qdqtool.passes import ChooseRanges, InsertQdq, Observe, PlanQuantization
from qdqtool.passes_api import Fact, Pass, PassManager


def chain(layers: int, channels: int = 8) -> onnx.ModelProto:
    """Conv 3x3 + Relu, ``layers`` times; weights near identity, so that the signal neither vanishes nor explodes."""
    rng = np.random.default_rng(0)
    nodes, weights = [], []
    for i in range(layers):
        kernel = rng.normal(0, 0.002, (channels, channels, 3, 3)).astype(np.float32)
        kernel[range(channels), range(channels), 1, 1] += 1  # the identity
        weights.append(numpy_helper.from_array(kernel, f"w{i}"))
        nodes.append(helper.make_node("Conv", [f"x{i}", f"w{i}"], [f"c{i}"], f"conv{i}", pads=[1, 1, 1, 1]))
        nodes.append(helper.make_node("Relu", [f"c{i}"], [f"x{i + 1}"], f"relu{i}"))
    shape: list[str | int | None] = ["N", channels, 8, 8]
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name in ("x0", f"x{layers}")]
    graph = helper.make_graph(nodes, "chain", ends[:1], ends[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def main() -> None:
    """Print one row a depth."""
    print("| layers | prepare, plan, insert s | ms a layer | observe s | choose s |\n|---|---|---|---|---|")
    for layers in [int(a) for a in sys.argv[1:]] or [100, 200, 400, 800, 1600]:
        recipe = pipeline.make_recipe(None, {"target": "cpu"})
        state, facts = pipeline.load(chain(layers), recipe, "cpu")
        data = {"x0": np.random.default_rng(1).random((4, 8, 8, 8), np.float32)}
        assert state.original is not None
        state.data = open_data(data, models.inputs(state.original))
        seconds = []
        first: list[Pass] = [*chains.preparation(), PlanQuantization()]
        for passes in (first, [Observe()], [ChooseRanges()], [InsertQdq()]):
            start = time.perf_counter()
            PassManager(passes).run(state, facts | frozenset(Fact))
            seconds.append(time.perf_counter() - start)
        graph = seconds[0] + seconds[3]
        print(
            f"| {layers} | {graph:.2f} | {graph / layers * 1e3:.2f} | {seconds[1]:.2f} | {seconds[2]:.2f} |", flush=True
        )


if __name__ == "__main__":
    main()

"""How long each layer takes in float and in integers, from the runtime's own profile of its kernels.

A kernel bears the name of one of the nodes that were fused into it, the layer's or one behind it, and more behind an
underscore. It belongs to the layer in whose chain of nodes the longest such name is.
"""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Final

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qdqtool import runtime
from qdqtool.data.fit import Feeds
from qdqtool.graphs import graph as graphs
from qdqtool.graphs.linear import LINEAR_OPS

_RUNS: Final = 30
_WARM_UP: Final = 5
_SUFFIX: Final = "_kernel_time"


def kernel_times(model: onnx.ModelProto, feeds: Feeds, provider: str = "cpu") -> dict[str, float]:
    """Median time of every kernel in milliseconds, by its name, over some runs on the same inputs."""
    with tempfile.TemporaryDirectory(prefix="qdqtool-") as folder:
        session = runtime.session(model, provider=provider, profile=Path(folder) / "profile")
        for _ in range(_WARM_UP + _RUNS):
            runtime.run(session, None, feeds)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    times: dict[str, list[float]] = defaultdict(list)
    for event in events:
        if event.get("cat") == "Node" and event["name"].endswith(_SUFFIX):
            times[event["name"].removesuffix(_SUFFIX)].append(event["dur"] / 1e3)
    # A name may stand for several kernels: each run adds them up.
    return {
        name: float(np.median(durations[-_RUNS:])) * max(1, len(durations) // (_WARM_UP + _RUNS))
        for name, durations in times.items()
    }


def layer_times(times: Mapping[str, float], chains: Mapping[str, Sequence[str]]) -> dict[str, float]:
    """Time of every layer in milliseconds; of one without a kernel of its own 0.

    Args:
        times: by kernel.
        chains: layer -> names of the nodes that may be fused into its kernel.
    """
    owners = {name: layer for layer, names in chains.items() for name in names}
    found = dict.fromkeys(chains, 0.0)
    for kernel, time in times.items():
        owner = next((owners[name] for name in _prefixes(kernel) if name in owners), None)
        if owner is not None:
            found[owner] += time
    return found


def _prefixes(kernel: str) -> Iterable[str]:
    """The name, and what is left of it without parts behind underscores, the longest first."""
    while kernel:
        yield kernel
        kernel, _, _ = kernel.rpartition("_")


def chains(graph: gs.Graph, layers: Iterable[str]) -> dict[str, list[str]]:
    """Layer -> its node, and the nodes behind it up to the next layer that read nothing but one result each."""
    outputs = graphs.leaving_ids(graph)
    nodes = {node.name: node for node in graph.nodes}
    found = {}
    for layer in layers:
        node, chain = nodes[layer], [layer]
        while len(node.outputs) == 1 and (reader := graphs.single_use(node.outputs[0], outputs)) is not None:
            if reader.op in LINEAR_OPS:
                break
            chain.append(reader.name)
            node = reader
        found[layer] = chain
    return found

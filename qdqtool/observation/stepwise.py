"""A model run stretch by stretch over the same batches, so that it can be changed on the way.

Every node runs once for each batch, whatever the number of stretches; what a later stretch reads is kept until then.
So layer after layer can be chosen by what the layers before it, as they were chosen, really give out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import onnx

from qdqtool import runtime
from qdqtool.data.fit import Feeds
from qdqtool.errors import PipelineError
from qdqtool.graphs.graph import Array
from qdqtool.graphs.scopes import read_by

_CONFIG = {"session.disable_quant_qdq": "1"}  # the arithmetic of the graph as it is written: Q/DQ nodes stay


class Stepwise:
    """A model, what is known of its tensors for each batch, and how far it has run."""

    def __init__(
        self, proto: onnx.ModelProto, batches: Iterable[Feeds], wanted: Iterable[str], *, provider: str = "cpu"
    ) -> None:
        """Nothing has run yet.

        Args:
            proto: the model, nodes in topological order; it is changed by :meth:`replace`.
            batches: what it takes, batch by batch.
            wanted: the tensors that will be taken, as often as they will be.
            provider: where it runs.
        """
        self._proto, self._provider = proto, provider
        self._known: list[dict[str, Array]] = [dict(feeds) for feeds in batches]
        self._wanted = Counter(wanted)
        self._constants = {tensor.name: tensor for tensor in proto.graph.initializer}
        self._nodes = _needed(proto.graph.node, set(self._wanted))
        self._named = {node.name: i for i, node in enumerate(self._nodes)}
        self._place = {name: i for i, node in enumerate(self._nodes) for name in node.output if name}
        self._last: dict[str, int] = {}
        for i, node in enumerate(self._nodes):
            self._last |= dict.fromkeys(read_by(node), i)
        self._next = 0

    def position(self, tensor: str) -> int:
        """Position of the node that computes a tensor; -1 for an input of the model."""
        return self._place.get(tensor, -1)

    def replace(self, node: str, index: int, values: Array) -> None:
        """Let a node that has not run yet read a constant as its input ``index``.

        Nothing happens where nothing that is wanted depends on the node.

        Raises:
            PipelineError: the node has run already.
        """
        place = self._named.get(node)
        if place is None:
            return
        if place < self._next:
            raise PipelineError(f"node {node!r} has run already: its inputs cannot be changed any more")
        name = f"qdqtool.stepwise.{node}.{index}"
        self._constants[name] = onnx.numpy_helper.from_array(values, name)
        self._nodes[place].input[index] = name

    def take(self, tensor: str) -> list[Array]:
        """A wanted tensor, batch by batch; runs the model as far as that needs."""
        stop = self.position(tensor) + 1
        if stop > self._next:
            self._run(self._next, stop)
        found = [known[tensor] for known in self._known]
        self._wanted[tensor] -= 1
        self._drop()
        return found

    def _run(self, start: int, stop: int) -> None:
        nodes = self._nodes[start:stop]
        made = [name for node in nodes for name in node.output if name]
        kept = [name for name in made if self._wanted[name] > 0 or self._last.get(name, -1) >= stop]
        session = runtime.session(self._stretch(nodes, kept), provider=self._provider, config=_CONFIG)
        given = [one.name for one in session.get_inputs()]
        self._next = stop
        for known in self._known:
            results = runtime.run(session, kept, {name: known[name] for name in given})
            known.update(zip(kept, results, strict=True))
        self._drop()

    def _drop(self) -> None:
        """Forget what neither a later stretch reads nor anybody wants."""
        for known in self._known:
            for name in [n for n in known if self._wanted[n] <= 0 and self._last.get(n, -1) < self._next]:
                del known[name]

    def _stretch(self, nodes: Sequence[onnx.NodeProto], outputs: Sequence[str]) -> onnx.ModelProto:
        made = {name for node in nodes for name in node.output}
        read = dict.fromkeys(name for node in nodes for name in read_by(node) if name not in made)
        graph = onnx.GraphProto(name="stretch", node=nodes)
        known: Mapping[str, Array] = self._known[0] if self._known else {}
        for name in read:
            if name in self._constants:
                graph.initializer.append(self._constants[name])
            elif name in known:
                kind = onnx.helper.np_dtype_to_tensor_dtype(known[name].dtype)
                graph.input.append(onnx.helper.make_tensor_value_info(name, kind, None))
        graph.output.extend(onnx.ValueInfoProto(name=name) for name in outputs)
        whole = self._proto
        return onnx.ModelProto(
            ir_version=whole.ir_version, opset_import=whole.opset_import, functions=whole.functions, graph=graph
        )


def _needed(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes on which what is wanted depends, in order."""
    needed, found = set(wanted), []
    for node in reversed(nodes):
        if needed.intersection(node.output):
            found.append(node)
            needed.update(read_by(node))
    return found[::-1]

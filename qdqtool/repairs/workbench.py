"""Quantize one float model by one recipe after another, from a single observation of its activations.

Preparation depends on the recipe only by whether layers are equalized, and statistics on the prepared graph alone: both
are kept, so that a try costs what comes behind them (ranges, rounding, biases, Q/DQ), without verification.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, ClassVar

import numpy as np
import onnx
import onnx_graphsurgeon as gs

from qdqtool.chains import preparation, quantization
from qdqtool.graphs import graph as graphs
from qdqtool.graphs import macs
from qdqtool.graphs import model as models
from qdqtool.observation.calibration import Calibration
from qdqtool.observation.collect import collect
from qdqtool.passes import Observe, RoundWeights, SmoothActivations, Verify
from qdqtool.passes_api import Fact, Pass, PassManager, State, Timing
from qdqtool.pipeline import load
from qdqtool.planning.plan import Key, Plan, params_of
from qdqtool.planning.target import target
from qdqtool.spec import QuantizedWeight, QuantSpec

if TYPE_CHECKING:
    from qdqtool.data.batching import Batching, Sample
    from qdqtool.data.source import Data
    from qdqtool.graphs.model import ModelSource
    from qdqtool.observation.cache import Cache
    from qdqtool.observation.observe import Observing, Progress
    from qdqtool.recipe import Recipe

_KERNEL_BITS = 8
"""Widest codes that integer kernels take."""


@dataclass(frozen=True)
class Trial:
    """A model quantized by a recipe, with what it was made from.

    Attributes:
        recipe: what was chosen.
        proto: the quantized model.
        reference: the prepared float model that it stands for, tensor by tensor, before biases are corrected.
        state: everything the passes found out.
    """

    recipe: Recipe
    proto: onnx.ModelProto
    reference: onnx.ModelProto
    state: State

    @property
    def plan(self) -> Plan:
        """What is quantized and how."""
        assert self.state.plan is not None
        return self.state.plan

    @property
    def size(self) -> int:
        """Bytes of the quantized model."""
        return models.size(self.proto)

    def integer_layers(self) -> set[str]:
        """Names of the nodes that the plan gives to integer kernels; those with wider codes around them have none."""
        plan = self.plan
        wide = {plan.tensors[key] for key in plan.entries if self._is_wide(key)}
        near = {node.name for node in self.reference.graph.node if wide.intersection(node.input)}
        near |= {maker.name for maker in map(self.maker, wide) if maker is not None}
        return {*plan.kernels} - {*plan.weight_only} - near

    @functools.cached_property
    def made(self) -> dict[str, onnx.NodeProto]:
        """Tensor -> the node of the prepared model that computes it."""
        return {name: node for node in self.reference.graph.node for name in node.output}

    def maker(self, tensor: str) -> onnx.NodeProto | None:
        """The planned node that puts a tensor out in integers, seen through what fuses with it or moves its values."""
        node = self.made.get(tensor)
        while node is not None and node.name not in self.plan.kernels:
            node = self.made.get(node.input[0]) if node.input else None
        return node

    def _is_wide(self, key: Key) -> bool:
        spec = self.plan.entries[self.plan.resolve(key)]
        return isinstance(spec, QuantSpec) and spec.format.bits > _KERNEL_BITS


@dataclass
class Memory:
    """What was observed of one prepared model, and how its samples are cut."""

    calibration: Calibration | None = None
    held: tuple[Sample, ...] = ()
    notes: dict[str, None] = field(default_factory=dict)


@dataclass(frozen=True)
class Recall:
    """Take statistics from memory, and observe only what is not there yet."""

    memory: Memory

    name: ClassVar[str] = "recall-statistics"
    needs: ClassVar[frozenset[Fact]] = Observe.needs
    gives: ClassVar[frozenset[Fact]] = Observe.gives
    drops: ClassVar[frozenset[Fact]] = Observe.drops

    def run(self, state: State) -> int:
        """Set ``state.statistics``, ``state.held`` and ``state.batching``; returns the number of tensors."""
        assert state.plan is not None
        assert state.data is not None
        tensors, axes = state.plan.observed(), state.plan.channel_axes()
        known = self.memory.calibration
        if known is None or not all(known.has(name, axes.get(name)) for name in tensors):
            seen = [] if known is None else [*known.statistics.tensors]
            found = collect(
                models.to_proto(state.graph, state.header),
                [*dict.fromkeys([*seen, *tensors])],
                state.data,
                axes=axes,
                samples=state.recipe.samples,
                provider=state.provider,
                options=state.observing,
                cache=state.cache,
                progress=state.progress,
            )
            known, self.memory.held = found.calibration, found.held
            self.memory.calibration = known
            self.memory.notes |= dict.fromkeys(found.notes)
        state.calibration = known.of(tensors)
        state.statistics, state.batching = state.calibration.statistics, state.calibration.batching
        state.held = self.memory.held
        return len(tensors)


@dataclass(frozen=True)
class KeepCodes:
    """Round only weights that were not rounded before, from the same values by the same scales.

    That is near to rounding all anew, not the same: codes may follow from what comes before a layer, too.

    Attributes:
        rounding: the pass that rounds.
        codes: what was rounded before, by content; grows.
    """

    rounding: RoundWeights
    codes: dict[tuple[object, ...], QuantizedWeight]

    name: ClassVar[str] = "keep-codes"
    needs: ClassVar[frozenset[Fact]] = RoundWeights.needs
    gives: ClassVar[frozenset[Fact]] = RoundWeights.gives
    drops: ClassVar[frozenset[Fact]] = RoundWeights.drops

    def run(self, state: State) -> int:
        """Change codes in ``state.params``; returns the number of weights rounded anew."""
        assert state.plan is not None
        assert state.params is not None
        plan, tensors = state.plan, graphs.all_tensors(state.graph)
        contents = {key: self._content(state, key, tensors) for key in plan.constants if key in state.params}
        state.params = {**state.params, **{key: self.codes[one] for key, one in contents.items() if one in self.codes}}
        fresh = frozenset(key for key, one in contents.items() if one not in self.codes)
        state.plan = replace(plan, constants=fresh | (plan.constants - contents.keys()))
        count = self.rounding.run(state) if fresh else 0
        state.plan = plan
        for key in fresh:
            value = state.params[key]
            if isinstance(value, QuantizedWeight):
                self.codes[contents[key]] = value
        return count

    def _content(self, state: State, key: Key, tensors: Mapping[str, gs.Tensor]) -> tuple[object, ...]:
        """What the codes follow from: the layer, the weight's values, and its parameters before rounding."""
        assert state.plan is not None
        assert state.params is not None
        params = params_of(state.params[key])
        values = np.ascontiguousarray(graphs.constant(tensors[state.plan.tensors[key]]))
        digest = hashlib.blake2b(values.tobytes(), digest_size=16).digest()
        numbers = (params.scale, params.zero_point, params.channel_bits)
        return (self.rounding, key, digest, params.spec, *(None if one is None else one.tobytes() for one in numbers))


class Workbench:
    """Makes a :class:`Trial` of a recipe.

    Attributes:
        original: the float model as it was given.
        tries: how many models were quantized so far.
    """

    def __init__(
        self,
        model: ModelSource,
        data: Data,
        *,
        provider: str = "auto",
        observing: Observing | None = None,
        cache: Cache | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.original = models.load(model)
        self.tries = 0
        self._data, self._provider = data, provider
        self._observing, self._cache, self._progress = observing, cache, progress
        self._prepared: dict[bool, State] = {}
        self._memories: dict[bool, Memory] = {}
        self._codes: dict[tuple[object, ...], QuantizedWeight] = {}

    def quantize(self, recipe: Recipe, *, exactly: bool = False) -> Trial:
        """Quantize by a recipe; ``exactly``: nothing is kept of how weights were rounded before.

        Raises:
            QdqError: the recipe does not fit the model.
        """
        self.tries += 1
        if exactly:
            self._codes.clear()
        state = self._start(recipe)
        recall = Recall(self.memory(recipe))
        steps = [self._instead(step, recall) for step in quantization(recipe) if not isinstance(step, Verify)]
        snapshots: list[onnx.ModelProto] = []

        def snapshot(step: Pass, now: State, _: Timing) -> None:
            if isinstance(step, Recall | SmoothActivations):
                snapshots[:] = [models.to_proto(now.graph, now.header)]

        facts = PassManager(preparation(recipe)).check() | {Fact.DATA}
        PassManager(steps, snapshot).run(state, facts)
        assert state.quantized is not None
        return Trial(recipe, models.to_proto(state.quantized, state.header), snapshots[0], state)

    def _instead(self, step: Pass, recall: Recall) -> Pass:
        """A pass of the pipeline, or what does the same from memory."""
        if isinstance(step, Observe):
            return recall
        return KeepCodes(step, self._codes) if isinstance(step, RoundWeights) else step

    def exact(self, trial: Trial) -> Trial:
        """The same as the pipeline makes it, where weights were not all rounded anew; not counted."""
        if trial.recipe.rounding == "nearest":
            return trial
        self.tries -= 1
        return self.quantize(trial.recipe, exactly=True)

    def uncorrected(self, trial: Trial) -> Trial:
        """The same without bias correction, which shifts a layer for the sake of those before it; not counted."""
        if not trial.recipe.bias_correction:
            return trial
        self.tries -= 1
        return self.quantize(trial.recipe.model_copy(update={"bias_correction": False}))

    def memory(self, recipe: Recipe) -> Memory:
        """What was observed for recipes that prepare the model as this one does."""
        return self._memories.setdefault(recipe.equalized, Memory())

    def batching(self, recipe: Recipe) -> Batching:
        """How samples are cut out of the data, once something was quantized."""
        calibration = self.memory(recipe).calibration
        assert calibration is not None
        return calibration.batching

    def _start(self, recipe: Recipe) -> State:
        """The prepared float model for a recipe: a copy of the graph, whose constants are shared."""
        if recipe.equalized not in self._prepared:
            state, facts = load(self.original, recipe, self._provider)
            PassManager(preparation(recipe)).run(state, facts)
            state.data, state.cache = self._data, self._cache
            state.observing, state.progress = self._observing, self._progress
            self._prepared[recipe.equalized] = state
        known = self._prepared[recipe.equalized]
        return replace(
            known,
            graph=graphs.copy(known.graph),
            recipe=recipe,
            target=target(recipe.target),
            skipped=list(known.skipped),
            notes=list(known.notes),
            origins=dict(known.origins),
            batchnorms=dict(known.batchnorms),
            compared={},
        )


def multiply_accumulates(trial: Trial) -> dict[str, int]:
    """Multiply-accumulates of each layer on one sample, by node."""
    feeds = trial.state.held[0].feeds if trial.state.held else None
    return dict(macs.count(trial.reference, (), feeds).layers)

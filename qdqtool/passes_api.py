"""What a graph pass is, what passes share, and the manager that runs a chain of them.

A pass is a frozen dataclass whose fields are its options. It declares the facts it needs, gives and drops; the manager
checks the whole chain before anything runs, so that a wrong order is an error about passes and not about tensors.
"""

from __future__ import annotations

import enum
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Protocol, runtime_checkable

from qdqtool.errors import PipelineError, QdqError

if TYPE_CHECKING:
    import onnx
    import onnx_graphsurgeon as gs

    from qdqtool.data.batching import Batching, Sample
    from qdqtool.data.source import Data
    from qdqtool.graphs.model import Header
    from qdqtool.observation.cache import Cache
    from qdqtool.observation.calibration import Calibration
    from qdqtool.observation.observe import Observing, Progress
    from qdqtool.planning.plan import Key, Parameters, Plan
    from qdqtool.planning.target import Target
    from qdqtool.recipe import Recipe
    from qdqtool.statistics.tensor import Statistics
    from qdqtool.verification.comparison import Comparison
    from qdqtool.verification.listing import Placed
    from qdqtool.verification.partition import Partition
    from qdqtool.verification.placement import Placement


class Fact(enum.StrEnum):
    """Something true of a model between two passes."""

    SHAPES = "tensor shapes are inferred"
    FOLDED = "constants are folded"
    DATA = "calibration data can be replayed"
    PLAN = "every use that will be quantized is planned"
    STATISTICS = "every planned activation is observed"
    PARAMS = "every planned use has scale and zero point"
    QDQ = "Q/DQ nodes are inserted"


GRAPH_FACTS = frozenset({Fact.SHAPES, Fact.PLAN, Fact.STATISTICS, Fact.PARAMS})
"""What a pass drops that changes the graph's structure."""


@dataclass(frozen=True)
class Skip:
    """A candidate that a pass left alone."""

    pass_name: str
    node: str
    reason: str


@dataclass(frozen=True)
class Timing:
    """One pass that ran: at how many places it changed something, and its wall time in seconds."""

    pass_name: str
    changes: int
    seconds: float


@dataclass
class State:
    """The model between two passes: the graph, and beside it what has been found out so far.

    ``plan``, ``statistics``, ``params``, ``data`` and ``quantized`` are None until the fact of their name holds.
    """

    graph: gs.Graph
    header: Header
    recipe: Recipe
    target: Target
    data: Data | None = None
    plan: Plan | None = None
    statistics: Statistics | None = None
    params: Parameters | None = None
    compared: dict[Key, Mapping[str, float]] = field(default_factory=dict)
    """Where a calibrator chose among others: the expected squared error of each, by name."""
    quantized: gs.Graph | None = None
    held: tuple[Sample, ...] = ()
    """Samples for bias correction and verification, chosen by content while observing."""
    batching: Batching | None = None
    calibration: Calibration | None = None
    """What ``statistics`` were taken from, and belong to."""
    observing: Observing | None = None
    cache: Cache | None = None
    """Where statistics are kept from run to run."""
    provider: str = "cpu"
    progress: Progress | None = None
    original: onnx.ModelProto | None = None
    """The model as it was given: the reference that the quantized one is verified against."""
    float_sha256: str = ""
    float_bytes: int = 0
    """Hash and size of that model, taken before its nodes got names."""
    verified: Comparison | None = None
    kernels: Mapping[str, int] = field(default_factory=dict)
    """Operator -> count in the graph that the runtime makes of the quantized model."""
    placement: Placement | None = None
    """What became of the planned nodes, where the target's runtime is here to ask."""
    partition: Partition | None = None
    """Which provider runs which node, where it is not the CPU alone."""
    listing: tuple[Placed, ...] = ()
    """Where every node and every Q/DQ pair runs."""
    shapes_current: bool = False
    """Whether nothing has changed since shapes were inferred, so that inferring again would find nothing new."""
    skipped: list[Skip] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    user_nodes: frozenset[str] = frozenset()
    user_tensors: frozenset[str] = frozenset()
    """Names of nodes and tensors in the model as it was given, which a recipe may use."""
    origins: dict[str, tuple[str, ...]] = field(default_factory=dict)
    """Fused node -> names of the user's nodes in it, so that excluding one of them excludes the fused node."""
    batchnorms: dict[str, tuple[object, object]] = field(default_factory=dict)
    """Tensor -> (beta, abs(gamma)) of the BatchNormalization folded into its producer, float64 arrays (channels,)."""

    def skip(self, pass_name: str, node: str, reason: str) -> None:
        """Record a candidate left alone; the report shows it."""
        self.skipped.append(Skip(pass_name, node, reason))

    def merged(self, into: str, *parts: str) -> None:
        """Record that node ``into`` now does the work of the nodes ``parts`` too."""
        names = [name for part in (into, *parts) for name in self.origins.pop(part, (part,))]
        self.origins[into] = tuple(dict.fromkeys(names))


@runtime_checkable
class Pass(Protocol):
    """One step from model to model; implementations are frozen dataclasses whose fields are the pass's options."""

    name: ClassVar[str]
    needs: ClassVar[frozenset[Fact]]
    gives: ClassVar[frozenset[Fact]]
    drops: ClassVar[frozenset[Fact]]

    def run(self, state: State) -> int:
        """Change ``state`` in place; returns at how many places."""
        ...


Callback = Callable[[Pass, State, Timing], None]


@dataclass(frozen=True)
class PassManager:
    """Runs passes in order after checking that each finds the facts it needs.

    Attributes:
        passes: the chain.
        callback: called after every pass with the pass, the state and its timing; may raise, the pass is named then.
    """

    passes: Sequence[Pass]
    callback: Callback | None = None

    def check(self, facts: frozenset[Fact] = frozenset()) -> frozenset[Fact]:
        """Follow the facts through the chain, from ``facts``; returns those that hold at the end.

        Raises:
            PipelineError: a pass needs a fact that does not hold where it stands; names the pass that gives it.
        """
        for position, step in enumerate(self.passes):
            for fact in sorted(step.needs - facts):
                raise PipelineError(self._missing(position, step, fact))
            facts = (facts - step.drops) | step.gives
        return facts

    def _missing(self, position: int, step: Pass, fact: Fact) -> str:
        givers = [p.name for p in self.passes[position + 1 :] if fact in p.gives]
        droppers = [p.name for p in self.passes[:position] if fact in p.drops]
        if givers:
            remedy = f"move {givers[0]!r} before it"
        elif droppers:
            remedy = f"{droppers[-1]!r} before it undoes that; run the pass that gives it again in between"
        elif fact is Fact.DATA:
            remedy = "give calibration data"
        else:
            remedy = "add a pass that gives it"
        return f"pass {step.name!r} needs that {fact.value}; {remedy}"

    def run(self, state: State, facts: frozenset[Fact] = frozenset()) -> tuple[Timing, ...]:
        """Check the chain, run it, and return what each pass did.

        Raises:
            PipelineError: the chain cannot work, or a pass failed (the error names it and what ran before).
        """
        self.check(facts)
        done: list[Timing] = []
        for step in self.passes:
            start = time.perf_counter()
            try:
                changes = step.run(state)
                timing = Timing(step.name, changes, time.perf_counter() - start)
                state.shapes_current &= changes == 0 or Fact.SHAPES in step.gives
                if self.callback is not None:
                    self.callback(step, state, timing)
            except QdqError:
                raise
            except Exception as error:
                before = ", ".join(t.pass_name for t in done) or "nothing"
                raise PipelineError(
                    f"pass {step.name!r} failed: {type(error).__name__}: {error} (ran before it: {before})"
                ) from error
            done.append(timing)
        return tuple(done)


def describe(catalogue: Mapping[str, type]) -> dict[str, str]:
    """First line of each entry's docstring, for listings."""
    return {name: (entry.__doc__ or "").strip().splitlines()[0] for name, entry in catalogue.items()}

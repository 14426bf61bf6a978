"""What will be quantized and how, before any number is known: values that can be printed and compared.

A plan's key is a *use* (a node reading a tensor at one input) or an *output* (a tensor as its producer puts it out).
One tensor may be int8 for one reader and float for another, and one bias may serve two layers; uses that agree share
one Q/DQ pair when inserted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from qdqtool.spec import QuantizedWeight, QuantParams, QuantSpec


@dataclass(frozen=True)
class Use:
    """Node ``node`` reading its input ``index``.

    ``graph`` is the path of the graph it is in ("" for the top). It is for those who read a plan: names of nodes and
    tensors are unique in a model, so it does not count where keys are compared.
    """

    node: str
    index: int
    graph: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.graph}::{self.node}::{self.index}"


@dataclass(frozen=True)
class Output:
    """Tensor ``tensor`` as its producer puts it out; readers then read the quantized tensor. ``graph`` as in Use."""

    tensor: str
    graph: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.graph}::{self.tensor}"


Key = Use | Output


@dataclass(frozen=True)
class SharedWith:
    """Quantized with exactly the parameters of another key (a Concat's inputs, what a MaxPool hands on)."""

    key: Key


@dataclass(frozen=True)
class DerivedFrom:
    """A bias in int32 whose scale is the product of an activation's and a weight's scale, and whose zero point is 0."""

    activation: Key
    weight: Key


Entry = QuantSpec | SharedWith | DerivedFrom


@dataclass(frozen=True)
class Plan:
    """Every key that will be quantized.

    Attributes:
        entries: what happens at each key.
        tensors: the tensor that each key reads or puts out.
        constants: keys whose tensor is a constant, so that its codes are stored in the file.
        kernels: nodes that are to run in integer arithmetic on the target, by name -> operator.
        weight_only: nodes whose weight alone is stored in integers.
        watched: tensors whose statistics are wanted although they stay float.
        channels: observed tensors whose channels are wanted too, although they share a range -> channel axis.
    """

    entries: Mapping[Key, Entry] = field(default_factory=dict)
    tensors: Mapping[Key, str] = field(default_factory=dict)
    constants: frozenset[Key] = frozenset()
    kernels: Mapping[str, str] = field(default_factory=dict)
    weight_only: frozenset[str] = frozenset()
    watched: tuple[str, ...] = ()
    channels: Mapping[str, int] = field(default_factory=dict)

    def resolve(self, key: Key) -> Key:
        """The key whose parameters ``key`` uses, at the end of a chain of sharing."""
        entry = self.entries[key]
        while isinstance(entry, SharedWith):
            key = entry.key
            entry = self.entries[key]
        return key

    def specs(self) -> Iterator[tuple[Key, QuantSpec]]:
        """Keys that have a spec of their own, in order."""
        for key, entry in self.entries.items():
            if isinstance(entry, QuantSpec):
                yield key, entry

    def observed(self) -> tuple[str, ...]:
        """Tensors whose statistics are needed, in order, once each."""
        wanted = [self.tensors[key] for key, spec in self.specs() if key not in self.constants and spec.fixed is None]
        return tuple(dict.fromkeys([*wanted, *self.watched]))

    def channel_axes(self) -> dict[str, int]:
        """Observed tensor -> its channel axis, where each channel's statistics are wanted."""
        ranged = {
            self.tensors[key]: spec.granularity.axis
            for key, spec in self.specs()
            if key not in self.constants and spec.fixed is None and spec.granularity.axis is not None
        }
        return {**self.channels, **ranged}

    def activation_of(self, node: str, index: int, tensor: str) -> Key | None:
        """The key under which a node's input is quantized: its own use, or what its tensor's producer puts out."""
        for key in (Use(node, index), Output(tensor)):
            if key in self.entries:
                return key
        return None


Parameters = Mapping[Key, QuantParams | QuantizedWeight]
"""Numbers for every key that has a spec of its own; shared and derived keys follow from them."""


def params_of(value: QuantParams | QuantizedWeight) -> QuantParams:
    """The scale and zero point behind either kind of value."""
    return value.params if isinstance(value, QuantizedWeight) else value

"""What can be done for a layer, from cheapest to dearest, each as changes of the recipe.

``calibrator``    another range for an activation that the layer reads, or puts out at the model's end: costs nothing;
``bias``          bias correction: costs nothing;
``equalization``  consecutive layers rescaled: costs nothing;
``smoothing``     channels of activations made alike: at most a Mul behind a model input;
``granularity``   a scale for each output channel of the weight: the bytes of the scales;
``rounding``      weight scales of least squared error, weights rounded by GPTQ: time while quantizing;
``bits``          8 bits where it has fewer, then 16 bits for what it reads: bytes, and integer kernels;
``float``         the layer, and then what puts out its inputs as well, left in float: bytes and integer kernels.

Every remedy is a function of the trial at hand and a layer, and gives candidates; it gives none, and a reason, where
there is nothing to do.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Final

import numpy as np
import onnx

from qdqtool import registry
from qdqtool.graphs import graph as graphs
from qdqtool.graphs.linear import channel_axis_of_weight
from qdqtool.passes.choose_ranges import activation_params
from qdqtool.planning.plan import Key, Output, Use, params_of
from qdqtool.planning.precision import width
from qdqtool.recipe import Override, Recipe
from qdqtool.repairs.workbench import Trial
from qdqtool.spec import QuantParams, QuantSpec

_RANGES: Final = ("minmax", "mse", "percentile", "entropy")
"""Calibrators to try: everything seen, least error, and two that clip more; others lie in between."""
_CHANNEL_RANGES: Final = ("minmax", "aciq")
_SAME: Final = 0.02
"""Ranges whose scales differ by less are the same: it changes no SQNR by a noticeable amount."""
_USUAL_BITS: Final = 8
Fields = dict[str, Any]


@dataclass(frozen=True)
class Candidate:
    """A recipe to try, and what it changes in words."""

    recipe: Recipe
    change: str


@dataclass(frozen=True)
class Site:
    """A layer of a trial that is to be mended."""

    trial: Trial
    node: onnx.NodeProto

    @property
    def recipe(self) -> Recipe:
        """What the trial was made by."""
        return self.trial.recipe

    def activations(self) -> dict[str, Key]:
        """Tensor -> the key that its range comes from, of what the layer reads and of a model output it puts out."""
        plan = self.trial.plan
        keys = [plan.activation_of(self.node.name, index, name) for index, name in enumerate(self.node.input)]
        given = [value.name for value in self.trial.reference.graph.output]
        ends = [Output(name) for name in given if Output(name) in plan.entries]
        keys += [key for key in ends if (maker := self.trial.maker(key.tensor)) and maker.name == self.node.name]
        roots = [plan.resolve(key) for key in keys if key is not None]
        return {plan.tensors[key]: key for key in roots if key not in plan.constants and self._spec(key) is not None}

    def weight(self) -> tuple[str, QuantSpec] | None:
        """Name and spec of the layer's constant weight; None where it has none in integers."""
        key, plan = Use(self.node.name, 1), self.trial.plan
        spec = self._spec(key) if key in plan.constants else None
        return None if spec is None else (plan.tensors[key], spec)

    def spec(self, key: Key) -> QuantSpec:
        """The spec at a key of :meth:`activations`."""
        found = self._spec(key)
        assert found is not None
        return found

    def _spec(self, key: Key) -> QuantSpec | None:
        entry = self.trial.plan.entries.get(key)
        return entry if isinstance(entry, QuantSpec) else None


Remedy = Callable[[Site], Iterator[Candidate]]


def changed(recipe: Recipe, **fields: object) -> Recipe:
    """The recipe with other fields."""
    return Recipe.of({**recipe.values(), **fields})


def _fields(override: Override | None) -> Fields:
    return {} if override is None else override.model_dump(mode="json", exclude_none=True)


def _with_tensor(recipe: Recipe, tensor: str, **fields: object) -> Recipe:
    """The recipe with fields of one tensor's override changed; None takes a field out."""
    overrides = {name: _fields(one) for name, one in recipe.tensors.items()}
    merged = {**overrides.get(tensor, {}), **fields}
    overrides[tensor] = {name: value for name, value in merged.items() if value is not None}
    return changed(recipe, tensors={name: one for name, one in overrides.items() if one})


def _matching(recipe: Recipe, site: Site) -> str | None:
    """The pattern whose override the layer has."""
    parts = {site.node.name, *site.trial.state.origins.get(site.node.name, ())}
    return next((p for p in recipe.nodes if any(re.fullmatch(p, part) for part in parts)), None)


def _with_node(site: Site, **fields: object) -> Recipe:
    """The recipe with fields of the layer's override changed; the first pattern that matches a node counts."""
    recipe, pattern = site.recipe, _matching(site.recipe, site)
    own = re.escape(site.node.name)
    merged = {**_fields(recipe.nodes.get(pattern) if pattern is not None else None), **fields}
    kept = {name: value for name, value in merged.items() if value is not None}
    others = {name: _fields(one) for name, one in recipe.nodes.items() if name != own}
    return changed(recipe, nodes={own: kept, **others} if kept else others)


def calibrator(site: Site) -> Iterator[Candidate]:
    """Other ranges for what the layer reads: without a range that was set, then by other calibrators."""
    override = _matching(site.recipe, site)
    if override is not None and site.recipe.nodes[override].range is not None:
        name = site.recipe.calibrator.name
        yield Candidate(_with_node(site, range=None), f"range of its inputs chosen by {name} instead of set")
    for tensor, key in site.activations().items():
        spec, known = site.spec(key), site.recipe.tensors.get(tensor)
        if known is not None and known.range is not None:
            recipe = _with_tensor(site.recipe, tensor, range=None)
            yield Candidate(recipe, f"range of {tensor} chosen by {recipe.calibrator.name} instead of set")
        elif spec.fixed is None:
            for name in _different_ranges(site, tensor, key):
                yield Candidate(
                    _with_tensor(site.recipe, tensor, calibrator={"name": name}), f"range of {tensor} by {name}"
                )


def _different_ranges(site: Site, tensor: str, key: Key) -> Iterator[str]:
    """Calibrators that choose another range than the tensor has, each other range once."""
    state, spec = site.trial.state, site.spec(key)
    assert state.statistics is not None
    assert state.params is not None
    seen = [params_of(state.params[key])]
    for name in _RANGES if spec.granularity.axis is None else _CHANNEL_RANGES:
        made = activation_params(registry.make("calibrators", name, {}), state.statistics[tensor], spec)[0]
        if not any(_alike(made, other) for other in seen):
            seen.append(made)
            yield name


def _alike(one: QuantParams, other: QuantParams) -> bool:
    zero = np.abs(one.zero_point - other.zero_point).max(initial=0)
    return bool(zero <= 1 and np.allclose(one.scale, other.scale, rtol=_SAME))


def bias(site: Site) -> Iterator[Candidate]:
    """Bias correction, where it was off."""
    if not site.recipe.bias_correction:
        yield Candidate(changed(site.recipe, bias_correction=True), "biases corrected in the whole model")


def equalization(site: Site) -> Iterator[Candidate]:
    """Equalization, where it was off."""
    if not site.recipe.equalized:
        yield Candidate(changed(site.recipe, equalization=True), "consecutive layers equalized in the whole model")


def smoothing(site: Site) -> Iterator[Candidate]:
    """Smoothing of all kinds, where some were off."""
    if site.recipe.smoothing != "all":
        yield Candidate(changed(site.recipe, smoothing="all"), "activations smoothed in the whole model")


def granularity(site: Site) -> Iterator[Candidate]:
    """A scale for each output channel of the weight, where it has one for all."""
    found, nodes = site.weight(), {node.name: node for node in graphs.all_nodes(site.trial.state.graph)}
    if found is None or found[1].granularity.axis is not None or site.node.name not in nodes:
        return
    if channel_axis_of_weight(nodes[site.node.name]) is not None:
        recipe = _with_tensor(site.recipe, found[0], granularity="per_channel")
        yield Candidate(recipe, f"a scale for each channel of {found[0]}")


def rounding(site: Site) -> Iterator[Candidate]:
    """Weights with scales of least squared error, and rounded by GPTQ."""
    recipe = site.recipe
    if site.weight() is None:
        return
    if recipe.weight_calibrator != "mse":
        yield Candidate(
            changed(recipe, weight_calibrator="mse"), "weight scales of least squared error in the whole model"
        )
    if recipe.weight_rounding != "gptq" and not (recipe.weight_rounding == "auto" and recipe.rounding == "gptq"):
        yield Candidate(changed(recipe, weight_rounding="gptq"), "weights rounded by GPTQ in the whole model")


def bits(site: Site) -> Iterator[Candidate]:
    """8 bits for weight and inputs that have fewer, then 16 bits for the inputs where the target has them."""
    found, read = site.weight(), site.activations()
    weights = _USUAL_BITS if found is None else min(width(found[1]), _USUAL_BITS)
    inputs = min([_USUAL_BITS, *(width(site.spec(key)) for key in read.values())])
    if weights < _USUAL_BITS and inputs < _USUAL_BITS:
        yield Candidate(_with_node(site, precision=f"w8a{inputs}"), "its weight in 8 bits")
        yield Candidate(_with_node(site, precision=f"w{weights}a8"), "its inputs in 8 bits")
    if weights < _USUAL_BITS or inputs < _USUAL_BITS:
        yield Candidate(_with_node(site, precision="w8a8"), "its weight and inputs in 8 bits")
    elif site.trial.state.target.for_cpu:
        wider = "int16" if site.trial.state.target.activation_symmetric else "uint16"
        recipe = site.recipe
        narrow = [tensor for tensor, key in read.items() if width(site.spec(key)) <= _USUAL_BITS]
        for tensor in narrow:
            recipe = _with_tensor(recipe, tensor, dtype=wider)
        if narrow:
            yield Candidate(recipe, f"{', '.join(narrow)} in 16 bits")


def to_float(site: Site) -> Iterator[Candidate]:
    """The layer in float; then with it the layers whose kernels put out its inputs in integers."""
    yield Candidate(_excluding(site, []), "left in float")
    makers = _makers(site)
    if makers:
        yield Candidate(_excluding(site, makers), f"left in float with {', '.join(makers)}, which it reads")


def _excluding(site: Site, others: list[str]) -> Recipe:
    """The recipe without the layer and others, and without overrides of tensors that then stay float."""
    recipe, names = site.recipe, [site.node.name, *others]
    plan = site.trial.plan
    read_by: dict[str, set[str]] = {}
    for node in site.trial.reference.graph.node:
        for index, name in enumerate(node.input):
            key = plan.activation_of(node.name, index, name)
            if key is not None:
                read_by.setdefault(plan.tensors[plan.resolve(key)], set()).add(node.name)
    kept = {}
    for name, override in recipe.tensors.items():
        maker = site.trial.maker(name) if Output(name) in plan.entries else None
        if not (read_by.get(name, set()) <= {*names} and (maker is None or maker.name in names)):
            kept[name] = _fields(override)
    excluded = [*dict.fromkeys([*recipe.nodes_to_exclude, *map(re.escape, names)])]
    return changed(recipe, nodes_to_exclude=excluded, tensors=kept)


def _makers(site: Site) -> list[str]:
    """Nodes of the plan that put out the layer's inputs in integers."""
    plan, found = site.trial.plan, dict[str, None]()
    for key in site.activations().values():
        node = site.trial.maker(plan.tensors[key]) if isinstance(key, Output) else None
        if node is not None and node.name != site.node.name:
            found[node.name] = None
    return [*found]


REMEDIES: Final[Mapping[str, Remedy]] = MappingProxyType(
    {
        "calibrator": calibrator,
        "bias": bias,
        "equalization": equalization,
        "smoothing": smoothing,
        "granularity": granularity,
        "rounding": rounding,
        "bits": bits,
        "float": to_float,
    }
)
"""By the name that --allow takes, from cheapest to dearest."""
MODEL_WIDE: Final = frozenset({"bias", "equalization", "smoothing", "rounding"})
"""Remedies that the recipe has for the whole model alone: tried once, whichever layer asks first."""

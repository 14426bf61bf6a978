"""Where the error of a quantized model is made: what each layer adds itself, and what it takes over.

With NSR the power of the noise over that of the signal (an SQNR of d dB is an NSR of 10^(-d/10)), a layer's output has

    own         what the rounding of its inputs, weight and bias alone does, every input coming from the float model;
    total       what has come together up to there;
    inherited   the rest: max(0, NSR_total - NSR_own).

Biases are corrected for what a layer is handed too, which would look like an error of its own: its own NSR is the
lesser of those with and without the correction. The rounding of a model output belongs to what makes it. A layer's
share is its own NSR over the sum of all layers' own.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from qdqtool.arithmetic import affine
from qdqtool.planning.plan import Output, params_of
from qdqtool.planning.precision import width
from qdqtool.planning.target import Emit
from qdqtool.repairs.workbench import Trial
from qdqtool.report.values import plain
from qdqtool.spec import QuantSpec
from qdqtool.verification import tensor_error
from qdqtool.verification.sqnr import Sqnr

if TYPE_CHECKING:
    from qdqtool.data.batching import Batch

_DOMINANT: Final = 0.5
"""Share from which on a layer makes more noise than all others together."""
_FEW: Final = 4
_USUAL_BITS: Final = 8
_BIT: Final = 6.02
"""dB that a bit more of width is worth: 20 log10 2."""
_BELOW: Final = 14.0
"""dB that values of natural tensors lie below the b * 6.02 of a full-scale uniform one, at b bits."""
_BELOW_AT_OUTPUT: Final = 23.0
"""The same for outputs, where the errors of many layers have come together: 25 dB at 8 bits."""
MARGIN: Final = 6.0
"""dB, about a bit, that a layer must be worse than usual to be one that hurts."""


@dataclass(frozen=True)
class LayerError:
    """The error of one layer.

    Attributes:
        node: its name in the prepared model.
        op: its operator.
        tensor: what it puts out.
        own_db: SQNR in dB with this layer alone quantized.
        total_db: SQNR in dB with everything before it quantized too.
        inherited_db: what is left of that without its own error: the SQNR that it was handed.
        share: its own noise among that of all layers, 0 to 1.
        usual_db: what could be expected of it: what its bits give; of one with most of the noise, a bit less than the
            median layer has, where that is more.
        hurts: whether it is worse than usual by more than a bit.
    """

    node: str
    op: str
    tensor: str
    own_db: float
    total_db: float
    inherited_db: float
    share: float
    usual_db: float
    hurts: bool


@dataclass(frozen=True)
class Analysis:
    """The error of every layer, in the model's order.

    Attributes:
        layers: all that read or make integers.
        samples: on how many samples this was measured.
        outputs: SQNR in dB of every model output.
        usual_db: what could be expected of the outputs at the fewest bits that a layer has.
        alone: whether layers could be measured alone; else own errors follow from those before and behind them.
    """

    layers: tuple[LayerError, ...]
    samples: int
    outputs: Mapping[str, float]
    usual_db: float
    alone: bool = True

    def suspects(self) -> list[LayerError]:
        """The layers that hurt, the worst first; where none does and outputs are bad all the same, the worst few."""
        ordered = self.worst_first()
        hurting = [layer for layer in ordered if layer.hurts]
        if hurting or min(self.outputs.values(), default=math.inf) >= self.usual_db:
            return hurting
        return ordered[:_FEW]

    def worst_first(self) -> list[LayerError]:
        """The layers in the order of their own noise."""
        return sorted(self.layers, key=lambda layer: -layer.share)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; infinite figures become the strings "inf" and "-inf"."""
        import dataclasses

        values: dict[str, Any] = plain(dataclasses.asdict(self))
        return values


def analyse(
    trial: Trial, plain: Trial, batches: Sequence[Batch], outputs: Mapping[str, float], provider: str = "cpu"
) -> Analysis:
    """Measure every layer of a quantized model on samples.

    Args:
        trial: the model and what it was made from.
        plain: the same without bias correction.
        batches: the samples.
        outputs: SQNR of the model's outputs in dB, for the record.
        provider: execution provider, already known to load.
    """
    total = tensor_error.cumulative(trial.reference, trial.proto, batches, provider)
    forms = [trial] if plain is trial else [trial, plain]
    own = [tensor_error.local(one.reference, one.proto, batches, provider) for one in forms]
    alone = all(own)
    noise = {name: nsr(max(one.get(name, db) for one in own)) for name, db in own[0].items()} if alone else {}
    if not alone:
        noise = {name: nsr(db) for name, db in _falls(trial, total).items()}
    for name, added in _output_noise(trial, batches, provider).items():
        maker = trial.maker(name)
        tensor = name if maker is None else maker.output[0]
        noise[tensor] = noise.get(tensor, 0.0) + added
        total[tensor] = outputs.get(name, total.get(tensor, math.inf))
    layers = _layers(trial, noise, total)
    samples = sum(len(batch.samples) for batch in batches)
    bits = min((_bits(trial, node.name, node.input) for node in trial.reference.graph.node), default=_USUAL_BITS)
    return Analysis(tuple(layers), samples, dict(outputs), _BIT * bits - _BELOW_AT_OUTPUT, alone)


def nsr(db: float) -> float:
    """Noise over signal of an SQNR in dB."""
    return math.inf if db == -math.inf else 10 ** (-db / 10)


def decibels(ratio: float) -> float:
    """SQNR in dB of a noise over signal."""
    return math.inf if ratio <= 0 else -10 * math.log10(ratio) if math.isfinite(ratio) else -math.inf


def _falls(trial: Trial, total: Mapping[str, float]) -> dict[str, float]:
    """By how much more noise leaves a layer than enters it, in dB: where none can be measured alone."""
    found: dict[str, float] = {}
    for node in trial.reference.graph.node:
        before = max((nsr(total[name]) for name in node.input if name in total), default=0.0)
        found |= {name: decibels(nsr(total[name]) - before) for name in node.output if name in total}
    return found


def _output_noise(trial: Trial, batches: Sequence[Batch], provider: str) -> dict[str, float]:
    """NSR of rounding each model output that is put out in integers."""
    from qdqtool import runtime
    from qdqtool.observation.observe import with_outputs

    given = {value.name for value in trial.reference.graph.output}
    keys = [key for key in trial.plan.entries if isinstance(key, Output) and key.tensor in given]
    if not keys:
        return {}
    names = [key.tensor for key in keys]
    active = runtime.session(with_outputs(trial.reference, names), provider=provider)
    sums = {name: Sqnr() for name in names}
    assert trial.state.params is not None
    for batch in batches:
        for key, value in zip(keys, runtime.run(active, names, batch.feeds), strict=True):
            params = params_of(trial.state.params[trial.plan.resolve(key)])
            real = batch.real(value)
            sums[key.tensor].add(real, affine.fake_quantize(real, params))
    return {name: nsr(one.db) for name, one in sums.items()}


def _layers(trial: Trial, noise: Mapping[str, float], total: Mapping[str, float]) -> list[LayerError]:
    """The layers that make noise of their own, with what can be expected of each."""
    rules = trial.state.target.by_op
    found = []
    for node in trial.reference.graph.node:
        rule = rules.get(node.op_type)
        if rule is not None and rule.output is Emit.SAME:
            continue  # it only moves what another layer rounded
        tensor = max((name for name in node.output if name in noise), key=noise.__getitem__, default="")
        if tensor and noise[tensor] > 0:
            found.append((node, tensor))
    everything = sum(noise[tensor] for _, tensor in found)
    median = decibels(statistics.median_low([noise[tensor] for _, tensor in found])) if found else math.inf
    layers = []
    for node, tensor in found:
        own, seen = noise[tensor], total.get(tensor, math.inf)
        usual = _BIT * _bits(trial, node.name, node.input) - _BELOW
        share = 1.0 if math.isinf(own) else 0.0 if math.isinf(everything) else own / everything
        rest = decibels(nsr(seen) - own) if math.isfinite(own) else math.inf
        if share > _DOMINANT:
            usual = max(usual, median - MARGIN)
        hurts = decibels(own) < usual - MARGIN
        layers.append(LayerError(node.name, node.op_type, tensor, decibels(own), seen, rest, share, usual, hurts))
    return layers


def _bits(trial: Trial, node: str, inputs: Sequence[str]) -> int:
    """The fewest bits of what a node reads; 8 where it reads no integers."""
    plan = trial.plan
    keys = [plan.activation_of(node, index, name) for index, name in enumerate(inputs)]
    specs = [plan.entries[plan.resolve(key)] for key in keys if key is not None]
    return min((width(spec) for spec in specs if isinstance(spec, QuantSpec)), default=_USUAL_BITS)

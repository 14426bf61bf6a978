"""The result of a run as plain values: what was decided, what it measured, what was left out and why."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

import onnx

import qdqtool
from qdqtool.graphs import model as models
from qdqtool.graphs.macs import Macs, count
from qdqtool.graphs.scopes import bodies
from qdqtool.passes_api import Skip, State, Timing
from qdqtool.planning.plan import params_of
from qdqtool.statistics.adequacy import Adequacy, assess
from qdqtool.verification.comparison import Comparison
from qdqtool.verification.listing import Placed
from qdqtool.verification.partition import Partition
from qdqtool.verification.placement import Placement, is_integer_kernel


@dataclass(frozen=True)
class QuantizedTensor:
    """One tensor that got integers.

    Attributes:
        key: use or output, ``graph::node::input`` or ``graph::tensor``.
        tensor: name in the prepared model.
        kind: "activation" or "constant".
        spec: format, symmetry and granularity in words.
        method: who chose the range.
        lo, hi: ends of the range (of all channels together).
        observed: least and greatest value seen, where it was observed.
        expected_errors: expected squared error of each calibrator, where one chose among others.
        bits: of a code, on average where channels differ.
        channel_bits: of each channel, where they differ.
    """

    key: str
    tensor: str
    kind: str
    spec: str
    method: str
    lo: float
    hi: float
    observed: tuple[float, float] | None = None
    expected_errors: Mapping[str, float] = field(default_factory=dict)
    bits: float = 8
    channel_bits: tuple[int, ...] = ()

    @property
    def codes(self) -> str:
        """Type, symmetry, granularity and, where channels differ, bits in words."""
        if not self.channel_bits:
            return self.spec
        return f"{self.spec}, {self.bits:.3g} bits on average ({min(self.channel_bits)} to {max(self.channel_bits)})"


@dataclass(frozen=True)
class Sizes:
    """Bytes of the float and the quantized model, and of what the quantized one consists of."""

    float_bytes: int
    quantized_bytes: int
    parts: Mapping[str, int]


@dataclass(frozen=True)
class Report:
    """Everything a run found out; :meth:`to_json` gives it to programs."""

    versions: Mapping[str, str]
    recipe: Mapping[str, Any]
    float_sha256: str
    samples: int
    synthetic: bool
    opset: int
    tensors: tuple[QuantizedTensor, ...]
    layers: Mapping[str, str]
    weight_only: tuple[str, ...]
    skipped: tuple[Skip, ...]
    notes: tuple[str, ...]
    sizes: Sizes
    verification: Comparison | None
    kernels: Mapping[str, int]
    timings: tuple[Timing, ...]
    evaluation: Comparison | None = field(default=None)
    calibration: Adequacy | None = field(default=None)
    """What the calibration data are worth; None where nothing was observed."""
    placement: Placement | None = field(default=None)
    """What became of each planned node; None where the runtime that the file is made for is not here."""
    partition: Partition | None = field(default=None)
    """Which execution provider runs which node; None where all ran on the CPU."""
    listing: tuple[Placed, ...] = field(default=())
    """Where every node and every Q/DQ pair of the quantized model runs, why, and what would change it."""

    macs: Macs | None = field(default=None)
    """The work of each layer, and which of them do it in integers."""

    @property
    def integer_kernels(self) -> int:
        """Operators that the runtime runs on integer codes."""
        return sum(count for op, count in self.kernels.items() if is_integer_kernel(op))

    @property
    def seconds(self) -> float:
        """Wall time of all passes."""
        return sum(t.seconds for t in self.timings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; infinite figures become the strings "inf" and "-inf"."""
        values: dict[str, Any] = plain(dataclasses.asdict(self))
        return values

    def to_json(self) -> str:
        """The report as indented JSON."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)


def plain(value: Any) -> Any:
    """Mappings, lists and finite numbers as JSON has them; other figures become the strings "inf", "-inf" and "nan"."""
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def make_report(state: State, proto: onnx.ModelProto, timings: tuple[Timing, ...], *, synthetic: bool) -> Report:
    """Gather the report of a finished run from its state."""
    assert state.original is not None
    assert state.plan is not None
    return Report(
        versions={"qdqtool": qdqtool.__version__, **{n: _version(n) for n in ("onnx", "onnxruntime", "numpy")}},
        recipe=json.loads(state.recipe.to_json()),
        float_sha256=state.float_sha256,
        samples=state.statistics.samples if state.statistics is not None else 0,
        synthetic=synthetic,
        opset=models.opset(proto),
        tensors=tuple(_tensors(state)),
        layers=dict(state.plan.kernels),
        weight_only=tuple(sorted(state.plan.weight_only)),
        skipped=tuple(dict.fromkeys(state.skipped)),
        notes=tuple(state.notes),
        sizes=Sizes(state.float_bytes, models.size(proto), _parts(proto)),
        verification=state.verified,
        kernels=state.kernels,
        timings=timings,
        calibration=_calibration(state, synthetic=synthetic),
        placement=state.placement,
        macs=_macs(state, proto),
        partition=state.partition,
        listing=state.listing,
    )


def _calibration(state: State, *, synthetic: bool) -> Adequacy | None:
    """What the data are worth; that synthetic ones are random need not be found out."""
    return None if state.statistics is None else assess(state.statistics, () if synthetic else state.held)


def _macs(state: State, proto: onnx.ModelProto) -> Macs:
    """The work of each layer on one sample; where the runtime was not asked, what is planned for integers."""
    assert state.plan is not None
    running = state.plan.kernels if state.placement is None else state.placement.kernels
    return count(proto, running.keys() - state.plan.weight_only, state.held[0].feeds if state.held else None)


def _version(package: str) -> str:
    if package == "onnxruntime":
        import onnxruntime

        return str(onnxruntime.__version__)
    return version(package)


def _tensors(state: State) -> list[QuantizedTensor]:
    assert state.plan is not None
    found = []
    for key, value in (state.params or {}).items():
        params, name = params_of(value), state.plan.tensors[key]
        stats = state.statistics.tensors.get(name) if state.statistics is not None else None
        chosen = params.range
        found.append(
            QuantizedTensor(
                key=str(key),
                tensor=name,
                kind="constant" if key in state.plan.constants else "activation",
                spec=str(params.spec),
                method=params.method,
                lo=float(chosen.lo.min()),
                hi=float(chosen.hi.max()),
                observed=None if stats is None or key in state.plan.constants else (stats.lo, stats.hi),
                expected_errors=state.compared.get(key, {}),
                bits=params.mean_bits,
                channel_bits=() if params.channel_bits is None else tuple(params.channel_bits.tolist()),
            )
        )
    return found


def _parts(proto: onnx.ModelProto) -> dict[str, int]:
    """Bytes of the file by what they hold; everything is accounted for."""
    parts: dict[str, int] = {}
    for tensor in (t for graph in (proto.graph, *bodies(proto.graph)) for t in graph.initializer):
        kind = f"{onnx.TensorProto.DataType.Name(tensor.data_type).lower()} constants"
        parts[kind] = parts.get(kind, 0) + tensor.ByteSize()
    parts["metadata"] = sum(entry.ByteSize() for entry in proto.metadata_props)
    parts["graph and names"] = models.size(proto) - sum(parts.values())
    return parts

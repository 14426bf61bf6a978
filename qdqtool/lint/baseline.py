"""What a quantized model is like, written down to be committed, and how a later one differs from it."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import numpy as np
import onnx
import pydantic

from qdqtool.errors import QdqError
from qdqtool.lint.findings import Finding, Hit, Severity
from qdqtool.lint.kernels import Kernels
from qdqtool.lint.rules import BY_ID
from qdqtool.lint.subject import Conversion, Subject, type_name
from qdqtool.planning.plan import Plan
from qdqtool.planning.target import Target
from qdqtool.report.values import plain
from qdqtool.spec import FORMATS
from qdqtool.units import percent
from qdqtool.verification import placement

Place = Literal["integer", "float", "gone"]
_RANGE, _PLACE, _SQNR, _SCORE, _LATENCY = (BY_ID[f"QDQ10{n}"] for n in range(1, 6))


class _Value(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid", frozen=True)


class Measures(_Value):
    """What running the model beside the float one gave.

    Attributes:
        samples: how many it ran on.
        provider: execution provider.
        sqnr_db: SQNR in dB of each output, as the runtime fuses the model.
        metric: the task's metric; None where none was asked for.
        score: of the quantized model, higher is better.
        latency_ratio: its median time relative to the float model's.
        latency_interval: ends of the ratio's 95 % interval.
    """

    samples: int
    provider: str
    sqnr_db: dict[str, float]
    metric: str | None = None
    score: float | None = None
    latency_ratio: float
    latency_interval: tuple[float, float]


class Baseline(_Value):
    """A model's state to compare later ones with.

    Attributes:
        version: of this format.
        target: what it was checked for.
        ranges: quantized activation -> least and greatest value that its codes stand for.
        placement: node -> where it runs; "gone" needs no kernel at all.
        measures: None where no data were given.
    """

    version: Literal[1] = 1
    target: str
    ranges: dict[str, tuple[float, float]]
    placement: dict[str, Place]
    measures: Measures | None = None

    def to_json(self) -> str:
        """Indented JSON with sorted keys, so that a diff shows what changed."""
        return json.dumps(plain(self.model_dump()), indent=2, sort_keys=True, allow_nan=False) + "\n"


@dataclass(frozen=True)
class Tolerances:
    """How much worse a model may be than its baseline.

    Attributes:
        range_drift: by how much an end of a range may move, as a share of the baseline's range.
        sqnr_drop: dB of an output.
        score_drop: in the metric's own units.
        latency_increase: of the latency ratio, as a share of the baseline's.
    """

    range_drift: float = 0.1
    sqnr_drop: float = 1.0
    score_drop: float = 0.5
    latency_increase: float = 0.2


def read(path: str | Path) -> Baseline:
    """Read a baseline; QdqError says what is wrong with the file."""
    try:
        return Baseline.model_validate_json(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise QdqError(f"baseline {path} cannot be read: {error}; --update-baseline writes one") from error
    except pydantic.ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise QdqError(
            f"{path} is no baseline: {place or 'it'}: {first['msg']}; --update-baseline writes one"
        ) from error


def of(proto: onnx.ModelProto, target: Target, measures: Measures | None = None) -> Baseline:
    """The state of a model that :func:`qdqtool.lint.subject.load` gave.

    Raises:
        ModelError: the runtime does not load it.
    """
    subject = Subject(proto, target)
    return Baseline(
        target=target.name, ranges=ranges(subject), placement=_placement(subject, target), measures=measures
    )


def ranges(subject: Subject) -> dict[str, tuple[float, float]]:
    """Quantized activation -> least and greatest value that its codes stand for, of all channels together."""
    found: dict[str, tuple[float, float]] = {}
    for conversion in subject.conversions:
        ends = _ends(conversion) if conversion.quantizes else None
        if ends is not None:
            name = conversion.source if conversion.source not in found else conversion.node.name
            found[name] = ends
    return found


def _ends(conversion: Conversion) -> tuple[float, float] | None:
    number = FORMATS.get(type_name(conversion.codes))
    if number is None or conversion.scale is None or not conversion.scale.size:
        return None
    zero = 0 if conversion.zero_point is None else conversion.zero_point
    scale = conversion.scale.astype(np.float64)
    return float(np.min((number.qmin - zero) * scale)), float(np.max((number.qmax - zero) * scale))


def _placement(subject: Subject, target: Target) -> dict[str, Place]:
    """Where each node runs that is between Q/DQ: asked of the CPU provider, else read off the graph."""
    kernels = Kernels(subject, target)
    planned = {name: node.op_type for name, (node, _, rule) in kernels.meant.items() if rule.kernel}
    planned |= dict.fromkeys(kernels.weights, "MatMul")
    if not target.for_cpu:
        placed = (kernels.integer & planned.keys()) | kernels.weights
        return {name: "integer" if name in placed else "float" for name in sorted(planned)}
    plan = Plan(kernels=planned, weight_only=frozenset(kernels.weights))
    optimized, _ = placement.load(subject.proto)
    found = placement.place(subject.proto, optimized, plan, target)
    places: dict[str, Place] = dict.fromkeys(found.kernels, "integer")
    return places | dict.fromkeys(found.gone, "gone") | dict.fromkeys(found.floats, "float")


_WAS: Final[Mapping[Place, str]] = {"integer": "ran in integers", "gone": "needed no kernel", "float": "ran in float"}


def compare(now: Baseline, before: Baseline, tolerances: Tolerances) -> list[Finding]:
    """What is worse than in the baseline beyond its tolerance, as errors; what is new or better, as notes.

    Raises:
        QdqError: the baseline is of another target or metric.
    """
    if now.target != before.target:
        raise QdqError(
            f"the baseline is of target {before.target}, and the check of {now.target}; compare like with like"
        )
    found = [Finding.of(_RANGE, hit) for hit in _drift(now.ranges, before.ranges, tolerances.range_drift)]
    found += [Finding.of(_PLACE, hit) for hit in _moved(now.placement, before.placement)]
    if now.measures is not None and before.measures is not None:
        found += _worse(now.measures, before.measures, tolerances)
    return found


def _drift(
    now: Mapping[str, tuple[float, float]], before: Mapping[str, tuple[float, float]], most: float
) -> Iterator[Hit]:
    for name, (lo, hi) in before.items():
        if name not in now:
            yield Hit(f"it had the range [{lo:.5g}, {hi:.5g}] and is not quantized any more", tensor=name)
            continue
        moved = max(abs(now[name][0] - lo), abs(now[name][1] - hi))
        if moved > most * (hi - lo):
            ends = f"[{lo:.5g}, {hi:.5g}] -> [{now[name][0]:.5g}, {now[name][1]:.5g}]"
            share = moved / (hi - lo) if hi > lo else math.inf
            yield Hit(
                f"its range moved: {ends}, by {percent(100 * share)} of its width (at most {percent(100 * most)})",
                tensor=name,
            )
    for name in (name for name in now if name not in before):
        yield Hit("it is quantized now and was not in the baseline", tensor=name, severity=Severity.NOTE)


def _moved(now: Mapping[str, Place], before: Mapping[str, Place]) -> Iterator[Hit]:
    for name, place in before.items():
        if place == "float" or now.get(name) in ("integer", "gone"):
            continue
        is_float = "runs in float now" if name in now else "has no operands in integers any more, or is gone"
        yield Hit(f"it {_WAS[place]} in the baseline and {is_float}", node=name)
    for name, place in now.items():
        if place != "float" and before.get(name, "float") == "float":
            was = _WAS["float"] if name in before else "was not there"
            yield Hit(f"it runs in integers now and {was} in the baseline", node=name, severity=Severity.NOTE)


def _worse(now: Measures, before: Measures, tolerances: Tolerances) -> Iterator[Finding]:
    if now.provider != before.provider:
        raise QdqError(
            f"the baseline was measured on {before.provider}, and this model on {now.provider}; name it with --provider"
        )
    for name, wanted in before.sqnr_db.items():
        got = now.sqnr_db.get(name, -math.inf)
        if wanted - got > tolerances.sqnr_drop:
            message = f"its SQNR fell from {wanted:.1f} dB to {got:.1f} dB (at most by {tolerances.sqnr_drop:g} dB)"
            yield Finding.of(_SQNR, Hit(message, tensor=name))
    if before.score is not None and now.score is not None:
        if now.metric != before.metric:
            raise QdqError(f"the baseline has the metric {before.metric}, and this check {now.metric}; use one")
        if before.score - now.score > tolerances.score_drop:
            fell = f"{now.metric} fell from {before.score:.4g} to {now.score:.4g}"
            yield Finding.of(_SCORE, Hit(f"{fell} (at most by {tolerances.score_drop:g})"))
    most = before.latency_ratio * (1 + tolerances.latency_increase)
    if now.latency_interval[0] > most:  # its lower end: a disturbed measurement has a wide interval
        times = f"it takes {now.latency_ratio:.2f} times as long as the float model ({now.latency_interval[0]:.2f} to"
        took = f"and took {before.latency_ratio:.2f} times in the baseline (at most {most:.2f})"
        yield Finding.of(_LATENCY, Hit(f"{times} {now.latency_interval[1]:.2f}), {took}"))

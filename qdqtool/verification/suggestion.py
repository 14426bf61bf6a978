"""Why a quantized model is slower than the float one on a provider, and what would be faster there, measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import onnx

from qdqtool import runtime
from qdqtool.data.fit import Feeds
from qdqtool.errors import QdqError, RuntimeUnavailableError
from qdqtool.graphs.model import ModelSource
from qdqtool.units import count, listed
from qdqtool.verification import latency
from qdqtool.verification.latency import Bench, Ratio, Variant
from qdqtool.verification.running import Work
from qdqtool.verification.variants import FORMS, forms

_WORDS: Final[Mapping[str, str]] = {
    "w8a8": "8 bits placed for this provider: --target cpu",
    "fp16": "float16: --precision fp16",
    "w8a16": "weights alone in 8 bits (MatMulNBits): --precision w8a16",
    "w4a16": "weights alone in 4 bits (MatMulNBits): --precision w4a16",
    "tensorrt": "the same file with --provider tensorrt",
}


@dataclass(frozen=True)
class Suggestion:
    """Something to try instead.

    Attributes:
        name: a precision, or "tensorrt".
        what: what it is and how to get it.
        ratio: its median time relative to the float model's; None where it was not measured.
        unmeasured: why it was not measured; "" where it was.
    """

    name: str
    what: str
    ratio: Ratio | None = None
    unmeasured: str = ""

    @property
    def is_faster(self) -> bool:
        """Whether it was measured to be faster than the float model, all of its interval."""
        return self.ratio is not None and self.ratio.hi < 1


def causes(work: Work) -> list[str]:
    """What a model does besides, or instead of, integer arithmetic: counts and names."""
    found = (
        ("Q or DQ node that fused into nothing", work.conversions),
        ("convolution or matrix product in float", work.layers),
        ("node on the CPU provider", work.fallen),
        ("copy between devices at every run", work.copies),
    )
    return [f"{_plural(len(names), what)}: {listed(names)}" for what, names in found if names]


def suggest(model: ModelSource, slow: ModelSource, feeds: Feeds, *, provider: str, **options: Any) -> list[Suggestion]:
    """Measure what else the float model could become on this provider; the fastest first, unmeasured ones last.

    Args:
        model: the float model.
        slow: the quantized model that is slower.
        feeds: one run's inputs.
        provider: execution provider that both were measured on.
        options: further arguments of :func:`qdqtool.verification.latency.bench`.
    """
    made, failed = forms(model, FORMS, provider)
    sources: dict[str, ModelSource | Variant] = {"float": model, **made}
    if provider == "cpu":
        try:
            sources["w8a8"] = _for_cpu(model, feeds)
        except QdqError as error:
            failed["w8a8"] = str(error)
    if provider == "cuda":
        try:
            runtime.resolve_provider("tensorrt")
            sources["tensorrt"] = Variant(slow, provider="tensorrt")
        except RuntimeUnavailableError as error:
            failed["tensorrt"] = str(error)
    found = latency.bench(sources, feeds, provider=provider, strict=False, **options)
    return _ordered(found, {**failed, **found.failed})


def _for_cpu(model: ModelSource, feeds: Feeds) -> onnx.ModelProto:
    """The model with integer kernels of the CPU provider; its ranges are good enough for measuring time alone."""
    from qdqtool.pipeline import quantize  # which imports this package

    data = [dict(feeds)]
    return quantize(
        model, data, provider="cpu", cache=False, target="cpu", calibrator="minmax", bias_correction=False
    ).model


def _ordered(found: Bench, failed: Mapping[str, str]) -> list[Suggestion]:
    measured = sorted(found.ratios.items(), key=lambda item: item[1].value)
    return [
        *(Suggestion(name, _WORDS[name], ratio) for name, ratio in measured),
        *(Suggestion(name, _WORDS[name], unmeasured=reason) for name, reason in failed.items()),
    ]


def _plural(number: int, what: str) -> str:
    """``2 nodes on the CPU provider``: the plural is of the first noun."""
    for noun in ("node", "product", "copy"):
        head, found, rest = what.partition(noun)
        if found:
            return f"{count(number, head + noun)}{rest}"
    return count(number, what)

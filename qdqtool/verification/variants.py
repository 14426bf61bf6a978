"""Other forms of the float model to measure beside: precisions that need no data, float32 without TF32, TensorRT."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Final

import onnx

from qdqtool.errors import QdqError, RecipeError, nearest
from qdqtool.graphs.model import ModelSource
from qdqtool.verification.latency import Variant

FORMS: Final = ("fp16", "w8a16", "w4a16")
"""Precisions that a float model is brought to without data."""
WITHOUT_TF32: Final[Mapping[str, str]] = {"use_tf32": "0"}
"""Option of the CUDA provider: float32 products in float32; by default inputs are rounded to TF32 (10 bits)."""


def parse_forms(text: str | None) -> tuple[str, ...]:
    """The precisions in ``fp16,w8a16``; RecipeError names one that is not known."""
    wanted = tuple(dict.fromkeys(part.strip() for part in (text or "").split(",") if part.strip()))
    for name in wanted:
        if name not in FORMS:
            raise RecipeError(f"{name!r} cannot be made without data; known: {', '.join(FORMS)}.{nearest(name, FORMS)}")
    return wanted


def forms(
    model: ModelSource, wanted: Iterable[str], provider: str
) -> tuple[dict[str, onnx.ModelProto], dict[str, str]]:
    """Bring the float model to other precisions.

    Args:
        model: the float model.
        wanted: some of :data:`FORMS`.
        provider: where they will run, a key of :data:`qdqtool.runtime.PROVIDERS`.

    Returns:
        Model by precision; and where there is none, why.
    """
    from qdqtool.pipeline import quantize  # which imports this package

    made: dict[str, onnx.ModelProto] = {}
    failed: dict[str, str] = {}
    target = "cpu" if provider == "cpu" else "cuda"
    for name in wanted:
        try:
            done = quantize(model, precision=name, target=target, provider="cpu", cache=False)
        except QdqError as error:
            failed[name] = str(error)
            continue
        if name != "fp16" and not done.plan.kernels:
            failed[name] = (
                "the model has no product by a constant weight of which a kernel takes the weight in integers"
            )
        else:
            made[name] = done.model
    return made, failed


def without_tf32(model: ModelSource, provider: str) -> dict[str, Variant]:
    """The float model with TF32 off, by name; none where the provider is not CUDA."""
    return {"float32, TF32 off": Variant(model, provider_options=WITHOUT_TF32)} if provider == "cuda" else {}

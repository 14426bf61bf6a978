"""What would be faster than a quantized model that is slower: measured here, or said not to be."""

from __future__ import annotations

import pytest

from qdqtool import runtime
from qdqtool.errors import RecipeError, RuntimeUnavailableError
from qdqtool.graphs.model import ModelSource
from qdqtool.verification import latency
from qdqtool.verification.latency import Ratio, Variant
from qdqtool.verification.suggestion import Suggestion, suggest
from qdqtool.verification.variants import WITHOUT_TF32, forms, parse_forms, without_tf32
from tests.builders import Arrays, conv_chain, feeds, normal, parse, quantized

PRODUCT = parse("[p] y = MatMul(x, m)", "float[N, 64] x", "float[N, 64] y", {"m": normal(64, 64)})


def test_forms_that_need_no_data() -> None:
    made, failed = forms(PRODUCT, ("fp16", "w8a16", "w4a16"), "cpu")
    assert list(made) == ["fp16", "w8a16", "w4a16"]
    assert not failed
    made, failed = forms(conv_chain(1), ("fp16", "w4a16"), "cpu")
    assert list(made) == ["fp16"]
    assert "no product by a constant weight" in failed["w4a16"]


def test_forms_by_name() -> None:
    assert parse_forms("fp16, w4a16,fp16") == ("fp16", "w4a16")
    assert parse_forms(None) == ()
    with pytest.raises(RecipeError, match=r"'w8a8' cannot be made without data; known: fp16, w8a16, w4a16"):
        parse_forms("w8a8")


def test_float32_without_tf32_is_a_variant_on_cuda_alone() -> None:
    (variant,) = without_tf32("model.onnx", "cuda").values()
    assert variant.provider_options == WITHOUT_TF32
    assert without_tf32("model.onnx", "cpu") == {}


def test_every_form_is_measured_on_the_cpu() -> None:
    slow = quantized(PRODUCT, bias_correction=False).model
    found = suggest(PRODUCT, slow, feeds(PRODUCT, 1), provider="cpu", seconds=0.0)
    assert {one.name for one in found} == {"fp16", "w8a8", "w8a16", "w4a16"}
    ratios = [one.ratio.value for one in found if one.ratio is not None]
    assert len(ratios) == 4
    assert ratios == sorted(ratios)


def test_on_cuda_what_cannot_load_is_said_not_to_be_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def bench(sources: dict[str, ModelSource | Variant], fed: Arrays, **_: object) -> latency.Bench:
        asked.extend(sources)
        times = {name: Ratio(1.0 / (1 + index), 0.4, 0.9) for index, name in enumerate(list(sources)[1:])}
        return latency.Bench("cuda", 0, 1, 100, {}, times, {}, {"w4a16": "no kernel"})

    def missing(wanted: str) -> tuple[str, str | None]:
        if wanted == "tensorrt":
            raise RuntimeUnavailableError("the tensorrt provider cannot load here")
        return wanted, None

    monkeypatch.setattr(latency, "bench", bench)
    monkeypatch.setattr(runtime, "resolve_provider", missing)
    found = suggest(PRODUCT, PRODUCT, {}, provider="cuda")
    assert asked == ["float", "fp16", "w8a16", "w4a16"]
    assert [(one.name, one.ratio is None) for one in found[-2:]] == [("tensorrt", True), ("w4a16", True)]
    assert "cannot load" in found[-2].unmeasured
    monkeypatch.setattr(runtime, "resolve_provider", lambda name: (name, None))
    asked.clear()
    suggest(PRODUCT, PRODUCT, {}, provider="cuda")
    assert asked[-1] == "tensorrt"


def test_faster_means_the_whole_interval() -> None:
    assert Suggestion("fp16", "", Ratio(0.5, 0.4, 0.6)).is_faster
    assert not Suggestion("fp16", "", Ratio(0.9, 0.7, 1.1)).is_faster
    assert not Suggestion("fp16", "", unmeasured="no provider").is_faster

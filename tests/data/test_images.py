import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from PIL import Image
from pydantic import ValidationError

from qdqtool.data.images import EXAMPLE, ImagePreprocessing
from qdqtool.data.source import open_data
from qdqtool.errors import DataError
from qdqtool.graphs.model import InputInfo

PIXELS = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)


def wants(*shape: int | str | None, dtype: Any = np.float32) -> list[InputInfo]:
    return [InputInfo("x", np.dtype(dtype), shape)]


NCHW = wants("N", 3, None, None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("b.png", "a.BMP"):
        Image.fromarray(PIXELS).save(tmp_path / name)
    return tmp_path


def first(folder: Path, inputs: list[InputInfo], **choices: Any) -> np.ndarray:
    return next(iter(open_data(folder, inputs, images=ImagePreprocessing(**choices))))["x"]


def test_a_folder_of_images_is_replayed_by_name(folder: Path) -> None:
    Image.fromarray(255 - PIXELS).save(folder / "c.png")
    Image.fromarray(PIXELS).save(folder / "d.webp", lossless=True)
    Image.new("RGB", (5, 5)).save(folder / "e.jpeg")
    data = open_data(folder, NCHW, images=ImagePreprocessing())
    passes = [[feeds["x"] for feeds in data] for _ in range(2)]
    assert len(data) == 5
    assert data.description == f"{folder.name} (5 images)"
    for left, right in zip(*passes, strict=True):
        np.testing.assert_array_equal(left, right)
    assert [x.shape for x in passes[0]] == [(1, 3, 4, 6)] * 4 + [(1, 3, 5, 5)]
    assert all(x.flags.c_contiguous for x in passes[0])
    np.testing.assert_allclose(passes[0][2][0].transpose(1, 2, 0), (255 - PIXELS) / 255, rtol=1e-6)


def test_scale_mean_and_std_by_channel(folder: Path) -> None:
    x = first(folder, NCHW, scale=0.5, mean=(1.0, 2.0, 3.0), std=[1, 2, 4])
    expected = (PIXELS * 0.5 - np.array([1, 2, 3])) / np.array([1, 2, 4])
    np.testing.assert_allclose(x[0], expected.transpose(2, 0, 1), rtol=1e-6)


def test_layout_and_channel_order(folder: Path) -> None:
    x = first(folder, wants(1, 4, 6, 3), layout="NHWC", scale=1, channel_order="BGR")
    np.testing.assert_array_equal(x[0], PIXELS[..., ::-1])
    assert first(folder, wants(1, 1, 4, 6), channel_order="GRAY", mean=[0.5]).shape == (1, 1, 4, 6)


def test_integer_inputs_take_pixels_as_they_are(folder: Path) -> None:
    u8 = wants("N", 4, 6, 3, dtype=np.uint8)
    np.testing.assert_array_equal(first(folder, u8, layout="NHWC")[0], PIXELS)
    np.testing.assert_array_equal(first(folder, u8, layout="NHWC", scale=0.5)[0], np.rint(PIXELS * 0.5))
    i8 = wants("N", 4, 6, 3, dtype=np.int8)
    np.testing.assert_array_equal(first(folder, i8, layout="NHWC", mean=128)[0], PIXELS.astype(int) - 128)
    with pytest.raises(DataError, match=r"a\.BMP: preprocessed values 0 to 142 do not fit the model's int8"):
        first(folder, i8, layout="NHWC", scale=2)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ml_dtypes.bfloat16])
def test_float_inputs_have_their_own_type(folder: Path, dtype: Any) -> None:
    assert first(folder, wants("N", 3, 4, 6, dtype=dtype)).dtype == dtype


@pytest.mark.parametrize(
    ("choices", "size"),
    [
        ({"resize": 8}, (8, 12)),
        ({"resize": (5, 7)}, (5, 7)),
        ({"crop": 2}, (2, 2)),
        ({"crop": [2, 4]}, (2, 4)),
        ({"resize": 8, "crop": 8}, (8, 8)),
    ],
)
def test_resize_then_crop(folder: Path, choices: dict[str, Any], size: tuple[int, int]) -> None:
    assert first(folder, NCHW, **choices).shape == (1, 3, *size)


def test_the_crop_is_the_centre(folder: Path) -> None:
    x = first(folder, wants(1, 2, 2, 3, dtype=np.uint8), crop=2, layout="NHWC")
    np.testing.assert_array_equal(x[0], PIXELS[1:3, 2:4])


def test_a_fixed_batch_is_fed_image_by_image(folder: Path) -> None:
    assert first(folder, wants(8, 3, 4, 6)).shape == (1, 3, 4, 6)


def test_a_grey_or_transparent_image_becomes_rgb(tmp_path: Path) -> None:
    Image.new("L", (6, 4)).save(tmp_path / "a.png")
    Image.new("RGBA", (6, 4)).save(tmp_path / "b.png")
    assert [f["x"].shape for f in open_data(tmp_path, NCHW, images=ImagePreprocessing())] == [(1, 3, 4, 6)] * 2


def test_without_preprocessing_the_error_shows_a_recipe(folder: Path) -> None:
    with pytest.raises(DataError) as caught:
        open_data(folder, NCHW)
    assert EXAMPLE in str(caught.value)
    assert "[images]\nresize = 256" in EXAMPLE


def test_the_example_is_valid() -> None:
    import tomllib

    assert ImagePreprocessing(**tomllib.loads(EXAMPLE)["images"]).crop == 224


def test_without_pillow(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(DataError, match=r"pip install qdqtool\[images\]"):
        first(folder, NCHW)


@pytest.mark.parametrize(
    ("inputs", "choices", "message"),
    [
        (wants("N", 3, 8, 8), {}, r"a\.BMP after \[images\] does not fit the model"),
        (wants("N", 3, 8, 8), {}, "axis 2 must be 8, not 4"),
        (wants("N", 3, 4, 6), {"layout": "NHWC"}, "axis 1 must be 3, not 4"),
        (wants("N", 3), {}, "its rank is 4; give rank 2"),
        (wants("N", 3, 4, 6, dtype=np.bool_), {}, "uint8 is not converted to bool"),
        (NCHW, {"crop": 5}, r"a\.BMP: cannot crop 5 x 5 from 4 x 6 pixels"),
        ([*NCHW, *wants(1)], {}, "models of one input"),
    ],
)
def test_images_that_do_not_fit(folder: Path, inputs: list[InputInfo], choices: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        first(folder, inputs, **choices)


def test_a_damaged_image_is_named(folder: Path) -> None:
    (folder / "a.BMP").unlink()
    for name, content in {"0.png": b"text", "1.png": (folder / "b.png").read_bytes()[:50]}.items():
        (folder / name).write_bytes(content)
        with pytest.raises(DataError, match=f"{name} is not a readable image"):
            first(folder, NCHW)
        (folder / name).unlink()


def test_more_than_eight_bits_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 6), np.uint16)).save(tmp_path / "deep.png")
    with pytest.raises(DataError, match=r"deep\.png has more than 8 bits"):
        first(tmp_path, NCHW)


@pytest.mark.parametrize(
    "choices",
    [
        {"sclae": 1.0},
        {"resize": "256"},
        {"resize": 0},
        {"resize": (256, 256, 3)},
        {"crop": True},
        {"scale": 0.0},
        {"std": (1.0, 0.0, 1.0)},
        {"mean": (0.5,)},
        {"mean": float("nan")},
        {"channel_order": "GRAY", "std": (1.0, 1.0, 1.0)},
        {"layout": "HWC"},
    ],
)
def test_choices_are_checked_when_they_are_made(choices: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ImagePreprocessing(**choices)

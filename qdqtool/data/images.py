"""An image file -> the array a model takes: resize, centre crop, then (pixels * scale - mean) / std."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, PositiveInt, model_validator

from qdqtool.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp"})
EXAMPLE = """\
[images]
resize = 256
crop = 224
mean = [0.485, 0.456, 0.406]
std = [0.229, 0.224, 0.225]
layout = "NCHW"
channel_order = "RGB\""""

# A recipe file has lists where Python has tuples; the numbers inside stay strict.
Pair = Annotated[tuple[PositiveInt, PositiveInt], Field(strict=False)]
PerChannel = float | Annotated[tuple[float, ...], Field(strict=False)]


class ImagePreprocessing(BaseModel):
    """How an image becomes an input, in this order: resize, crop, times scale, minus mean, divided by std.

    resize: pixels of the shorter side, or (height, width); bilinear as Pillow does it, None leaves the size.
    crop:   a square of that side around the centre, or (height, width).
    scale:  factor on the pixels (0 to 255); None means 1/255 for float inputs and 1 for integer inputs.
    mean, std: one number, or one for each channel in ``channel_order``, in units of the scaled pixels.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)

    resize: PositiveInt | Pair | None = None
    crop: PositiveInt | Pair | None = None
    scale: float | None = None
    mean: PerChannel = 0.0
    std: PerChannel = 1.0
    layout: Literal["NCHW", "NHWC"] = "NCHW"
    channel_order: Literal["RGB", "BGR", "GRAY"] = "RGB"

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        channels = 1 if self.channel_order == "GRAY" else 3
        for name, value in (("mean", self.mean), ("std", self.std)):
            if isinstance(value, tuple) and len(value) != channels:
                raise ValueError(f"{name} has {len(value)} numbers, {self.channel_order} has {channels} channel(s)")
        if not np.all(self.std) or self.scale == 0:
            raise ValueError("std and scale must not be 0")
        return self


def read_image(path: Path, images: ImagePreprocessing, dtype: np.dtype) -> np.ndarray:
    """Read and preprocess one image.

    Returns shape [1, C, H, W] or [1, H, W, C]; of ``dtype`` where that is a number type, rounded to nearest for
    integers; else the uint8 pixels, for the caller to refuse. The arithmetic is float32.

    Raises:
        DataError: Pillow is missing, the image is unreadable or smaller than the crop, or the result is outside an
            integer dtype.
    """
    pixels = _read_pixels(path, images)
    values = pixels if dtype.kind in "bOSU" else _normalize(pixels, images, dtype, path)
    if images.layout == "NCHW":
        values = values.transpose(2, 0, 1)
    return np.ascontiguousarray(values[np.newaxis])


def _read_pixels(path: Path, images: ImagePreprocessing) -> np.ndarray:
    """uint8 [H, W, C], channels in the wanted order."""
    try:
        from PIL import Image
    except ImportError:
        raise DataError(f"{path}: reading images needs Pillow; run: pip install qdqtool[images]") from None
    try:
        with Image.open(path) as image:
            image.load()
            mode = image.mode
            converted = image.convert("L" if images.channel_order == "GRAY" else "RGB")
    # Pillow's decoders raise SyntaxError and ValueError for broken files, beside OSError.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{path} is not a readable image ({error}); remove it or save it again") from error
    if mode.startswith(("I", "F")):
        raise DataError(f"{path} has more than 8 bits a channel (mode {mode}); save it with 8, or give arrays as .npz")
    pixels = np.asarray(_crop(_resize(converted, images), images, path))
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    return pixels[..., ::-1] if images.channel_order == "BGR" else pixels


def _resize(image: Image.Image, images: ImagePreprocessing) -> Image.Image:
    from PIL import Image

    if images.resize is None:
        return image
    if isinstance(images.resize, tuple):
        height, width = images.resize
    else:
        shorter = min(image.size)
        width, height = (side * images.resize // shorter for side in image.size)
    return image.resize((width, height), Image.Resampling.BILINEAR)


def _crop(image: Image.Image, images: ImagePreprocessing, path: Path) -> Image.Image:
    if images.crop is None:
        return image
    height, width = images.crop if isinstance(images.crop, tuple) else (images.crop, images.crop)
    if height > image.height or width > image.width:
        raise DataError(
            f"{path}: cannot crop {height} x {width} from {image.height} x {image.width} pixels (height x width); "
            "set `resize` in [images] to at least the crop"
        )
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def _normalize(pixels: np.ndarray, images: ImagePreprocessing, dtype: np.dtype, path: Path) -> np.ndarray:
    """[H, W, C] of `dtype`."""
    integer = np.issubdtype(dtype, np.integer)
    scale = images.scale if images.scale is not None else (1.0 if integer else 1 / 255)
    values: np.ndarray = pixels * np.float32(scale)
    values = (values - np.asarray(images.mean, np.float32)) / np.asarray(images.std, np.float32)
    if not integer:
        return values.astype(dtype)
    values = np.rint(values)
    limits = np.iinfo(dtype)
    if values.min() < limits.min or values.max() > limits.max:
        raise DataError(
            f"{path}: preprocessed values {values.min():g} to {values.max():g} do not fit the model's {dtype} input; "
            "check `scale`, `mean` and `std` in [images]"
        )
    return values.astype(dtype)

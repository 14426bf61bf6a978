"""Does an array fit a model input? What is wrong, what the model wants beside what was given, and what to do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from qdqtool.errors import DataError, nearest

if TYPE_CHECKING:
    from qdqtool.model import InputInfo

Feeds = dict[str, np.ndarray]
Shape = tuple[int | str | None, ...]


def whole_shapes(info: InputInfo) -> list[Shape]:
    """A whole feed: the input's shape; the last batch of a fixed size may be short, it is filled when it runs."""
    return [info.shape]


def row_shapes(info: InputInfo) -> list[Shape]:
    """Samples along axis 0, any number of them."""
    return [(None, *info.shape[1:])]


def sample_shapes(info: InputInfo) -> list[Shape]:
    """Samples along axis 0, or with one rank more whole feeds along axis 0."""
    return [*(row_shapes(info) if info.shape else []), (None, *info.shape)]


class _MisfitError(Exception):
    """What to do about one array that does not fit its input."""


def fit(
    given: Mapping[str, object], inputs: Sequence[InputInfo], where: str, shapes: Callable[[InputInfo], list[Shape]]
) -> Feeds:
    """The given arrays in the inputs' order and dtypes: read-only, C-contiguous, views where nothing is converted.

    ``shapes`` lists what is acceptable for an input, None being any size; the first of the array's rank counts.

    Raises:
        DataError: with all that is wrong at once, and what the model wants beside what was given.
    """
    arrays = {str(name): as_array(value, str(name), where) for name, value in given.items()}
    fitted: Feeds = {}
    advice = []
    for info in inputs:
        if info.name not in arrays:
            advice.append(f"{info.name}: missing; every input of the model needs an array")
            continue
        try:
            fitted[info.name] = _fit_one(arrays[info.name], info, shapes(info))
        except _MisfitError as misfit:
            advice.append(f"{info.name}: {misfit}")
    missing = [info.name for info in inputs if info.name not in arrays]
    extra = [name for name in arrays if not is_input(name, inputs)]
    advice += [f"{name}: the model has no such input; remove or rename it.{nearest(name, missing)}" for name in extra]
    if advice:
        raise DataError("\n".join([f"{where} does not fit the model", *_table(arrays, inputs, extra), "", *advice]))
    return fitted


def _table(arrays: Feeds, inputs: Sequence[InputInfo], extra: Sequence[str]) -> list[str]:
    text = {name: f"{name}: {a.dtype.name}[{', '.join(map(str, a.shape))}]" for name, a in arrays.items()}
    rows = [("the model wants", "given"), *((str(info), text.get(info.name, "-")) for info in inputs)]
    rows += [("-", text[name]) for name in extra]
    width = max(len(wanted) for wanted, _ in rows)
    return [f"  {wanted:{width}}   {found}" for wanted, found in rows]


def _fit_one(array: np.ndarray, info: InputInfo, shapes: list[Shape]) -> np.ndarray:
    shape = next((shape for shape in shapes if len(shape) == array.ndim), None)
    if shape is None:
        if len(shapes) == 1 and array.ndim == len(info.shape) - 1:
            raise _MisfitError("the leading batch axis is missing; give array[numpy.newaxis]")
        ranks = " or ".join(str(len(shape)) for shape in shapes)
        more = " (samples along axis 0; with one rank more than the model's, whole feeds)" if len(shapes) > 1 else ""
        raise _MisfitError(f"its rank is {array.ndim}; give rank {ranks}{more}")
    for axis, (want, size) in enumerate(zip(shape, array.shape, strict=True)):
        short = axis == 0 and shape is info.shape and 0 < size < (want if isinstance(want, int) else 0)
        if isinstance(want, int) and want != size and not short:
            raise _MisfitError(f"axis {axis} must be {want}, not {size}")
    view = np.asarray(_convert(array, info.dtype), order="C").view()
    view.flags.writeable = False
    return view


def _convert(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Float to float and integer to integer where the values fit; anything else would be a guess."""
    if array.dtype == dtype:
        return array
    if np.issubdtype(array.dtype, np.floating) and np.issubdtype(dtype, np.floating):
        with np.errstate(over="ignore"):
            converted = array.astype(dtype)
        if np.isinf(converted).sum() != np.isinf(array).sum():
            raise _MisfitError(f"some values are too large for {dtype}; clip them")
        return converted
    if np.issubdtype(array.dtype, np.integer) and np.issubdtype(dtype, np.integer):
        limits = np.iinfo(dtype)
        least, greatest = (int(array.min()), int(array.max())) if array.size else (0, 0)
        if least < limits.min or greatest > limits.max:
            raise _MisfitError(f"values {least} to {greatest} do not fit {dtype}; give values that do")
        return array.astype(dtype)
    if dtype.name == "bfloat16" and array.dtype == np.dtype("V2"):
        return array.view(dtype)  # numpy.save keeps the bytes of a bfloat16 array but not its name
    if np.issubdtype(array.dtype, np.integer) and np.issubdtype(dtype, np.floating):
        raise _MisfitError(
            f"how integers become {dtype} is not guessed; for pixels perhaps array.astype('{dtype}') / 255"
        )
    raise _MisfitError(f"{array.dtype} is not converted to {dtype} silently; convert it as the model expects it")


def as_array(value: object, name: str, where: str) -> np.ndarray:
    """Whatever numpy can make an array of; DataError names the array otherwise."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors of other libraries on a device
        raise DataError(f"{where}: {name!r} cannot become a numpy array ({error}); give arrays of numbers") from error
    if array.dtype.hasobject:
        raise DataError(f"{where}: {name!r} holds Python objects; give arrays of numbers")
    return array


def only_input(inputs: Sequence[InputInfo], what: str) -> InputInfo:
    """The model's one input; DataError where it has several."""
    if len(inputs) != 1:
        names = ", ".join(info.name for info in inputs)
        raise DataError(f"{what} serves models of one input, this one has {len(inputs)} ({names}); give an .npz file")
    return inputs[0]


def is_input(name: object, inputs: Sequence[InputInfo]) -> bool:
    """Whether the model has an input of that name."""
    return any(info.name == name for info in inputs)

"""Does an array fit a model input? What is wrong, what the model wants beside what was given, and what to do."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Final, Protocol

import numpy as np

from qdqtool.errors import DataError, nearest

if TYPE_CHECKING:
    from qdqtool.graphs.model import InputInfo

Feeds = dict[str, np.ndarray]
Shape = tuple[int | str | None, ...]
_CHUNK: Final = 1 << 20  # bytes whose values are checked at once


class Rows(Protocol):
    """Rows along axis 0, read by slices of step 1: a numpy array, or one on disk."""

    @property
    def shape(self) -> tuple[int, ...]:
        """As of an array."""
        ...

    @property
    def dtype(self) -> np.dtype:
        """As of an array."""
        ...

    def __getitem__(self, rows: slice, /) -> np.ndarray: ...


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

    Raises:
        DataError: as :func:`check`.
    """
    arrays = {str(name): as_array(value, str(name), where) for name, value in given.items()}
    check(arrays, inputs, where, shapes)
    return {info.name: convert(arrays[info.name], info.dtype) for info in inputs}


def check(
    arrays: Mapping[str, Rows], inputs: Sequence[InputInfo], where: str, shapes: Callable[[InputInfo], list[Shape]]
) -> None:
    """Hold shapes, types and, where another type could lose them, values against the inputs.

    ``shapes`` lists what is acceptable for an input, None being any size; the first of the array's rank counts.

    Raises:
        DataError: with all that is wrong at once, and what the model wants beside what was given.
    """
    advice = []
    for info in inputs:
        if info.name not in arrays:
            advice.append(f"{info.name}: missing; every input of the model needs an array")
            continue
        try:
            _check_shape(arrays[info.name].shape, info, shapes(info))
            _check_type(arrays[info.name], info.dtype)
        except _MisfitError as misfit:
            advice.append(f"{info.name}: {misfit}")
    missing = [info.name for info in inputs if info.name not in arrays]
    extra = [name for name in arrays if not is_input(name, inputs)]
    advice += [f"{name}: the model has no such input; remove or rename it.{nearest(name, missing)}" for name in extra]
    if advice:
        raise DataError("\n".join([f"{where} does not fit the model", *_table(arrays, inputs, extra), "", *advice]))


def convert(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """A checked array in another type: read-only, C-contiguous, a view where that changes nothing."""
    if dtype in (array.dtype, np.object_):  # text stays in numpy's own type, whose bytes are its content
        converted = array
    elif _is_nameless_bfloat16(array.dtype, dtype):
        converted = array.view(dtype)
    else:
        converted = array.astype(dtype)
    view = np.asarray(converted, order="C").view()
    view.flags.writeable = False
    return view


def _table(arrays: Mapping[str, Rows], inputs: Sequence[InputInfo], extra: Sequence[str]) -> list[str]:
    text = {name: f"{name}: {a.dtype.name}[{', '.join(map(str, a.shape))}]" for name, a in arrays.items()}
    rows = [("the model wants", "given"), *((str(info), text.get(info.name, "-")) for info in inputs)]
    rows += [("-", text[name]) for name in extra]
    width = max(len(wanted) for wanted, _ in rows)
    return [f"  {wanted:{width}}   {found}" for wanted, found in rows]


def _check_shape(given: tuple[int, ...], info: InputInfo, shapes: list[Shape]) -> None:
    if not info.ranked and shapes == whole_shapes(info):
        return
    if not info.ranked:
        raise _MisfitError(
            "the model leaves its rank open; give a list of whole feeds, each a dict {input name: array}"
        )
    shape = next((shape for shape in shapes if len(shape) == len(given)), None)
    if shape is None:
        if len(shapes) == 1 and len(given) == len(info.shape) - 1:
            raise _MisfitError("the leading batch axis is missing; give array[numpy.newaxis]")
        ranks = " or ".join(str(len(shape)) for shape in shapes)
        more = " (samples along axis 0; with one rank more than the model's, whole feeds)" if len(shapes) > 1 else ""
        raise _MisfitError(f"its rank is {len(given)}; give rank {ranks}{more}")
    for axis, (want, size) in enumerate(zip(shape, given, strict=True)):
        short = axis == 0 and shape is info.shape and 0 < size < (want if isinstance(want, int) else 0)
        if isinstance(want, int) and want != size and not short:
            raise _MisfitError(f"axis {axis} must be {want}, not {size}")


def _check_type(array: Rows, dtype: np.dtype) -> None:
    """Float to float and integer to integer where the values fit; anything else would be a guess."""
    given = array.dtype
    if given == dtype or _is_nameless_bfloat16(given, dtype) or (given.kind == "U" and dtype == np.object_):
        return
    integer, floating = np.issubdtype(given, np.integer), np.issubdtype(given, np.floating)
    if floating and np.issubdtype(dtype, np.floating):
        if not np.can_cast(given, dtype) and any(_overflows(chunk, dtype) for chunk in _chunks(array)):
            raise _MisfitError(f"some values are too large for {dtype}; clip them")
    elif integer and np.issubdtype(dtype, np.integer):
        if not np.can_cast(given, dtype):
            _check_integers(array, dtype)
    elif integer and np.issubdtype(dtype, np.floating):
        raise _MisfitError(
            f"how integers become {dtype} is not guessed; for pixels perhaps array.astype('{dtype}') / 255"
        )
    else:
        raise _MisfitError(f"{given} is not converted to {dtype} silently; convert it as the model expects it")


def _is_nameless_bfloat16(given: np.dtype, dtype: np.dtype) -> bool:
    """numpy.save keeps the bytes of a bfloat16 array but not its type's name."""
    return dtype.name == "bfloat16" and given == np.dtype("V2")


def _overflows(chunk: np.ndarray, dtype: np.dtype) -> bool:
    with np.errstate(over="ignore"):
        return bool(np.isinf(chunk.astype(dtype)).sum() != np.isinf(chunk).sum())


def _check_integers(array: Rows, dtype: np.dtype) -> None:
    extremes = [(int(chunk.min()), int(chunk.max())) for chunk in _chunks(array) if chunk.size]
    least = min((low for low, _ in extremes), default=0)
    greatest = max((high for _, high in extremes), default=0)
    limits = np.iinfo(dtype)
    if least < limits.min or greatest > limits.max:
        raise _MisfitError(f"values {least} to {greatest} do not fit {dtype}; give values that do")


def _chunks(array: Rows) -> Iterator[np.ndarray]:
    """Rows of about :data:`_CHUNK` bytes at a time, at least one, so that data of any size take little memory."""
    if isinstance(array, np.ndarray) and array.ndim == 0:
        yield array
        return
    each = math.prod(array.shape[1:]) * array.dtype.itemsize
    together = max(1, _CHUNK // max(each, 1))
    for start in range(0, array.shape[0], together):
        yield array[start : start + together]


def as_array(value: object, name: str, where: str) -> np.ndarray:
    """Whatever numpy can make an array of; DataError names the array otherwise."""
    try:
        array = np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # ragged lists; tensors of other libraries on a device
        raise DataError(f"{where}: {name!r} cannot become a numpy array ({error}); give arrays of numbers") from error
    if array.dtype == np.object_ and all(isinstance(item, str) for item in array.flat):
        return array.astype(np.str_)
    if array.dtype.hasobject:
        raise DataError(f"{where}: {name!r} holds Python objects; give arrays of numbers or text")
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

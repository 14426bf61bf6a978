"""Values of types that numpy itself has not, bfloat16 and float8, on their way into the runtime and out of it.

``InferenceSession.run`` knows numpy's own types alone; in memory both sides store these values alike.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

import numpy as np
import numpy.typing as npt
import onnx

_TYPES: Final = {
    f"tensor({name.lower()})": np.dtype(onnx.helper.tensor_dtype_to_np_dtype(number))
    for name, number in onnx.TensorProto.DataType.items()
    if name == "BFLOAT16" or name.startswith("FLOAT8")
}
"""The runtime's name of each of these types -> its dtype, which the package ml_dtypes has."""


def is_foreign(dtype: np.dtype[Any]) -> bool:
    """Whether the runtime takes arrays of this type only as values of its own."""
    return dtype in _TYPES.values()


def is_needed(active: Any) -> bool:
    """Whether the model of a session takes or gives out such a type."""
    return any(value.type in _TYPES for value in (*active.get_inputs(), *active.get_outputs()))


def run(active: Any, names: Sequence[str] | None, feeds: Mapping[str, npt.NDArray[Any]]) -> list[npt.NDArray[Any]]:
    """Run a session on arrays of any type; without ``names`` all outputs are given."""
    values = active.run_with_ort_values(names, {name: to_runtime(value) for name, value in feeds.items()})
    return [_to_numpy(value) for value in values]


def to_runtime(array: npt.NDArray[Any]) -> Any:
    """An ``onnxruntime.OrtValue`` of an array's values."""
    import onnxruntime as ort

    if not is_foreign(array.dtype):
        return ort.OrtValue.ortvalue_from_numpy(array)
    raw = np.ascontiguousarray(array).reshape(array.shape).view(f"u{array.itemsize}")
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, onnx.helper.np_dtype_to_tensor_dtype(array.dtype))


def _to_numpy(value: Any) -> npt.NDArray[Any]:
    dtype = _TYPES.get(value.data_type())
    if dtype is None:
        found: npt.NDArray[Any] = value.numpy()
        return found
    shape = tuple(value.shape())
    raw = ctypes.string_at(value.data_ptr(), math.prod(shape) * dtype.itemsize)
    return np.frombuffer(raw, dtype).reshape(shape)

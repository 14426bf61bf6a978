"""Constants whose values are made when they are asked for, and not kept: a second form of a weight costs no memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
from onnx_graphsurgeon.ir.tensor import LazyValues

from qdqtool.graphs.graph import Array


class Derived(LazyValues):  # type: ignore[misc]  # the library has no type hints
    """Values computed from those of another constant each time they are wanted.

    Args:
        source: the constant.
        shape: shape of the result.
        dtype: numpy type of the result.
        function: the other constant's values to the result; must not change its argument.
    """

    def __init__(
        self, source: gs.Constant, shape: Sequence[int], dtype: np.dtype[Any], function: Callable[[Array], Array]
    ) -> None:
        self._source, self._function = source._values, function
        self.shape, self.dtype = tuple(shape), dtype
        self.nbytes = int(np.prod(self.shape, dtype=np.int64)) * dtype.itemsize

    def load(self) -> Array:
        """The values, newly computed."""
        found = self._function(_read(self._source))
        assert (found.shape, found.dtype) == (self.shape, self.dtype)
        return found

    @property
    def tensor(self) -> onnx.TensorProto:
        """The values as the message that an export takes; the name is the export's to give."""
        return onnx.numpy_helper.from_array(np.ascontiguousarray(self.load()))


def peek(tensor: gs.Tensor) -> Array:
    """Values of a constant; what is still part of the model's message is read without keeping a copy.

    The tensor's own ``values`` would hold on to one from then on.
    """
    return _read(tensor._values)


def _read(values: Any) -> Array:
    if isinstance(values, np.ndarray):
        return values
    if isinstance(values, Derived):
        return values.load()
    return onnx.numpy_helper.to_array(values.tensor)

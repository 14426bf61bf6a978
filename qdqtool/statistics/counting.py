"""The innermost loop of calibration: counters[key] += 1 for every key, without a temporary and without the GIL.

``numpy.add.at`` takes two to three times as long and holds the interpreter's lock. What scipy runs for the product of a
sparse matrix in columns with a vector is exactly this loop; its function is not public, so where a release of scipy
should lack it numpy's does the same, slower.
"""

from __future__ import annotations

import contextlib
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_product: Any = None
with contextlib.suppress(ImportError):
    from scipy.sparse import _sparsetools

    _product = getattr(_sparsetools, "csc_matvec", None)

MOST: Final = np.iinfo(np.int32).max
"""Keys that may be counted before a counter could overflow."""
_ONES: Final = np.ones(1 << 16, np.int32)


def count(counters: npt.NDArray[np.int32], keys: npt.NDArray[np.int32]) -> None:
    """Add 1 to the counter of every key.

    Args:
        counters: int32 (n,), contiguous.
        keys: int32 (m,), contiguous, each at least 0 and below n; they are not checked.
    """
    for start in range(0, keys.size, _ONES.size):
        some = keys[start : start + _ONES.size]
        if _product is None:
            np.add.at(counters, some, np.int32(1))
        else:  # a matrix with one column, whose entries are all 1, times the vector [1]
            _product(counters.size, 1, np.array([0, some.size], np.int32), some, _ONES, _ONES, counters)

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import pytest

from qdqtool.calibrators.entropy import _SHARES, Entropy, _Counts
from qdqtool.calibrators.minmax import MinMax
from qdqtool.spec import FORMATS, QuantSpec, Range
from qdqtool.statistics.distribution import partial_moments
from qdqtool.statistics.tensor import TensorStatistics

Array = npt.NDArray[np.float32]
Observe = Callable[..., TensorStatistics]
Sqnr = Callable[[Array, Range, QuantSpec], float]
ASYMMETRIC, SYMMETRIC = QuantSpec(FORMATS["uint8"]), QuantSpec(FORMATS["int8"], symmetric=True)


@pytest.mark.parametrize(("fmt", "deviations"), [("uint8", 4), ("int8", 4), ("uint4", 3), ("int4", 3)])
def test_long_tail_gives_an_interior_threshold(
    observe: Observe, many_samples: dict[str, Array], fmt: str, deviations: int
) -> None:
    x = many_samples["t3"]
    threshold = Entropy().choose(observe(x), QuantSpec(FORMATS[fmt], symmetric=fmt.startswith("int"))).hi
    assert threshold < 0.9 * x.max()
    assert not np.isclose(threshold / x.max(), _SHARES[-1], rtol=0.01)  # the first and narrowest candidate
    assert threshold > deviations * x.std()  # the body is not clipped


def test_outlier_far_beyond_the_narrowest_candidate_is_cut_off(observe: Observe, samples: dict[str, Array]) -> None:
    chosen = Entropy().choose(
        observe(np.append(samples["gauss"], np.float32(200))), QuantSpec(FORMATS["int4"], symmetric=True)
    )
    assert 2.5 < chosen.hi < 5


def test_outlier_that_hides_all_else_in_one_bin_does_not_collapse_the_other_end(
    observe: Observe, samples: dict[str, Array]
) -> None:
    chosen = Entropy().choose(observe(np.append(samples["gauss"], np.float32(1e6))), ASYMMETRIC)
    assert chosen.lo == samples["gauss"].min()
    assert chosen.hi > 8e5


@pytest.mark.parametrize("fmt", ["uint8", "int8"])
@pytest.mark.parametrize("name", ["relu", "gauss", "laplace"])
def test_eight_bits_are_no_worse_than_minmax(
    observe: Observe, sqnr_db: Sqnr, samples: dict[str, Array], name: str, fmt: str
) -> None:
    x, spec = samples[name], QuantSpec(FORMATS[fmt], symmetric=fmt == "int8")
    stats = observe(x)
    assert sqnr_db(x, Entropy().choose(stats, spec), spec) > sqnr_db(x, MinMax().choose(stats, spec), spec) - 0.5


@pytest.mark.parametrize("name", ["gauss", "laplace", "t3", "gelu"])
def test_four_bits_beat_minmax(observe: Observe, sqnr_db: Sqnr, samples: dict[str, Array], name: str) -> None:
    x, spec = samples[name], QuantSpec(FORMATS["uint4"])
    stats = observe(x)
    assert sqnr_db(x, Entropy().choose(stats, spec), spec) > sqnr_db(x, MinMax().choose(stats, spec), spec) + 0.5


def test_few_values_are_not_clipped_by_the_noise_of_their_counts(observe: Observe, samples: dict[str, Array]) -> None:
    x = samples["gauss"][:500]
    chosen = Entropy().choose(observe(x), ASYMMETRIC)
    assert (chosen.lo, chosen.hi) == (x.min(), x.max())


def test_zeros_of_a_relu_do_not_move_the_threshold(observe: Observe, samples: dict[str, Array]) -> None:
    x, spec = np.abs(samples["laplace"]), QuantSpec(FORMATS["uint4"])
    alone, diluted = (Entropy().choose(observe(v), spec) for v in (x, np.append(x, np.zeros_like(x))))
    assert alone.hi == diluted.hi < x.max()


def test_sixteen_bits_keep_the_whole_range(observe: Observe, samples: dict[str, Array]) -> None:
    chosen = Entropy().choose(observe(samples["t3"]), QuantSpec(FORMATS["uint16"]))
    assert (chosen.lo, chosen.hi) == (samples["t3"].min(), samples["t3"].max())


def test_counts_under_a_point_leave_zeros_out(observe: Observe, samples: dict[str, Array]) -> None:
    bins = observe(np.append(samples["gelu"], np.zeros(500, np.float32))).bins
    points = np.append(np.linspace(bins.lo[0] - 1, bins.hi[-1] + 1, 999), 0)
    expected = partial_moments(bins, points)[0] - partial_moments(bins, bins.lo[0])[0]
    np.testing.assert_allclose(_Counts(bins).under(points), expected, atol=1e-6)

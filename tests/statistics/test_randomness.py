"""Random numbers are told from data: noise of every shape is found, and nothing that hangs together is taken for it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from qdqtool.data.batching import Sample, digest
from qdqtool.statistics.randomness import noise, random_inputs

Array = npt.NDArray[Any]
Make = Callable[[np.random.Generator, tuple[int, ...]], Array]

NOISE: dict[str, tuple[str, Make]] = {
    "randn": ("normal", lambda rng, shape: rng.standard_normal(shape)),
    "shifted normal": ("normal", lambda rng, shape: rng.normal(120, 30, shape)),
    "rand": ("uniform", lambda rng, shape: rng.random(shape)),
    "pixels": ("uniform", lambda rng, shape: rng.uniform(0, 255, shape)),
    "pixels in steps": ("uniform", lambda rng, shape: rng.integers(0, 256, shape) / 255),
}
SHAPES = {
    "images": ((1, 3, 32, 32), 16),
    "features": ((1, 20), 64),
    "flat": ((1, 784), 10),
    "short axes": ((1, 6, 5), 64),
    "sequence": ((1, 50, 12), 8),
    "one feed": ((64, 3, 16, 16), 1),
}


def samples(make: Make, shape: tuple[int, ...], count: int, seed: int = 0) -> list[Array]:
    rng = np.random.default_rng([seed, *shape])
    return [make(rng, shape).astype(np.float32) for _ in range(count)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("make", NOISE)
def test_noise_is_found_whatever_its_shape(make: str, shape: str) -> None:
    kind, draw = NOISE[make]
    assert [noise(samples(draw, *SHAPES[shape], seed=seed)) for seed in range(20)] == [kind] * 20


def test_noise_in_samples_of_differing_length_is_found() -> None:
    rng = np.random.default_rng(0)
    assert noise([rng.random((1, length, 4), np.float32) for length in range(5, 60)]) == "uniform"


def test_half_precision_is_found() -> None:
    assert noise([array.astype(np.float16) for array in samples(NOISE["randn"][1], (1, 40), 50)]) == "normal"


def test_few_values_tell_nothing() -> None:
    assert noise(samples(NOISE["randn"][1], (1, 15), 64)) is None
    assert noise(samples(NOISE["randn"][1], (1, 16), 64)) == "normal"
    assert noise([]) is None


@pytest.mark.parametrize("value", [0.0, 1.0, np.nan, np.inf])
def test_constants_and_what_is_not_finite_are_no_noise(value: float) -> None:
    arrays = samples(NOISE["randn"][1], (1, 64), 32)
    if np.isfinite(value):
        arrays = [np.full_like(array, value) for array in arrays]
    else:
        arrays[3][0, 5] = value
    assert noise(arrays) is None


def test_other_distributions_are_no_noise() -> None:
    rng = np.random.default_rng(0)
    laplace, bell, skewed = rng.laplace(size=2560), rng.beta(2, 2, 2560), rng.beta(2, 5, 2560)
    for values in (laplace, bell, skewed):  # the last has the kurtosis of a normal distribution
        assert noise(list(values.reshape(64, 40).astype(np.float32))) is None


def gaussian_but(change: Callable[[Array], Array], shape: tuple[int, ...], count: int = 64) -> list[Array]:
    """Normal values through a change that leaves the distribution of all values normal."""
    drawn = np.random.default_rng(1).standard_normal((count, *shape))
    return list(change(drawn).astype(np.float32))


class TestWhatHangsTogetherIsNoNoise:
    """Every array here has normal values: only how they hang together gives it away."""

    @pytest.mark.parametrize("axis", [3, 4])
    def test_neighbours_along_one_axis(self, axis: int) -> None:
        def smooth(x: Array) -> Array:
            return np.asarray((x + 0.5 * np.roll(x, 1, axis)) / np.sqrt(1.25))

        assert noise(gaussian_but(smooth, (1, 4, 20, 20), 1)) is None

    def test_samples_alike_at_the_same_place(self) -> None:
        common = np.random.default_rng(2).standard_normal((1, 300))
        assert noise(gaussian_but(lambda x: (x + 0.3 * common) / np.sqrt(1.09), (300,))) is None

    def test_features_that_correlate_far_apart(self) -> None:
        def factor(x: Array) -> Array:
            common = x[:, :1] * np.where(np.arange(40) % 2, 1, -1)[np.random.default_rng(3).permutation(40)]
            return np.asarray((x + 0.5 * common) / np.sqrt(1.25))

        assert noise(gaussian_but(factor, (40,))) is None

    def test_standardized_skewed_features(self) -> None:
        rng = np.random.default_rng(4)
        table = rng.lognormal(0, 0.4, (64, 30))
        table = (table - table.mean(0)) / table.std(0)
        assert noise([row[None].astype(np.float32) for row in table]) is None

    @pytest.mark.parametrize("blur", [1, 4])
    def test_smooth_images(self, blur: int) -> None:
        images = np.random.default_rng(5).random((16, 3, 40, 40))
        for _ in range(blur):
            for axis in (2, 3):
                images = (images + np.roll(images, 1, axis)) / 2
        assert noise(list(images.astype(np.float32))) is None

    def test_images_equalized_to_a_uniform_histogram(self) -> None:
        smooth = np.cumsum(np.random.default_rng(6).standard_normal((16, 1, 32, 32)), axis=3)
        ranks = smooth.reshape(-1).argsort().argsort().reshape(smooth.shape) / smooth.size
        assert noise(list(ranks.astype(np.float32))) is None


def as_samples(feeds: list[dict[str, Array]]) -> list[Sample]:
    return [Sample(feed, digest(feed), position) for position, feed in enumerate(feeds)]


def test_every_float_input_is_looked_at() -> None:
    rng = np.random.default_rng(7)
    line = np.linspace(-1, 1, 50, dtype=np.float32)
    feeds = [
        {
            "image": rng.random((1, 50), np.float32),
            "wave": line * rng.random(dtype=np.float32),
            "ids": rng.integers(0, 1000, (1, 50)),
            "latent": rng.standard_normal((1, 50), np.float32),
        }
        for _ in range(40)
    ]
    assert random_inputs(as_samples(feeds)) == {"image": "uniform", "latent": "normal"}


def test_a_sample_given_many_times_counts_once() -> None:
    rng = np.random.default_rng(8)
    distinct = [{"x": rng.random((1, 64), np.float32)} for _ in range(20)]
    assert random_inputs(as_samples(distinct * 3)) == {"x": "uniform"}
    assert random_inputs(as_samples(distinct[:10] * 6)) == {}


def test_large_samples_are_judged_by_some_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = samples(NOISE["rand"][1], (1, 100), 64)
    arrays[-1][...] = np.nan
    assert noise(arrays) is None
    monkeypatch.setattr("qdqtool.statistics.randomness._MOST_VALUES", 3000)
    assert noise(arrays) == "uniform"


@pytest.mark.zoo
@pytest.mark.filterwarnings("ignore::ResourceWarning")  # the loader of the real data leaves a file open
def test_real_data_are_not_called_random(zoo: Any) -> None:
    for name in zoo.names():
        feeds = zoo.feeds(zoo.load(name), 64)
        assert random_inputs(as_samples(feeds)) == {}, name

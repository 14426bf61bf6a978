"""GPTQ and AdaRound lower the error that second moments tell, at the same scales."""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest

from qdqtool.arithmetic import adaround, gptq
from qdqtool.arithmetic.grid import Grid
from qdqtool.arithmetic.output_error import Rounding, _borne_out, chosen
from qdqtool.arithmetic.second_moments import SecondMoments, product
from qdqtool.spec import FloatArray, IntArray

METHODS: dict[str, Rounding] = {"gptq": gptq.rounded, "adaround": adaround.rounded}


def grid(scale: FloatArray, least: int | IntArray = -7, greatest: int | IntArray = 7) -> Grid:
    ends = (np.broadcast_to(np.asarray(end, np.int64), scale.shape) for end in (least, greatest))
    return Grid(scale, np.zeros(scale.shape, np.int64), *ends)


def problem(inputs: int, outputs: int = 10, seed: int = 0) -> tuple[FloatArray, FloatArray, Grid]:
    """A weight, moments of inputs that go together, one of which is always 0, and 4-bit codes."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((1, outputs, inputs))
    x = rng.standard_normal((inputs, 3)) @ rng.standard_normal((3, 500)) + 0.3 * rng.standard_normal((inputs, 500))
    x[0] = 0
    return weights, (x @ x.T / 500)[None], grid(np.abs(weights).max(axis=2, keepdims=True) / 7)


def error(weights: FloatArray, moments: FloatArray, codes: IntArray, allowed: Grid) -> float:
    e = weights - allowed.values(codes)
    return float((e * (e @ moments)).sum())


@pytest.mark.parametrize("method", METHODS)
def test_without_correlations_nothing_is_better_than_nearest(method: str) -> None:
    weights = np.random.default_rng(0).standard_normal((3, 8, 40))
    allowed = grid(np.full((3, 8, 1), 0.3))
    moments = np.broadcast_to(np.diag(np.linspace(0.1, 2, 40)), (3, 40, 40))
    found = METHODS[method](weights, moments, allowed)
    np.testing.assert_array_equal(found, np.clip(np.rint(weights / 0.3), -7, 7))


@pytest.mark.parametrize(
    ("method", "inputs"), [*(("gptq", n) for n in (3, 127, 128, 129, 300)), ("adaround", 3), ("adaround", 60)]
)
def test_the_error_that_the_moments_tell_is_less(method: str, inputs: int) -> None:
    """In one block and over several, with an input that is always 0."""
    weights, moments, allowed = problem(inputs, seed=inputs)
    found = METHODS[method](weights, moments, allowed)
    near, best = (error(weights, moments, codes, allowed) for codes in (allowed.nearest(weights), found))
    assert best < (1.0 if inputs == 3 else 0.5) * near + 1e-12
    assert np.abs(found).max() <= 7


@pytest.mark.parametrize("method", METHODS)
def test_each_output_keeps_inside_its_own_codes(method: str) -> None:
    weights, moments, _ = problem(40)
    least = -np.repeat([0, 1, 3, 7, 127], 2).reshape(1, 10, 1)
    scale = np.abs(weights).max(axis=2, keepdims=True) / np.maximum(-least, 1)
    found = METHODS[method](weights, moments, grid(scale, least, -least))
    assert (found >= least).all()
    assert (found <= -least).all()
    assert (np.abs(found).max(axis=2, keepdims=True) >= -least // 2).all()


def test_gptq_is_the_rule_written_out() -> None:
    """Against optimal brain surgeon step by step: w -= e H⁻¹_i / H⁻¹_ii, then input i leaves H."""
    rng = np.random.default_rng(3)
    x, weights = rng.standard_normal((6, 50)), rng.standard_normal((1, 4, 6))
    h = x @ x.T / 50
    found = gptq.substituted(weights, h[None], grid(np.full((1, 4, 1), 0.4)))[0]
    damped, w, wanted = h + 0.01 * np.diag(h).mean() * np.eye(6), weights[0].copy(), np.zeros((4, 6))
    left = list(np.argsort(-np.diag(h), kind="stable"))
    while left:
        inverse, i = np.linalg.inv(damped[np.ix_(left, left)]), left[0]
        wanted[:, i] = np.clip(np.rint(w[:, i] / 0.4), -7, 7)
        w[:, left] -= np.outer(w[:, i] - 0.4 * wanted[:, i], inverse[0] / inverse[0, 0])
        left = left[1:]
    np.testing.assert_array_equal(found, wanted)


def test_a_descent_ends_where_no_single_code_does_better() -> None:
    weights, moments, allowed = problem(24)
    moments = gptq.damped(moments)
    found = allowed.nearest(weights)
    for _ in range(10):
        found = gptq.descended(found, weights, moments, allowed)
    least = error(weights, moments, found, allowed)
    for output in range(10):
        for i in range(24):
            for step in (-1, 1):
                other = found.copy()
                other[0, output, i] = np.clip(other[0, output, i] + step, -7, 7)
                assert error(weights, moments, other, allowed) >= least - 1e-9


def test_a_weight_that_fits_other_inputs_is_the_regression() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((5, 4000))
    y = 0.7 * x + 0.2 * rng.standard_normal((5, 5)) @ x + 0.1 * rng.standard_normal(x.shape)
    weights = rng.standard_normal((1, 3, 5))
    found = gptq.compensated(weights, (y @ y.T / 4000)[None], ((x - y) @ y.T / 4000)[None])[0]
    wanted = np.linalg.lstsq(y.T, (weights[0] @ x).T)[0].T
    np.testing.assert_allclose(found, wanted, atol=0.01)


def test_numpy_and_torch_choose_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch", reason="PyTorch is not installed")
    weights, moments, allowed = problem(60)
    errors = []
    for module in (np, torch):
        monkeypatch.setattr(adaround, "_arrays", partial(operator.itemgetter(0), (module,)))
        errors.append(error(weights, moments, adaround.rounded(weights, moments, allowed), allowed))
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def moments_of(draw: Callable[[], FloatArray], count: int, *, exact: bool = False) -> SecondMoments:
    found = SecondMoments(product(), count_exact=exact)
    for _ in range(count):
        columns = draw().astype(np.float32)[None]
        found.add(columns, columns)
    return found


def test_codes_that_fail_on_samples_kept_apart_are_not_taken() -> None:
    """Samples to choose by whose inputs go together otherwise than those of the samples to check on."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((1, 10, 12))
    allowed = grid(np.abs(weights).max(axis=2, keepdims=True) / 7)
    mixing = rng.standard_normal((12, 2))
    other = mixing * np.where(np.arange(12) % 2, 1, -1)[:, None]
    fit = moments_of(lambda: mixing @ rng.standard_normal((2, 50)), 30)
    alike = moments_of(lambda: mixing @ rng.standard_normal((2, 50)), 10, exact=True)
    unlike = moments_of(lambda: other @ rng.standard_normal((2, 50)), 10, exact=True)
    found = chosen(weights, allowed, gptq.rounded, fit, alike, centred=False)
    assert found is not None
    known = alike.mean(centred=False)
    near, best = (known.exact_error(weights, allowed.values(codes)) for codes in (allowed.nearest(weights), found))
    assert best < 0.5 * near
    assert chosen(weights, allowed, gptq.rounded, fit, unlike, centred=False) is None


def test_of_a_fit_only_so_much_is_taken_as_other_samples_bear_out() -> None:
    """What few samples say of drift is mostly chance: weights stay, but for the part that repeats."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((1, 6, 40))

    def sums(samples: int, drift: float) -> SecondMoments:
        counted = SecondMoments(product(), count_exact=True)
        for _ in range(samples):
            seen, noise = rng.standard_normal((2, 1, 40, 4)).astype(np.float32)
            counted.add((1 + drift) * seen + 0.3 * noise, seen)
        return counted

    chance, real = (
        _borne_out(weights, sums(60, drift).mean(centred=False), sums(8, drift).mean(centred=False))
        for drift in (0.0, 0.5)
    )
    assert chance.mean() < 0.2
    assert real.mean() > 0.5
    assert ((chance >= 0) & (real <= 1)).all()

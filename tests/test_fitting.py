"""Fitted solvers: where they start, their gradients, that they learn, their files; GITS grids."""

import dataclasses
import itertools
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Mixture, mixture, normal
from closed_forms import unoptimised as unoptimised
from damage import assert_damage_is_an_error
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd
from steindiff_jax import fitting, gits

KEY = jax.random.key(3)
GRID = sd.karras_sigmas(4)
DENOISER = mixture()
PLAIN, STEIN = sd.DPMpp3M(), sd.Stein(sd.IPNDM(3))
PARTS = ("sigmas", "coefficients", "rows", "levels")


def fit(solver=STEIN, denoiser=DENOISER, **options):
    options = {"batches": 2, "held_out": 1, "teacher": sd.log_snr_sigmas(20)} | options
    return sd.fit(KEY, denoiser, (32, 2), GRID, solver, **options)


def closed(x, sigma):
    """A denoiser that is a plain function."""
    return DENOISER(x, sigma)


@cache
def fitted():
    return fit(parts=PARTS, iterations=60)


@cache
def plain():
    return fit(PLAIN, closed, parts=("sigmas", "rows"), iterations=4)


def run(solver, x, sigmas=None, denoiser=DENOISER):
    sigmas = solver.sigmas if sigmas is None else sigmas
    return sd.sample(KEY, denoiser, sigmas=sigmas, solver=solver, x_init=x).x


def start(solver, shape=(32, 2), denoiser=DENOISER):
    return fitting._start(KEY, denoiser, shape, GRID, solver, 3)


def perturbed(solver, seed=0, size=0.1):
    """All tables away from where they start, but what is not there yet still without weight."""
    rng = np.random.default_rng(seed)
    there = np.arange(3)[None, :, None] < np.arange(4)[:, None, None]
    return dataclasses.replace(
        solver,
        coefficients=jax.tree.map(
            lambda c: c + size * rng.standard_normal(c.shape), solver.coefficients
        ),
        rows=jnp.asarray(there * size * rng.standard_normal(solver.rows.shape)),
        levels=jnp.asarray(size * rng.standard_normal(solver.levels.shape)),
    )


@pytest.mark.parametrize("solver", [PLAIN, sd.UniPC(2), STEIN], ids=lambda s: type(s).__name__)
def test_starts_as_the_solver(solver):
    """The plain one to the last bit; the corrected one is its own table."""
    x = normal(16, 2, scale=80.0)
    base = solver
    if isinstance(solver, sd.Stein):
        base = sd.calibrate(KEY, DENOISER, (32, 2), GRID, solver)
    assert_array_equal(run(start(solver), x), run(base, x, GRID))


def test_a_step_by_hand():
    """x_next = q x + (1 - q)(x0 + delta + sum_j c_j (x0_j - x0)), the network told other levels."""
    solver, x = perturbed(start(sd.DDIM())), normal(5, 2, scale=80.0)
    gamma, drift = solver.coefficients
    assert gamma.shape == drift.shape == (4, 1)
    y, past = x, []
    for i, (s, t) in enumerate(itertools.pairwise(GRID)):
        x0 = DENOISER(y, s * jnp.exp(solver.levels[i]))
        change = float(drift[i, 0]) * (x0 - y)
        for c, before in zip(solver.rows[i, :, 0].tolist(), past, strict=False):
            change += c * (before - x0)
        y, past = sd.ddim(y, x0 + change, s, t), [x0, *past]
    assert_allclose(run(solver, x), y, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("solver", [PLAIN, STEIN], ids=lambda s: type(s).__name__)
def test_gradient_of_the_whole_chain(solver):
    """Against central differences in float64, of every part, along random directions."""
    solver = perturbed(start(solver), size=0.02)
    x, target = normal(8, 2, scale=80.0), normal(8, 2, seed=1)
    increments = fitting._parameter(solver, "sigmas")
    parameters = {"sigmas": increments, **{p: getattr(solver, p) for p in PARTS[1:]}}

    @jax.jit
    def loss(parameters):
        grid = fitting._grid(GRID[0], parameters["sigmas"], 4)
        new = dataclasses.replace(solver, **parameters | {"sigmas": grid})
        x_end = sd.sample(KEY, DENOISER, sigmas=grid, solver=new, x_init=x, remat=True).x
        return jnp.mean((x_end - target) ** 2)

    gradient = jax.jit(jax.grad(loss))(parameters)
    flat, unravel = jax.flatten_util.ravel_pytree(parameters)
    slopes = jax.flatten_util.ravel_pytree(gradient)[0]
    h, rng = 1e-6, np.random.default_rng(0)
    for part in PARTS:
        direction = jax.tree.map(jnp.zeros_like, parameters)
        direction[part] = jax.tree.map(
            lambda a: jnp.asarray(rng.standard_normal(a.shape)), direction[part]
        )
        v = jax.flatten_util.ravel_pytree(direction)[0]
        found = (loss(unravel(flat + h * v)) - loss(unravel(flat - h * v))) / (2 * h)
        assert abs(found) > 1e-6
        assert_allclose(slopes @ v, found, rtol=1e-5)


def test_gradients_of_a_network_in_half_precision():
    """Finite, also where the steps are first order and where a step ends at 0."""

    def half(x, sigma):
        return DENOISER(x.astype(jnp.bfloat16), sigma.astype(jnp.bfloat16)).astype(x.dtype)

    solver = start(STEIN, denoiser=half)
    x = jnp.float32(normal(8, 2, scale=80.0))

    def loss(solver):
        x_end = sd.sample(KEY, half, sigmas=solver.sigmas, solver=solver, x_init=x).x
        return jnp.mean(x_end**2)

    gradient = jax.grad(loss, allow_int=True)(jax.tree.map(jnp.float32, solver))
    for field in PARTS:
        for leaf in jax.tree.leaves(getattr(gradient, field)):
            assert np.isfinite(leaf).all()
            assert np.any(leaf)


def test_ends_nearer_to_the_teacher():
    """On noise that it has not seen, a good deal; and every part has moved."""
    x = normal(400, 2, seed=5, scale=80.0)
    exact = run(sd.DPMpp2M(), x, sd.log_snr_sigmas(100))

    def error(solver):
        return np.sqrt(np.mean((run(solver, x) - exact) ** 2))

    assert error(fitted()) < 0.7 * error(start(STEIN))
    for part in PARTS:
        moved = jax.tree.map(
            lambda a, b: np.abs(a - b).max(), *(getattr(f, part) for f in (fitted(), start(STEIN)))
        )
        assert max(jax.tree.leaves(moved)) > 1e-3, part


def test_only_the_parts_that_are_asked_for():
    after, before = plain(), start(PLAIN)
    for part in PARTS:
        same = jax.tree.map(np.array_equal, getattr(after, part), getattr(before, part))
        assert jax.tree.all(same) == (part not in ("sigmas", "rows"))


def test_the_grid_keeps_its_ends_and_decreases():
    sigmas = fitted().sigmas
    assert sigmas[0] == GRID[0]
    assert sigmas[-1] == 0
    assert np.all(np.diff(sigmas) < 0)
    rng = np.random.default_rng(0)
    for size in (0.0, 1.0, 3.0):
        grid = fitting._grid(GRID[0], jnp.asarray(size * rng.standard_normal(6)), 7)
        assert grid.shape == (8,)
        assert np.all(np.diff(grid) < 0)
        assert grid[0] == GRID[0]
        assert grid[-1] == 0
    again = fitting._grid(GRID[0], fitting._parameter(start(PLAIN), "sigmas"), 4)
    assert_allclose(again, GRID, rtol=1e-14)


def test_bands_of_the_basis():
    """Images: a table for each band, and a row of one of them moves that band alone."""
    shape, basis = (8, 4, 4, 1), sd.Cosine(2)
    image = Mixture(normal(3, 16), 0.3)

    def denoiser(x, sigma):
        return image(x.reshape(-1, 16), sigma).reshape(x.shape)

    found = fitting._start(KEY, denoiser, shape, GRID, sd.Stein(sd.DDIM(), basis=basis), 9)
    bands = len(basis.partition(shape[1:]).sizes)
    assert found.rows.shape == (4, 3, bands)
    assert found.gamma.shape == (4, bands)
    x = normal(*shape, scale=80.0)
    changed = dataclasses.replace(found, rows=found.rows.at[-1, 0, 1].set(0.5))
    gap = run(changed, x, denoiser=denoiser) - run(found, x, denoiser=denoiser)
    moved = basis.partition(shape[1:]).inner(basis.transform(gap), basis.transform(gap))
    assert np.all(moved[:, 1] > 1e-6)
    assert np.all(moved[:, np.arange(bands) != 1] < 1e-20)


def test_the_default_metric():
    """The error in each band, over the variance of the targets there."""
    targets = jnp.asarray(normal(2, 50, 8, 8, 1))
    metric = fitting._banded(targets)
    x = targets[0]
    assert_allclose(metric(x, x), 0.0)
    # What is as far from x in each band as the mean is has an error of 1, up to that of the mean.
    mean = targets.mean((0, 1))[None]
    assert metric(jnp.broadcast_to(mean, x.shape), x).mean() == pytest.approx(1, rel=0.1)
    assert_allclose(metric(2 * x, 0 * x), 4 * metric(x, 0 * x))


def test_the_same_key_gives_the_same():
    progress = lambda iterations: (i for i in iterations)  # noqa: E731
    again = fit(PLAIN, closed, parts=("sigmas", "rows"), iterations=4, progress=progress)
    assert again == plain()


@pytest.mark.slow
def test_goes_on_from_a_fitted_one_and_keeps_what_no_other_beats():
    first = fitted()
    options = {"batches": 1, "held_out": 1, "iterations": 1}
    equal = lambda x, target: 0.0 * (x - target).sum(1)  # noqa: E731
    again = sd.fit(KEY, DENOISER, (32, 2), first.sigmas, first, metric=equal, **options)
    assert again == first


def test_saved_and_loaded(tmp_path):
    path = tmp_path / "fitted.json"
    for found, solver in ((fitted(), STEIN), (start(PLAIN), PLAIN)):
        found.save(path)
        assert sd.Fitted.load(path, solver, DENOISER) == found
        with pytest.raises(ValueError, match="another denoiser"):
            sd.Fitted.load(path, solver, mixture(seed=1))
        with pytest.raises(ValueError, match="was recorded with"):
            sd.Fitted.load(path, sd.IPNDM(2), DENOISER)
        with pytest.raises(ValueError, match="has format 'steindiff_jax fitted"):
            sd.Calibrated.load(path, STEIN)

    def check(loaded):
        assert loaded.rows.shape == (4, 3, 1)
        assert loaded.levels.shape == (4,)
        assert np.isfinite(loaded.rows).all()

    assert_damage_is_an_error(path, lambda path: sd.Fitted.load(path, PLAIN, DENOISER), check, 200)


def test_another_grid_is_refused():
    with pytest.raises(ValueError, match=r"pass sigmas=table\.sigmas"):
        run(fitted(), normal(4, 2), GRID)
    with pytest.raises(ValueError, match=r"pass sigmas=table\.sigmas"):
        sd.fit(KEY, DENOISER, (32, 2), GRID, fitted())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"parts": ("grid",)}, "parts must be some of"),
        ({"parts": ()}, "parts must be some of"),
        ({"past": 0}, "past must be at least 1"),
        ({"batches": 0}, "batches must be at least 1"),
        ({"iterations": 0}, "iterations must be at least 1"),
        ({"metric": lambda x, target: jnp.sum(x - target) * jnp.nan}, "the loss at the start"),
    ],
)
def test_what_cannot_be_fitted_is_refused(options, match):
    with pytest.raises(ValueError, match=match):
        fit(PLAIN, **options)


def test_a_grid_that_ends_above_0():
    """All its levels but the first are fitted, and samples of other noise end nearer."""
    grid, x = sd.karras_sigmas(4, to_zero=False), normal(64, 2, seed=7, scale=80.0)
    options = {"parts": ("sigmas", "coefficients"), "iterations": 10}
    found = sd.fit(KEY, DENOISER, (32, 2), jnp.pad(grid, (0, 2), mode="edge"), STEIN, **options)
    assert found.sigmas.shape == (5,)
    assert found.sigmas[0] == grid[0]
    assert np.all(np.asarray(found.sigmas[1:]) != grid[1:])
    assert np.all(np.diff(found.sigmas) < 0)
    assert found.sigmas[-1] > 0
    target = run(STEIN, x, sd.log_snr_sigmas(40))
    before, after = (np.mean((y - target) ** 2) for y in (run(STEIN, x, grid), run(found, x)))
    assert after < 0.7 * before


@pytest.mark.parametrize("steps", [1, 2, 3, 5])
def test_shortest_path_is_that_of_brute_force(steps):
    costs = np.random.default_rng(steps).uniform(size=(8, 8))
    inside = itertools.combinations(range(1, 7), steps - 1)
    paths = [[0, *nodes, 7] for nodes in inside]
    totals = [sum(costs[i, j] for i, j in itertools.pairwise(path)) for path in paths]
    assert gits.shortest_path(costs, steps) == paths[int(np.argmin(totals))]


def test_a_grid_of_a_trajectory():
    """Its costs are the errors of first-order steps, and its nodes are some of the teacher's."""
    long, x = sd.log_snr_sigmas(12), 80.0 * normal(16, 2)
    grid = sd.gits_sigmas(KEY, DENOISER, (16, 2), 4, long)
    assert grid.shape == (5,)
    assert set(np.asarray(grid)) <= set(np.asarray(long))
    assert (grid[0], grid[-1]) == (long[0], 0)
    assert_array_equal(sd.gits_sigmas(KEY, DENOISER, (16, 2), 12, long), long)
    states, x0 = sd.sample(
        KEY, DENOISER, sigmas=long, x_init=x, record=lambda state, step: (state.x, step.x0)
    ).record
    costs = gits._errors(long, x, states, x0)
    step = sd.ddim(states[2], x0[3], long[3], long[7])
    assert_allclose(costs[3, 7], np.sqrt(np.mean((step - states[6]) ** 2)))
    with pytest.raises(ValueError, match="steps must be below"):
        sd.gits_sigmas(KEY, DENOISER, (16, 2), 13, long)

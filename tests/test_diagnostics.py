"""Diagnostics against closed forms on Gaussian data and brute force on mixtures."""

import sys
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian, Mixture, gaussian, mixture, normal, run, whitened
from jax.tree_util import Partial
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd
from steindiff_jax import diagnostics

KEY = jax.random.key(0)
contractivity = jax.jit(diagnostics.contractivity, static_argnames="iterations")
discrepancy = jax.jit(diagnostics.stein_discrepancy)
GRID = np.array([6.0, 3.0, 1.6, 0.7, 0.3, 0.0])


def with_noise(denoiser, sigma, n=64, seed=0):
    """N states of mean and covariance exactly those of Gaussian data noised to sigma."""
    factor = np.linalg.cholesky(np.asarray(denoiser.covariance) + sigma**2 * np.eye(3))
    return np.asarray(denoiser.mean) + whitened(n, 3, seed) @ factor.T


def draw(denoiser, n, rng):
    """Clean samples of a mixture."""
    means = np.asarray(denoiser.means)
    return means[rng.integers(len(means), size=n)] + denoiser.std * rng.standard_normal(
        (n, means.shape[1])
    )


# --- Power iteration -----------------------------------------------------------------------------


def rotation_and_stretch(d=6):
    """A non-symmetric Jacobian that differs from row to row: x -> M x + sin(x)."""
    m = normal(d, d, seed=1)
    return lambda x: x @ m.T + jnp.sin(x), lambda row: m + jnp.diag(jnp.cos(row))


def test_spectral_norm_is_the_largest_singular_value():
    function, jacobian = rotation_and_stretch()
    x = normal(5, 6)
    exact = jnp.linalg.norm(jax.vmap(jacobian)(x), ord=2, axis=(1, 2))
    found = jax.jit(lambda x: diagnostics.spectral_norm(KEY, function, x, 400))(x)
    assert_allclose(found.value, exact, rtol=1e-10)
    assert np.all(found.residual < 1e-6)


@pytest.mark.slow
def test_an_early_estimate_is_a_lower_bound_and_its_residual_says_so():
    function, jacobian = rotation_and_stretch()
    x = normal(50, 6)
    singular = jnp.linalg.svd(jax.vmap(jacobian)(x), compute_uv=False)
    before = jnp.zeros(50)
    for iterations in (1, 2, 6):
        found = diagnostics.spectral_norm(KEY, function, x, iterations)
        assert np.all(found.value <= singular[:, 0] * (1 + 1e-12))
        assert np.all(found.value >= before)  # never falls
        before = found.value
        # the promise of the residual: an eigenvalue of J^T J within that share of value^2
        distance = jnp.abs(singular**2 - found.value[:, None] ** 2).min(1)
        assert np.all(distance <= found.residual * found.value**2 * (1 + 1e-9))
        if iterations == 1:  # far from converged, and known to be
            assert np.median(found.residual) > 0.1


def test_spectral_norm_of_zero():
    found = diagnostics.spectral_norm(KEY, jnp.zeros_like, normal(3, 4))
    assert_array_equal(found.value, 0.0)
    assert_array_equal(found.residual, 0.0)
    with pytest.raises(ValueError, match="iterations"):
        diagnostics.spectral_norm(KEY, jnp.zeros_like, normal(3, 4), iterations=0)


# --- Contractivity -------------------------------------------------------------------------------

AXES = Gaussian(jnp.zeros(3), jnp.diag(jnp.array([1.5, 0.3, 0.02])))


def profile(solver, denoiser=AXES, x=None, grid=GRID, iterations=400):
    x = normal(4, 3, scale=grid[0]) if x is None else x
    return contractivity(KEY, denoiser, x, grid, solver, iterations)


def test_a_first_order_step_meets_the_certificate():
    """L_T = q + (1 - q) L_D where the Jacobian is symmetric and positive."""
    found = profile(sd.DDIM())
    largest = 1.5 / (1.5 + GRID[:-1] ** 2)
    q = GRID[1:] / GRID[:-1]
    shape = np.ones((5, 4))
    assert_allclose(found.denoiser, largest[:, None] * shape, rtol=1e-9)
    assert_allclose(found.step, (q + (1 - q) * largest)[:, None] * shape, rtol=1e-9)
    assert_allclose(found.certificate, found.step, rtol=1e-9)
    assert np.all(found.residual < 1e-4)
    assert_array_equal(found.violations, 0.0)
    assert_array_equal(found.expanding, 0.0)


@pytest.mark.slow
def test_a_first_order_step_never_violates_it_however_few_iterations():
    """Here the residual is large, and a mixture's Jacobian differs from sample to sample."""
    x = normal(64, 2, scale=6.0)
    for iterations in (1, 3):
        found = profile(sd.DDIM(), mixture(std=0.1), x, iterations=iterations)
        assert np.max(found.residual) > 0.02
        assert_array_equal(found.violations, 0.0)


def second_order(gamma):
    """Norms of the DPM++2M step by hand, damped to gamma of each step."""
    norms = []
    for i, (s, s_next) in enumerate(pairwise(GRID)):
        q, weight = s_next / s, 0.0
        if i > 0 and s_next > 0:
            weight = np.log(s / s_next) / np.log(GRID[i - 1] / s) / 2
        eigenvalues = np.array([1.5, 0.3, 0.02])
        jacobian = eigenvalues / (eigenvalues + s**2)
        norms.append(np.max(q + (1 - q) * (1 + gamma[i] * weight) * jacobian))
    return np.array(norms)


@pytest.mark.parametrize("statistics", ["batch", "sample", None])
def test_a_multistep_step_exceeds_the_certificate_by_its_history(statistics):
    """L_T = q + (1 - q)(1 + gamma w) J: the past is held fixed, and so is gamma."""
    solver, gamma = sd.DPMpp2M(), np.ones((5, 4))
    x = normal(4, 3, scale=GRID[0])
    if statistics:
        solver = sd.Stein(solver, sd.StepEnergy(0.0, 10.0), statistics=statistics)
        gamma = np.asarray(run(AXES, GRID, solver, x).info.gamma)
        gamma = np.broadcast_to(gamma.reshape(5, -1), (5, 4))
        assert np.abs(gamma[1:-1] - 1).min() > 1e-3
    found = profile(solver, x=x)
    expected = np.stack([second_order(column) for column in gamma.T], axis=1)
    assert_allclose(found.step, expected, rtol=1e-8)
    exceeds = expected > 1.001 * np.asarray(found.certificate)
    assert_array_equal(found.violations, exceeds.mean(axis=1))
    if not statistics:
        assert_array_equal(found.violations, [0, 1, 1, 1, 0])


@pytest.mark.slow
def test_the_trap_by_brute_force():
    """Half-way between two sharp modes L_D = (a / sigma)^2 or so, above 1; nearer to one, not."""
    sigma, means = 0.3, jnp.array([[0.8, 0.0], [-0.8, 0.0]])
    denoiser, x = Mixture(means, 0.05), jnp.array([[0.01, 0.02], [0.2, 0.1], [-0.25, 0.0]])
    found = profile(sd.Heun(), denoiser, x, np.array([sigma, 0.2]))

    def norms(function):
        jacobians = jax.vmap(jax.jacfwd(lambda row: function(row[None])[0]))(x)
        return jnp.linalg.norm(jacobians, ord=2, axis=(1, 2))

    assert_allclose(found.denoiser[0], norms(lambda x: denoiser(x, sigma)), rtol=1e-8)
    step = norms(lambda x: run(denoiser, [sigma, 0.2], sd.Heun(), x).x)
    assert_allclose(found.step[0], step, rtol=1e-8)
    assert np.all(found.denoiser[0, 1:] < 1)
    assert abs(found.denoiser[0, 0] / (0.8 / sigma) ** 2 - 1) < 0.1
    assert_allclose(found.expanding, 1 / 3)


@pytest.mark.slow
def test_memory_is_linear_in_the_dimension():
    def temporary(d):
        def profile(x):
            return diagnostics.contractivity(
                KEY, lambda x, s: jnp.tanh(x / (1 + s)), x, GRID, sd.Stein(sd.DPMpp2M())
            )

        x = jax.ShapeDtypeStruct((2, d), jnp.float64)
        return jax.jit(profile).lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(40_000) < 4.5 * temporary(10_000)


# --- Stein discrepancy ---------------------------------------------------------------------------


def test_discrepancy_of_gaussian_data_at_another_level():
    """Every term is closed form: the ratio, and the implied level is the true one."""
    denoiser = gaussian()
    levels, truth = jnp.array([0.1, 0.8, 5.0]), np.array([0.15, 0.5, 7.0])
    x = jnp.stack([jnp.asarray(with_noise(denoiser, s)) for s in truth])
    found = discrepancy(KEY, denoiser, x, levels, sd.Exact())
    for ratio, s, s_true in zip(found.ratio, levels, truth, strict=True):
        away = np.eye(3) - np.asarray(denoiser.jacobian(s))
        covariance = np.asarray(denoiser.covariance) + s_true**2 * np.eye(3)
        expected = np.trace(away @ covariance @ away) / (s**2 * np.trace(away))
        assert_allclose(ratio, expected, rtol=1e-9)
    assert_allclose(found.sigma, truth, rtol=1e-9)


@pytest.mark.parametrize(
    "estimator", [sd.Exact(), pytest.param(sd.Hutchinson(2), marks=pytest.mark.slow)], ids=type
)
def test_discrepancy_measures_calibration(estimator):
    """On noised data: 1 for the exact denoiser, not for one that shrinks or sees another sigma."""
    denoiser, n, rng = mixture(), 20_000, np.random.default_rng(3)
    levels = jnp.array([0.3, 1.0])
    clean = draw(denoiser, n, rng)
    x = jnp.asarray(clean + np.asarray(levels)[:, None, None] * rng.standard_normal((2, n, 2)))
    exact = discrepancy(KEY, denoiser, x, levels, estimator)
    assert np.all(np.abs(exact.ratio - 1) < 4 * exact.error)
    assert np.all(exact.error < 0.02)

    def shrinking(denoiser, x, s):
        return 0.8 * denoiser(x, s)

    def confident(denoiser, x, s):
        return denoiser(x, 0.8 * s)

    for wrong in (shrinking, confident):
        found = discrepancy(KEY, Partial(wrong, denoiser), x, levels, estimator)
        assert np.all(np.abs(found.ratio - 1) > 5 * found.error)


def test_the_standard_error_of_the_discrepancy():
    """Over many batches the ratio scatters as its own error says."""
    denoiser, rng = gaussian(), np.random.default_rng(4)
    n, levels = 200, 400
    factor = np.linalg.cholesky(np.asarray(denoiser.covariance) + np.eye(3))
    x = np.asarray(denoiser.mean) + rng.standard_normal((levels, n, 3)) @ factor.T
    found = discrepancy(KEY, denoiser, jnp.asarray(x), jnp.ones(levels))
    # a standard deviation from 400 draws is known to 3.5%
    assert abs(np.std(found.ratio) / np.mean(found.error) - 1) < 4 * 0.035
    assert abs(np.mean(found.ratio) - 1) < 4 * np.mean(found.error) / np.sqrt(levels)


def test_discrepancy_refuses():
    x = jnp.ones((2, 4, 3))
    with pytest.raises(ValueError, match="Hutchinson"):
        diagnostics.stein_discrepancy(KEY, gaussian(), x, jnp.ones(2), sd.Tweedie())
    with pytest.raises(ValueError, match="one batch per sigma"):
        diagnostics.stein_discrepancy(KEY, gaussian(), x, jnp.ones(2)[:, None])


# --- Reports -------------------------------------------------------------------------------------


@jax.jit
def both(denoiser, x, sigma):
    """The denoiser and its Jacobians."""
    jacobians = jax.vmap(jax.jacfwd(lambda row: denoiser(row[None], sigma)[0]))(x)
    return denoiser(x, sigma), jacobians


@pytest.mark.parametrize("statistics", ["batch", "sample"])
def test_report_of_a_run(statistics):
    denoiser, x = mixture(), normal(32, 2, scale=6.0)
    solver = sd.Stein(sd.DPMpp2M(), statistics=statistics)
    solution = run(denoiser, GRID, solver, x, record=diagnostics.keep)
    report = diagnostics.trajectory_report(solution, GRID, denoiser, key=KEY, estimator=sd.Exact())
    steps = list(pairwise(GRID))
    assert_array_equal(report.sigma, GRID[:-1])
    assert_array_equal(report.sigma_next, GRID[1:])
    assert_allclose(report.gamma, np.reshape(solution.info.gamma, (5, -1)).mean(1))
    assert_allclose(report.finite, 1.0)

    ends = np.asarray(run(denoiser, GRID, solver, x, record=lambda state, _: state.x).record)
    assert_allclose(report.x, np.sqrt(np.mean(ends**2, axis=(1, 2))), rtol=1e-9)
    assert np.isnan(report.ratio[-1])
    for i, ((_, s), end) in enumerate(zip(steps[:-1], ends, strict=False)):
        x0, jacobians = both(denoiser, end, s)
        trace = np.trace(jacobians, axis1=1, axis2=2)
        ratio = np.mean(np.sum((end - x0) ** 2, axis=1)) / (s**2 * np.mean(2 - trace))
        assert_allclose(report.ratio[i], ratio, rtol=1e-8)
        assert_allclose(report.x0[i + 1], np.sqrt(np.mean(np.square(x0))), rtol=1e-9)
    assert report.delta[-1] == 0 < report.delta[:-1].min()  # a step to 0 returns the denoiser

    table = str(report).splitlines()
    assert len(table) == 1 + len(steps)
    assert [float(v) for v in table[3].split()[1:3]] == [1.6, 0.7]


def test_drift_of_a_sampler_that_leaves_noise_behind():
    """A solver whose steps are a tenth too short ends each of them above its sigma: ratio > 1."""

    @sd.pytree
    class Short(sd.Solver):
        def advance(self, key, denoiser, state, sigma, sigma_next):
            new, step = sd.DDIM().advance(key, denoiser, state, sigma, sigma_next)
            return sd.State(new.x + 0.1 * (state.x - new.x)), step

    denoiser, grid = Gaussian(jnp.zeros(3), 1e-4 * jnp.eye(3)), np.array([6.0, 3.0, 1.5])
    x = jnp.asarray(grid[0] * whitened(64, 3))
    reports = {}
    for solver in (sd.DDIM(), Short()):
        solution = run(denoiser, grid, solver, x, record=diagnostics.keep)
        reports[type(solver).__name__] = diagnostics.trajectory_report(
            solution, grid, denoiser, key=KEY
        )
    # data next to a point: the state is noise, and 0.9 s' + 0.1 s remains of it
    assert_allclose(reports["DDIM"].implied, [3.0, 1.5], rtol=1e-4)
    assert_allclose(reports["Short"].implied, [6.0 * 0.55, 6.0 * 0.55**2], rtol=1e-4)
    assert_allclose(reports["Short"].ratio, np.square([1.1, 4 * 0.55**2]), rtol=1e-4)


def test_report_without_a_denoiser_and_its_errors():
    denoiser, x = mixture(), normal(8, 2, scale=6.0)
    solution = run(denoiser, GRID, sd.DDIM(), x, record=diagnostics.keep)
    assert np.all(np.isnan(diagnostics.trajectory_report(solution, GRID).ratio))
    with pytest.raises(ValueError, match="key"):
        diagnostics.trajectory_report(solution, GRID, denoiser)
    with pytest.raises(ValueError, match="those of the run"):
        diagnostics.trajectory_report(solution, GRID[1:])
    with pytest.raises(ValueError, match="record=keep"):
        diagnostics.trajectory_report(run(denoiser, GRID, sd.DDIM(), x), GRID)


def test_all_of_it_under_jit_in_float32():
    denoiser, x = mixture(), normal(16, 2, scale=6.0).astype(jnp.float32)
    denoiser = jax.tree.map(jnp.float32, denoiser)
    grid = jnp.asarray(GRID, jnp.float32)

    @jax.jit
    def everything(x, grid):
        solver = sd.Stein(sd.DPMpp3M())
        solution = sd.sample(
            KEY, denoiser, x_init=x, sigmas=grid, solver=solver, record=diagnostics.keep
        )
        return (
            diagnostics.contractivity(KEY, denoiser, x, grid, solver),
            diagnostics.trajectory_report(solution, grid, denoiser, key=KEY),
            diagnostics.error_decay(KEY, denoiser, x, grid, sd.DPMpp2M()),
            diagnostics.perturbation(KEY, denoiser, sd.State(x), 3.0, 2.0, sd.Heun()),
        )

    found = everything(x, grid)
    assert all(leaf.dtype == jnp.float32 for leaf in jax.tree.leaves(found))
    lipschitz, report, decay, drift = found
    assert np.isfinite(
        np.concatenate([np.ravel(a) for a in (*lipschitz, *decay, *drift[:4])])
    ).all()
    assert np.isfinite(report.ratio[:-1]).all()


# --- Figures -------------------------------------------------------------------------------------


def test_figures_show_the_numbers(monkeypatch):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    denoiser, x = mixture(), normal(8, 2, scale=6.0)
    found = profile(sd.DPMpp2M(), denoiser, x)
    axis = found.plot()
    lines = {line.get_label(): line.get_ydata() for line in axis.lines}
    assert_allclose(lines["step"], np.median(found.step, axis=1))
    assert_allclose(lines["certificate"], np.median(found.certificate, axis=1))
    solution = run(denoiser, GRID, sd.DPMpp2M(), x, record=diagnostics.keep)
    axes = diagnostics.trajectory_report(solution, GRID, denoiser, key=KEY).plot()
    assert_allclose(axes[0].lines[0].get_ydata(), 1.0)
    plt.close("all")

    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match="steindiff_jax\\[plot\\]"):
        found.plot()

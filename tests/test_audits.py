"""Every statement of docs/theory.md, with a control that must fail where its condition is dropped.

Statistical ones compare a mean over independent samples with 0 in units of its standard error:
below 4 where the statement holds, above 8 for its control.
"""

import dataclasses
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import (
    Gaussian,
    Mixture,
    Overshoot,
    deviations,
    gaussian,
    mixture,
    normal,
    run,
    unoptimised,  # noqa: F401
    whitened,
)
from jax.tree_util import Partial
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd
from steindiff_jax import diagnostics
from steindiff_jax.stein.rules import TargetMoments

KEY = jax.random.key(0)
WIDE = {"gamma_min": -np.inf, "gamma_max": np.inf}
VP = sd.VPLinear()


def alpha_vp(s):
    return 1 / np.sqrt(1 + s**2)


def ring(modes=8, radius=0.7, std=0.05):
    angles = 2 * np.pi * np.arange(modes) / modes
    return Mixture(jnp.asarray(radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)), std)


def inner(a, b):
    return np.sum(np.asarray(a) * np.asarray(b), axis=1)


def probed(denoiser, y, s):
    """The denoiser at y, and d - tr J of each sample by one probe."""
    keys = jax.random.split(KEY, y.shape[0])
    x0, jacobian = sd.Hutchinson()(keys, denoiser, y, jnp.asarray(s))
    return x0, jnp.sum(jacobian.v[0] * (jacobian.v[0] - jacobian.jv[0]), axis=1)


# --- Stein's identity ----------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 16, 64])
def test_stein_identity(d):
    """E<v, y - x*> = s^2 E[div v]. Controls: noise that is not normal; a field that jumps."""
    s, n, weights = 0.5, 60_000, np.random.default_rng(5).standard_normal((d, d)) / np.sqrt(d)
    weights += 4 * np.eye(d)

    def smooth(y):
        v = np.tanh(y @ weights)
        return v, np.sum((1 - v**2) * np.diag(weights), axis=1)

    def jumping(y):
        return np.sign(y), np.zeros(len(y))  # the divergence it has almost everywhere

    def gap(field, noise="normal"):
        clean, y = mixture(10, d, std=0.2).coupled(n, s, noise=noise)
        v, divergence = field(y)
        return deviations(inner(v, y - clean) - s**2 * divergence)

    assert gap(smooth) < 4
    assert gap(smooth, noise="laplace") > 8
    assert gap(jumping) > 8


@jax.jit
def reference_free(denoiser, y, grid, schedule, solver):
    """Of the library: gamma of the batch, and its numerator and u for each sample."""
    alpha, alpha_next = schedule.at(grid)[1]
    rule = sd.CleanTarget(**WIDE, schedule=schedule)

    def follow(solver):
        return sd.sample(KEY, denoiser, sigmas=grid, solver=solver, x_init=y)

    batch, sample = (
        follow(sd.Stein(solver, rule, sd.Hutchinson(), statistics=statistics)).info.gamma[0]
        for statistics in ("batch", "sample")
    )
    u = alpha * y - alpha_next * follow(solver).x
    return batch, sample * jnp.sum(u**2, axis=1), u


@pytest.mark.parametrize("schedule", [sd.EDM(), VP], ids=["edm", "vp"])
@pytest.mark.parametrize(
    ("d", "solver"), [(2, sd.Heun()), (16, Overshoot(3.0)), (64, sd.DDIM())], ids=str
)
def test_reference_free_coefficient(d, solver, schedule):
    """It is the least-squares one towards clean samples that it never sees, exact denoiser or not.

    Controls: states that are not noised data at sigma; and, with alpha < 1, no drift term.
    """
    s, n, problem = 0.8, 5000, mixture(10, d, std=1.5)
    grid = jnp.array([s, 0.4])
    alpha = float(schedule.at(jnp.asarray(s))[1])
    clean, y = problem.coupled(n, s)

    def gap(denoiser, y):
        gamma, numerator, u = reference_free(denoiser, jnp.asarray(y), grid, schedule, solver)
        assert_allclose(gamma, numerator.mean() / inner(u, u).mean(), rtol=1e-8)
        return numerator - inner(u, alpha * y - clean), u

    exact, u = gap(problem, y)
    assert deviations(exact) < 4
    # a denoiser of other data: that it be exact is no condition
    other = dataclasses.replace(problem, means=0.5 * problem.means[::-1] - 0.3)
    assert deviations(gap(other, y)[0]) < 4
    assert deviations(gap(problem, clean + 1.5 * (y - clean))[0]) > 8
    if alpha < 1:
        assert deviations(exact - (1 - 1 / alpha) * inner(u, alpha * y)) > 8


def test_drift_term_vanishes_without_a_schedule():
    """For alpha = 1 gamma does not depend on E<u, x>, even infinite; otherwise it does."""
    s = jnp.asarray(0.7)
    for drift in (-3.0, 0.0, 1e30):
        moments = TargetMoments(*(jnp.array([m]) for m in (drift, 2.0, 5.0)))
        free = sd.CleanTarget(**WIDE).coefficients(moments, jnp.ones(1), s, s / 2)
        assert_allclose(free.gamma, [0.7**2 * 2 / 5], rtol=1e-14)
        a = alpha_vp(0.7)
        paper = ((1 - 1 / a) * drift + (0.7 * a) ** 2 / a * 2) / 5
        in_vp = sd.CleanTarget(**WIDE, schedule=VP).coefficients(moments, jnp.ones(1), s, s / 2)
        assert_allclose(in_vp.gamma, [paper], rtol=1e-13)


# --- Decay of the error --------------------------------------------------------------------------

GRID = sd.karras_sigmas(6, sigma_max=10.0)


@jax.jit
def decay(denoiser, clean, grid, solver, gamma_min, gamma_max):
    return diagnostics.error_decay(
        KEY, denoiser, clean, grid, solver, gamma_min=gamma_min, gamma_max=gamma_max
    )


@pytest.mark.parametrize("solver", [sd.DDIM(), sd.Heun(), sd.DPMpp3M(), Overshoot(2.5)], ids=type)
def test_stepwise_decay(solver):
    """E' = (1 - rho) E with rho = b^2 / (c E), and the product of all. Control: clipped gamma."""
    problem = mixture(10, 16, std=0.2)
    clean = jnp.asarray(problem.coupled(200, 0.0)[0])
    free, clipped = (
        decay(problem, clean, GRID, solver, *c) for c in ((-jnp.inf, jnp.inf), (0.1, 0.9))
    )
    assert np.all((free.rate >= 0) & (free.rate <= 1))
    assert np.ptp(free.rate) > 0.1
    assert_allclose(free.error[1:], (1 - free.rate) * free.error[:-1], rtol=1e-10)
    assert_allclose(free.error[1:], free.product * free.error[0], rtol=1e-10)

    best = (1 - clipped.rate) * clipped.error[:-1]
    at_clip = np.isin(clipped.gamma, [0.1, 0.9])
    assert at_clip.any()
    assert np.all(clipped.error[1:][at_clip] > best[at_clip] * (1 + 1e-6))


def test_improvement_interval():
    """E(gamma) < E if and only if 0 < gamma < 2 gamma*: a clip helps as long as it stays inside.

    The control is a lower clip beyond 2 gamma*, of a solver that goes four times too far.
    """
    problem, grid = mixture(10, 16, std=0.2), jnp.array([2.0, 0.0])
    clean = jnp.asarray(problem.coupled(200, 0.0)[0])

    def clipped(low, high):
        return decay(problem, clean, grid, Overshoot(4.0), low, high)

    free = clipped(-jnp.inf, jnp.inf)
    best, start = float(free.gamma[0]), free.error[0]
    assert 0.2 < best < 0.3
    for share in (-0.5, -1e-6, 1e-6, 0.3, 1.0, 1.7, 2 - 1e-6, 2 + 1e-6, 3.0):
        end = clipped(share * best, share * best).error[1]
        assert (end < start) == (0 < share < 2)
        expected = start * (1 - float(free.rate[0]) * share * (2 - share))
        assert_allclose(end, expected, rtol=1e-10)
    assert clipped(0.1, 1.0).gamma == best  # inside the clip
    assert clipped(1.9 * best, 1.0).error[1] < start
    assert clipped(2.1 * best, 1.0).error[1] > start


# --- A wrong law ---------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [sd.EDM(), VP], ids=["edm", "vp"])
def test_perturbation_bound_on_gaussian_laws(schedule):
    """|gamma - target| <= C S, and every term of it in closed form, for a step u = K y + k."""
    s, s_next, rng = 0.9, 0.4, np.random.default_rng(7)
    alpha, alpha_next = (alpha_vp(t) if schedule is VP else 1.0 for t in (s, s_next))
    data = gaussian()
    mean, covariance = np.asarray(data.mean), np.asarray(data.covariance)
    jacobian, one = np.asarray(data.jacobian(s)), np.eye(3)
    # the sampler's law N(m, P), and its states, of exactly that mean and covariance
    root = rng.standard_normal((3, 3))
    m, p = mean + 0.3, covariance + s**2 * one + 0.3 * root @ root.T
    y = m + whitened(64, 3) @ np.linalg.cholesky(p).T

    def score(y):
        return -(y - m[None]) @ jnp.asarray(np.linalg.inv(p))

    found = jax.jit(
        lambda y: diagnostics.perturbation(
            KEY, data, sd.State(y), s, s_next, sd.DDIM(), estimator=sd.Exact(),
            schedule=schedule, score=score,
        )
    )(jnp.asarray(y))  # fmt: skip

    def second_moment(a, shift_a, b, shift_b):
        """E<A y + a, B y + b> for y of the law N(m, P)."""
        return np.trace(a @ p @ b.T) + (a @ m + shift_a) @ (b @ m + shift_b)

    q = s_next / s
    step, step_0 = q * one + (1 - q) * jacobian, (1 - q) * (one - jacobian) @ mean
    k, k_0 = alpha * one - alpha_next * step, -alpha_next * step_0
    away, away_0 = alpha * one - jacobian, -(one - jacobian) @ mean  # alpha y - D
    energy = second_moment(k, k_0, k, k_0)
    drift = (1 - 1 / alpha) * second_moment(k, k_0, alpha * one, np.zeros(3))
    gamma = (drift + (alpha * s) ** 2 / alpha * np.trace(k) / alpha) / energy
    target = second_moment(k, k_0, away, away_0) / energy
    inverse = np.linalg.inv(covariance + s**2 * one)
    r = (inverse - np.linalg.inv(p)) / alpha  # grad log p~ - grad log p of alpha y
    r_0 = (np.linalg.inv(p) @ m - inverse @ mean) / alpha
    constant = (alpha * s) ** 2 / alpha / np.sqrt(energy)
    bound = constant * np.sqrt(second_moment(r, r_0, r, r_0))
    expected = (gamma, target, constant, abs(gamma - target) / constant, bound)
    assert_allclose(np.asarray(found), expected, rtol=1e-9)
    assert 0.01 < abs(gamma - target) < bound


def test_perturbation_bound_needs_the_sampler_s_law():
    """Sharp in one dimension. Control: S under the law of the data is too small, no bound."""
    s, s_next, variance, wide = 0.9, 0.4, 0.5, 4.0
    data = Gaussian(jnp.zeros(1), variance * jnp.eye(1))
    y = jnp.asarray(np.sqrt(wide) * whitened(50, 1))

    def score(y):
        return -y / wide

    found = diagnostics.perturbation(
        KEY, data, sd.State(y), s, s_next, sd.DDIM(), estimator=sd.Exact(), score=score
    )
    gap = abs(found.gamma - found.target)
    assert_allclose(gap, found.bound, rtol=1e-10)
    slope = 1 / (variance + s**2) - 1 / wide  # of grad log p~ - grad log p
    assert_allclose(found.mismatch, slope * np.sqrt(wide), rtol=1e-10)
    under_the_data = slope * np.sqrt(variance + s**2)
    assert gap > found.constant * under_the_data * 1.5


def test_perturbation_vanishes_under_the_right_law():
    data = gaussian()
    p = np.asarray(data.covariance) + 0.9**2 * np.eye(3)
    y = jnp.asarray(np.asarray(data.mean) + whitened(64, 3) @ np.linalg.cholesky(p).T)
    found = diagnostics.perturbation(
        KEY, data, sd.State(y), 0.9, 0.4, sd.Heun(), estimator=sd.Exact()
    )
    assert_allclose(found.gamma, found.target, rtol=1e-10)
    assert found.bound is None
    with pytest.raises(ValueError, match="derivative"):
        diagnostics.perturbation(
            KEY, data, sd.State(y), 0.9, 0.4, sd.Heun(), estimator=sd.Tweedie()
        )


# --- The coordinates of the coefficient ----------------------------------------------------------


@pytest.mark.parametrize("solver", [sd.DDIM(), sd.Heun(), Overshoot(2.0)], ids=type)
def test_paper_s_update_in_x_and_in_y(solver):
    """With kappa = 1 - alpha / alpha', moments in y, and Stein's identity exact on this batch,

        gamma_x = [b - kappa s^2 d - (1 - alpha)(m - kappa e)] / alpha' (c - 2 kappa m + kappa^2 e)

    where b, c are the y-form's, m = E<u, y>, e = E|y|^2. The control drops the change of anchor.
    """
    s, s_next, data, d = 1.2, 0.5, gaussian(), 3
    z = whitened(64, 2 * d)  # clean samples and noise whitened together
    clean = np.asarray(data.mean) + z[:, :d] @ np.linalg.cholesky(data.covariance).T
    y = jnp.asarray(clean + s * z[:, d:])
    runs = {
        schedule: run(data, [s, s_next], sd.Stein(solver, rule, sd.Exact()), y)
        for schedule in (sd.EDM(), VP)
        for rule in [sd.CleanTarget(**WIDE, schedule=schedule)]
    }
    (in_y, in_x), t = runs.values(), run(data, [s, s_next], solver, y).x
    u = np.asarray(y - t)
    c, m, e = (np.mean(inner(a, b)) for a, b in ((u, u), (u, y), (y, y)))
    b = float(in_y.info.gamma[0]) * c
    alpha, alpha_next = alpha_vp(s), alpha_vp(s_next)

    def gamma_x(kappa):
        numerator = b - kappa * s**2 * d - (1 - alpha) * (m - kappa * e)
        return numerator / (alpha_next * (c - 2 * kappa * m + kappa**2 * e))

    kappa = 1 - alpha / alpha_next
    assert_allclose(in_x.info.gamma, [gamma_x(kappa)], rtol=1e-9)
    assert abs(in_x.info.gamma[0] / gamma_x(0.0) - 1) > 0.05
    # two updates: the segments share the candidate and nothing else
    assert_allclose(in_y.x, y + in_y.info.gamma[0] * (t - y), rtol=1e-10)
    anchor = alpha / alpha_next * y
    assert_allclose(in_x.x, anchor + in_x.info.gamma[0] * (t - anchor), rtol=1e-10)
    assert np.max(np.abs(in_x.x - in_y.x)) > 0.05


def test_x_form_is_ill_conditioned_at_small_alpha():
    """Same states, same step: the spread over batches is that of the y-form, a hundredfold."""
    s, s_next, batches = 140.0, 100.0, 40
    problem = Mixture(0.4 * mixture(10, 16).means, 0.2)  # of unit variance, u = 0 in x
    clean, y = problem.coupled(64 * batches, s)
    y = jnp.asarray(y).reshape(batches, 64, 16)

    def spread(schedule):
        stein = sd.Stein(sd.DDIM(), sd.CleanTarget(**WIDE, schedule=schedule), sd.Exact())
        gamma = jax.vmap(lambda y: run(problem, [s, s_next], stein, y).info.gamma[0])(y)
        return float(jnp.std(gamma) / abs(jnp.mean(gamma))), gamma

    relative, gamma = spread(sd.EDM())
    assert relative < 0.1
    assert abs(gamma.mean() * (1 - s_next / s) - 1) < 4 * relative / np.sqrt(batches)
    assert spread(VP)[0] > 2  # no digit left
    # the two terms of the numerator cancel but for one part in a hundred
    u = alpha_vp(s) * np.reshape(y, (-1, 16)) - alpha_vp(s_next) * np.asarray(
        run(problem, [s, s_next], sd.DDIM(), y.reshape(-1, 16)).x
    )
    x = alpha_vp(s) * np.reshape(y, (-1, 16))
    drift = (1 - 1 / alpha_vp(s)) * inner(u, x).mean()
    assert abs(drift) > 30 * abs(inner(u, x - clean).mean())


# --- Second-order Tweedie ------------------------------------------------------------------------


@pytest.mark.parametrize("s", [0.3, 0.5, 2.0])
def test_second_order_tweedie(s):
    """J = Cov[x* | y] / s^2. Control: a denoiser that is no posterior mean."""
    problem = mixture(6, 4, std=0.2)
    _, y = problem.coupled(5, s)

    def jacobians(denoiser):
        one = jax.jacfwd(lambda row: denoiser(row[None], jnp.asarray(s))[0])
        return jax.jit(jax.vmap(one))(jnp.asarray(y))

    exact = problem.posterior_covariance(y, s) / s**2
    assert_allclose(jacobians(problem), exact, rtol=1e-9, atol=1e-12)
    guided = sd.guided(problem, mixture(3, 4, std=0.2, seed=8), 3.0)
    assert np.linalg.norm(jacobians(guided) - exact) > 0.1 * np.linalg.norm(exact)


@pytest.mark.parametrize("d", [2, 16, 64])
def test_tweedie_energy(d):
    """E|y - D|^2 = s^2 E[d - tr J]. Controls: another denoiser, states at another level."""
    s, problem = 0.5, mixture(10, d, std=0.4)
    clean, y = problem.coupled(20_000, s)

    @jax.jit
    def gap(denoiser, y):
        x0, divergence = probed(denoiser, y, s)
        return jnp.sum((y - x0) ** 2, axis=1) - s**2 * divergence

    assert deviations(gap(problem, jnp.asarray(y))) < 4
    shrunk = Partial(lambda problem, y, s: 0.8 * problem(y, s), problem)
    assert deviations(gap(shrunk, jnp.asarray(y))) > 8
    assert deviations(gap(problem, jnp.asarray(clean + 1.2 * (y - clean)))) > 8


# --- The clip of the paper's rule ----------------------------------------------------------------


def test_without_the_upper_clip_the_batch_collapses():
    """The warning of the documentation: gamma* = 1 / (1 - q) leads to the posterior mean.

    The batch has then lost its noise, and the next coefficients, which take it for noised data,
    are of any size. Control: clipped at 1 a first-order solver is left alone while it is sound.
    """
    problem, grid = ring(), np.asarray(sd.karras_sigmas(8))
    x, data = normal(200, 2, scale=80.0), np.sqrt(0.7**2 / 2 + 0.05**2)

    def follow(rule):
        stein = sd.Stein(sd.DDIM(), rule, sd.Exact())
        solution = run(problem, grid, stein, x, record=lambda state, _: state.x)
        return solution.info.gamma, np.std(solution.record, axis=(1, 2))

    gamma, spread = follow(sd.CleanTarget(**WIDE))
    # relative to what it should be, but for the batch mean of |x|^2 / d, known to 1 / sqrt(200)
    assert abs(gamma[0] * (1 - grid[1] / grid[0]) - 1) < 4 / np.sqrt(200)
    assert spread[0] < 4 / np.sqrt(200) * grid[0]
    assert spread[0] < 0.1 * grid[1]
    assert np.max(np.abs(gamma[1:])) > 100
    assert abs(np.log(spread[-1] / data)) > np.log(10)

    gamma, spread = follow(sd.CleanTarget())
    assert_array_equal(gamma[:3], 1.0)
    assert_allclose(spread[0], grid[1], rtol=4 / np.sqrt(2 * 400))
    assert abs(spread[-1] / data - 1) < 0.25


# --- This project's rules ------------------------------------------------------------------------


@pytest.mark.parametrize("d", [2, 16, 64])
def test_stein_energy_of_a_step(d):
    """With y*' = x* + s' e: E<v, y - y*'> = s (s - s') E[div v]; E|u_A|^2 = s (s - s') E[div u_A].

    Controls: the energy of a step that is not A, and a denoiser that is no posterior mean.
    """
    s, s_next, problem = 0.6, 0.35, mixture(10, d, std=0.4)
    clean, y = problem.coupled(20_000, s)
    target, y = clean + s_next / s * (y - clean), jnp.asarray(y)
    q = s_next / s

    @jax.jit
    def statistics(denoiser, y):
        x0, divergence = probed(denoiser, y, s)
        return (1 - q) * (y - x0), (1 - q) * divergence

    u, divergence = statistics(problem, y)
    allowed = s * (s - s_next) * divergence
    assert deviations(inner(u, y - target) - allowed) < 4
    assert deviations(inner(u, u) - allowed) < 4
    assert deviations(inner(1.3 * u, 1.3 * u) - 1.3 * allowed) > 8
    shrunk = Partial(lambda problem, y, s: 0.8 * problem(y, s), problem)
    u, divergence = statistics(shrunk, y)
    allowed = s * (s - s_next) * divergence
    assert deviations(inner(u, y - target) - allowed) < 4  # any field v
    assert deviations(inner(u, u) - allowed) > 8


def test_contractivity_certificate():
    """L_T <= q + (1 - q) L_D for a first-order step. Control: one that adds from its history."""
    problem, x = ring(), normal(50, 2, scale=10.0)
    profiles = [
        jax.jit(diagnostics.contractivity)(KEY, problem, x, GRID, solver)
        for solver in (sd.DDIM(), sd.DPMpp2M())
    ]
    assert_array_equal(profiles[0].violations, 0.0)
    assert np.max(profiles[0].denoiser) > 1  # the trap: the certificate alone proves nothing here
    assert np.max(profiles[1].violations) > 0.5


def test_theory_names_its_audits():
    """Every test that docs/theory.md names exists, and every audit here is named there."""
    here = Path(__file__)
    named = set(re.findall(r"\b(test_\w+)`", (here.parents[1] / "docs/theory.md").read_text()))
    defined = {
        path.stem: set(re.findall(r"^def (test_\w+)", path.read_text(), re.MULTILINE))
        for path in here.parent.glob("test_*.py")
    }
    assert named <= set.union(*defined.values())
    assert defined[here.stem] - {"test_theory_names_its_audits"} <= named

"""The Stein correction: estimators, coefficients and updates against closed forms."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian, gaussian, mixture, normal, run, whitened
from jax import Array
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd

WIDE = {"gamma_min": -1e9, "gamma_max": 1e9}
SCHEDULES = {  # alpha as a function of the noise-to-signal ratio
    sd.EDM(): lambda s: 1.0,  # noqa: ARG005
    sd.VPLinear(): lambda s: 1 / np.sqrt(1 + s**2),
    sd.RectifiedFlow(): lambda s: 1 / (1 + s),
}


@sd.pytree
class Midpoint:
    """A solver of a user, with nothing but `init` and `step`: the midpoint rule in sigma."""

    def init(self, x, sigmas):  # noqa: ARG002
        return sd.State(x)

    def step(self, key, denoiser, state, sigma, sigma_next):  # noqa: ARG002
        x0, middle = denoiser(state.x, sigma), (sigma + sigma_next) / 2
        half = state.x + (middle - sigma) * (state.x - x0) / sigma
        slope = (half - denoiser(half, middle)) / middle
        delta = state.x - sigma * slope - x0
        return sd.State(state.x + (sigma_next - sigma) * slope), sd.Step(x0, delta, nfe=2)


@sd.pytree
class Fixed:
    """A rule of a user: first-order anchor, a coefficient that looks at nothing."""

    value: float
    gamma_min: float = 0.0
    gamma_max: float = 1.0

    def anchor(self, local):
        q = local.sigma_next / local.sigma
        return q * local.x + (1 - q) * local.x0

    def moments(self, local):
        return (jnp.zeros(local.x.shape[0]),)

    def gamma(self, moments, sigma, sigma_next):  # noqa: ARG002
        return self.value + moments[0]


# --- Whole runs on Gaussian data -----------------------------------------------------------------
# There every step is linear, x_k = a_k z in the eigenbasis of the covariance, and from a start z
# with mean 0 and covariance 1 exactly, batch means are sums over the eigenvalues c. So numpy
# follows a whole corrected run on three numbers, by the formulas as they stand in the papers.

EIGENVALUES = np.array([1.5, 0.3, 0.02])
VECTORS = np.linalg.qr(np.random.default_rng(0).standard_normal((3, 3)))[0]
DATA = Gaussian(jnp.zeros(3), jnp.asarray((VECTORS * EIGENVALUES) @ VECTORS.T))
GRID = np.array([6.0, 3.0, 1.6, 0.7, 0.3, 0.0])


def candidate(solver, past, s, s_next):
    """(p, r, h) with T = p a + r J a + h, J = c / (c + s^2)."""
    q, step = s_next / s, s_next - s
    if solver == "Heun" and s_next > 0:
        e, e_next = s / (EIGENVALUES + s**2), s_next / (EIGENVALUES + s_next**2)  # (1 - J) / s
        return 1 + step / 2 * (e + e_next * (1 + step * e)), 0.0, 0.0
    if not past or s_next == 0:
        return q, 1 - q, 0.0
    s_past, x0_past, noise_past = past
    if solver == "DPMpp2M":
        weight = np.log(s / s_next) / np.log(s_past / s) / 2
        return q, (1 - q) * (1 + weight), -(1 - q) * weight * x0_past
    return 1 + 1.5 * step / s, -1.5 * step / s, -0.5 * step * noise_past  # Adams-Bashforth 2


def corrected_run(solver, rule, tweedie, clip, alpha=None):
    """Coefficients of all steps, and a at the end."""
    a, past, gammas, d = GRID[0] * np.ones(3), (), [], 3
    for s, s_next in pairwise(GRID):
        j = EIGENVALUES / (EIGENVALUES + s**2)
        p, r, h = candidate(solver, past, s, s_next)
        t = p * a + r * j * a + h
        trace_j = d - np.sum((a - j * a) ** 2) / s**2 if tweedie else np.sum(j)
        if rule == "StepEnergy":
            q = s_next / s
            anchor = q * a + (1 - q) * j * a
            first_order = s_next == 0 or (not past and solver != "Heun")
            energy = s * (s - s_next) * (1 - q) * (d - trace_j)
            gamma = 1.0 if first_order else energy / np.sum((a - t) ** 2)
        else:  # METHOD: in the coordinates x = alpha y, T~(x) = alpha' T(x / alpha)
            al, al_next = alpha(s), alpha(s_next)
            x, u = al * a, al * a - al_next * t
            divergence = d - al_next / al * (np.sum(p * np.ones(d)) + r * trace_j)
            gamma = (1 - 1 / al) * np.sum(u * x) + (al * s) ** 2 / al * divergence
            gamma = gamma / np.sum(u**2)
            anchor = x / al_next
        gamma = np.clip(gamma, *clip)
        past = (s, j * a, (1 - j) * a / s)
        a = (1 - gamma) * anchor + gamma * t
        gammas.append(gamma)
    return np.array(gammas), a


@pytest.mark.parametrize("divergence", [sd.Exact(), sd.Tweedie()], ids=["Exact", "Tweedie"])
@pytest.mark.parametrize("rule", ["StepEnergy", *SCHEDULES], ids=str)
@pytest.mark.parametrize("solver", [sd.DPMpp2M(), sd.IPNDM(2), sd.Heun()], ids=type)
def test_runs_on_gaussian_data(solver, rule, divergence):
    name, tweedie = type(solver).__name__, isinstance(divergence, sd.Tweedie)
    z = whitened(16, 3)
    start = GRID[0] * z @ VECTORS.T
    for clip in ((0.0, 1.0), (0.9, 0.95), (-1e9, 1e9)):
        if rule == "StepEnergy":
            ours = sd.StepEnergy(*clip)
        else:
            ours = sd.CleanTarget(*clip, schedule=rule)
        stein = sd.Stein(solver, ours, divergence)
        if name == "Heun" and rule != "StepEnergy" and tweedie:
            with pytest.raises(ValueError, match="second point"):
                run(DATA, GRID, stein, start)
            return
        kind = rule if rule == "StepEnergy" else "CleanTarget"
        gammas, a = corrected_run(name, kind, tweedie, clip, SCHEDULES.get(rule))
        solution = run(DATA, GRID, stein, start)
        assert_allclose(solution.info.gamma, gammas, rtol=1e-9, atol=1e-9)
        assert_allclose(solution.x, (a * z) @ VECTORS.T, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("fraction", "distribution"), [(0.25, "rademacher"), (1.0, "gaussian")])
def test_hutchinson_s_gamma_within_its_standard_error(fraction, distribution):
    """The law of gamma over keys: mean, and standard deviation from Hutchinson's own variance."""
    stein = sd.Stein(sd.DPMpp2M(), sd.StepEnergy(**WIDE), sd.Hutchinson(2, fraction, distribution))
    start, grid, count = GRID[0] * whitened(16, 3), GRID[:3], 1000
    keys = jax.random.split(jax.random.key(1), count)
    sample = jax.jit(jax.vmap(lambda key: run(DATA, grid, stein, start, key=key).info.gamma[1]))
    gamma, exact = sample(keys), corrected_run("DPMpp2M", "StepEnergy", False, (-9, 9))[0][1]

    m = np.eye(3) - np.asarray(DATA.jacobian(GRID[1]))  # the probe is v . (1 - J) v
    diagonal = np.sum(np.diag(m) ** 2) if distribution == "rademacher" else 0.0
    variance = 2 * (np.sum(m**2) - diagonal) / (2 * 16 * fraction)
    deviation = exact * np.sqrt(variance) / np.trace(m)
    assert abs(gamma.mean() - exact) < 4 * deviation / np.sqrt(count)
    # the standard error of a standard deviation, for a kurtosis of up to 6
    assert abs(gamma.std() / deviation - 1) < 4 * np.sqrt(5 / 4 / count)


@pytest.mark.parametrize("fraction", [1.0, 0.3, 0.01])
def test_rademacher_probes_are_exact_on_isotropic_data(fraction):
    denoiser = Gaussian(normal(3), 0.4 * jnp.eye(3))
    start = normal(10, 3, scale=GRID[0])
    one, all_columns = (
        run(denoiser, GRID, sd.Stein(sd.DPMpp2M(), sd.StepEnergy(**WIDE), divergence), start)
        for divergence in (sd.Hutchinson(1, fraction), sd.Exact())
    )
    assert_allclose(one.info.gamma, all_columns.info.gamma, rtol=1e-12)
    assert_allclose(one.x, all_columns.x, rtol=1e-12)


# --- Estimators ----------------------------------------------------------------------------------


def jacobians(function, x):
    """Of a function of one sample, at each of (batch, d), by brute force; (batch, d, d)."""
    return jax.jit(jax.vmap(jax.jacfwd(function)))(x)


def estimate(divergence, denoiser, x, sigma, seed=0):
    keys = jax.random.split(jax.random.key(seed), x.shape[0])
    return jax.jit(divergence)(keys, denoiser, x, jnp.asarray(sigma))


def test_exact_trace_is_the_jacobian_s():
    denoiser, x = mixture(d=3), normal(4, 3, scale=2.0)
    x0, known = estimate(sd.Exact(), denoiser, x, 0.8)
    j = jacobians(lambda row: denoiser(row[None], 0.8)[0], x)
    assert_allclose(x0, denoiser(x, 0.8), rtol=1e-12)
    assert_allclose(known.trace, jnp.trace(j, axis1=1, axis2=2), rtol=1e-10)
    assert_allclose(known.complement, 3 - known.trace, rtol=1e-10)
    assert_allclose(known.squared_norm, jnp.square(j).sum((1, 2)), rtol=1e-10)


@pytest.mark.parametrize("sigma", [1e-3, 0.5, 50.0])
def test_tweedie_trace_on_gaussian_data(sigma):
    """s^2 E[d - tr J] = E|x - D|^2 for x of the law N(m, C + s^2), here to the last digits."""
    denoiser = gaussian()
    factor = np.linalg.cholesky(np.asarray(denoiser.covariance) + sigma**2 * np.eye(3))
    x = jnp.asarray(np.asarray(denoiser.mean) + whitened(50, 3) @ factor.T)
    complement = estimate(sd.Tweedie(), denoiser, x, sigma)[1].complement.mean()
    assert_allclose(complement, np.trace(np.eye(3) - denoiser.jacobian(sigma)), rtol=1e-9)


@pytest.mark.parametrize("distribution", ["rademacher", "gaussian"])
@pytest.mark.parametrize("fraction", [1.0, 0.3])
def test_hutchinson_is_unbiased(fraction, distribution):
    denoiser, x = gaussian(), normal(4001, 3)
    x0, known = estimate(sd.Hutchinson(2, fraction, distribution), denoiser, x, 0.6)
    j = np.asarray(denoiser.jacobian(0.6))
    assert_allclose(x0, denoiser(x, 0.6), rtol=1e-10, atol=1e-12)  # probed or not
    diagonal = np.sum(np.diag(j) ** 2) if distribution == "rademacher" else 0.0
    probed = int(np.sum(np.any(known.v[0] != 0, axis=-1)))
    assert probed == 4001 // round(1 / fraction)
    deviation = np.sqrt(2 * (np.sum(j**2) - diagonal) / (2 * probed))
    assert abs(known.trace.mean() - np.trace(j)) < 4 * deviation
    norms = known.squared_norm[known.squared_norm != 0]
    scale = 4001 / probed  # a probed sample stands for its neighbours
    assert abs(norms.mean() / scale - np.sum(j**2)) < 4 * norms.std() / scale / np.sqrt(probed)
    if distribution == "rademacher":  # exact on the identity part
        assert_allclose(known.trace + known.complement, jnp.where(known.trace, 3 * scale, 0))


@pytest.mark.parametrize(("batch", "fraction"), [(7, 0.5), (7, 0.3), (6, 0.3), (2, 0.1)])
def test_fractions_that_do_not_divide_the_batch(batch, fraction):
    x = normal(batch, 2)
    x0, known = estimate(sd.Hutchinson(1, fraction), mixture(), x, 0.5)
    assert_allclose(x0, mixture()(x, 0.5), rtol=1e-12)
    # v . v = d on what is probed, which stands for every sample once
    assert_allclose(jnp.square(known.v).sum() / batch, 2.0)


def test_second_order_tweedie_on_a_mixture():
    """E|x - D|^2 = s^2 E[d - tr J] and Stein's identity itself, x drawn from its law."""
    rng, n, s, denoiser = np.random.default_rng(2), 20000, 0.7, mixture()
    clean = np.asarray(denoiser.means)[rng.integers(5, size=n)]
    clean = clean + denoiser.std * rng.standard_normal((n, 2))
    x = jnp.asarray(clean + s * rng.standard_normal((n, 2)))
    free, full = (estimate(e, denoiser, x, s)[1].complement for e in (sd.Tweedie(), sd.Exact()))
    difference = free - full
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(n)
    # v = x - D:  E<v, x - x*> = s^2 E[div v]
    difference = jnp.sum((x - denoiser(x, s)) * (x - clean), axis=1) - s**2 * full
    assert abs(difference.mean()) < 4 * difference.std() / np.sqrt(n)


# --- Rules ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "solver",
    [sd.DDIM(), sd.DPMpp2M(), sd.DPMpp3M(), sd.IPNDM(4)],
    ids=type,
)
def test_step_energy_is_1_where_the_solver_adds_nothing(solver):
    statistics = "sample" if isinstance(solver, sd.DPMpp2M) else "batch"
    stein = sd.Stein(solver, sd.StepEnergy(gamma_max=10.0), statistics=statistics)
    grid = sd.karras_sigmas(5)
    solution = run(mixture(), grid, stein, normal(8, 2, scale=80.0), record=lambda _, step: step.x0)
    assert_array_equal(solution.info.gamma[0], 1.0)
    assert_array_equal(solution.info.gamma[-1], 1.0)
    assert_array_equal(solution.x, solution.record[-1])  # at sigma = 0 the denoiser's estimate
    if isinstance(solver, sd.DDIM):
        assert_array_equal(solution.info.gamma, 1.0)
    else:
        assert np.all(np.abs(np.asarray(solution.info.gamma[1:-1]) - 1) > 1e-6)


def test_step_energy_by_its_definition():
    """With nothing simplified, s (s - s') E[div u_A] / E|u_T|^2 on a mixture."""
    denoiser, grid, start = mixture(), np.array([3.0, 1.5, 0.9]), normal(6, 2, scale=3.0)
    s, s_next = grid[1:]
    x, t = run(denoiser, grid, sd.DPMpp2M(), start, record=lambda state, _: state.x).record

    def anchor(row):
        return s_next / s * row + (1 - s_next / s) * denoiser(row[None], s)[0]

    first_order = jax.vmap(anchor)(x)
    divergence = 2 - jnp.trace(jacobians(anchor, x), axis1=1, axis2=2)
    energy = jnp.square(x - t).sum(1)
    for statistics, mean in (("batch", np.mean), ("sample", np.asarray)):
        gamma = s * (s - s_next) * mean(divergence) / mean(energy)
        stein = sd.Stein(sd.DPMpp2M(), sd.StepEnergy(**WIDE), sd.Exact(), statistics)
        solution = run(denoiser, grid, stein, start)
        assert_allclose(solution.info.gamma[1], gamma, rtol=1e-9)
        corrected = first_order + np.reshape(gamma, (-1, 1)) * (t - first_order)
        assert_allclose(solution.x, corrected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [sd.DDIM(), sd.Heun(), Midpoint()], ids=type)
@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_clean_target_is_the_best_step_towards_the_clean_samples(solver, schedule):
    """The least |x' - x*|^2 over the batch's own clean samples, which the rule never sees.

    With clean samples and noise whitened together, Stein's identity holds for batch means. The
    error then falls by b^2 / c, b = E<u, x - x*>, c = E|u|^2.
    """
    denoiser, alpha, d = gaussian(), SCHEDULES[schedule], 3
    s, s_next = 1.2, 0.5
    z = whitened(64, 2 * d)
    factor = np.linalg.cholesky(denoiser.covariance)
    clean = np.asarray(denoiser.mean) + z[:, :d] @ factor.T
    y = jnp.asarray(clean + s * z[:, d:])
    x = alpha(s) * np.asarray(y)
    u = x - alpha(s_next) * np.asarray(run(denoiser, [s, s_next], solver, y).x)
    b, c = np.sum(u * (x - clean)), np.sum(u**2)

    stein = sd.Stein(solver, sd.CleanTarget(**WIDE, schedule=schedule), sd.Exact())
    solution = run(denoiser, [s, s_next], stein, y)
    assert_allclose(solution.info.gamma, [b / c], rtol=1e-9)
    error = np.sum((alpha(s_next) * np.asarray(solution.x) - clean) ** 2)
    assert_allclose(error, np.sum((x - clean) ** 2) - b**2 / c, rtol=1e-9)


@pytest.mark.parametrize("solver", [sd.Heun(), Midpoint()], ids=type)
def test_clean_target_differentiates_the_whole_step(solver):
    """Against a Jacobian of the step by brute force, through both evaluations of a mixture."""
    denoiser, grid, start = mixture(), np.array([2.0, 0.9]), normal(6, 2, scale=2.0)

    def step(row):
        return run(denoiser, grid, solver, row[None]).x[0]

    energy = jnp.square(start - run(denoiser, grid, solver, start).x).sum(1)
    divergence = 2 - jnp.trace(jacobians(step, start), axis1=1, axis2=2)
    for statistics, mean in (("batch", np.mean), ("sample", np.asarray)):
        gamma = grid[0] ** 2 * mean(divergence) / mean(energy)
        stein = sd.Stein(solver, sd.CleanTarget(**WIDE), sd.Exact(), statistics)
        assert_allclose(run(denoiser, grid, stein, start).info.gamma[0], gamma, rtol=1e-9)

    stein = sd.Stein(solver, sd.CleanTarget(**WIDE), sd.Hutchinson(), statistics)
    keys = jax.random.split(jax.random.key(3), 500)
    sample = jax.jit(jax.vmap(lambda key: run(denoiser, grid, stein, start, key=key).info.gamma[0]))
    estimates = sample(keys)
    error = estimates.std(0) / np.sqrt(500)
    assert np.all(np.abs(estimates.mean(0) - gamma) < 4 * error)


def test_unclipped_clean_target_collapses_to_the_posterior_mean():
    """With a first-order step gamma = 1 / (1 - s'/s), and x' = D: why the upper clip is there."""
    denoiser, start = mixture(), normal(6, 2, scale=3.0)
    stein = sd.Stein(sd.DDIM(), sd.CleanTarget(**WIDE))
    solution = run(denoiser, [3.0, 2.4], stein, start)
    assert_allclose(solution.info.gamma, [1 / (1 - 2.4 / 3.0)], rtol=1e-12)
    assert_allclose(solution.x, denoiser(start, 3.0), rtol=1e-10)
    clipped = run(denoiser, [3.0, 2.4], sd.Stein(sd.DDIM(), sd.CleanTarget()), start)
    assert_array_equal(clipped.x, run(denoiser, [3.0, 2.4], sd.DDIM(), start).x)


@pytest.mark.parametrize(
    ("rule", "divergence"),
    [(sd.StepEnergy(), sd.Tweedie()), (sd.CleanTarget(0.1, 0.9), sd.Exact())],
    ids=type,
)
def test_sample_statistics_are_batch_statistics_of_batches_of_one(rule, divergence):
    denoiser, grid, start = mixture(), sd.karras_sigmas(5), normal(4, 2, scale=80.0)
    together = run(denoiser, grid, sd.Stein(sd.DPMpp3M(), rule, divergence, "sample"), start)
    alone = jax.vmap(
        lambda row: run(denoiser, grid, sd.Stein(sd.DPMpp3M(), rule, divergence), row[None])
    )(start)
    assert together.info.gamma.shape == (5, 4)
    assert_allclose(together.info.gamma, alone.info.gamma.T, rtol=1e-9)
    assert_allclose(together.x, alone.x[:, 0], rtol=1e-9, atol=1e-12)


def test_batch_statistics_over_a_mapped_axis():
    """Two halves of a batch on an axis share one coefficient, that of the whole batch."""
    denoiser, grid, start = mixture(), sd.karras_sigmas(5), normal(8, 2, scale=80.0)
    probes = sd.Hutchinson(2)
    whole = run(denoiser, grid, sd.Stein(sd.DPMpp2M(), divergence=probes), start)
    stein = sd.Stein(sd.DPMpp2M(), divergence=probes, axis_name="devices")
    halves = jax.vmap(lambda x: run(denoiser, grid, stein, x), axis_name="devices")(
        start.reshape(2, 4, 2)
    )
    assert_allclose(halves.info.gamma, jnp.stack([whole.info.gamma] * 2), rtol=1e-10)
    assert_allclose(halves.x.reshape(8, 2), whole.x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_rule_of_the_user(value):
    """Coefficient 0 is DDIM, 1 the solver itself, others lie on the line between."""
    denoiser, grid, start = mixture(), np.array([3.0, 1.5, 0.9]), normal(6, 2, scale=3.0)
    solution = run(denoiser, grid, sd.Stein(sd.DPMpp2M(), Fixed(value)), start)
    assert_array_equal(solution.info.gamma, value)
    x = run(denoiser, grid[:2], sd.DDIM(), start).x  # the first step is first order anyway
    low = run(denoiser, grid[1:], sd.DDIM(), x).x
    high = run(denoiser, grid, sd.DPMpp2M(), start).x
    assert_allclose(solution.x, low + value * (high - low), rtol=1e-12)


def test_the_correction_is_a_solver():
    """Of a corrected step whose coefficient is 1, another correction finds nothing to correct."""
    denoiser, grid, start = mixture(), sd.karras_sigmas(5), normal(6, 2, scale=80.0)
    nested = run(
        denoiser, grid, sd.Stein(sd.Stein(sd.DPMpp2M(), Fixed(1.0)), sd.StepEnergy()), start
    )
    single = run(denoiser, grid, sd.Stein(sd.DPMpp2M(), sd.StepEnergy()), start)
    assert_allclose(nested.x, single.x, rtol=1e-12)
    assert_allclose(nested.info.gamma, single.info.gamma, rtol=1e-12)


SOLVERS = [sd.Heun(), Midpoint(), sd.DPMpp2M(), sd.IPNDM(3)]


@pytest.mark.parametrize("solver", SOLVERS, ids=type)
def test_the_free_correction_evaluates_the_network_no_more_often(solver):
    """Counted as the program runs, and equal to what Info says."""
    evaluations = []
    inner = mixture()

    def counted(x: Array, sigma: Array) -> Array:
        jax.debug.callback(lambda: evaluations.append(None))
        return inner(x, sigma)

    grid = [3.0, 2.0, 1.0, 0.5] if isinstance(solver, Midpoint) else [3.0, 2.0, 1.0, 0.0]
    for kind in (solver, sd.Stein(solver, sd.StepEnergy())):
        evaluations.clear()
        solution = jax.block_until_ready(run(counted, grid, kind, normal(6, 2, scale=3.0)))
        jax.effects_barrier()
        twice = {"Heun": 5, "Midpoint": 6}.get(type(solver).__name__, 3)
        assert len(evaluations) == solution.info.nfe == twice

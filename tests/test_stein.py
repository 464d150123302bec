"""The Stein correction: exactness, estimators, rules and updates against closed forms."""

import dataclasses
import re
from functools import partial
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import (
    Banded,
    ConstantRule,
    Gaussian,
    Midpoint,
    Overshoot,
    deviations,
    gaussian,
    mixture,
    normal,
    run,
    unoptimised,  # noqa: F401
    whitened,
)
from jax.experimental.pallas import pallas_call
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd
from steindiff_jax.stein import rules

WIDE = {"gamma_min": -1e9, "gamma_max": 1e9}
SCHEDULES = {  # alpha as a function of the noise-to-signal ratio
    sd.EDM(): lambda s: 1.0,  # noqa: ARG005
    sd.VPLinear(): lambda s: 1 / np.sqrt(1 + s**2),
    sd.RectifiedFlow(): lambda s: 1 / (1 + s),
}
SOLVERS = [
    sd.DDIM(),
    sd.Heun(),
    sd.Heun(prediction="flow"),
    sd.DPM2(),
    sd.DPMpp2S(),
    sd.DPMpp3S(),
    sd.LMS(4),
    sd.IPNDM(2),
    sd.IPNDM(3),
    sd.IPNDM(4),
    sd.DEIS(3),
    sd.DEIS(4, prediction="x0"),
    sd.DPMpp2M(),
    sd.DPMpp3M(),
    sd.DPMpp3M(curvature=1.0),
    sd.UniPC(1),
    sd.UniPC(2),
    sd.UniPC(3, lower_order_final=False),
    Overshoot(3.0),
    Overshoot(0.4),
    Midpoint(),
]


def states(state, step):
    del step
    return state.x


# --- PosteriorLength on Gaussian data ------------------------------------------------------------

EVENT, BANDS = (8, 8, 3), sd.Cosine(3)


def banded(seed=0, mean=1.0):
    """Random mean; a variance for each band, over four orders of magnitude."""
    variances = 10 ** np.random.default_rng(seed).uniform(-3, 1, len(BANDS.partition(EVENT).sizes))
    return Banded(normal(*EVENT, seed=seed, scale=mean), jnp.asarray(variances), BANDS)


def assert_exact_flow(solver, data, x, sigmas, tolerance):
    """After each of the steps, in units of the standard deviation of each coefficient."""
    found = run(data, sigmas, solver, x, record=states).record
    for state, end in zip(found, sigmas[1:], strict=True):
        # A standard deviation of 1 in all coefficients.
        unit = dataclasses.replace(data, mean=jnp.zeros(EVENT, x.dtype))._scaled
        error = unit(state - data.flow(x, sigmas[0], end), (data.variances + end**2) ** -0.5)
        assert jnp.abs(error).max() < tolerance, (sigmas[0], end)


GRIDS = [[80.0, 5.0, 1.0, 0.05], [5.0, 3.0, 2.0, 1.2], [1.0, 0.3, 0.2, 0.002]]


@pytest.mark.parametrize(
    "solver",
    [pytest.param(s, marks=pytest.mark.slow if i % 2 else ()) for i, s in enumerate(SOLVERS)],
    ids=str,
)
def test_exact_on_gaussian_data(solver):
    """Any solver makes the exact step, in one step and in three, from any sigma to any other.

    Whatever the batch: the statistics are a regression, not an estimate of the law's moments.
    """
    stein = sd.Stein(solver, basis=BANDS)
    for grid in GRIDS:
        x = banded().mean[None] + normal(4, *EVENT, seed=1, scale=grid[0])
        assert_exact_flow(stein, banded(), x, np.array(grid), 1e-9)


@pytest.mark.parametrize(
    ("batch", "statistics"), [(1, "batch"), (2, "batch"), (3, "batch"), (3, "sample")]
)
def test_exact_on_gaussian_data_with_few_samples(batch, statistics):
    """A single sample, or each by itself, has the mean 0 in place of its batch's."""
    mean = 1.0 if batch > 1 and statistics == "batch" else 0.0
    stein = sd.Stein(sd.DPMpp2M(), basis=BANDS, statistics=statistics)
    for grid in GRIDS:
        data = banded(mean=mean)
        x = data.mean[None] + normal(batch, *EVENT, seed=1, scale=grid[0])
        assert_exact_flow(stein, data, x, np.array(grid), 1e-9)


@pytest.mark.parametrize("solver", [sd.DDIM(), sd.DPMpp2M()], ids=str)
def test_exact_on_gaussian_data_in_float32(solver):
    data, grid = banded(), np.array(GRIDS[0], np.float32)
    x = data.mean[None] + normal(4, *EVENT, seed=1, scale=grid[0])
    data, x = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), (data, x))
    assert_exact_flow(sd.Stein(solver, basis=BANDS), data, x, grid, 1e-4)


def test_a_step_to_zero_is_the_denoiser_s_estimate():
    data = banded()
    x = data.mean[None] + normal(4, *EVENT, scale=2.0)
    for solver in (sd.DDIM(), sd.DPMpp2M(), sd.Heun()):
        solution = run(data, [2.0, 0.0], sd.Stein(solver, basis=BANDS), x)
        assert_array_equal(solution.x, run(data, [2.0, 0.0], sd.DDIM(), x).x)


@pytest.mark.parametrize("data", [mixture(), gaussian(2)], ids=type)
def test_gradients_are_finite(data):
    """Through powers, roots and clips, also where delta is 0, and where D is all regression."""
    sigmas, x = sd.karras_sigmas(4), normal(6, 2, scale=80.0)

    def loss(data, sigmas, x):
        return jnp.sum(run(data, sigmas, sd.Stein(sd.DPMpp3M()), x).x ** 2)

    gradients = jax.grad(loss, (0, 1, 2))(data, sigmas, x)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))


# --- PosteriorLength on any data -----------------------------------------------------------------


@sd.pytree
class Anchored(sd.PosteriorLength):
    """delta = eta(tr J / d) (D - x), with the trace as `drift`."""

    def coefficients(self, moments, sizes, sigma, sigma_next):
        mean = rules.jacobian(moments, sizes, sigma).mean
        return rules.Lengths(rules.gaussian(mean, sigma_next / sigma), mean)

    def delta(self, local, coefficients):
        return coefficients.gamma * (local.x0 - local.x)


def eigenvalue(denoiser, x, s, q, estimator):
    """What the rule finds tr J / d to be; the step that is made with it alone."""
    stein = sd.Stein(sd.DDIM(), Anchored(), estimator)
    solution = run(denoiser, [s, q * s], stein, x, record=lambda _, step: step.coefficients.drift)
    return solution.record[0, 0], solution.x


@pytest.mark.parametrize(("s", "q"), [(0.3, 0.5), (1.0, 0.1), (1.0, 0.9), (5.0, 0.2)])
def test_energy_of_a_corrected_step(s, q):
    """With the true l = E tr J / d, E|x' - mean|^2 is that of the law at sigma_next, for any data.

    For x' = x + w (D - x) it is E|x0 - mean|^2 + d sigma^2 (1 - 2 w + w^2 (1 - l)) by Stein's
    identity, and w = (1 - q)(1 + eta) makes of the last factor q^2. DDIM's w = 1 - q does not.
    """
    n, data = 40_000, mixture(k=5, d=3, std=0.3)
    mean = np.asarray(data.means).mean(0)
    law = np.sum((np.asarray(data.means) - mean) ** 2) / 5 + 3 * (0.3**2 + (q * s) ** 2)
    x = jnp.asarray(data.coupled(n, s)[1])
    _, after = eigenvalue(data, x, s, q, sd.Exact())
    first_order = run(data, [s, q * s], sd.DDIM(), x).x
    energy, less = (np.sum((np.asarray(x) - mean) ** 2, axis=1) for x in (after, first_order))
    assert deviations(energy - law) < 4
    assert deviations(energy - less) > 8


@pytest.mark.parametrize("q", [0.9, 0.1])
@pytest.mark.parametrize("variances", [(0.7, 0, 0), (0.7, 0.7, 0), (0.7, 0.7, 0.7)])
def test_length_where_some_directions_have_no_signal(variances, q):
    """The moments of Gaussian data of these variances; |delta| is that of the exact step."""
    s = 0.8
    variances = np.array(variances)
    total = variances + s**2
    j = variances / total
    signal, noise, cross = (np.sum(w * total)[None] for w in (j**2, (1 - j) ** 2, j * (1 - j)))
    none = np.zeros(1)
    m = rules.LengthMoments(signal, noise / s**2, cross / s, *[none] * 4, None)
    m, size, *sigmas = jax.tree.map(jnp.asarray, (m, np.full(1, 3), s, q * s))
    drift = sd.PosteriorLength().coefficients(m, size, *sigmas).drift
    exact = (np.sqrt(variances + (q * s) ** 2) / np.sqrt(total) - 1) / (1 - q) - (j - 1)
    assert_allclose(drift**2 * noise, np.sum(exact**2 * total)[None], rtol=1e-12)


def test_regression_gives_the_trace():
    """Over batches, the default estimate of tr J / d has the true mean and a spread below 1 - e^2.

    The batches are small enough for a spread, and far too large for a bias of their regression to
    show; the truth is the mean of the closed form over the very same x.
    """
    data, s, batches, size = mixture(k=5, d=3, std=0.5), 0.8, 200, 200
    _, x = data.coupled(batches * size, s)
    true = np.trace(data.posterior_covariance(x, s), axis1=1, axis2=2).mean() / s**2 / 3
    rows = jnp.asarray(x).reshape(batches, size, 3)
    found = jax.vmap(lambda x: eigenvalue(data, x, s, 0.5, sd.Tweedie())[0])(rows)
    residual = 1 - np.square((rows - jax.vmap(lambda x: data(x, s))(rows)) / s).sum(2).mean(1) / 3
    assert abs(found.mean() - true) < 4 * found.std() / np.sqrt(batches)
    assert abs(residual.mean() - true) < 4 * residual.std() / np.sqrt(batches)
    # The standard error of a ratio of two standard deviations is below 1 / sqrt(batches).
    assert found.std() / residual.std() < 1 - 4 / np.sqrt(batches)


def test_regression_gives_the_trace_of_gaussian_data_without_noise():
    s, c = 0.8, 0.4
    data, x = Gaussian(normal(3), c * jnp.eye(3)), normal(8, 3, seed=1)
    assert_allclose(eigenvalue(data, x, s, 0.5, sd.Tweedie())[0], c / (c + s**2), rtol=1e-8)


# --- Denoisers of every kind ---------------------------------------------------------------------


@sd.pytree
class Labelled:
    """Data that hold a row for each sample: N(centre of the sample, 0.25)."""

    centres: jax.Array

    def __call__(self, x, sigma):
        return self.centres + 0.25 / (0.25 + sigma**2) * (x - self.centres)


def test_a_denoiser_with_data_of_each_sample():
    """It always sees the whole batch; its closed form for each sample, as if it were alone."""
    centres = normal(6, 4, seed=3, scale=3.0)
    x, sigmas = normal(6, 4, scale=10.0), [10.0, 3.0, 1.0, 0.3, 0.0]

    def denoiser(x, sigma):
        return Labelled(centres)(x, sigma)

    found = sd.sample(jax.random.key(0), denoiser, sigmas=np.array(sigmas), x_init=x).x
    fine = run(denoiser, np.append(np.geomspace(10.0, 0.01, 100), 0.0), sd.Heun(), x).x
    assert_allclose(fine, centres + 0.5 / np.sqrt(100.25) * (x - centres), atol=2e-2)
    assert_allclose(found, fine, atol=0.3)
    alone = sd.Stein(sd.IPNDM(3), statistics="sample")
    together = run(Labelled(centres), sigmas, alone, x).x
    rows = jax.vmap(lambda c, x: run(Labelled(c[None]), sigmas, alone, x[None]).x[0])(centres, x)
    assert_allclose(together, rows, rtol=1e-9, atol=1e-12)


@jax.custom_vjp
def reverse_only(x, sigma):
    return mixture()(x, sigma)


reverse_only.defvjp(
    lambda x, sigma: jax.vjp(mixture(), x, sigma), lambda pull, cotangent: pull(cotangent)
)


def callback(x, sigma):
    """A network outside of JAX."""
    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return jax.pure_callback(lambda x, s: np.asarray(mixture()(x, s)), like, x, sigma)


def pallas_kernel(x, sigma):
    """Shrunk as a Gaussian's, by a kernel of Pallas."""

    def kernel(x, s, out):
        out[...] = x[...] / (1 + s[0] ** 2)

    like = jax.ShapeDtypeStruct(x.shape, x.dtype)
    return pallas_call(kernel, out_shape=like, interpret=True)(x, sigma[None])


def shrunk(x, sigma):
    return x / (1 + sigma**2)


def attention(attend, x, sigma):
    """Of each sample's own entries to one another, four numbers each."""
    tokens = (x / jnp.sqrt(1 + sigma**2)).reshape(len(x), -1, 1, 4)
    return attend(tokens, tokens, tokens).reshape(x.shape)


def softmax_attention(q, k, v):
    weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / 2)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, v)


# Networks that JAX cannot look into, the same in plain JAX, and the estimators that work on them.
HUTCHINSON = {how: sd.Hutchinson(derivative=how) for how in ("jvp", "vjp", "secant")}
ESTIMATORS = {"default": sd.Tweedie(), "Exact": sd.Exact(), **HUTCHINSON}
OPAQUE = {
    "custom gradient": (reverse_only, mixture(), {"vjp"}),
    "callback": (callback, mixture(), set()),
    "kernel of Pallas": (pallas_kernel, shrunk, set()),
    "attention": (
        partial(attention, jax.nn.dot_product_attention),
        partial(attention, softmax_attention),
        {"Exact", "jvp", "vjp"},
    ),
}


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("kind", OPAQUE)
def test_networks_without_derivatives(kind, estimator):
    """The default and a secant need none; a probe works where its derivative is there, or says so.

    While tracing, and not by an error of JAX's or of the compiler's.
    """
    network, same, derivatives = OPAQUE[kind]
    x = normal(6, 8 if kind == "attention" else 2, scale=3.0)
    stein = sd.Stein(sd.IPNDM(3), estimator=ESTIMATORS[estimator])

    def draw(network):
        return run(network, [3.0, 1.5, 0.5], stein, x).x

    if estimator in derivatives | {"default", "secant"}:
        # A secant divides rounding by its step; JAX's attention takes its weights in float32.
        atol = 1e-5 if kind == "attention" else 1e-10
        assert_allclose(draw(network), draw(same), rtol=1e-9, atol=atol)
    else:
        name = "Exact()" if estimator == "Exact" else "Hutchinson(derivative='"
        with pytest.raises(ValueError, match=re.escape(name) + ".*that this network does not have"):
            jax.eval_shape(partial(draw, network))


def test_mistakes_in_a_network_are_its_own():
    """And not taken for a missing derivative."""
    x = normal(6, 2)
    with pytest.raises(TypeError, match="dot_general"):
        sd.from_probes(lambda x, s: x @ jnp.ones(3) + s, x, jnp.float64(1.0), x[None])


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


@pytest.mark.parametrize("estimator", [sd.Exact(), sd.Tweedie()], ids=["Exact", "Tweedie"])
@pytest.mark.parametrize("rule", ["StepEnergy", *SCHEDULES], ids=str)
@pytest.mark.parametrize(
    "solver", [sd.DPMpp2M(), pytest.param(sd.IPNDM(2), marks=pytest.mark.slow), sd.Heun()], ids=type
)
def test_runs_on_gaussian_data(solver, rule, estimator):
    name, tweedie = type(solver).__name__, isinstance(estimator, sd.Tweedie)
    z = whitened(16, 3)
    start = GRID[0] * z @ VECTORS.T
    for clip in ((0.0, 1.0), (0.9, 0.95), (-1e9, 1e9)):
        if rule == "StepEnergy":
            ours = sd.StepEnergy(*clip)
        else:
            ours = sd.CleanTarget(*clip, schedule=rule)
        stein = sd.Stein(solver, ours, estimator)
        if name == "Heun" and rule != "StepEnergy" and tweedie:
            with pytest.raises(ValueError, match="second point"):
                run(DATA, GRID, stein, start)
            return
        kind = rule if rule == "StepEnergy" else "CleanTarget"
        gammas, a = corrected_run(name, kind, tweedie, clip, SCHEDULES.get(rule))
        solution = run(DATA, GRID, stein, start)
        assert_allclose(solution.info.gamma, gammas, rtol=1e-9, atol=1e-9)
        assert_allclose(solution.x, (a * z) @ VECTORS.T, rtol=1e-9, atol=1e-9)


def test_hutchinson_s_gamma_within_its_standard_error():
    """The law of gamma over keys: mean, and standard deviation from Hutchinson's own variance."""
    stein = sd.Stein(sd.DPMpp2M(), sd.StepEnergy(**WIDE), sd.Hutchinson(2))
    start, grid, count = GRID[0] * whitened(16, 3), GRID[:3], 1000
    keys = jax.random.split(jax.random.key(1), count)
    sample = jax.jit(jax.vmap(lambda key: run(DATA, grid, stein, start, key=key).info.gamma[1]))
    gamma, exact = sample(keys), corrected_run("DPMpp2M", "StepEnergy", False, (-9, 9))[0][1]

    m = np.eye(3) - np.asarray(DATA.jacobian(GRID[1]))  # the probe is v . (1 - J) v
    variance = 2 * (np.sum(m**2) - np.sum(np.diag(m) ** 2)) / (2 * 16)
    deviation = exact * np.sqrt(variance) / np.trace(m)
    assert abs(gamma.mean() - exact) < 4 * deviation / np.sqrt(count)
    # the standard error of a standard deviation, for a kurtosis of up to 6
    assert abs(gamma.std() / deviation - 1) < 4 * np.sqrt(5 / 4 / count)


def test_rademacher_probes_are_exact_on_isotropic_data():
    denoiser = Gaussian(normal(3), 0.4 * jnp.eye(3))
    start = normal(10, 3, scale=GRID[0])
    one, all_columns = (
        run(denoiser, GRID, sd.Stein(sd.DPMpp2M(), sd.StepEnergy(**WIDE), estimator), start)
        for estimator in (sd.Hutchinson(), sd.Exact())
    )
    assert_allclose(one.info.gamma, all_columns.info.gamma, rtol=1e-12)
    assert_allclose(one.x, all_columns.x, rtol=1e-12)


# --- Estimators ----------------------------------------------------------------------------------


def jacobians(function, x):
    """Of a function of one sample, at each of (batch, d), by brute force; (batch, d, d)."""
    return jax.jit(jax.vmap(jax.jacfwd(function)))(x)


def estimate(estimator, denoiser, x, sigma, seed=0):
    """The denoiser at x, and the trace of each sample by the probes."""
    keys = jax.random.split(jax.random.key(seed), x.shape[0])
    x0, jacobian = jax.jit(estimator)(keys, denoiser, x, jnp.asarray(sigma))
    return x0, np.sum(np.multiply(jacobian.v, jacobian.jv), axis=(0, *range(2, x.ndim + 1)))


@pytest.mark.parametrize("sigma", [0.1, 0.8, 3.0])
def test_exact_trace_is_that_of_the_closed_form(sigma):
    """By second-order Tweedie, J = Cov[x0 | x] / sigma^2."""
    denoiser, x = mixture(d=3), normal(4, 3, scale=2.0)
    x0, trace = estimate(sd.Exact(), denoiser, x, sigma)
    covariance = denoiser.posterior_covariance(x, sigma)
    assert_allclose(x0, denoiser(x, sigma), rtol=1e-12)
    assert_allclose(trace, np.trace(covariance, axis1=1, axis2=2) / sigma**2, rtol=1e-9)
    j = jacobians(lambda row: denoiser(row[None], sigma)[0], x)
    assert_allclose(j, covariance / sigma**2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("derivative", ["jvp", "vjp", "secant"])
def test_hutchinson_is_unbiased(derivative):
    """Against the closed form; the variance of a sign probe's trace is 2 sum_{i != j} J_ij^2."""
    denoiser, x, sigma = mixture(d=3), normal(4000, 3), 0.6
    x0, trace = estimate(sd.Hutchinson(2, derivative, 1e-5), denoiser, x, sigma)
    j = denoiser.posterior_covariance(x, sigma) / sigma**2
    error = trace - np.trace(j, axis1=1, axis2=2)
    off = np.sum(j**2, axis=(1, 2)) - np.sum(np.diagonal(j, axis1=1, axis2=2) ** 2, axis=1)
    assert_allclose(x0, denoiser(x, sigma), rtol=1e-10, atol=1e-12)
    assert abs(error.mean()) < 4 * np.sqrt(off.mean() / len(x))
    # of the squares' mean, by their own spread
    assert deviations(error**2 - off) < 4


def test_a_secant_s_error_falls_with_its_step():
    """In first order: the three derivatives are one for the same probes."""
    x, sigma = normal(50, 3), 0.6
    true = estimate(sd.Hutchinson(), mixture(d=3), x, sigma)[1]
    transposed = estimate(sd.Hutchinson(derivative="vjp"), mixture(d=3), x, sigma)[1]
    assert_allclose(transposed, true, rtol=1e-9)
    errors = [
        np.abs(estimate(sd.Hutchinson(1, "secant", h), mixture(d=3), x, sigma)[1] - true).max()
        for h in (0.02, 0.01)
    ]
    assert errors[0] / errors[1] == pytest.approx(2, rel=0.1)
    assert errors[1] < 0.02 * 3


def test_a_secant_is_exact_on_gaussian_data():
    """As its denoiser is affine, however long the step."""
    x, sigma = normal(20, 3), 0.6
    true = estimate(sd.Hutchinson(3), gaussian(), x, sigma)[1]
    found = estimate(sd.Hutchinson(3, "secant", 10.0), gaussian(), x, sigma)[1]
    assert_allclose(found, true, rtol=1e-9)


@pytest.mark.parametrize("sigma", [1e-3, 0.5, 50.0])
def test_tweedie_trace_on_gaussian_data(sigma):
    """s^2 E[d - tr J] = E|x - D|^2 for x of the law N(m, C + s^2), by gamma's own numerator."""
    denoiser = gaussian()
    factor = np.linalg.cholesky(np.asarray(denoiser.covariance) + sigma**2 * np.eye(3))
    x = jnp.asarray(np.asarray(denoiser.mean) + whitened(50, 3) @ factor.T)
    gammas = [
        run(denoiser, [sigma, sigma / 2], sd.Stein(Overshoot(1.5), rule, estimator), x).info.gamma
        for rule in [sd.StepEnergy(**WIDE)]
        for estimator in (sd.Tweedie(), sd.Exact())
    ]
    assert_allclose(*gammas, rtol=1e-9)


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
        stein = sd.Stein(sd.DPMpp2M(), sd.StepEnergy(**WIDE), sd.Exact(), statistics=statistics)
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
        stein = sd.Stein(solver, sd.CleanTarget(**WIDE), sd.Exact(), statistics=statistics)
        assert_allclose(run(denoiser, grid, stein, start).info.gamma[0], gamma, rtol=1e-9)

    stein = sd.Stein(solver, sd.CleanTarget(**WIDE), sd.Hutchinson(), statistics=statistics)
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
    ("rule", "estimator"),
    [(sd.StepEnergy(), sd.Tweedie()), (sd.CleanTarget(0.1, 0.9), sd.Exact())],
    ids=type,
)
def test_sample_statistics_are_batch_statistics_of_batches_of_one(rule, estimator):
    denoiser, grid, start = mixture(), sd.karras_sigmas(5), normal(4, 2, scale=80.0)
    together = run(
        denoiser, grid, sd.Stein(sd.DPMpp3M(), rule, estimator, statistics="sample"), start
    )
    alone = jax.vmap(
        lambda row: run(denoiser, grid, sd.Stein(sd.DPMpp3M(), rule, estimator), row[None])
    )(start)
    assert together.info.gamma.shape == (5, 4)
    assert_allclose(together.info.gamma, alone.info.gamma.T, rtol=1e-9)
    assert_allclose(together.x, alone.x[:, 0], rtol=1e-9, atol=1e-12)


def test_batch_statistics_over_a_mapped_axis():
    """Two halves of a batch on an axis share one coefficient, that of the whole batch."""
    denoiser, grid, start = mixture(), sd.karras_sigmas(5), normal(8, 2, scale=80.0)
    probes = sd.Hutchinson(2)
    whole = run(denoiser, grid, sd.Stein(sd.DPMpp2M(), estimator=probes), start)
    stein = sd.Stein(sd.DPMpp2M(), estimator=probes, axis_name="devices")
    halves = jax.vmap(lambda x: run(denoiser, grid, stein, x), axis_name="devices")(
        start.reshape(2, 4, 2)
    )
    assert_allclose(halves.info.gamma, jnp.stack([whole.info.gamma] * 2), rtol=1e-10)
    assert_allclose(halves.x.reshape(8, 2), whole.x, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
def test_a_rule_of_the_user(value):
    """Coefficient 0 is DDIM, 1 the solver itself, others lie on the line between."""
    denoiser, grid, start = mixture(), np.array([3.0, 1.5, 0.9]), normal(6, 2, scale=3.0)
    solution = run(denoiser, grid, sd.Stein(sd.DPMpp2M(), ConstantRule(value)), start)
    assert_array_equal(solution.info.gamma, value)
    x = run(denoiser, grid[:2], sd.DDIM(), start).x  # the first step is first order anyway
    low = run(denoiser, grid[1:], sd.DDIM(), x).x
    high = run(denoiser, grid, sd.DPMpp2M(), start).x
    assert_allclose(solution.x, low + value * (high - low), rtol=1e-12)


def test_the_correction_is_a_solver():
    """Of a corrected step whose coefficient is 1, another correction finds nothing to correct."""
    denoiser, grid, start = mixture(), sd.karras_sigmas(5), normal(6, 2, scale=80.0)
    nested = run(
        denoiser, grid, sd.Stein(sd.Stein(sd.DPMpp2M(), ConstantRule(1.0)), sd.StepEnergy()), start
    )
    single = run(denoiser, grid, sd.Stein(sd.DPMpp2M(), sd.StepEnergy()), start)
    assert_allclose(nested.x, single.x, rtol=1e-12)
    assert_allclose(nested.info.gamma, single.info.gamma, rtol=1e-12)


# --- A solver like any other ---------------------------------------------------------------------


def test_parts_are_replaced():
    """By `dataclasses.replace`, without a word of the parts that stay."""
    x, grid, stein = normal(6, 2, scale=3.0), [3.0, 1.5, 0.5], sd.Stein(sd.IPNDM(3))
    for part, value in [("statistics", "sample"), ("rule", sd.StepEnergy()), ("inner", sd.Heun())]:
        parts = {"inner": sd.IPNDM(3), part: value}
        replaced = dataclasses.replace(stein, **{part: value})
        assert replaced == sd.Stein(**parts)
        assert replaced != stein
        found = run(mixture(), grid, replaced, x)
        assert_array_equal(found.x, run(mixture(), grid, sd.Stein(**parts), x).x)
        assert np.abs(found.x - run(mixture(), grid, stein, x).x).max() > 1e-6


def test_wrappers_know_the_mapped_axis():
    """Two halves start from noise of their own and share their statistics: they are the whole."""
    grid, stein = np.array([3.0, 1.5, 0.5, 0.0]), sd.Stein(sd.IPNDM(3), sd.StepEnergy())
    key, over = jax.random.key(1), {"axis_name": "devices"}
    table = sd.calibrate(key, mixture(), (8, 2), sigmas=grid, solver=stein)
    mapped = dataclasses.replace(stein, **over)
    pairs = [
        (stein, mapped),
        (sd.AnalyticalFirst(stein), sd.AnalyticalFirst(mapped)),
        (table, dataclasses.replace(table, inner=dataclasses.replace(table.inner, **over))),
    ]
    for whole, halves in pairs:

        def half(_, solver=halves):
            return sd.sample(key, mixture(), (4, 2), sigmas=grid, solver=solver).x

        assert halves.mapped_axis() == "devices"
        expected = sd.sample(key, mixture(), (8, 2), sigmas=grid, solver=whole).x
        found = jax.vmap(half, **over)(jnp.arange(2)).reshape(8, 2)
        assert_allclose(found, expected, rtol=1e-9, atol=1e-12)

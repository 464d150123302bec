"""Solvers against references in numpy, the stochastic ones, options and evaluations."""

from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian, Midpoint, mixture, normal, run, unoptimised, walk  # noqa: F401
from numpy.testing import assert_allclose, assert_array_equal

import steindiff_jax as sd

# References in numpy


def denoise(x, sigma, problem=mixture()):
    means, variance = np.asarray(problem.means), problem.std**2 + sigma**2
    logits = -np.square(x[:, None] - means).sum(-1) / (2 * variance)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    mean = weights / weights.sum(1, keepdims=True) @ means
    return mean + problem.std**2 / variance * (x - mean)


X = np.asarray(normal(6, 2, seed=5, scale=4.0))
SIGMAS = np.array([4.0, 2.3, 1.1, 0.7, 0.3, 0.12, 0.05])


def test_euler_in_the_time_of_a_flow_is_ddim():
    """x_t = x / (1 + sigma), t = sigma / (1 + sigma), velocity (x_t - x0) / t."""
    x, times = X / (1 + SIGMAS[0]), SIGMAS / (1 + SIGMAS)
    for t, t_next in pairwise(times):
        x = x + (t_next - t) * (x - denoise(x / (1 - t), t / (1 - t))) / t
    assert_allclose(run(mixture(), SIGMAS, sd.DDIM(), X).x, x * (1 + SIGMAS[-1]), rtol=1e-12)


def test_heun_in_the_time_of_a_flow():
    """prediction="flow" is Heun in t, which Heun in sigma is not."""

    def velocity(x, t):
        return (x - denoise(x / (1 - t), t / (1 - t))) / t

    x, times = X / (1 + SIGMAS[0]), SIGMAS / (1 + SIGMAS)
    for t, t_next in pairwise(times):
        v = velocity(x, t)
        x = x + (t_next - t) * (v + velocity(x + (t_next - t) * v, t_next)) / 2
    x *= 1 + SIGMAS[-1]
    assert_allclose(run(mixture(), SIGMAS, sd.Heun(prediction="flow"), X).x, x, rtol=1e-12)
    assert np.abs(run(mixture(), SIGMAS, sd.Heun(), X).x - x).max() > 1e-3


@pytest.mark.parametrize("order", [2, 3, 4])
def test_adams_bashforth_in_the_time_of_a_flow(order):
    """On a grid uniform in t, LMS and IPNDM are both the classical method for the velocity."""
    rows = {1: [1], 2: [3, -1], 3: [23, -16, 5], 4: [55, -59, 37, -9]}
    times = np.linspace(0.8, 0.05, 9)
    x, past = X / 5, []
    for t, t_next in pairwise(times):
        past = [(x - denoise(x / (1 - t), t / (1 - t))) / t, *past][:order]
        row = np.array(rows[len(past)]) / sum(rows[len(past)])
        x = x + (t_next - t) * np.tensordot(row, past, 1)
    for solver in (sd.LMS, sd.IPNDM):
        found = run(mixture(), times / (1 - times), solver(order, prediction="flow"), X).x
        assert_allclose(found, x / (1 - times[-1]), rtol=1e-11)


def unipc(order, epsilon, sigmas, x, first_moment=None):
    """UniPC as its paper states it: predict, evaluate, and correct from the old state.

    Every integral is that of the interpolating polynomial in lambda, by 60-point quadrature, but
    that with one node the slope weighs first_moment(h), if given.
    """
    nodes, weights = np.polynomial.legendre.leggauss(60)
    nodes, weights = (nodes + 1) / 2, weights / 2
    lambdas = -np.log(sigmas)
    steps = len(sigmas) - 1

    def quantity(x, sigma):
        d = denoise(x, sigma)
        return (x - d) / sigma if epsilon else d

    def advance(x, i, points, values):
        """The polynomial through (points, values), integrated from lambda_i to the next."""
        h = lambdas[i + 1] - lambdas[i]
        u = (np.asarray(points) - lambdas[i]) / h
        powers = np.vander(u, increasing=True)
        density = np.exp((-h if epsilon else h) * nodes) * weights
        moments = nodes[:, None] ** np.arange(len(u))
        integral = density @ moments / density.sum()
        if first_moment and len(u) == 2:
            integral[1] = first_moment(-h if epsilon else h)
        mean = np.tensordot(np.linalg.solve(powers.T, integral), values, 1)
        q = sigmas[i + 1] / sigmas[i]
        return x + (sigmas[i + 1] - sigmas[i]) * mean if epsilon else q * x + (1 - q) * mean

    points, values = [lambdas[0]], [quantity(x, sigmas[0])]
    for i in range(steps):
        used = min(order, i + 1, steps - i)
        predicted = advance(x, i, points[:used], values[:used])
        if i == steps - 1:
            return predicted
        new = quantity(predicted, sigmas[i + 1])
        points, values = [lambdas[i + 1], *points], [new, *values]
        x = advance(x, i, points[: used + 1], values[: used + 1])
    return None


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("kind", ["bh1", "bh2", "vary_coeff"])
def test_unipc_as_in_its_paper(order, prediction, kind):
    """The correction as a row of weights is the corrector that starts from the old state."""
    moment = {"bh1": lambda h: h / (1 - np.exp(-h)) / 2, "bh2": lambda _: 0.5}.get(kind)
    expected = unipc(order, prediction == "epsilon", SIGMAS, X, moment)
    solver = sd.UniPC(order, kind, prediction=prediction)
    assert_allclose(walk(mixture(), solver, SIGMAS, X), expected, rtol=1e-10)


# Defects of public libraries that are not copied


@pytest.mark.parametrize("lower_order_final", [True, False])
@pytest.mark.parametrize("prediction", ["x0", "epsilon"])
@pytest.mark.parametrize("kind", ["bh1", "bh2", "vary_coeff"])
def test_unipc_ends_at_zero_in_the_data_prediction(kind, prediction, lower_order_final):
    """Where lambda is infinite: x0 = D is all that is known there; diffusers returns NaN or inf."""
    options = {"prediction": prediction, "lower_order_final": lower_order_final}
    solution = run(
        mixture(),
        np.append(SIGMAS, 0.0),
        sd.UniPC(3, kind, **options),
        X,
        record=lambda state, step: (state.x, step.x0),
    )
    states, estimates = solution.record
    assert np.isfinite(states).all()
    assert_array_equal(solution.x, estimates[-1])
    assert_allclose(solution.x, denoise(np.asarray(states[-2]), SIGMAS[-1]), rtol=1e-10)


# Stochastic members


def start(solver):
    return sd.State(jnp.asarray(X), solver.init(jnp.asarray(X), jnp.asarray(SIGMAS)))


@jax.jit
def advance(solver, key, state, sigma, sigma_next):
    return solver.advance(key, mixture(), state, sigma, sigma_next)


def noises(key, x):
    """The noise that a step with this key draws."""
    return np.asarray(sd.noise(key, jnp.asarray(x)))


@pytest.mark.parametrize("kind", ["midpoint", "heun"])
@pytest.mark.parametrize("eta", [0.4, 1.0])
def test_sde_dpm_solver(kind, eta):
    """Against its formulas in lambda, with the same noise."""
    solver = sd.DPMpp2MSDE(kind, eta)
    state, x, last = start(solver), X, None
    for i, (sigma, sigma_next) in enumerate(pairwise(SIGMAS)):
        key = jax.random.key(i)
        state, _ = advance(solver, key, state, sigma, sigma_next)
        h, d = np.log(sigma / sigma_next), denoise(x, sigma)
        decay = np.exp(-h * (1 + eta))
        mean = decay * x + (1 - decay) * d
        if last is not None:
            slope = (d - last[0]) / last[1] * h
            mean += slope * (
                (1 - decay) / 2 if kind == "midpoint" else 1 - (1 - decay) / (h + eta * h)
            )
        x = mean + sigma_next * np.sqrt(1 - np.exp(-2 * eta * h)) * noises(key, x)
        last = d, h
        assert_allclose(state.x, x, rtol=1e-9)


def test_churn():
    """Algorithm 2 of arXiv:2206.00364, with the same noise."""
    solver = sd.Churn(sd.Heun(), churn=2.0, sigma_min=0.1, sigma_max=3.0, noise=1.01)
    state, x = start(solver), X
    for i, (sigma, sigma_next) in enumerate(pairwise(SIGMAS)):
        key = jax.random.key(i)
        state, _ = advance(solver, key, state, sigma, sigma_next)
        gamma = min(2.0 / 6, np.sqrt(2) - 1) if 0.1 <= sigma <= 3.0 else 0.0
        raised = sigma * (1 + gamma)
        noise = noises(jax.random.split(key)[0], x)
        x = x + np.sqrt(raised**2 - sigma**2) * 1.01 * noise
        slope = (x - denoise(x, raised)) / raised
        euler = x + (sigma_next - raised) * slope
        end = (euler - denoise(euler, sigma_next)) / sigma_next
        x = x + (sigma_next - raised) * (slope + end) / 2
        assert_allclose(state.x, x, rtol=1e-10)


@sd.pytree
class Ancestral(sd.StochasticSolver):
    """A stochastic solver of a user: back to x0, and noise anew."""

    def advance(self, key, denoiser, state, sigma, sigma_next):
        x0 = denoiser(state.x, sigma)
        return sd.State(x0 + sigma_next * sd.noise(key, state.x), ()), sd.Step(x0, 0 * x0)


def test_a_stochastic_solver_of_the_user():
    """With one key for all samples, and with one for each, whose draws depend on no other."""
    keys, many = jax.random.split(jax.random.key(3), 4), {"sigmas": SIGMAS, "solver": Ancestral()}
    one = sd.sample(jax.random.key(3), mixture(), (4, 2), **many)
    each = sd.sample(keys, mixture(), (4, 2), **many)
    alone = sd.sample(keys[2:], mixture(), (2, 2), **many)
    assert_allclose(alone.x, each.x[2:], rtol=1e-12)
    for solution in (one, each):
        assert len(np.unique(solution.x, axis=0)) == 4


@pytest.mark.parametrize(
    "solver",
    [sd.DPMpp2MSDE(eta=1.0), sd.DPMpp2MSDE("heun", 0.5), sd.Churn(sd.Heun()), sd.Churn(sd.DPM2())],
    ids=str,
)
def test_stochastic_solvers_keep_the_variance(solver):
    """On Gaussian data, from the exact law at the start: many steps end in the data's variance.

    The mean of n squares of variance v is known to v sqrt(2 / n).
    """
    n, std = 20_000, 0.5
    data = Gaussian(jnp.zeros(1), jnp.full((1, 1), std**2))
    start = normal(n, 1, seed=7, scale=np.hypot(10.0, std))
    sigmas = np.append(np.geomspace(10.0, 0.005, 80), 0.0)
    x = run(data, sigmas, solver, start).x
    assert abs(np.mean(np.square(x)) - std**2) < 4 * std**2 * np.sqrt(2 / n)
    # and the noise is new: what is left of the start is not what the ODE would leave
    assert abs(np.corrcoef(x[:, 0], start[:, 0])[0, 1]) < 0.9


# Options and evaluations


@pytest.mark.parametrize(
    "inner", [sd.DPMpp2M(), sd.IPNDM(1), sd.AnalyticalFirst(sd.Heun())], ids=str
)
def test_churn_of_a_solver_with_memory_is_refused(inner):
    with pytest.raises(ValueError, match="without memory"):
        run(mixture(), SIGMAS, sd.Churn(inner), X)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: sd.LMS(5), "order must be one of .* got 5"),
        (lambda: sd.IPNDM(0), "order must be one of .* got 0"),
        (lambda: sd.DEIS(7), "order must be one of .* got 7"),
        (lambda: sd.UniPC(4), r"order must be one of \(1, 2, 3\), got 4"),
        (lambda: sd.UniPC(2, "bh3"), "kind must be one of .* got 'bh3'"),
        (lambda: sd.DPMpp2M("taylor"), "kind must be one of .* got 'taylor'"),
        (lambda: sd.DPMpp3M(kind="bh1"), "kind must be one of .* got 'bh1'"),
        (lambda: sd.DPMpp2S(kind="bh1"), "kind must be one of .* got 'bh1'"),
        (lambda: sd.DPMpp3S(kind="bh1"), "kind must be one of .* got 'bh1'"),
        (lambda: sd.DPMpp2M(prediction="eps"), "prediction must be one of .* got 'eps'"),
        (lambda: sd.LMS(prediction="x0"), "prediction must be one of .* got 'x0'"),
        (lambda: sd.Heun(prediction="x0"), "prediction must be one of .* got 'x0'"),
        (lambda: sd.DPMpp2MSDE(kind="bh1"), "kind must be one of .* got 'bh1'"),
    ],
)
def test_unknown_options(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("solver", "to_zero", "above"),
    [
        (sd.UniPC(3), 6, 6),
        (sd.LMS(4), 6, 6),
        (sd.DPM2(), 11, 12),
        (sd.DPMpp2S(), 11, 12),
        (sd.DPMpp3S(), 16, 18),
        (sd.Churn(), 11, 12),
        (sd.AnalyticalFirst(sd.DDIM()), 5, 5),
        (sd.AnalyticalFirst(sd.Heun()), 10, 11),
        (sd.Stein(sd.IPNDM(3)), 6, 6),
        (sd.Stein(sd.Heun()), 11, 12),
        (sd.Stein(Midpoint(), sd.StepEnergy()), 12, 12),
        (sd.AnalyticalFirst(sd.Stein(sd.IPNDM(3))), 5, 5),
        (sd.AnalyticalFirst(sd.Stein(sd.Heun(), sd.StepEnergy())), 10, 11),
        (sd.Stein(sd.AnalyticalFirst(sd.IPNDM(3))), 6, 6),  # nothing is left to save
    ],
    ids=str,
)
def test_evaluations(solver, to_zero, above):
    """Counted where the denoiser is called, and as reported; the correction asks for none."""
    calls = []

    def denoiser(x, sigma):
        jax.debug.callback(lambda: calls.append(None))
        return mixture()(x, sigma)

    for sigmas, expected in ((np.append(SIGMAS[:-1], 0.0), to_zero), (SIGMAS, above)):
        calls.clear()
        solution = jax.block_until_ready(run(denoiser, sigmas, solver, X))
        jax.effects_barrier()
        assert solution.info.nfe == expected == len(calls)


@pytest.mark.parametrize(
    "solver",
    [sd.UniPC(3), sd.DEIS(4, lower_order_final=True), sd.LMS(3, lower_order_final=True)],
    ids=str,
)
@pytest.mark.parametrize("last", [0.0, 0.01])
def test_lower_orders_at_the_end_of_a_padded_grid(solver, last):
    """The last step is that before the padding."""

    @jax.jit
    def weights(sigmas):
        def padded(sigmas):
            rows = solver.weights(jnp.pad(sigmas, (0, 3), mode="edge"))
            return rows.sum(), rows

        return solver.weights(sigmas), *jax.grad(padded, has_aux=True)(sigmas)

    alone, slopes, padded = weights(jnp.asarray(np.append(SIGMAS, last)))
    assert_allclose(padded[: len(alone)], alone, rtol=1e-12)
    assert np.isfinite(slopes).all()

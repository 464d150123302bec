"""`PosteriorLength`: its shares of the posterior variance, exactness on Gaussians, its order."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Gaussian, mixture, normal, run, whitened
from scipy.integrate import quad
from test_order import converge, graded, order

import steindiff_jax as sd
from steindiff_jax.stein.rules import MODE_EIGENVALUE, gaussian_share


@pytest.mark.parametrize("eigenvalue", [1e-6, 0.01, 0.3, 0.9, 1 - 1e-6])
@pytest.mark.parametrize("q", [0.0, 0.1, 0.8])
def test_share_of_the_exact_step(eigenvalue, q):
    """E|delta*|^2 / V of the exact flow of N(0, v I) per dimension, v / (v + 1) = eigenvalue."""
    variance = eigenvalue / (1 - eigenvalue)
    x_next = np.sqrt((variance + q**2) / (variance + 1))  # times x, sigma = 1
    delta = (x_next - q) / (1 - q) - eigenvalue
    share = delta**2 * (variance + 1) / eigenvalue
    # delta itself is a difference of numbers of order 1, good to 1e-16 of them.
    assert gaussian_share(jnp.float64(eigenvalue), q) == pytest.approx(
        share, rel=1e-9, abs=1e-15 / eigenvalue
    )


def test_share_of_two_modes():
    """Between two far modes D = tanh(u), u of density cosh(u), and the path ends at sign(u)."""

    def share(f):
        return quad(lambda u: np.cosh(u) * f(np.tanh(u)), 0, 20)[0]

    modes = share(lambda t: (1 - t) ** 2) / share(lambda t: 1 - t**2)
    assert modes == pytest.approx((4 - np.pi) / np.pi, rel=1e-6)
    assert gaussian_share(jnp.float64(MODE_EIGENVALUE), 0.0) == pytest.approx(modes, rel=1e-6)


class WrongLength:
    """A solver whose delta has the direction of the exact one on N(0, v I), and not its length."""

    def init(self, x, sigmas):
        del sigmas
        return sd.State(x)

    def step(self, key, denoiser, state, sigma, sigma_next):
        del key
        x0, q = denoiser(state.x, sigma), sigma_next / sigma
        return sd.State(q * state.x + (1 - q) * 1.7 * x0), sd.Step(x0, 0.7 * x0)


@pytest.mark.parametrize("scale", [1.0, 5.0])
@pytest.mark.parametrize("statistics", ["batch", "sample"])
@pytest.mark.parametrize("sigma_next", [0.0, 0.1, 2.5])
def test_exact_on_isotropic_gaussians(statistics, sigma_next, scale):
    """Stein's length turns the right direction into the exact step, however large.

    So under guidance, which moves the mean where both laws have one covariance.
    """
    d, variance, sigma = 3, 0.8, 4.0
    target = Gaussian(jnp.zeros(d), variance * jnp.eye(d))
    x = whitened(16, d) * np.sqrt(variance + sigma**2)
    if statistics == "sample":  # each sample must have the law's energy by itself
        x *= np.sqrt(d * (variance + sigma**2)) / np.linalg.norm(x, axis=1, keepdims=True)
    mean = jnp.array([0.3, -1.0, 2.0])
    branches = (Gaussian(m * mean, target.covariance) for m in (scale - 1, scale))
    rule = sd.PosteriorLength(gamma_max=1e3)
    solver = sd.Stein(WrongLength(), rule, sd.Exact(), statistics)
    solution = run(sd.guided(*branches, scale), [sigma, sigma_next], solver, x)
    np.testing.assert_allclose(solution.x, target.flow(x, sigma, sigma_next), rtol=1e-10)


def test_length_under_guidance():
    """From the branch's variance, as |J_w|^2 / |J|^2: where tr J_w is negative there is a way too.

    N(0, c) in all 3 directions, J = c / (c + sigma^2), and delta = 0.7 D of the guided denoiser.
    """
    sigma, sigma_next, scale = 2.0, 0.5, 3.0
    jacobian, other = (c / (c + sigma**2) for c in (0.5, 2.0))
    guided = scale * jacobian - (scale - 1) * other
    assert guided < 0
    x = np.asarray(normal(8, 3))
    left = float(gaussian_share(jnp.float64(jacobian), sigma_next / sigma)) * 3 * jacobian
    left *= sigma**2 * guided**2 / jacobian**2
    gamma = np.sqrt(left / np.mean(np.sum((0.7 * guided * x) ** 2, axis=1)))
    branches = (Gaussian(jnp.zeros(3), c * jnp.eye(3)) for c in (0.5, 2.0))
    solver = sd.Stein(WrongLength(), sd.PosteriorLength(gamma_max=1e3), sd.Exact())
    solution = run(sd.guided(*branches, scale), [sigma, sigma_next], solver, x)
    np.testing.assert_allclose(solution.info.gamma[0], gamma, rtol=1e-10)


@pytest.mark.parametrize(
    ("inner", "nominal"), [(sd.DPMpp2M(), 2), (sd.DPMpp3M(curvature=1.0), 3), (sd.Heun(), 2)]
)
def test_order_is_kept(inner, nominal):
    """Surprise is O(step^2), so that 1 - gamma costs not even a third-order solver its order."""
    solver = sd.Stein(inner, sd.PosteriorLength(), sd.Exact())
    errors, solutions = converge(solver, graded)
    assert abs(order(errors) - nominal) < 0.2
    assert max(abs(np.asarray(solutions[-1].info.gamma)[5:] - 1)) > 0  # and it did correct


def test_first_order_steps_are_left_alone():
    sigmas = sd.karras_sigmas(6)
    solver = sd.Stein(sd.DPMpp3M(), sd.PosteriorLength())
    solution = sd.sample(jax.random.key(0), mixture(), (32, 2), sigmas=sigmas, solver=solver)
    assert solution.info.gamma[0] == 1
    assert solution.info.gamma[-1] == 1
    assert (solution.info.gamma[1:-1] != 1).all()


def test_gradients_are_finite():
    """Through the power, the roots and the clips, the step to 0 and the first step included."""

    def loss(means, sigmas):
        denoiser = mixture()
        denoiser = type(denoiser)(means, denoiser.std)
        solver = sd.Stein(sd.DPMpp3M(), sd.PosteriorLength())
        x = sd.sample(jax.random.key(0), denoiser, (16, 2), sigmas=sigmas, solver=solver).x
        return jnp.sum(x**2)

    gradients = jax.grad(loss, (0, 1))(mixture().means, sd.karras_sigmas(5))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))

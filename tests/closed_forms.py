"""Problems with closed forms: exact denoisers, exact flows."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import steindiff_jax as sd
from steindiff_jax.solvers.multistep import Memory

REFERENCE = Path(__file__).parent / "reference"


@sd.pytree
class Mixture:
    """Equal isotropic Gaussians: means (k, d), standard deviation std."""

    means: Any
    std: Any

    def __call__(self, x, sigma):
        variance = self.std**2 + sigma**2
        distance = jnp.square(x[:, None] - self.means[None]).sum(-1)
        mean = jax.nn.softmax(-distance / (2 * variance)) @ self.means
        return mean + self.std**2 / variance * (x - mean)

    def posterior_covariance(self, x, sigma):
        """Cov[x0 | x] at each row of x, from the weights of Bayes' formula, in numpy."""
        means, x, d = np.asarray(self.means), np.asarray(x), np.shape(x)[1]
        variance = self.std**2 + sigma**2
        logits = -np.square(x[:, None] - means).sum(-1) / (2 * variance)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        weights /= weights.sum(1, keepdims=True)
        away = means - (weights @ means)[:, None]
        away *= sigma**2 / variance  # of the centres mean + std^2 / variance (x - mean)
        own = self.std**2 * sigma**2 / variance * np.eye(d)
        return own + np.einsum("nk,nki,nkj->nij", weights, away, away)

    def coupled(self, n, sigma, seed=0, noise="normal"):
        """Clean samples and x = x0 + sigma e, e of variance 1, normal or Laplace."""
        rng = np.random.default_rng(seed)
        k, d = self.means.shape
        clean = np.asarray(self.means)[rng.integers(k, size=n)]
        clean = clean + float(self.std) * rng.standard_normal((n, d))
        if noise == "normal":
            return clean, clean + sigma * rng.standard_normal((n, d))
        return clean, clean + sigma * rng.laplace(scale=np.sqrt(0.5), size=(n, d))


@sd.pytree
class Gaussian:
    """N(mean, covariance): D = m + C (C + sigma^2)^-1 (x - m), J the same at every x."""

    mean: Any
    covariance: Any

    def __call__(self, x, sigma):
        return self.mean[None] + (x - self.mean[None]) @ self.jacobian(sigma)

    def jacobian(self, sigma):
        c = self.covariance
        return jnp.linalg.solve(c + sigma**2 * jnp.eye(c.shape[0], dtype=c.dtype), c)

    def flow(self, x, sigma, sigma_next):
        """The exact solution of the probability-flow ODE, sqrt((C + s'^2) / (C + s^2)) (x - m)."""
        values, vectors = np.linalg.eigh(self.covariance)
        scale = np.sqrt((values + sigma_next**2) / (values + sigma**2))
        mean = np.asarray(self.mean)
        return mean + (x - mean) @ (vectors * scale) @ vectors.T


@sd.pytree
class Banded:
    """N(mean, sum_k c_k P_k): variance c_k in each coefficient of band k of a basis."""

    mean: Any
    variances: Any
    basis: sd.Basis

    def __call__(self, x, sigma):
        c = self.variances
        return self._scaled(x, c / (c + sigma**2))

    def flow(self, x, sigma, sigma_next):
        """The exact solution of the probability-flow ODE, in each band by itself."""
        c = self.variances
        return self._scaled(x, jnp.sqrt((c + sigma_next**2) / (c + sigma**2)))

    def _scaled(self, x, factors):
        factors = self.basis.partition(x.shape[1:]).spread(factors)
        scaled = factors * self.basis.transform(x - self.mean[None])
        return self.mean[None] + self.basis.inverse(scaled)


@sd.pytree
class Overshoot(sd.Solver):
    """A solver of a user, with nothing but `step`: `factor` times as far as the first-order one."""

    factor: float = 1.0

    def step(self, key, denoiser, state, sigma, sigma_next, *, x0=None):  # noqa: ARG002
        x0, nfe = sd.evaluate(denoiser, state.x, sigma, x0)
        return sd.Step(x0, (self.factor - 1) * (x0 - state.x), nfe), ()


@sd.pytree
class Midpoint(sd.Solver):
    """Another, that evaluates at a second point: the midpoint rule in sigma."""

    def step(self, key, denoiser, state, sigma, sigma_next, *, x0=None):  # noqa: ARG002
        x0, nfe = sd.evaluate(denoiser, state.x, sigma, x0)
        x, middle = state.x, (sigma + sigma_next) / 2
        half = x + (middle - sigma) * (x - x0) / sigma
        slope = (half - denoiser(half, middle)) / middle
        return sd.Step(x0, x - sigma * slope - x0, nfe + 1), ()


class Constant(NamedTuple):
    gamma: Any


@sd.pytree
class ConstantRule(sd.Rule):
    """A rule of a user: a coefficient that looks at nothing."""

    value: float

    def coefficients(self, moments, sizes, sigma, sigma_next):  # noqa: ARG002
        return Constant(jnp.full_like(sizes, self.value))


@pytest.fixture(scope="module", autouse=True)
def unoptimised():
    """Of a test that runs each program once: XLA's optimisations take longer than they save."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def gaussian(d=3, seed=0):
    """An anisotropic Gaussian whose axes are not the coordinates'."""
    rng = np.random.default_rng(seed)
    factor = rng.standard_normal((d, d)) * np.array([1.0, 0.4, 0.1, 0.7])[:d]
    return Gaussian(jnp.asarray(rng.standard_normal(d)), jnp.asarray(factor @ factor.T))


def mixture(k=5, d=2, std=0.5, seed=0):
    return Mixture(jnp.asarray(np.random.default_rng(seed).standard_normal((k, d))), std)


def normal(*shape, seed=0, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape))


def whitened(n, d, seed=0):
    """(n, d) points whose mean is 0 and whose covariance is 1, exactly."""
    z = np.random.default_rng(seed).standard_normal((n, d))
    z -= z.mean(0)
    return z @ np.linalg.inv(np.linalg.cholesky(z.T @ z / n)).T


@cache
def reference(name):
    """The arrays of one file of tests/reference; see the README there."""
    with np.load(REFERENCE / f"{name}.npz") as arrays:
        return dict(arrays)


def run(denoiser, sigmas, solver, x_init, **kwargs):
    """`sample` from a given start; the key is without influence unless a probe is drawn."""
    return sd.sample(
        kwargs.pop("key", jax.random.key(0)),
        denoiser,
        sigmas=jnp.asarray(sigmas),
        solver=solver,
        x_init=x_init,
        **kwargs,
    )


def walk(denoiser, solver, sigmas, x):
    """`sample` step by step, so that a solver is compiled once for grids of all lengths."""
    sigmas = jnp.asarray(sigmas)
    x = jnp.asarray(x)

    def padded(memory):
        if not isinstance(memory, Memory):
            return memory
        more = 20 - memory.weights.shape[0]
        return memory._replace(weights=jnp.pad(memory.weights, ((0, more), (0, 0))))

    memory = solver.init(x, sigmas)
    memory = jax.tree.map(padded, memory, is_leaf=lambda part: isinstance(part, Memory))
    state = sd.State(x, memory)
    for now, then in pairwise(sigmas):
        state = _step(denoiser, solver, state, now, then)
    return state.x


@jax.jit
def _step(denoiser, solver, *arguments):
    return solver.advance(jax.random.key(0), denoiser, *arguments)[0]


def deviations(z):
    """|mean| of independent samples in units of its standard error."""
    z = np.asarray(z)
    return abs(z.mean()) / (z.std() / np.sqrt(len(z)))

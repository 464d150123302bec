"""Problems with closed forms: exact denoisers, exact flows."""

from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import steindiff_jax as sd
from steindiff_jax.solvers.multistep import Multistep

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
    """`sample` step by step: to compile every solver for every number of steps takes minutes."""
    sigmas = jnp.asarray(sigmas)
    state = solver.init(jnp.asarray(x), sigmas)
    # A multistep solver's memory has another shape for each grid: op by op compiles less.
    step = _step.__wrapped__ if isinstance(solver, Multistep) else _step
    for now, then in pairwise(sigmas):
        state = step(denoiser, solver, state, now, then)
    return state.x


@jax.jit
def _step(denoiser, solver, *arguments):
    return solver.step(jax.random.key(0), denoiser, *arguments)[0]

"""DPM-Solver++: exponential multistep methods in the data prediction and lambda = -log sigma.

The exact solution of a step of size h in lambda is x' = q x + int_0^h e^{-(h - u)} x0(u) du,
q = e^{-h} (Lu et al. 2022, arXiv:2211.01095): the weight of the integral is e^u.
"""

import jax.numpy as jnp
from jax import Array

from steindiff_jax._numerics import exponential_moments
from steindiff_jax._typing import Numeric, Sigmas, pytree
from steindiff_jax.solvers.multistep import Multistep, Weights, interpolation_weights


def log_snr(sigmas: Sigmas) -> tuple[Array, Array]:
    """Log-SNR -log sigma at the nodes, and where a step ends at 0, beyond every polynomial.

    A node at sigma = 0 is put one unit after the one before it, so that all is finite.
    """
    final = sigmas[1:] == 0
    logs = -jnp.log(jnp.where(sigmas > 0, sigmas, 1.0))
    return jnp.where(sigmas > 0, logs, jnp.roll(logs, 1) + 1), final


@pytree
class DPMpp2M(Multistep):
    """DPM-Solver++(2M), second order, one evaluation a step.

    Midpoint form: the slope of x0 weighs h / 2, as in k-diffusion and in diffusers' default. A step
    to sigma = 0 is first order and returns the denoiser's estimate.
    """

    def weights(self, sigmas: Sigmas) -> Weights:
        z, final = log_snr(sigmas)
        return interpolation_weights(z, jnp.full((z.size - 1, 1), 0.5, z.dtype), final)


@pytree
class DPMpp3M(Multistep):
    """DPM-Solver++(3M), one evaluation a step.

    curvature: weight of the second difference relative to the exact integral. 0.5 is what every
        public "3M" uses (official, diffusers, k-diffusion) and is second order; there it damps
        few large steps. 1.0 is the exact exponential multistep method, third order.
    A step to sigma = 0 is first order and returns the denoiser's estimate.
    """

    curvature: Numeric = 0.5

    def weights(self, sigmas: Sigmas) -> Weights:
        z, final = log_snr(sigmas)
        scale = jnp.stack([jnp.ones_like(z[0]), jnp.asarray(self.curvature, z.dtype)])
        moments = scale[None] * exponential_moments(jnp.diff(z), 3)
        return interpolation_weights(z, moments, final)

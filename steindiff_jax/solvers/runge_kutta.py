"""One-step methods for dx/dsigma = (x - D(x, sigma)) / sigma."""

import jax.numpy as jnp
from jax import lax

from steindiff_jax._typing import Batch, Denoiser, Key, Scalar, Sigmas, State, Step, pytree
from steindiff_jax.solvers._step import take_step


@pytree
class DDIM:
    """x' = q x + (1 - q) D(x, sigma), q = sigma' / sigma. First order, one evaluation a step.

    DDIM (Song et al. 2021, arXiv:2010.02502), Euler in sigma and the exponential Euler method are
    this same step.
    """

    def init(self, x: Batch, sigmas: Sigmas) -> State:  # noqa: ARG002
        return State(x)

    def step(
        self, key: Key, denoiser: Denoiser, state: State, sigma: Scalar, sigma_next: Scalar
    ) -> tuple[State, Step]:
        del key
        x0 = denoiser(state.x, sigma)
        return take_step(state.x, x0, jnp.zeros_like(x0), sigma, sigma_next)


@pytree
class Heun:
    """Heun's method in sigma. Second order, two evaluations a step, one in a step to sigma = 0.

    Karras et al. 2022, arXiv:2206.00364, algorithm 1.
    """

    def init(self, x: Batch, sigmas: Sigmas) -> State:  # noqa: ARG002
        return State(x)

    def step(
        self, key: Key, denoiser: Denoiser, state: State, sigma: Scalar, sigma_next: Scalar
    ) -> tuple[State, Step]:
        del key
        x0 = denoiser(state.x, sigma)
        slope = (state.x - x0) / sigma

        def correct() -> Batch:
            # Under vmap both branches run: the sigma of the unused one must be safe as well.
            end = jnp.where(sigma_next > 0, sigma_next, sigma)
            euler = state.x + (end - sigma) * slope
            return -sigma * ((euler - denoiser(euler, end)) / end - slope) / 2

        delta = lax.cond(sigma_next > 0, correct, lambda: jnp.zeros_like(x0))
        nfe = 1 + (sigma_next > 0).astype(jnp.int32)
        return take_step(state.x, x0, delta, sigma, sigma_next, nfe=nfe)

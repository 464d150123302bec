"""Multistep methods of every kind, as rows of numbers computed once from the sigmas.

A method of order p interpolates what it remembers, f_0 (now), f_1, ... (before), by a polynomial of
degree p - 1 in some variable z of the grid and integrates it over the step. With the moments

    m_k = int g(u) u^k du / int g(u) du,  u = 0 .. 1 along the step in z,  k = 1 .. p - 1,

of the integral's own weight g and the nodes r_j = (z_j - z_0) / (z_next - z_0), it is

    f = f_0 + sum_j w_j (f_j - f_0),   sum_j w_j r_j^k = m_k.

What f and z are, and the moments, is all that tells one family from another (Hochbruck &
Ostermann, Acta Numerica 2010, for the exponential ones).
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from steindiff_jax._numerics import accurate
from steindiff_jax._typing import Batch, Denoiser, Key, Scalar, Sigmas, State, Step, pytree
from steindiff_jax.solvers._step import take_step

Weights = Float[Array, "steps past"]


class Memory(NamedTuple):
    """past: (order - 1, batch, *event), latest first; weights: (steps, order - 1); step: ()."""

    past: Array
    weights: Weights
    step: Int[Array, ""]


@pytree
class Multistep:
    """Base of the multistep solvers; a subclass says what it remembers and its weights."""

    def weights(self, sigmas: Sigmas) -> Weights:
        """Row i weighs f_1 - f_0, f_2 - f_0, ... in step i; 0 for what is not there yet."""
        raise NotImplementedError

    def remember(self, x: Batch, x0: Batch, sigma: Scalar) -> Batch:  # noqa: ARG002
        """What is interpolated: x0, unless a subclass says otherwise."""
        return x0

    def extrapolate(self, change: Batch, sigma: Scalar) -> Batch:  # noqa: ARG002
        """The change of x0 that a change of what is interpolated amounts to."""
        return change

    def init(self, x: Batch, sigmas: Sigmas) -> State:
        weights = self.weights(accurate(sigmas)).astype(x.dtype)
        past = jnp.zeros((weights.shape[1], *x.shape), x.dtype)
        return State(x, Memory(past, weights, jnp.zeros((), jnp.int32)))

    def step(
        self, key: Key, denoiser: Denoiser, state: State, sigma: Scalar, sigma_next: Scalar
    ) -> tuple[State, Step]:
        del key
        past, weights, step = state.history
        x0 = denoiser(state.x, sigma)
        now = self.remember(state.x, x0, sigma)
        change = jnp.tensordot(weights[step], past - now[None], axes=1)
        past = jnp.concatenate([now[None], past])[: weights.shape[1]]
        return take_step(
            state.x,
            x0,
            self.extrapolate(change, sigma),
            sigma,
            sigma_next,
            history=Memory(past, weights, step + 1),
        )


class EpsilonMultistep(Multistep):
    """Interpolates the noise (x - x0) / sigma, the slope of the ODE, in place of x0."""

    def remember(self, x: Batch, x0: Batch, sigma: Scalar) -> Batch:
        return (x - x0) / sigma

    def extrapolate(self, change: Batch, sigma: Scalar) -> Batch:
        return -sigma * change


def interpolation_weights(
    z: Float[Array, " nodes"], moments: Float[Array, "steps past"], first_order: Array
) -> Weights:
    """Solve sum_j w_j r_j^k = m_k in every step, with as many nodes as there are by then.

    z: the interpolation variable at the grid's nodes; moments: m_1 .. m_{order-1} of each step;
    first_order: (steps,) where to use no history at all; there the rest need only be finite.
    """
    steps, count = moments.shape
    i, j = jnp.arange(steps)[:, None], jnp.arange(1, count + 1)[None]
    available = (j <= i) & ~first_order[:, None]
    h = jnp.where(first_order, 1.0, jnp.diff(z))  # a grid padded with zeros has none of its own
    r = (z[jnp.maximum(i - j, 0)] - z[:-1, None]) / h[:, None]
    power = jnp.where(available, r, 0.0)[:, None, :] ** j[:, :, None]  # (steps, k, j)
    # Nodes and moments that are not there yet get equations of their own: w_j = 0.
    active = available[:, :, None] & available[:, None, :]
    matrix = jnp.where(active, power, jnp.eye(count, dtype=z.dtype)[None])
    return jnp.linalg.solve(matrix, jnp.where(available, moments, 0.0)[..., None])[..., 0]

"""Multistep methods of every kind, as rows of numbers computed once from the sigmas.

A method of order p interpolates what it remembers, f_0 (now), f_1, ... (before), by a polynomial of
degree p - 1 in some variable z of the grid and integrates it over the step. With the moments

    m_k = int g(u) u^k du / int g(u) du,  u = 0 .. 1 along the step in z,  k = 1 .. p - 1,

of the integral's own weight g and the nodes r_j = (z_j - z_0) / (z_next - z_0), it is

    f = f_0 + sum_j w_j (f_j - f_0),   sum_j w_j r_j^k = m_k.

What f and z are, and the moments, is all that tells one family from another (Hochbruck &
Ostermann, Acta Numerica 2010, for the exponential ones). The first p - 1 steps have less to
interpolate and are of lower order; where sigma is far above the data's scale that costs nothing,
for there the denoiser hardly changes.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, Int

from steindiff_jax import _checks
from steindiff_jax._numerics import at_least_float32
from steindiff_jax._pytree import pytree, static
from steindiff_jax.grids import decreases
from steindiff_jax.protocols import (
    Batch,
    Denoiser,
    Key,
    Scalar,
    Sigmas,
    Solver,
    State,
    Step,
    evaluate,
)
from steindiff_jax.solvers.interpolants import INTERPOLANTS

Weights = Float[Array, "steps past"]
Counts = Int[Array, " steps"]


class Memory(NamedTuple):
    """past: (past, batch, *event), latest first; weights: (steps, past); step: ()."""

    past: Array
    weights: Weights
    step: Int[Array, ""]


@pytree
class Multistep(Solver):
    """Base of the multistep solvers; a subclass gives its weights.

    Attributes:
      prediction: what is interpolated, "x0", "epsilon" (the noise) or "flow" (the velocity).
      lower_order_final: the last step is first order, the one before at most second, and so on, as
        in diffusers' schedulers below 15 steps. A step to sigma = 0 is first order in any case.
    """

    prediction: str = static(default="x0", choices=("x0", "epsilon"), kw_only=True)
    lower_order_final: bool = static(default=False, kw_only=True)

    __post_init__ = _checks.fields

    def weights(self, sigmas: Sigmas) -> Weights:
        """Row i weighs f_1 - f_0, f_2 - f_0, ... in step i; 0 for what is not there yet."""
        raise NotImplementedError

    def past_used(self, sigmas: Sigmas, order: int, *, denoise_last: bool = True) -> Counts:
        """How many earlier values each step interpolates; none in a step to 0, unless told so."""
        index = jnp.arange(sigmas.size - 1)
        count = jnp.minimum(index, order - 1)
        made = decreases(sigmas)
        if self.lower_order_final:
            count = jnp.minimum(count, made.sum() - 1 - index)
        return jnp.where(made & ((sigmas[1:] if denoise_last else sigmas[:-1]) > 0), count, 0)

    def init(self, x: Batch, sigmas: Sigmas) -> Memory:
        weights = self.weights(at_least_float32(sigmas)).astype(x.dtype)
        # Zeros made from x are sharded as x is.
        past = jnp.broadcast_to(jnp.zeros_like(x)[None], (weights.shape[1], *x.shape))
        return Memory(past, weights, jnp.zeros((), jnp.int32))

    def step(
        self,
        key: Key,
        denoiser: Denoiser,
        state: State,
        sigma: Scalar,
        sigma_next: Scalar,
        *,
        x0: Batch | None = None,
    ) -> tuple[Step, Memory]:
        del key, sigma_next
        past, weights, step = state.memory
        interpolant = INTERPOLANTS[self.prediction]
        x0, nfe = evaluate(denoiser, state.x, sigma, x0)
        now = interpolant.quantity(state.x, x0, sigma)
        change = jnp.tensordot(weights[step], past - now[None], axes=1)
        past = jnp.concatenate([now[None], past])[: weights.shape[1]]
        memory = Memory(past, weights, step + 1)
        return Step(x0, interpolant.to_x0(change, sigma), nfe), memory


def interpolation_weights(
    z: Float[Array, " nodes"],
    moments: Float[Array, "steps past"],
    count: Counts,
    back: Sequence[int] | None = None,
) -> Weights:
    """Solve sum_j w_j r_j^k = m_k, k = 1 .. count, in every step; the other weights are 0.

    w_j is the mean of Lagrange's polynomial l_j(u) = u / r_j prod_i (u - r_i) / (r_j - r_i).

    z: the interpolation variable at the grid's nodes; moments: m_1, m_2, ... of each step; count:
    number of nodes that a step uses, where 0 the rest need only be finite; back: how many steps
    ago each node was, by default 1, 2, ...
    """
    steps, size = moments.shape
    index, order = jnp.arange(steps)[:, None], jnp.arange(1, size + 1)
    nodes = index - (order if back is None else jnp.asarray(back, order.dtype))[None]
    used = order[None] <= count[:, None]
    h = jnp.where(count > 0, jnp.diff(z), 1.0)  # padding has none of its own
    r = jnp.where(used, (z[jnp.maximum(nodes, 0)] - z[:-1, None]) / h[:, None], 1.0)
    # Coefficients of u, u^2, ..., each of all l_j; nodes that are not used divide by 1.
    lagrange = [1 / r] + [jnp.zeros_like(r)] * (size - 1)
    for i in range(size):
        node, other = r[:, i : i + 1], used & used[:, i : i + 1] & (order != i + 1)[None]
        gap = jnp.where(other, r - node, 1.0)
        lagrange = [
            jnp.where(other, (lower - node * same) / gap, same)
            for same, lower in zip(lagrange, [jnp.zeros_like(r), *lagrange[:-1]], strict=True)
        ]
    weights = sum(moments[:, k : k + 1] * power for k, power in enumerate(lagrange))
    return jnp.where(used, weights, 0.0)

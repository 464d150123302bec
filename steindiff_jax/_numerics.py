"""Reductions, safe division and integrals that keep their digits at both ends of a grid."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jaxtyping import Float

from steindiff_jax.protocols import Batch, Numeric, Rows

# Gauss-Legendre on [0, 1]: the integrand u^k exp(h u) is entire and positive, so 32 nodes
# reach rounding for |h| <= 40 without the cancellation of the phi functions' recurrences.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)
_NODES = (_NODES + 1) / 2


def at_least_float32(x: Array) -> Array:
    """The array in float32 or wider: the dtype of states and statistics."""
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    return x if x.dtype == dtype and not getattr(x, "weak_type", False) else x.astype(dtype)


def inner(a: Batch, b: Batch) -> Rows:
    """Inner product of each sample of a with the same sample of b; (batch,)."""
    return jnp.sum(at_least_float32(a) * at_least_float32(b), axis=range(1, a.ndim))


def expand(scalar: Array, x: Batch) -> Array:
    """A () or (batch,) coefficient, shaped to multiply x."""
    return scalar.reshape(scalar.shape + (1,) * (x.ndim - scalar.ndim)) if scalar.ndim else scalar


def divide(a: Numeric, b: Numeric, otherwise: Numeric) -> Array:
    """Quotient a / b where b > 0, else `otherwise`; its gradient is finite in both cases."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), otherwise)


def batch_mean(moments: Any, axis_name: str | None = None) -> Any:
    """Means over the finite rows of a pytree of (rows, bands) arrays, over all devices; (bands,).

    One sum of one array, so that the whole step costs at most one all-reduce. A row that is not
    finite in any moment is left out of all, since one NaN would spoil every mean.
    """
    leaves, structure = jax.tree.flatten(moments)
    if not leaves:
        return moments
    rows = jnp.concatenate([at_least_float32(leaf) for leaf in leaves], axis=1)
    finite = jnp.isfinite(rows).all(axis=1, keepdims=True)
    kept = jnp.concatenate([jnp.where(finite, rows, 0), finite.astype(rows.dtype)], axis=1)
    total = kept.sum(axis=0)
    if axis_name is not None:
        total = lax.psum(total, axis_name)
    mean = total[:-1] / jnp.maximum(total[-1], 1)
    ends = np.cumsum([leaf.shape[1] for leaf in leaves])[:-1]
    return jax.tree.unflatten(structure, jnp.split(mean, ends))


def exponential_moments(h: Float[Array, " n"], order: int) -> Float[Array, " n {order}-1"]:
    """m_k = int_0^1 u^k exp(h u) du / int_0^1 exp(h u) du for k = 1 .. order - 1.

    In terms of the phi functions of exponential integrators, m_k = k! phi_{k+1}(h) / phi_1(h)
    up to the direction of time (Hochbruck & Ostermann, Acta Numerica 2010).
    """
    nodes, weights = jnp.asarray(_NODES, h.dtype), jnp.asarray(_WEIGHTS, h.dtype)
    # Relative to the larger end of the step, so that nothing overflows.
    exponent = jnp.outer(h, nodes) - jnp.maximum(h, 0)[:, None]
    density = weights[None] * jnp.exp(exponent)
    powers = nodes[:, None] ** jnp.arange(1, order, dtype=h.dtype)[None]
    return density @ powers / density.sum(axis=1, keepdims=True)

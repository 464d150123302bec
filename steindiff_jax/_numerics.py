"""Reductions, safe division and integrals that keep their digits at both ends of a grid."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Float

from steindiff_jax._typing import Batch, Key, Numeric, Rows

# Gauss-Legendre on [0, 1]: the integrand u^k exp(h u) is entire and positive, so 32 nodes
# reach rounding for |h| <= 40 without the cancellation of the phi functions' recurrences.
_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(32)
_NODES = (_NODES + 1) / 2


def accurate(x: Array) -> Array:
    """The array in float32 or wider: the dtype of states and statistics."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def check_batch(name: str, x: ArrayLike, *, empty: bool = False) -> Array:
    """Samples in `accurate`, or a ValueError for anything but numbers (batch, *event)."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if x.ndim < 1 or not (x.size or empty):
        raise ValueError(f"{name} must have shape (batch, *event), got {x.shape}")
    return accurate(x)


def inner(a: Batch, b: Batch) -> Rows:
    """Inner product of each sample of a with the same sample of b; (batch,)."""
    return jnp.sum(accurate(a) * accurate(b), axis=range(1, a.ndim))


def expand(scalar: Array, x: Batch) -> Array:
    """A () or (batch,) coefficient, shaped to multiply x."""
    return scalar.reshape(scalar.shape + (1,) * (x.ndim - scalar.ndim)) if scalar.ndim else scalar


def divide(a: Numeric, b: Numeric, otherwise: Numeric) -> Array:
    """Quotient a / b where b > 0, else `otherwise`; its gradient is finite in both cases."""
    return jnp.where(b > 0, a / jnp.where(b > 0, b, 1.0), otherwise)


def one_each(key: Key) -> bool:
    """Whether these are keys (batch,), one for each sample, rather than one key for all."""
    typed = jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    return key.ndim > (0 if typed else 1)  # an old-style key is itself an array of two words


def split(key: Key) -> tuple[Key, Key]:
    """As `jax.random.split`; keys that are one for each sample are split one by one."""
    each = jax.vmap(jax.random.split, out_axes=1) if one_each(key) else jax.random.split
    first, second = each(key)
    return first, second


def fold_in(key: Key, data: ArrayLike) -> Key:
    """As `jax.random.fold_in`; into each key where they are one for each sample."""
    each = jax.vmap(jax.random.fold_in, (0, None)) if one_each(key) else jax.random.fold_in
    return each(key, data)


def sample_keys(key: Key, batch: int, axis_name: str | None = None) -> Key:
    """One key a sample, by its index in the whole batch, however that is spread; (batch,)."""
    if one_each(key):
        if key.shape[0] != batch:
            raise ValueError(
                f"key must be one key, or one for each of the {batch} samples, got {key.shape[0]}"
            )
        return key
    index = jnp.arange(batch)
    if axis_name is not None:
        index = index + batch * lax.axis_index(axis_name)
    return jax.vmap(jax.random.fold_in, (None, 0))(key, index)


def standard_normal(key: Key, x: Batch) -> Batch:
    """Noise for every sample of x, each from a key of its own; shape and dtype of x."""
    keys = sample_keys(key, x.shape[0])
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def batch_mean(
    rows: Float[Array, "batch k"], axis_name: str | None = None, group: int = 1
) -> Float[Array, " k"]:
    """Mean over the finite rows of (batch, k), over all devices on `axis_name` if given; (k,).

    One sum of one array, so that the whole step costs at most one all-reduce. A sample that
    is not finite is left out, or it would spoil every other one, and with it those `group` rows of
    which one was probed for all: without the others, or on their own, they would be biased.
    """
    finite = jnp.isfinite(rows).all(axis=1, keepdims=True)
    if group > 1:
        cut = finite.shape[0] // group * group  # the rest is in no group
        whole = finite[:cut].reshape(cut // group, group, 1).all(axis=1, keepdims=True)
        whole = jnp.broadcast_to(whole, (cut // group, group, 1)).reshape(cut, 1)
        finite = jnp.concatenate([whole, finite[cut:]])
    kept = jnp.concatenate([jnp.where(finite, rows, 0), finite.astype(rows.dtype)], axis=1)
    total = kept.sum(axis=0)
    if axis_name is not None:
        total = lax.psum(total, axis_name)
    return total[:-1] / jnp.maximum(total[-1], 1)


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

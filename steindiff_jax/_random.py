"""Keys and noise: one key for all, or one for each sample, whose draws are then its own."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from steindiff_jax.protocols import Batch, Key


def is_key(key: Any) -> bool:
    """Whether this is a key, or several."""
    return isinstance(key, Array) and (is_typed(key) or (key.ndim > 0 and key.dtype == jnp.uint32))


def one_each(key: Key) -> bool:
    """Whether these are keys (batch,), one for each sample, rather than one key for all."""
    return key.ndim > (0 if is_typed(key) else 1)


def is_typed(key: Key) -> bool:
    """Whether this is a new-style key; an old-style one is an array of two words."""
    return jnp.issubdtype(key.dtype, jax.dtypes.prng_key)


def split(key: Key) -> tuple[Key, Key]:
    """As `jax.random.split`; keys that are one for each sample are split one by one."""
    each = jax.vmap(jax.random.split, out_axes=1) if one_each(key) else jax.random.split
    first, second = each(key)
    return first, second


def fold_in(key: Key, data: ArrayLike) -> Key:
    """As `jax.random.fold_in`; into each key where they are one for each sample."""
    each = jax.vmap(jax.random.fold_in, (0, None)) if one_each(key) else jax.random.fold_in
    return each(key, data)


def sample_keys(key: Key, batch: Any, axis_name: str | None = None) -> Key:
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


def normal(key: Key, x: Batch) -> Batch:
    """Standard normal noise for every sample of x, each from a key of its own; shape of x."""
    keys = sample_keys(key, x.shape[0])
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def rademacher(key: Key, shape: tuple[int, ...], dtype: Any) -> Array:
    """Signs from random bits; `jax.random.rademacher` draws float64 numbers where x64 is on."""
    return 1 - 2 * (jax.random.bits(key, shape, jnp.uint8) & 1).astype(dtype)

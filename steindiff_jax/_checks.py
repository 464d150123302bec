"""Checks of arguments: a ValueError that names the argument, its value and what was expected."""

import dataclasses
import operator
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from steindiff_jax._numerics import at_least_float32


def fields(self: Any) -> None:
    """ValueError unless every field is one of its `choices`, or `within` its interval.

    Numbers become Python floats, so that all kinds of them share one program.
    """
    for field in dataclasses.fields(self):
        value, choices = getattr(self, field.name), field.metadata.get("choices")
        # 2.0 equals 2, but does not count.
        if choices and not (isinstance(value, type(choices[0]) | np.integer) and value in choices):
            raise ValueError(f"{field.name} must be one of {choices}, got {value!r}")
        if within := field.metadata.get("within"):
            number(field.name, value, within)
            object.__setattr__(self, field.name, as_float(value))


def as_float(value: Any) -> Any:
    """A number as Python's float, whoever made it; what is traced or has axes as it is."""
    known = isinstance(value, ArrayLike) and not isinstance(value, Tracer)
    return float(value) if known and jnp.ndim(value) == 0 else value  # pyright: ignore[reportArgumentType]


def number(name: str, value: Any, within: str) -> None:
    """ValueError unless a number, or all of an array, lies in an interval such as "(0, 1]".

    Traced values and JAX's placeholders pass unchecked.
    """
    if isinstance(value, Tracer) or not isinstance(value, ArrayLike):
        return
    known, (low, high) = np.asarray(value), map(float, within[1:-1].split(","))
    if known.dtype.kind not in "biufV":  # V: bfloat16
        raise ValueError(f"{name} must be a real number, got {value!r}")
    inside = (known >= low) if within[0] == "[" else (known > low)
    inside &= (known <= high) if within[-1] == "]" else (known < high)
    if not inside.all():
        raise ValueError(f"{name} must be in {within}, got {known[~inside][0]}")


def count(name: str, value: Any) -> int:
    """The number as an int, or a ValueError unless it is an integer of at least 1."""
    if not isinstance(value, int | np.integer):
        raise ValueError(f"{name} must be an integer, got {value!r}")
    if value < 1:
        raise ValueError(f"{name} must be at least 1, got {value}")
    return int(value)


def shape(name: str, value: Any) -> tuple:
    """The shape as a tuple of sizes, or a ValueError; symbolic sizes (jax.export) pass."""
    try:
        sizes = tuple(value)
        known = [operator.index(size) for size in sizes if not hasattr(size, "_to_single_term")]
    except TypeError:
        sizes, known = (), [-1]
    if min(known, default=0) < 0:
        raise ValueError(f"{name} must be a tuple of integers, none negative, got {value!r}")
    return sizes


def array(value: ArrayLike) -> Array:
    """As `jnp.asarray`, which costs much also where the value is an array already."""
    return value if isinstance(value, Array) else jnp.asarray(value)


def batch(name: str, x: ArrayLike, *, allow_empty: bool = False) -> Array:
    """Samples in float32 or wider, or a ValueError for anything but numbers (batch, *event)."""
    x = array(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"{name} must be floating point, got {x.dtype}")
    if x.ndim < 1 or not (x.size or allow_empty):
        raise ValueError(f"{name} must have shape (batch, *event), got {x.shape}")
    return at_least_float32(x)


def clip(gamma_min: Any, gamma_max: Any) -> None:
    """ValueError if they are no numbers or, both known, the wrong way round."""
    number("gamma_min", gamma_min, "[-inf, inf)")
    number("gamma_max", gamma_max, "(-inf, inf]")
    known = isinstance(gamma_min, int | float) and isinstance(gamma_max, int | float)
    if known and not gamma_min <= gamma_max:
        raise ValueError(f"gamma_min must not exceed gamma_max, got {gamma_min} > {gamma_max}")


def instance(name: str, value: Any, kind: type | tuple[type, ...], example: str) -> None:
    """ValueError unless the value is an instance of the kind, and not its class."""
    if isinstance(value, type) or not isinstance(value, kind):  # a class has its methods too
        got = f"the class {value.__name__}: call it" if isinstance(value, type) else repr(value)
        raise ValueError(f"{name} must be {example}, got {got}")

"""Arrays of torch's files as the parameters of a Flax module."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax.errors import FlaxError
from jax import Array


def expected(module: Any, config: Path) -> dict[str, tuple[tuple, tuple]]:
    """Name in the file -> path and shape in the variables; nothing is allocated."""
    try:
        init = lambda: module.init(jax.random.key(0), *module.example())["params"]  # noqa: E731
        shapes = jax.eval_shape(init)
    except (ValueError, TypeError, OverflowError, ZeroDivisionError, FlaxError) as error:
        raise ValueError(f"{config}: no network can be built from it: {error}") from error

    def name(path: tuple[str, ...]) -> str:
        leaf = {"kernel": "weight", "scale": "weight", "embedding": "weight"}
        return ".".join((*path[:-1], leaf.get(path[-1], path[-1])))

    paths = {tuple(k.key for k in path): leaf for path, leaf in jax.tree.leaves_with_path(shapes)}
    return {name(path): (path, leaf.shape) for path, leaf in paths.items()}


def check_names(expected: Mapping[str, Any], found: Mapping[str, Any], place: Path) -> None:
    """That a place has the arrays that a network needs, and no others."""
    for what, keys in {
        "missing": expected.keys() - found.keys(),
        "not in the network of its configuration": found.keys() - expected.keys(),
    }.items():
        if keys:
            some = sorted(key[:80] for key in keys)[:4]
            raise ValueError(f"{place}: {len(keys)} arrays {what}, such as {some}")


def stored_shape(path: tuple[str, ...], shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape in torch's files, (out, in, ...), of what is (..., in, out) in Flax."""
    return (*shape[:-3:-1], *shape[:-2]) if path[-1] == "kernel" else shape


def parameter(array: np.ndarray, key: str, path: tuple[str, ...]) -> Array:
    """An array of torch's files as Flax has it."""
    if not np.isfinite(array).all():
        raise ValueError(f"{key} has values that are not finite")
    is_kernel = path[-1] == "kernel"
    return jnp.asarray(np.moveaxis(array, (0, 1), (-1, -2)) if is_kernel else array)

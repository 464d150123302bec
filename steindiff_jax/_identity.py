"""What a solver and a denoiser are, in words and in a hash: to refuse files of another run."""

import hashlib
from typing import Any

import jax
import numpy as np

from steindiff_jax.denoisers import rows
from steindiff_jax.protocols import Denoiser


def describe(solver: Any) -> str:
    """A solver in words: its classes, choices and numbers, equal for equal solvers."""
    return repr(jax.tree.map(lambda leaf: np.asarray(leaf).tolist(), solver))


def fingerprint(denoiser: Denoiser) -> str:
    """SHA-256 of a denoiser's arrays and numbers (weights, guidance scale), without conditioning.

    Of what a plain function closes over nothing is known, only its name.
    """
    digest = hashlib.sha256()
    unconditioned = rows(denoiser, lambda row: row[:0])
    for path, leaf in jax.tree_util.tree_leaves_with_path(unconditioned):
        digest.update(jax.tree_util.keystr(path).encode())
        if isinstance(leaf, jax.typing.ArrayLike):
            value = np.asarray(leaf)
            digest.update(f"{value.dtype}{value.shape}".encode() + value.tobytes())
        else:
            digest.update(getattr(leaf, "__qualname__", type(leaf).__qualname__).encode())
    return digest.hexdigest()

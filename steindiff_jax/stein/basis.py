"""Bases: which coefficients of a sample share one coefficient of the correction.

Images have spectra that fall by orders of magnitude, so that at any noise level some frequencies
are decided and others are noise still; Stein's identity holds within each band by itself.
"""

from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from steindiff_jax import _checks
from steindiff_jax._pytree import pytree, static
from steindiff_jax.protocols import Basis, Batch

# Up to this size the last axis and the channels are transformed by one matrix: two small products,
# and the moves of axes between them, cost more.
MERGED = 512
# A band's statistics have a relative error of sqrt(2 / numbers), 10% here.
ENOUGH = 200


@pytree
class Whole(Basis):
    """One band of all entries: for vectors, and for the paper's rule."""

    def labels(self, event: tuple[int, ...]) -> np.ndarray:
        return np.zeros(event, int)


@pytree
class Cosine(Basis):
    """Radial bands of the cosine transform (DCT-II), one octave each, for (*space, channels).

    Events are (height, width, channels), (frames, height, width, channels), (length, channels).
    The channels are transformed too: of three, the first coefficient is the brightness and the
    others are differences of colours, with bands of their own.

    Attributes:
      bands: number of octaves; from the highest frequency down, the lowest one takes all the rest.
      colour: whether differences of channels have bands of their own.
    """

    bands: int = static(default=5)
    colour: bool = static(default=True)

    def __post_init__(self) -> None:
        _checks.count("bands", self.bands)

    def labels(self, event: tuple[int, ...]) -> np.ndarray:
        return _labels(event, self.bands, self.colour)

    def transform(self, x: Batch) -> Batch:
        return _along_axes(x, inverse=False)

    def inverse(self, coefficients: Batch) -> Batch:
        return _along_axes(coefficients, inverse=True)


def default_basis(shape: tuple) -> Basis:
    """The finest `Cosine` whose bands have numbers enough in a batch (batch, *event), or `Whole`.

    Events of one axis have no frequencies: `Whole`. A symbolic batch counts as one sample.
    """
    return _default(*(size if isinstance(size, int) else 1 for size in shape))


@lru_cache
def _default(batch: int, *event: int) -> Basis:
    if len(event) > 1 and min(event) > 0:
        for bands, colour in [*((n, True) for n in range(8, 0, -1)), (2, False)]:
            basis = Cosine(bands, colour)
            sizes = basis.partition(event).sizes
            if len(sizes) > 1 and batch * sizes.min() >= ENOUGH:
                return basis
    return Whole()


@lru_cache
def _labels(event: tuple[int, ...], bands: int, colour: bool) -> np.ndarray:
    *space, channels = event
    longest = max(space, default=1)
    axes = [np.arange(size) * longest / size for size in space]
    radius = np.sqrt(sum(axis**2 for axis in np.meshgrid(*axes, indexing="ij", sparse=True)))
    top = max(longest - 1, 1).bit_length()
    octave = np.floor(np.log2(np.maximum(radius, 0.5))).astype(int) + 1
    octave = np.clip(octave, max(top - bands + 1, 0), top)
    labels = np.broadcast_to(np.reshape(octave, (*space, 1)), event)
    if colour:
        labels = labels + (top + 1) * (np.arange(channels) > 0)
    _, labels = np.unique(labels, return_inverse=True)
    return labels.reshape(event)


@lru_cache
def _dct(size: int) -> np.ndarray:
    """The orthonormal DCT-II as a matrix (frequency, place)."""
    place, frequency = np.arange(size) + 0.5, np.arange(size)[:, None]
    matrix = np.cos(np.pi * frequency * place / size) * np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    return matrix


def _along_axes(x: Batch, *, inverse: bool) -> Array:
    # Matrix products: TPUs have no fast cosine transform, and lower precision would show.
    shape, (*space, channels) = x.shape, x.shape[1:]
    matrices = [_dct(n) for n in space] + [_dct(channels)]
    if len(space) > 1 and space[-1] * channels <= MERGED:
        matrices[-2:] = [np.kron(*matrices[-2:])]
        x = x.reshape(*shape[:-2], -1)
    for axis, matrix in enumerate(matrices, 1):
        matrix = jnp.asarray(matrix.T if inverse else matrix, x.dtype)
        turned = [x.ndim if a == axis else a for a in range(x.ndim)]
        sides = matrix, [x.ndim, axis], x, [*range(x.ndim)]
        x = jnp.einsum(*sides, turned, precision=jax.lax.Precision.HIGHEST)
    return x.reshape(shape)

"""Distances between samples and the law they should follow."""

import contextlib
import io

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from prdc import compute_prdc


class SlicedWasserstein:
    """Sliced 2-Wasserstein distance to a law given by many draws, relative to its projected std.

    Along each of `projections` random directions the sorted samples are compared with the law's
    quantiles, W2^2 = mean_i (x_(i) - Q((i + 1/2) / n))^2, over the variance there; the root of the
    mean over directions. 0 is perfect; 1 is as far as a point mass at the mean.
    """

    def __init__(self, law: np.ndarray, n: int, projections: int = 128, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        flat = np.asarray(law).reshape(len(law), -1)
        directions = rng.standard_normal((flat.shape[1], projections))
        directions /= np.linalg.norm(directions, axis=0)
        projected = flat @ directions
        self.directions = jnp.asarray(directions)
        self.quantiles = jnp.asarray(np.quantile(projected, (np.arange(n) + 0.5) / n, axis=0))
        self.variance = jnp.asarray(projected.var(axis=0))

    def __call__(self, samples: Array) -> float:
        """samples: (n, *event), n as given at the start."""
        flat = jnp.asarray(samples).reshape(len(samples), -1)
        return float(_sliced(flat, self.directions, self.quantiles, self.variance))


@jax.jit
def _sliced(x: Array, directions: Array, quantiles: Array, variance: Array) -> Array:
    gap = jnp.sort(x @ directions, axis=0) - quantiles
    return jnp.sqrt(jnp.mean(gap**2 / variance[None]))


def precision_recall(law: np.ndarray, samples: np.ndarray, neighbours: int) -> tuple[float, float]:
    """Share of samples within the nearest-neighbour balls of draws of the law, and the reverse.

    Kynkaanniemi et al. 2019, arXiv:1904.06991, by `prdc`; both (n, features).
    """
    with contextlib.redirect_stdout(io.StringIO()):  # it prints its sizes
        found = compute_prdc(law, samples, neighbours)
    return float(found["precision"]), float(found["recall"])


def geometric_mean(values) -> float:
    return float(np.exp(np.mean(np.log(values))))


def table(header: list[str], rows: list[list[str]]) -> str:
    """In markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)

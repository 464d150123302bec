"""Distances between samples and the law they should follow."""

import contextlib
import io
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from prdc import compute_prdc

import problems
import steindiff_jax as sd


class SlicedWasserstein:
    """Sliced 2-Wasserstein distance to a law given by many draws, relative to its projected std.

    Along each of `projections` random directions the sorted samples are compared with the law's
    quantiles, W2^2 = mean_i (x_(i) - Q((i + 1/2) / n))^2, over the variance there; the root of the
    mean over directions. 0 is perfect; 1 is as far as a point mass at the mean.
    """

    def __init__(self, law: np.ndarray, n: int, projections: int = 128, seed: int = 0) -> None:
        rng = np.random.default_rng(seed)
        flat = np.asarray(law).reshape(len(law), -1)
        directions = rng.standard_normal((flat.shape[1], projections)).astype(flat.dtype)
        directions /= np.linalg.norm(directions, axis=0)
        projected = flat @ directions
        self.directions = directions
        self.quantiles = np.quantile(projected, (np.arange(n) + 0.5) / n, axis=0)
        self.variance = projected.var(axis=0)

    def __call__(self, samples: Array) -> float:
        """samples: (n, *event), n as given at the start."""
        flat = jnp.asarray(samples).reshape(len(samples), -1)
        return float(_sliced(flat, self.directions, self.quantiles, self.variance))


@jax.jit
def _sliced(x: Array, directions: Array, quantiles: Array, variance: Array) -> Array:
    gap = jnp.sort(x @ directions, axis=0) - quantiles
    return jnp.sqrt(jnp.mean(gap**2 / variance[None]))


class Distance(NamedTuple):
    """How far samples are from a law.

    pixels: `SlicedWasserstein`, which the directions of largest variance decide; bands: the same
    with each band of the law scaled to unit variance, so that every scale counts; rmse: to the fine
    solve from the same noise, over the law's std; energy: the largest ratio of a band's energy to
    the law's, r or 1 / r.
    """

    pixels: float
    bands: float
    rmse: float
    energy: float


class Distances:
    """All distances of n samples from a problem's law.

    The bands of images are those of `sd.Cosine`, all octaves, brightness and colours; vectors are
    whitened by the law's covariance, and their bands are fifths of its principal axes.
    """

    def __init__(self, problem: problems.Problem, n: int) -> None:
        self.problem, self.n, self.event = problem, n, problem.event
        law = problem.law
        self.mean, self.std = law.mean(axis=0), float(np.sqrt(law.var(axis=0).mean()))
        if len(self.event) > 1:
            basis = sd.Cosine(bands=8)
            self.labels = basis.labels(self.event).reshape(-1)
            self.turn = jax.jit(lambda x: basis.transform(x).reshape(len(x), -1))
        else:
            axes = np.linalg.eigh(problem.mixture.covariance())[1]
            d = len(axes)
            self.labels = np.arange(d) * min(d, 5) // d
            self.turn = lambda x: x @ axes
        coefficients = np.concatenate([self.turn(part) for part in np.array_split(law, 20)])
        variances = coefficients.var(axis=0)
        self.energies = self._by_band(variances)
        each = variances if len(self.event) == 1 else self.energies[self.labels]
        self.scale = 1 / np.sqrt(each)
        self.pixels = SlicedWasserstein(law, n)
        self.bands = SlicedWasserstein(coefficients * self.scale, n)
        self.fine = {}

    def noise(self, seed: int) -> np.ndarray:
        """(n, *event) of unit level, what the samples start from."""
        rng = np.random.default_rng(seed)
        return rng.standard_normal((self.n, *self.event)).astype(self.problem.law.dtype)

    def __call__(self, x: Array, seed: int) -> Distance:
        """x: (n, *event), from `noise(seed)`."""
        if seed not in self.fine:
            self.fine[seed] = problems.fine_solve(self.problem, self.noise(seed))
        x = np.asarray(x)
        c = np.asarray(self.turn(x))
        ratio = self._by_band(((c - self.turn(self.mean[None])) ** 2).mean(axis=0)) / self.energies
        return Distance(
            pixels=self.pixels(x),
            bands=self.bands(c * self.scale),
            rmse=float(np.sqrt(np.mean((x - self.fine[seed]) ** 2))) / self.std,
            energy=float(np.maximum(ratio, 1 / ratio).max()),
        )

    def _by_band(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.labels, np.asarray(values)) / np.bincount(self.labels)


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

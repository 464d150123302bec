"""Problems with an exact denoiser: Gaussian mixtures, synthetic and fitted to real data.

Component k is N(mu_k, floor I + U_k diag(spread_k) U_k^T), so that the posterior of x0 given
x = x0 + sigma * noise is a mixture in closed form, and with it the denoiser and the trace of
its Jacobian. Data are scaled to standard deviation 0.5, as EDM does, where they are real.
"""

import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import steindiff_jax as sd

sys.path.append(str(Path(__file__).parents[1] / "examples"))  # the digits network


@sd.pytree
class Mixture:
    """A Gaussian mixture and its exact denoiser.

    means: (components, d); axes: (components, d, rank) orthonormal columns; spread: (components,
    rank) variance along them, on top of floor, the variance () in every direction; log_weights:
    (components,).
    """

    means: Array
    axes: Array
    spread: Array
    floor: Array
    log_weights: Array

    def posterior(self, x: Array, sigma: Array) -> tuple[Array, Array]:
        """E[x0 | x] (batch, d) and tr Cov[x0 | x] (batch,)."""
        d, rank = self.means.shape[1], self.spread.shape[1]
        floor = self.floor + sigma**2
        total = floor + self.spread
        # Inner products rather than differences: nothing of size (batch, components, d) is made.
        along = jnp.einsum("bd,kdr->bkr", x, self.axes)
        along = along - jnp.einsum("kd,kdr->kr", self.means, self.axes)[None]
        square = (x**2).sum(1)[:, None] + (self.means**2).sum(1)[None] - 2 * x @ self.means.T
        across = jnp.maximum(square - (along**2).sum(2), 0)
        log_density = (across / floor + (along**2 / total[None]).sum(2)) / -2
        log_det = (d - rank) * jnp.log(floor) + jnp.log(total).sum(1)
        weights = jax.nn.softmax(log_density + (self.log_weights - log_det / 2)[None], axis=1)
        # The posterior mean of component k is x - sigma^2 (Cov_k + sigma^2)^-1 (x - mu_k).
        pull = (1 / floor - 1 / total)[None] * along
        residual = (x - weights @ self.means) / floor
        residual = residual - jnp.einsum("bk,bkr,kdr->bd", weights, pull, self.axes)
        within = (d - rank) * self.floor / floor + ((self.floor + self.spread) / total).sum(1)
        squares = across / floor**2 + (along**2 / total[None] ** 2).sum(2)
        between = (weights * squares).sum(1) - (residual**2).sum(1)
        variance = sigma**2 * weights @ within + sigma**4 * between
        return x - sigma**2 * residual, variance

    def __call__(self, x: Array, sigma: Array) -> Array:
        return self.posterior(x, sigma)[0]

    def draw(self, seed: int, n: int) -> np.ndarray:
        """(n, d) samples of the data."""
        rng = np.random.default_rng(seed)
        k = rng.choice(len(self.means), n, p=np.exp(self.log_weights))
        x = np.asarray(self.means)[k] + np.sqrt(self.floor) * rng.standard_normal(
            (n, self.means.shape[1])
        )
        for c in np.unique(k):
            here = k == c
            along = np.sqrt(self.spread[c]) * rng.standard_normal((here.sum(), len(self.spread[c])))
            x[here] += along @ np.asarray(self.axes[c]).T
        return x


@sd.pytree
class Analytic:
    """Divergence estimator for a `Mixture`: tr J = tr Cov[x0 | x] / sigma^2 in closed form."""

    def __call__(self, keys, denoiser, x, sigma):
        del keys
        x0, variance = denoiser.posterior(x, sigma)
        d = x.shape[1]
        trace = variance / sigma**2
        v = jnp.ones_like(x)
        jv = (trace / d)[:, None] * v
        norm = trace**2 / d
        return x0, sd.Jacobian(v[None], jv[None], trace, d - trace, norm, trace, norm, False)


def mixture(means, std, axes=None, spread=None, weights=None) -> Mixture:
    """Components with a common isotropic std, and a larger spread along `axes` if given."""
    means = jnp.asarray(means)
    k, d = means.shape
    return Mixture(
        means=means,
        axes=jnp.zeros((k, d, 0), means.dtype) if axes is None else jnp.asarray(axes),
        spread=jnp.zeros((k, 0), means.dtype) if spread is None else jnp.asarray(spread),
        floor=jnp.asarray(std**2, means.dtype),
        log_weights=jnp.log(jnp.full(k, 1 / k) if weights is None else jnp.asarray(weights)),
    )


def ring(modes: int = 8, radius: float = 0.7, std: float = 0.05) -> Mixture:
    """Clumps on a circle, d = 2."""
    angle = 2 * np.pi * np.arange(modes) / modes
    return mixture(radius * np.stack([np.cos(angle), np.sin(angle)], axis=1), std)


def clumps(modes: int = 20, d: int = 32, std: float = 0.1, seed: int = 3) -> Mixture:
    """Isotropic components at random."""
    return mixture(np.random.default_rng(seed).standard_normal((modes, d)) * 0.5, std)


def scaled(data: np.ndarray) -> np.ndarray:
    """Standard deviation 0.5 over all entries."""
    return 0.5 * data / data.std()


def digits(std: float = 0.03) -> Mixture:
    """The empirical denoiser of scikit-learn's handwritten digits, d = 64."""
    from sklearn.datasets import load_digits

    return mixture(scaled(load_digits().data / 8 - 1), std)


def patches(components: int = 12, size: int = 6) -> Mixture:
    """A full-covariance mixture fitted to grey patches of scikit-learn's photographs, d = 36."""
    from sklearn.datasets import load_sample_images
    from sklearn.feature_extraction.image import extract_patches_2d
    from sklearn.mixture import GaussianMixture

    grey = [image.mean(axis=2) for image in load_sample_images().images]
    data = np.concatenate(
        [extract_patches_2d(g, (size, size), max_patches=8000, random_state=0) for g in grey]
    ).reshape(-1, size * size)
    fit = GaussianMixture(components, random_state=0, reg_covar=1e-4, max_iter=50)
    fit.fit(scaled(data / 127.5 - 1))
    variances, axes = np.linalg.eigh(fit.covariances_)
    floor = variances.min()
    return mixture(fit.means_, np.sqrt(floor), axes, variances - floor, fit.weights_)


PROTOTYPE = {"ring": ring, "clumps": clumps, "digits": digits, "patches": patches}


def grid(side: int = 5, d: int = 2, spacing: float = 0.35, std: float = 0.03) -> Mixture:
    """Clumps on a square lattice in the first two of d dimensions."""
    ticks = spacing * (np.arange(side) - (side - 1) / 2)
    means = np.zeros((side**2, d))
    means[:, :2] = np.stack(np.meshgrid(ticks, ticks), axis=-1).reshape(-1, 2)
    return mixture(means, std)


def curve(
    d: int = 16, harmonics: int = 3, components: int = 60, std: float = 0.03, seed: int = 0
) -> Mixture:
    """A closed curve: components along a random trigonometric polynomial, stretched along it."""
    rng = np.random.default_rng(seed)
    phase = 2 * np.pi * np.arange(components) / components
    k = np.arange(1, harmonics + 1)
    basis = np.concatenate([np.cos(np.outer(phase, k)), np.sin(np.outer(phase, k))], axis=1)
    slope = np.concatenate(
        [-k * np.sin(np.outer(phase, k)), k * np.cos(np.outer(phase, k))], axis=1
    )
    coefficients = rng.standard_normal((2 * harmonics, d)) / np.tile(k, 2)[:, None]
    coefficients *= 0.5 * np.sqrt(d) / np.linalg.norm(basis @ coefficients, axis=1).mean()
    tangent = slope @ coefficients
    speed = np.linalg.norm(tangent, axis=1, keepdims=True)
    stretch = (speed * 2 * np.pi / components / 2) ** 2
    return mixture(basis @ coefficients, std, (tangent / speed)[:, :, None], stretch)


def low_rank(
    components: int = 24,
    d: int = 48,
    rank: int = 6,
    std: float = 0.02,
    width: float = 0.5,
    distance: float = 0.5,
    anisotropy: float = 1.0,
    offset: float = 0.0,
    seed: int = 0,
) -> Mixture:
    """Smooth components of the given rank in small isotropic noise.

    width: std along the axes, falling from the first to the last by the factor `anisotropy`;
    distance: std of the components' means; offset: of their common mean.
    """
    rng = np.random.default_rng(seed)
    axes = np.linalg.qr(rng.standard_normal((components, d, rank)))[0]
    widths = width * np.geomspace(1, 1 / anisotropy, rank)
    means = distance * rng.standard_normal((components, d)) + offset * rng.standard_normal(d)
    return mixture(means, std, axes, np.tile(widths**2, (components, 1)))


# Halves of each family, fixed before any rule was tuned: TUNE to develop on, REPORT to quote.
TUNE = {
    "ring": ring,
    "clumps": clumps,
    "grid": grid,
    "curve": curve,
    "smooth": low_rank,
    "gaussian": lambda: low_rank(1, d=100, rank=20, anisotropy=10.0),
    "anisotropic": lambda: low_rank(6, d=32, rank=16, anisotropy=30.0, distance=0.2, seed=1),
    "offset": lambda: low_rank(12, d=24, rank=3, width=0.2, offset=2.0, seed=2),
    "digits": digits,
}
REPORT = {
    "clumps": lambda: clumps(40, d=100, std=0.05, seed=11),
    "few clumps": lambda: clumps(3, d=8, std=0.15, seed=12),
    "grid": lambda: grid(7, d=6, spacing=0.3, std=0.02),
    "curve": lambda: curve(d=40, harmonics=5, components=100, seed=13),
    "smooth": lambda: low_rank(10, d=200, rank=12, width=0.4, distance=0.3, seed=14),
    "gaussian": lambda: low_rank(1, d=1000, rank=30, anisotropy=5.0, seed=15),
    "anisotropic": lambda: low_rank(4, d=64, rank=32, anisotropy=50.0, distance=0.1, seed=16),
    "offset": lambda: low_rank(20, d=30, rank=4, width=0.3, offset=1.5, seed=17),
    "patches": patches,
}


class Problem(NamedTuple):
    """A denoiser (batch, *event), and draws (n, *event) of the law that it should sample."""

    denoiser: sd.Denoiser
    event: tuple[int, ...]
    law: np.ndarray
    mixture: Mixture | None = None


def exact(problem: Mixture, draws: int = 200_000) -> Problem:
    """The mixture's own law is the one to sample."""
    return Problem(problem, problem.means.shape[1:], problem.draw(0, draws), problem)


def network(scale: float, batch: int, draws: int = 2000) -> Problem:
    """The digits network under guidance; its own fine solve is the law to sample."""
    import digits as trained

    labels = jnp.arange(batch) % 10
    free = trained.load(jnp.full(batch, trained.NULL))
    denoiser = sd.guided(trained.load(labels), free, scale) if scale else free
    fine = [
        sd.sample(
            jax.random.key(1000 + i),
            denoiser,
            (batch, 8, 8, 1),
            sigmas=sd.karras_sigmas(100),
            solver=sd.DPMpp2M(),
        ).x
        for i in range(-(-draws // batch))
    ]
    return Problem(denoiser, (8, 8, 1), np.concatenate(fine))


# Guidance scales of the digits network; 0 is unguided. Reported; rules saw 0 and 3.
GUIDED = {"digits network, guidance 1.5": 1.5, "digits network, guidance 6": 6.0}

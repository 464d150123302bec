"""Problems with an exact denoiser, synthetic and fitted to real data, and two trained networks.

Most are Gaussian mixtures: component k is N(mu_k, floor I + U_k diag(spread_k) U_k^T), so that the
posterior of x0 given x = x0 + sigma * noise is a mixture in closed form, and with it the denoiser.
Data are scaled to standard deviation 0.5, as EDM does, where they are real. Rules are developed on
`TUNE` and reported on `REPORT`.
"""

import dataclasses
import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import _path  # noqa: F401
import steindiff_jax as sd

HERE = Path(__file__).parent
DATA = HERE.parents[1] / "shared" / "data"


@sd.pytree
class Mixture:
    """A Gaussian mixture and its exact denoiser.

    means: (components, d); axes: (components, d, rank) orthonormal columns; spread: (components,
    rank) variance along them, on top of floor, the variance () in every direction; log_weights:
    (components,); event: shape of a sample, () for (d,).
    """

    means: Array
    axes: Array
    spread: Array
    floor: Array
    log_weights: Array
    event: tuple[int, ...] = sd.static(default=())

    def posterior(self, x: Array, sigma: Array) -> tuple[Array, Array]:
        """E[x0 | x], of the shape of x, and tr Cov[x0 | x] (batch,)."""
        shape, x = x.shape, x.reshape(len(x), -1)
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
        return (x - sigma**2 * residual).reshape(shape), variance

    def __call__(self, x: Array, sigma: Array) -> Array:
        return self.posterior(x, sigma)[0]

    def covariance(self) -> np.ndarray:
        """(d, d) of the data."""
        means, weights = np.asarray(self.means), np.exp(self.log_weights)
        centred = np.sqrt(weights)[:, None] * (means - weights @ means)
        axes = np.sqrt(weights[:, None] * self.spread)[:, None] * self.axes
        axes = np.concatenate(axes, axis=1)
        return self.floor * np.eye(len(axes)) + centred.T @ centred + axes @ axes.T

    def draw(self, seed: int, n: int) -> np.ndarray:
        """(n, *event) samples of the data."""
        rng = np.random.default_rng(seed)
        k = rng.choice(len(self.means), n, p=np.exp(self.log_weights))
        x = np.asarray(self.means)[k] + np.sqrt(self.floor) * rng.standard_normal(
            (n, self.means.shape[1])
        )
        for c in np.unique(k):
            here = k == c
            along = np.sqrt(self.spread[c]) * rng.standard_normal((here.sum(), len(self.spread[c])))
            x[here] += along @ np.asarray(self.axes[c]).T
        return x.reshape(n, *self.event) if self.event else x


@sd.pytree
class Waves:
    """A Gaussian law of periodic images, the same everywhere, and its exact denoiser.

    mean: () of all entries; variances: event, of the plane waves, in the order of the Fourier
    transform, times colours; colours: an orthonormal matrix (colour, channel). No basis of cosines
    makes it diagonal, and nothing of size (d, d) is made.
    """

    mean: Array
    variances: Array
    colours: Array

    @property
    def event(self) -> tuple[int, ...]:
        return self.variances.shape

    def __call__(self, x: Array, sigma: Array) -> Array:
        shrunk = self.variances / (self.variances + sigma**2)
        return self.mean + self._filtered(x - self.mean, shrunk, jnp)

    def draw(self, seed: int, n: int) -> np.ndarray:
        """(n, *event) samples of the data."""
        noise = np.random.default_rng(seed).standard_normal((n, *self.event))
        return self.mean + self._filtered(noise, np.sqrt(self.variances), np)

    def _filtered(self, x: Any, factors: Any, numpy: Any) -> Any:
        waves = numpy.fft.fft2(x @ self.colours.T, axes=(1, 2))
        return numpy.fft.ifft2(factors[None] * waves, axes=(1, 2)).real @ self.colours


def mixture(means, std, axes=None, spread=None, weights=None, event=()) -> Mixture:
    """Components with a common isotropic std, and a larger spread along `axes` if given."""
    means = np.asarray(means, np.float64)
    k, d = means.shape
    return Mixture(
        means=means,
        axes=np.zeros((k, d, 0)) if axes is None else np.asarray(axes),
        spread=np.zeros((k, 0)) if spread is None else np.asarray(spread),
        floor=np.asarray(std**2, np.float64),
        log_weights=np.log(np.full(k, 1 / k) if weights is None else np.asarray(weights)),
        event=event,
    )


def ring(modes: int = 8, radius: float = 0.7, std: float = 0.05) -> Mixture:
    """Clumps on a circle, d = 2."""
    angle = 2 * np.pi * np.arange(modes) / modes
    return mixture(radius * np.stack([np.cos(angle), np.sin(angle)], axis=1), std)


def clumps(modes: int = 20, d: int = 32, std: float = 0.1, seed: int = 3) -> Mixture:
    """Isotropic components at random."""
    return mixture(np.random.default_rng(seed).standard_normal((modes, d)) * 0.5, std)


def families(
    classes: int = 10, modes: int = 4, d: int = 32, std: float = 0.15, seed: int = 0
) -> Mixture:
    """Isotropic components, so many at random about each of some centres."""
    rng = np.random.default_rng(seed)
    centres, offsets = (
        rng.standard_normal((classes, 1, d)),
        rng.standard_normal((classes, modes, d)),
    )
    return mixture((0.4 * centres + 0.3 * offsets).reshape(-1, d), std)


def scaled(data: np.ndarray) -> np.ndarray:
    """Standard deviation 0.5 over all entries."""
    return 0.5 * data / data.std()


def digits(std: float = 0.03) -> Mixture:
    """The empirical denoiser of scikit-learn's handwritten digits, d = 64."""
    from sklearn.datasets import load_digits

    return mixture(scaled(load_digits().data / 8 - 1), std)


def patches(components: int = 12, size: int = 6, seed: int = 0) -> Mixture:
    """Full covariances, fitted to grey patches of scikit-learn's photographs."""
    from sklearn.datasets import load_sample_images
    from sklearn.feature_extraction.image import extract_patches_2d

    def data() -> np.ndarray:
        grey = [image.mean(axis=2) for image in load_sample_images().images]
        take = {"patch_size": (size, size), "max_patches": 5000, "random_state": seed}
        return np.concatenate([extract_patches_2d(g, **take) for g in grey])[..., None]

    return fitted(f"grey-{components}-{size}-{seed}", data, components)


def photographs(choose: Callable[[np.ndarray], Iterable[int]]) -> Iterator[Any]:
    """Training images of CIFAR-10, pillow's, by their numbers; chosen by the labels of all."""
    from PIL import Image

    with np.load(DATA / "cifar10_jpeg_train.npz") as file:
        jpeg, offsets, labels = file["jpeg"].tobytes(), file["offsets"], file["labels"]
    for i in choose(labels):
        yield Image.open(io.BytesIO(jpeg[offsets[i] : offsets[i + 1]])).convert("RGB")


def colour_patches(components: int, size: int, first: int, seed: int = 0) -> Mixture:
    """Full covariances, fitted to one patch of each of 10,000 CIFAR-10 images from `first` on."""

    def data() -> np.ndarray:
        rng, found = np.random.default_rng(seed), []
        for image in map(np.asarray, photographs(lambda _: range(first, first + 10_000))):
            i, j = rng.integers(0, 33 - size, 2)
            found.append(image[i : i + size, j : j + size])
        return np.stack(found)

    return fitted(f"colour-{components}-{size}-{first}-{seed}", data, components)


def thumbnails(
    classes: Iterable[int], components: int = 3, size: int = 8, rank: int = 48
) -> Mixture:
    """So many components fitted to each of these classes of CIFAR-10, reduced in size.

    The variances along all but their first `rank` axes are one, the mean of them.
    """

    def data(label: int) -> np.ndarray:
        from PIL.Image import Resampling

        found = photographs(lambda labels: np.flatnonzero(labels == label))
        return np.stack([np.asarray(i.resize((size, size), Resampling.BOX)) for i in found])

    each = [
        fitted(f"class-{label}-{components}-{size}", partial(data, label), components)
        for label in classes
    ]
    variances = np.concatenate([m.floor + m.spread for m in each])  # ascending
    floor = variances[:, :-rank].mean()
    return Mixture(
        means=np.concatenate([m.means for m in each]),
        axes=np.concatenate([m.axes for m in each])[:, :, -rank:],
        spread=variances[:, -rank:] - floor,
        floor=floor,
        log_weights=np.concatenate([m.log_weights for m in each]) - np.log(len(each)),
        event=each[0].event,
    )


def fitted(name: str, data: Callable, components: int) -> Mixture:
    """A mixture fitted to data (n, *event), bytes; kept for the next time."""
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.mixture import GaussianMixture

    def fit() -> dict[str, np.ndarray]:
        x = scaled(data() / 127.5 - 1)
        model = GaussianMixture(
            components, random_state=0, reg_covar=1e-4, max_iter=10, init_params="k-means++"
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ConvergenceWarning)  # a few iterations are enough
            model.fit(x.reshape(len(x), -1))
        variances, axes = np.linalg.eigh(model.covariances_)
        return {
            "means": model.means_,
            "variances": variances,
            "axes": axes,
            "weights": model.weights_,
            "event": np.array(x.shape[1:]),
        }

    f = kept(name, fit)
    floor = f["variances"].min()
    event = tuple(int(size) for size in f["event"])
    spread = f["variances"] - floor
    return mixture(f["means"], np.sqrt(floor), f["axes"], spread, f["weights"], event)


def kept(name: str, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """What `make` gives, once and for all: in runs/, which git ignores."""
    path = HERE / "runs" / f"{name}.npz"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        part = path.with_name(f"{os.getpid()}-{path.name}")
        np.savez(part, **make())
        part.replace(path)
    with np.load(path) as file:
        return dict(file)


def power_law(
    exponent: float,
    side: int,
    channels: int = 3,
    angle: float = 0.4,
    aspect: float = 3.0,
    chroma: float = 0.08,
) -> Waves:
    """Images of spectrum (0.3 + |k|)^-exponent, with |k| an ellipse turned by `angle`.

    So the variance varies with direction, and within an octave. The colours' axes are near those of
    brightness and its differences, but not the same; chroma: the variance along the second over
    that along the first, and of the third over that of the second twice as much.
    """
    k = np.fft.fftfreq(side, 1 / side)
    along = k[:, None] * np.cos(angle) + k[None] * np.sin(angle)
    across = k[None] * np.cos(angle) - k[:, None] * np.sin(angle)
    spectrum = (0.3 + np.hypot(along * aspect**0.5, across / aspect**0.5)) ** -exponent
    # The waves k and -k are one, also at the highest frequency, which is its own negative.
    spectrum = (spectrum + np.roll(spectrum[::-1, ::-1], 1, axis=(0, 1))) / 2
    variances = spectrum[..., None] * np.cumprod([1.0, chroma, 2 * chroma][:channels])[None, None]
    colours = np.linalg.qr([[0.55, 1.0, 0.2], [0.65, -0.3, -1.0], [0.52, -0.6, 0.9]])[0].T
    return Waves(
        mean=np.asarray(0.1),
        variances=0.25 * variances / variances.mean(),
        colours=colours if channels == 3 else np.eye(channels),
    )


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
TUNE_VECTORS = {
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
TUNE_IMAGES = {
    "spectrum k^-2, 8x8x1": lambda: power_law(2.0, 8, channels=1),
    "spectrum k^-2.5, 12x12x3": lambda: power_law(2.5, 12),
    "grey patches 6x6": patches,
    "colour patches 8x8": lambda: colour_patches(8, 8, first=0),
}
REPORT_VECTORS = {
    "clumps": lambda: clumps(40, d=100, std=0.05, seed=11),
    "few clumps": lambda: clumps(3, d=8, std=0.15, seed=12),
    "grid": lambda: grid(7, d=6, spacing=0.3, std=0.02),
    "curve": lambda: curve(d=40, harmonics=5, components=100, seed=13),
    "smooth": lambda: low_rank(10, d=200, rank=12, width=0.4, distance=0.3, seed=14),
    "gaussian": lambda: low_rank(1, d=1000, rank=30, anisotropy=5.0, seed=15),
    "anisotropic": lambda: low_rank(4, d=64, rank=32, anisotropy=50.0, distance=0.1, seed=16),
    "offset": lambda: low_rank(20, d=30, rank=4, width=0.3, offset=1.5, seed=17),
}
REPORT_IMAGES = {
    "spectrum k^-1, 16x16x3": lambda: power_law(1.0, 16, angle=1.1, chroma=0.1),
    "spectrum k^-2, 16x16x3": lambda: power_law(2.0, 16, angle=1.1, chroma=0.05),
    "spectrum k^-3, 16x16x3": lambda: power_law(3.0, 16, angle=0.2, aspect=2.0, chroma=0.1),
    "spectrum k^-2, 32x32x3": lambda: power_law(2.0, 32, angle=0.8, aspect=4.0, chroma=0.07),
    "grey patches 8x8": lambda: patches(10, size=8, seed=1),
    "colour patches 6x6": lambda: colour_patches(6, 6, first=25_000, seed=1),
}
TUNE, REPORT = TUNE_VECTORS | TUNE_IMAGES, REPORT_VECTORS | REPORT_IMAGES


class Problem(NamedTuple):
    """A denoiser, and the law that it should sample.

    denoiser: of (batch, *event); event; law: draws (n, *event), in the precision to compute in;
    mixture: the law itself, if it is one; fine: steps of a fine solve.
    """

    denoiser: sd.Denoiser
    event: tuple[int, ...]
    law: np.ndarray
    mixture: Mixture | None = None
    fine: int = 100


def exact(law: Mixture | Waves, draws: int = 50_000) -> Problem:
    """The law of a mixture or of waves is the one to sample; fewer draws in high dimension."""
    event = law.event or law.means.shape[1:]
    draws = law.draw(0, min(draws, 30_000_000 // np.prod(event)))
    return Problem(law, event, draws, law if isinstance(law, Mixture) else None)


def fine_solve(problem: Problem, noise: np.ndarray) -> np.ndarray:
    """Where the ODE leads from noise at unit level, the same precision throughout."""
    sigmas = np.asarray(sd.log_snr_sigmas(problem.fine)).astype(noise.dtype)
    solver, x_init = sd.DPMpp2M(), sigmas[0] * noise
    key = jax.random.key(0)
    solution = sd.sample(key, problem.denoiser, sigmas=sigmas, solver=solver, x_init=x_init)
    return np.asarray(solution.x)


def network(scale: float, batch: int, draws: int = 2000, label: int | None = None) -> Problem:
    """The digits network, guided, or free at scale 0; its own fine solve is the law to sample.

    Guided towards all classes in turn, or towards that of the label; at scale 1 that is the class.
    """
    import digits as trained

    return _network(trained, trained.WEIGHTS, (8, 8, 1), scale, batch, draws, 100, label)


def images16(scale: float, batch: int, draws: int = 1000, label: int | None = None) -> Problem:
    """The same of the network of natural images."""
    import images as trained

    return _network(trained, trained.weights(16), (16, 16, 3), scale, batch, draws, 40, label)


def _network(trained, weights, event, scale, batch, draws, fine, label) -> Problem:
    weights = Path(weights).read_bytes()
    labels = jnp.arange(batch) % 10 if label is None else jnp.full(batch, label)
    free = trained.load(jnp.full(batch, trained.NULL))
    denoiser = sd.guided(trained.load(labels), free, scale) if scale else free
    problem = Problem(denoiser, event, np.empty(0), fine=fine)

    def law() -> dict[str, np.ndarray]:
        rng = np.random.default_rng(1000)
        starts = rng.standard_normal((-(-draws // batch), batch, *event), np.float32)
        return {"law": np.concatenate([fine_solve(problem, start) for start in starts])}

    state = hashlib.sha256(weights).hexdigest()[:12]
    name = f"{trained.__name__}-{scale:g}-{batch}-{draws}-{fine}-{state}"
    name += "" if label is None else f"-{label}"
    return problem._replace(law=kept(name, law)["law"])


class Classes(NamedTuple):
    """The data of a class, and what guides towards them.

    conditional: the problem without guidance; unconditional: the denoiser of all classes; weaker: a
    worse one of the class, for autoguidance, if there is one.
    """

    conditional: Problem
    unconditional: sd.Denoiser
    weaker: sd.Denoiser | None = None


def first_class(whole: Mixture, classes: int) -> Classes:
    """The first of so many classes, each of equally many components; the weaker has 1.1 its std."""
    log_weights = whole.log_weights[: len(whole.means) // classes]
    own = dataclasses.replace(
        whole,
        means=whole.means[: len(log_weights)],
        axes=whole.axes[: len(log_weights)],
        spread=whole.spread[: len(log_weights)],
        log_weights=log_weights - np.log(np.exp(log_weights).sum()),
    )
    wider = dataclasses.replace(own, floor=1.1**2 * own.floor, spread=1.1**2 * own.spread)
    return Classes(exact(own), whole, wider)


def image_classes(batch: int) -> Classes:
    """All classes of the network of natural images in turn; the law is that of the test images.

    The weaker one is the network with its weights in eight bits, two of them of the mantissa.
    """
    import images as trained

    def coarse(weights):
        return weights.astype(jnp.float8_e5m2).astype(weights.dtype)

    denoiser = trained.load(jnp.arange(batch) % 10)
    law = trained.images(DATA, "test")[0]
    problem = Problem(denoiser, law.shape[1:], law, fine=40)
    weaker = dataclasses.replace(denoiser, parameters=jax.tree.map(coarse, denoiser.parameters))
    return Classes(problem, trained.load(jnp.full(batch, trained.NULL)), weaker)


# Of a number of samples, as the networks below.
TUNE_CLASSES = {
    "families": lambda _: first_class(families(5, d=16, seed=21), 5),
    "thumbnails 8x8": lambda _: first_class(thumbnails(range(5)), 5),
}
REPORT_CLASSES = {
    "families": lambda _: first_class(families(seed=22), 10),
    "thumbnails 8x8": lambda _: first_class(thumbnails(range(5, 10)), 5),
    "images network": image_classes,
}


# Of a number of samples that are drawn at once, whose labels the denoiser holds.
TUNE_NETWORKS = {
    "digits network": partial(network, 0.0),
    "digits network, guidance 3": partial(network, 3.0),
}
REPORT_NETWORKS = {
    "digits network, guidance 1.5": partial(network, 1.5),
    "digits network, guidance 6": partial(network, 6.0),
    "images network": partial(images16, 0.0),
    "images network, guidance 3": partial(images16, 3.0),
}
# A class each, for what was fitted to another one.
CLASS_NETWORKS = {
    f"{name} network, class {label}": partial(make, 1.0, label=label)
    for name, make in (("digits", network), ("images", images16))
    for label in range(10)
}
NETWORKS = TUNE_NETWORKS | REPORT_NETWORKS | CLASS_NETWORKS
HALVES = {
    "tune": TUNE | TUNE_NETWORKS,
    "report": REPORT | REPORT_NETWORKS,
    "classes": CLASS_NETWORKS,
}


def kind(name: str) -> str:
    """Of networks, of images with an exact denoiser, or of vectors; nothing is built for it."""
    if name in NETWORKS:
        return "networks"
    return "images" if name in TUNE_IMAGES | REPORT_IMAGES else "vectors"


def build(half: str, name: str, batch: int) -> Problem:
    """FileNotFoundError if its data or weights are missing."""
    make = HALVES[half][name]
    return make(batch) if name in NETWORKS else exact(make())

"""Guidance: two denoisers combined into one.

Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) and its variants are one formula,

    D = D_c + (scale - 1) difference(D_c, D_u),

with D_c - D_u for the plain one: scale 1 is the conditional denoiser, 0 the unconditional. The
variants here differ in `difference`, or in a scale that is a function of sigma.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import ArrayLike

from steindiff_jax import _checks
from steindiff_jax._numerics import at_least_float32, divide, expand, inner
from steindiff_jax._pytree import number, pytree, static
from steindiff_jax.denoisers import Cond, Network, check, rows
from steindiff_jax.grids import check_sigmas
from steindiff_jax.protocols import Basis, Batch, Denoiser, Numeric, Rows, Scalar, Sigmas

Scale = Numeric | Callable[[Scalar], Any]
Difference = Callable[[Batch, Batch], Batch]

# Every prediction is, up to a factor, x0 - k x with this k of sigma: the noise (x - x0) / sigma,
# v of Salimans & Ho (arXiv:2202.00512), the velocity of the flow at t = sigma / (1 + sigma).
SHARE_OF_X: dict[str, Callable[[Scalar], Any]] = {
    "x0": lambda sigma: 0.0,  # noqa: ARG005
    "epsilon": lambda sigma: 1.0,  # noqa: ARG005
    "v": lambda sigma: 1 / (1 + sigma**2),
    "flow": lambda sigma: 1 / (1 + sigma),
}


@pytree
class Combination:
    """How `guided` combines its branches; fields as there."""

    scale: Scale
    basis: Basis | None = None
    difference: Difference | None = None
    rescale: Numeric | None = number(default=None, within="[0, 1]")
    prediction: str = static(default="x0", choices=(*SHARE_OF_X,))

    __post_init__ = _checks.fields

    def scale_at(self, sigma: Scalar) -> Array:
        return jnp.asarray(self.scale(sigma) if callable(self.scale) else self.scale)

    def __call__(self, d_c: Batch, d_u: Batch, x: Batch, sigma: Scalar) -> Batch:
        shift = 0.0
        if self.prediction != "x0":
            shift = SHARE_OF_X[self.prediction](sigma) * x
        f_c, f_u = d_c - shift, d_u - shift
        difference = f_c - f_u if self.difference is None else self.difference(f_c, f_u)
        f = f_c + self._scaled(difference, self.scale_at(sigma).astype(d_c.dtype))
        if self.rescale is not None:
            ratio = _deviation(f_c) / _deviation(f)
            f = f * expand(1 + self.rescale * (ratio - 1), f).astype(f.dtype)
        return f + shift

    def _scaled(self, difference: Batch, scale: Array) -> Batch:
        if self.basis is None:
            batch = difference.shape[:1]
            if scale.shape not in ((), batch):
                raise ValueError(f"scale must have shape () or {batch}, got {scale.shape}")
            return expand(scale - 1, difference) * difference
        partition = self.basis.partition(difference.shape[1:])
        bands = len(partition.sizes)
        if scale.shape != (bands,):
            raise ValueError(
                f"scale must have a value for each of {bands} bands, got {scale.shape}"
            )
        coefficients = partition.spread(scale - 1) * self.basis.transform(difference)
        return self.basis.inverse(coefficients)

    def rows(self, take: Callable[[Array], Array]) -> "Combination":
        """See `Network.rows`."""
        scale: Any = self.scale
        if callable(scale):
            scale = rows(scale, take)  # pyright: ignore[reportArgumentType]
        elif self.basis is None and jnp.ndim(scale):
            scale = take(scale)
        return dataclasses.replace(self, scale=scale)


class _Guided:
    """Base of the guided denoisers; a subclass evaluates its branches."""

    conditional: Any
    how: Combination

    def branches(self, x: Batch, sigma: Scalar) -> tuple[Batch, Batch]:
        raise NotImplementedError

    def check(self, sigmas: Sigmas) -> None:
        check(self.conditional, sigmas)

    def __call__(self, x: Batch, sigma: Scalar) -> Batch:
        def both() -> Batch:
            return self.how(*self.branches(x, sigma), x, sigma)

        if not callable(self.how.scale):
            return both()
        # Where the scale is 1, the unconditional branch has no part in the result.
        alone = jnp.all(self.how.scale_at(sigma) == 1)
        return lax.cond(alone, lambda: self.conditional(x, sigma), both)


@pytree
class Guided(_Guided):
    """Two denoisers combined; made by `guided`."""

    conditional: Denoiser
    unconditional: Denoiser
    how: Combination

    def branches(self, x: Batch, sigma: Scalar) -> tuple[Batch, Batch]:
        return self.conditional(x, sigma), self.unconditional(x, sigma)

    def rows(self, take: Callable[[Array], Array]) -> "Guided":
        """See `Network.rows`."""
        branches = rows(self.conditional, take), rows(self.unconditional, take)
        return Guided(*branches, self.how.rows(take))


@pytree
class GuidedNetwork(_Guided):
    """`Guided` where both branches are one network: evaluated in one call on 2 batch rows."""

    conditional: Network
    unconditional: Cond
    how: Combination

    def branches(self, x: Batch, sigma: Scalar) -> tuple[Batch, Batch]:
        # Branches alternate row by row, so that a sharded batch stays where it is.
        def both(c: Array, u: Array) -> Array:
            return jnp.stack([c, u], axis=1).reshape(2 * c.shape[0], *c.shape[1:])

        cond = jax.tree.map(both, dict(self.conditional.cond), dict(self.unconditional))
        d = dataclasses.replace(self.conditional, cond=cond)(both(x, x), sigma)
        d_c, d_u = jnp.moveaxis(d.reshape(x.shape[0], 2, *x.shape[1:]), 1, 0)
        return d_c, d_u

    def rows(self, take: Callable[[Array], Array]) -> "GuidedNetwork":
        """See `Network.rows`."""
        fewer = jax.tree.map(take, dict(self.unconditional))
        return GuidedNetwork(self.conditional.rows(take), fewer, self.how.rows(take))


def guided(
    conditional: Denoiser,
    unconditional: Denoiser,
    scale: Scale,
    *,
    basis: Basis | None = None,
    difference: Difference | None = None,
    rescale: Numeric | None = None,
    prediction: str = "x0",
) -> Guided | GuidedNetwork:
    """Guidance: D_c + (scale - 1)(D_c - D_u); scale=1 is the conditional denoiser.

    Ho & Salimans 2022, arXiv:2207.12598. Two adapters that differ in nothing but the values of
    `cond` (same network, same arrays of weights) are evaluated in one batched network call.

    Args:
      conditional: D_c.
      unconditional: D_u; any other denoiser will do, such as a worse network (autoguidance, Karras
        et al. 2024, arXiv:2406.02507).
      scale: a number; an array (batch,), one for each sample; or a function of sigma that returns
        either, such as `GuidanceInterval` and `CFGpp`. Where a function returns 1 for all, the
        unconditional denoiser is not called.
      basis: with a basis, scale has the values of its bands, (bands,): frequency-decoupled
        guidance (Sadat et al. 2025, arXiv:2506.19713).
      difference: (D_c, D_u) -> what stands for D_c - D_u, all (batch, *event): `APG`, `MAMBOG`,
        `CFGZeroStar` or a function of yours.
      rescale: share, 0 to 1, by which each sample's standard deviation is brought back to that of
        the conditional prediction (Lin et al. 2023, arXiv:2305.08891, section 3.4).
      prediction: what `difference` and `rescale` look at, "x0", "epsilon", "v" or "flow" (the
        velocity), up to a factor that depends on sigma alone. diffusers' guiders look at what the
        network predicts.

    ValueError: a scale that is not finite, a rescale outside [0, 1], an unknown prediction.
    """
    if not callable(scale):
        _checks.number("scale", scale, "(-inf, inf)")
        scale = _checks.as_float(scale)
    how = Combination(scale, basis, difference, rescale, prediction)
    if (
        isinstance(conditional, Network)
        and isinstance(unconditional, Network)
        and _differ_in_cond_alone(conditional, unconditional)
    ):
        return GuidedNetwork(conditional, unconditional.cond, how)
    return Guided(conditional, unconditional, how)


# --- Scales that are functions of sigma ----------------------------------------------------------


@pytree
class GuidanceInterval:
    """A scale within low < sigma <= high, and 1 elsewhere, where one network call is saved.

    Kynkaanniemi et al. 2024, arXiv:2404.07724.

    Attributes:
      scale: a number, or (batch,).
      low: sigma at which guidance ends.
      high: sigma at which it begins.
    """

    scale: Numeric
    low: Numeric = number(within="[0, inf]")
    high: Numeric = number(within="[0, inf]")

    def __post_init__(self) -> None:
        _checks.fields(self)
        _checks.number("scale", self.scale, "(-inf, inf)")
        object.__setattr__(self, "scale", _checks.as_float(self.scale))

    def __call__(self, sigma: Scalar) -> Array:
        return jnp.where((self.low < sigma) & (sigma <= self.high), self.scale, 1.0)

    def rows(self, take: Callable[[Array], Array]) -> "GuidanceInterval":
        """See `Network.rows`."""
        scale = take(self.scale) if jnp.ndim(self.scale) else self.scale
        return dataclasses.replace(self, scale=scale)


@pytree
class CFGpp:
    """The scale of CFG++: strength sigma / (sigma - sigma'), sigma' the next node of the grid.

    Chung et al. 2024, arXiv:2406.08070: x' = D + q (x - D_u) with D = D_u + strength (D_c - D_u)
    and q = sigma' / sigma is the DDIM step from D_u + strength / (1 - q) (D_c - D_u). So it is
    CFG++ in `DDIM`, the solver of the paper, and the same scale for any other one that evaluates at
    the nodes of the grid alone.

    Attributes:
      strength: lambda of the paper, 0 to 1.
      sigmas: (steps + 1,) the grid that is given to `sample`.
    """

    strength: Numeric = number(within="(-inf, inf)")
    sigmas: ArrayLike

    def __post_init__(self) -> None:
        _checks.fields(self)
        object.__setattr__(self, "sigmas", check_sigmas(self.sigmas))

    def __call__(self, sigma: Scalar) -> Array:
        nodes = jnp.asarray(self.sigmas, sigma.dtype)  # rounded as sigma is
        below = jnp.max(jnp.where(nodes < sigma, nodes, 0.0))
        return self.strength * sigma / (sigma - below)


# --- Differences ---------------------------------------------------------------------------------


@pytree
class APG:
    """Adaptive projected guidance: less of the difference that is parallel to D_c.

    Sadat et al. 2024, arXiv:2410.02416, without its momentum, which would make a denoiser remember:

        d = (D_c - D_u) min(1, norm / |D_c - D_u|),
        difference = d - (1 - eta) <d, D_c> D_c / |D_c|^2,

    with norms and products over each sample.

    Attributes:
      eta: share of the parallel part that is kept, 0 in the paper.
      norm: largest |d|; 15 in the paper for SDXL, 2.5 for EDM2.
    """

    eta: Numeric = number(default=0.0, within="(-inf, inf)")
    norm: Numeric = number(default=float("inf"), within="(0, inf]")

    __post_init__ = _checks.fields

    def __call__(self, d_c: Batch, d_u: Batch) -> Batch:
        d = d_c - d_u
        size = _norm(d)
        d = d * _like(jnp.minimum(size, self.norm) / size, d)
        share = divide(inner(d, d_c), inner(d_c, d_c), 0.0)
        return d - (1 - self.eta) * _like(share, d) * d_c


@pytree
class MAMBOG:
    """Magnitude-aware guidance: less where the difference is large beside D_u.

    arXiv:2508.03442 (2025): difference = exp(-alpha |d| / |D_u|) d with d = D_c - D_u and the norms
    of each sample. The paper has velocities there: prediction="flow" of `guided`.

    Attributes:
      alpha: strength, 8 in the paper.
    """

    alpha: Numeric = number(default=8.0, within="[0, inf)")

    __post_init__ = _checks.fields

    def __call__(self, d_c: Batch, d_u: Batch) -> Batch:
        d = d_c - d_u
        return d * _like(jnp.exp(-self.alpha * _norm(d) / _norm(d_u)), d)


@pytree
class CFGZeroStar:
    """CFG-Zero*: the difference from the multiple of D_u that is nearest to D_c.

    Fan et al. 2025, arXiv:2503.18886: difference = D_c - <D_c, D_u> / |D_u|^2 D_u, products over
    each sample. The paper has velocities there: prediction="flow" of `guided`. Its zeroed first
    steps are not part of this.
    """

    def __call__(self, d_c: Batch, d_u: Batch) -> Batch:
        return d_c - _like(divide(inner(d_c, d_u), inner(d_u, d_u), 0.0), d_u) * d_u


def _norm(a: Batch) -> Rows:
    """Euclidean norm of each sample, never exactly 0, where its derivative is infinite."""
    square = inner(a, a)
    return jnp.sqrt(jnp.maximum(square, jnp.finfo(square.dtype).tiny))


def _deviation(a: Batch) -> Rows:
    """Standard deviation of each sample times the root of its size."""
    a = at_least_float32(a)
    return _norm(a - a.mean(axis=range(1, a.ndim), keepdims=True))


def _like(factor: Rows, x: Batch) -> Array:
    """A factor (batch,), shaped to multiply x and in its dtype."""
    return expand(factor, x).astype(x.dtype)


def _differ_in_cond_alone(a: Network, b: Network) -> bool:
    def shapes(network: Network) -> Any:
        return jax.tree.map(lambda leaf: (jnp.shape(leaf), jnp.result_type(leaf)), network.cond)

    leaves_a, tree_a = jax.tree.flatten(dataclasses.replace(a, cond={}))
    leaves_b, tree_b = jax.tree.flatten(dataclasses.replace(b, cond={}))
    pairs = zip(leaves_a, leaves_b, strict=tree_a == tree_b)
    same = tree_a == tree_b and all(x is y or _equal(x, y) for x, y in pairs)
    return same and bool(a.cond) and shapes(a) == shapes(b)


def _equal(x: Any, y: Any) -> bool:
    """Equal Python numbers, such as a schedule's; arrays count only if they are the same object."""
    return isinstance(x, int | float) and isinstance(y, int | float) and x == y

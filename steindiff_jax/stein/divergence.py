"""Estimators of the divergence of a denoiser, tr J with J = dD/dx, per sample.

Each evaluates the denoiser once and returns its value with what it learned of J: `Exact` from all
columns, `Hutchinson` from random probes v with E[v v^T] = I, so that tr J = E[v . J v] (Hutchinson
1990), and `Tweedie` without any derivative, from Cov[x0 | x] = sigma^2 J of an exact denoiser
(second-order Tweedie), whence E|x - D|^2 = sigma^2 E[d - tr J].
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from steindiff_jax._numerics import expand, inner
from steindiff_jax._typing import (
    Batch,
    Denoiser,
    Key,
    Rows,
    Scalar,
    check_count,
    check_fields,
    check_number,
    pytree,
    static,
)
from steindiff_jax.denoisers import rows, with_posterior

Probes = Float[Array, "probes batch *event"]


def rademacher(key: Key, shape: tuple[int, ...], dtype: Any) -> Array:
    """Signs from random bits; `jax.random.rademacher` draws float64 numbers where x64 is on."""
    return 1 - 2 * (jax.random.bits(key, shape, jnp.uint8) & 1).astype(dtype)


DISTRIBUTIONS: dict[str, Callable] = {
    "rademacher": rademacher,
    "gaussian": jax.random.normal,
}


class Jacobian(NamedTuple):
    """What is known of J at x. The statistics are per sample and unbiased in the batch mean.

    Attributes:
      v: probes, scaled so that tr(M J) = sum over probes of v . M J v in the mean; 0 for a sample
        that was not probed.
      jv: their products J v.
      trace: tr J.
      complement: d - tr J, with digits of its own where J is close to 1.
      squared_norm: |J|_F^2.
      posterior_trace: tr J of the posterior mean that a guided denoiser is made of
        (`with_posterior`), which Stein's identity is about; else no different.
      posterior_squared_norm: |J|_F^2 of the same.
      directional: whether jv are true derivatives along v.
      group: how many samples in a row are one group, of which the first alone was probed.
    """

    v: Probes
    jv: Probes
    trace: Rows
    complement: Rows
    squared_norm: Rows
    posterior_trace: Rows
    posterior_squared_norm: Rows
    directional: bool
    group: int = 1


@runtime_checkable
class Divergence(Protocol):
    """keys: (batch,) one for each sample. Returns the denoiser at x, and what is known of J."""

    def __call__(
        self, keys: Key, denoiser: Denoiser, x: Batch, sigma: Scalar
    ) -> tuple[Batch, Jacobian]: ...


@pytree
class Tweedie:
    """tr J = d - |x - D|^2 / sigma^2 in the mean: no derivative, no cost.

    An identity of exact denoisers. Of a network it is what the network's own residual says; of a
    guided denoiser, which is no posterior mean, it is a biased plug-in.
    """

    def __call__(
        self, keys: Key, denoiser: Denoiser, x: Batch, sigma: Scalar
    ) -> tuple[Batch, Jacobian]:
        del keys
        x0 = denoiser(x, sigma)
        noise = (x - x0) / sigma
        complement = inner(noise, noise)
        size = math.prod(x.shape[1:])
        trace = size - complement
        # As if J were isotropic, which is enough for the trace of anything affine in x and D.
        v = jnp.ones_like(x)
        jv = expand(trace / max(size, 1), x).astype(x.dtype) * v
        norm = trace**2 / max(size, 1)
        return x0, Jacobian(v[None], jv[None], trace, complement, norm, trace, norm, False)


@pytree
class Hutchinson:
    """Random probes of the Jacobian: about one more evaluation each, times `fraction`.

    Attributes:
      probes: number of probes per sample.
      fraction: share of the batch that is probed, in (0, 1]: every round(1 / fraction)-th sample
        stands for its neighbours (batch statistics only). Of a sharded batch every device should
        have a multiple of that many samples: with automatic mesh axes the compiler else moves
        them about, with explicit ones a larger share is probed, so that they stay.
      distribution: "rademacher", exact on the identity part of J, or "gaussian".
    """

    probes: int = static(default=1)
    fraction: float = static(default=1.0)
    distribution: str = static(default="rademacher", choices=(*DISTRIBUTIONS,))

    def __post_init__(self) -> None:
        check_count("probes", self.probes)
        check_number("fraction", self.fraction, "(0, 1]")
        check_fields(self)

    def __call__(
        self, keys: Key, denoiser: Denoiser, x: Batch, sigma: Scalar
    ) -> tuple[Batch, Jacobian]:
        batch = x.shape[0]
        few = self.fraction * batch <= 1  # and its inverse may not be finite
        group, take, leave, merge = _every(batch if few else round(1 / self.fraction), x)
        probed, others = take(x), leave(x)

        def draw(key: Key) -> Array:
            shape = (self.probes, *x.shape[1:])
            return DISTRIBUTIONS[self.distribution](key, shape, x.dtype)

        v = jnp.moveaxis(jax.vmap(draw)(take(keys)), 1, 0)
        x0, *products = _products(rows(denoiser, take), probed, sigma, v)
        scale = math.sqrt(batch / max(probed.shape[0], 1) / self.probes)
        products = [scale * part for part in (v, *products)]
        if others.shape[0]:
            x0 = merge(x0, rows(denoiser, leave)(others, sigma))
            blank = jnp.zeros_like(others)
            products = [jax.vmap(merge, (0, None))(part, blank) for part in products]
        return x0, _jacobian(*products)._replace(group=group)


@pytree
class Exact:
    """All d columns of the Jacobian: d evaluations and d^2 numbers per sample; for small d."""

    def __call__(
        self, keys: Key, denoiser: Denoiser, x: Batch, sigma: Scalar
    ) -> tuple[Batch, Jacobian]:
        del keys
        size = math.prod(x.shape[1:])
        basis = jnp.eye(size, dtype=x.dtype).reshape(size, 1, *x.shape[1:])
        return from_probes(denoiser, x, sigma, jnp.broadcast_to(basis, (size, *x.shape)))


def from_probes(denoiser: Denoiser, x: Batch, sigma: Scalar, v: Probes) -> tuple[Batch, Jacobian]:
    """The denoiser at x and what its Jacobian does to probes: the end of an estimator of your own.

    About one more evaluation for each probe.

    Args:
      denoiser: the denoiser of the step.
      x: (batch, *event) sample.
      sigma: its noise-to-signal ratio.
      v: (probes, batch, *event). Over the probes of a sample v v^T must add up to the identity in
        the mean; given that, all of `Jacobian` is unbiased.

    Returns:
      The denoiser at x, (batch, *event), and its `Jacobian`.

    Raises:
      ValueError: for probes of another shape than x.
    """
    if v.shape[1:] != x.shape:
        raise ValueError(f"each probe must have the shape of x, {x.shape}, got {v.shape[1:]}")
    x0, *products = _products(denoiser, x, sigma, v)
    return x0, _jacobian(v, *products)


def _products(
    denoiser: Denoiser, x: Batch, sigma: Scalar, v: Probes
) -> tuple[Batch, Probes, Probes]:
    """D, J v, and J v of the posterior mean that it is made of.

    One probe: jvp. Several: the primal once, then one probe after another.
    """

    def both(x: Batch) -> tuple[Batch, Batch]:
        return with_posterior(denoiser, x, sigma)

    if v.shape[0] == 1:
        (x0, _), products = jax.jvp(both, (x,), (v[0],))
        return x0, products[0][None], products[1][None]
    (x0, _), product = jax.linearize(both, x)
    return x0, *lax.map(product, v)


def _jacobian(v: Probes, jv: Probes, posterior: Probes) -> Jacobian:
    dot = jax.vmap(inner)
    return Jacobian(
        v,
        jv,
        trace=dot(v, jv).sum(0),
        complement=dot(v, v - jv).sum(0),
        squared_norm=dot(jv, jv).sum(0),
        posterior_trace=dot(v, posterior).sum(0),
        posterior_squared_norm=dot(posterior, posterior).sum(0),
        directional=True,
    )


def _every(stride: int, x: Batch) -> tuple[int, Callable, Callable, Callable]:
    """Split (batch, ...) arrays into every stride-th row and the others, and put them together.

    By reshaping alone: a batch sharded in pieces that are multiples of the stride stays in place.
    Returned with the stride, smaller than asked for where a device would have no such row.
    """
    batch, sharding = x.shape[0], jax.typeof(x).sharding
    axes = sharding.spec[0] or ()  # of the mesh, where they are explicit
    devices = math.prod(sharding.mesh.shape[a] for a in ([axes] if isinstance(axes, str) else axes))
    stride = max(min(stride, batch // devices), 1)
    if devices > 1:
        stride = math.gcd(stride, batch // devices)
    count = batch // stride
    cut = count * stride

    def groups(a: Array) -> Array:
        return a[:cut].reshape(count, stride, *a.shape[1:])

    def take(a: Array) -> Array:
        return groups(a)[:, 0]

    def leave(a: Array) -> Array:
        rest = groups(a)[:, 1:]
        return jnp.concatenate([rest.reshape(cut - count, *a.shape[1:]), a[cut:]])

    def merge(taken: Array, left: Array) -> Array:
        rest = left[: cut - count].reshape(count, stride - 1, *left.shape[1:])
        whole = jnp.concatenate([taken[:, None], rest], axis=1)
        return jnp.concatenate([whole.reshape(cut, *left.shape[1:]), left[cut - count :]])

    return stride, take, leave, merge

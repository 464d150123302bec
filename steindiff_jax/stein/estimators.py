"""Estimators of the Jacobian J = dD/dx of a denoiser, by which Stein's identity is used.

`Tweedie`, the default, asks nothing of the network: the identity itself gives tr J from inner
products of x and D (second-order Tweedie, E|x - D|^2 = sigma^2 E[d - tr J] for a posterior mean).
`Hutchinson` takes random probes v with E[v v^T] = I, so that tr J = E[v . J v] (Hutchinson 1990),
and `Exact` all columns.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from steindiff_jax import _checks, _random
from steindiff_jax._pytree import number, pytree, static
from steindiff_jax.protocols import Batch, Denoiser, Estimator, Jacobian, Key, Numeric, Scalar

Probes = Float[Array, "probes batch *event"]


@pytree
class Tweedie(Estimator):
    """No derivative and no cost: rules use what Stein's identity says of x and D.

    It works for every callable, and takes the denoiser for the posterior mean that it estimates.
    """

    def __call__(
        self, keys: Key, denoiser: Denoiser, x: Batch, sigma: Scalar
    ) -> tuple[Batch, None]:
        del keys
        return denoiser(x, sigma), None


@pytree
class Hutchinson(Estimator):
    """Random probes of signs; each costs one or two evaluations of the denoiser more.

    Attributes:
      probes: number of probes per sample.
      derivative: "jvp", forward mode; "vjp", reverse mode, for networks with a custom gradient,
        such as flash attention, which have no forward mode; "secant",
        (D(x + h v) - D(x)) / h with h = step sigma, for networks with no derivative at all.
      step: of the secant, relative to sigma.
    """

    probes: int = static(default=1)
    derivative: str = static(default="jvp", choices=("jvp", "vjp", "secant"))
    step: Numeric = number(default=0.01, within="(0, inf)")

    def __post_init__(self) -> None:
        _checks.count("probes", self.probes)
        _checks.fields(self)

    def __call__(
        self, keys: Key, denoiser: Denoiser, x: Batch, sigma: Scalar
    ) -> tuple[Batch, Jacobian]:
        def draw(key: Key) -> Array:
            return _random.rademacher(key, (self.probes, *x.shape[1:]), x.dtype)

        v = jnp.moveaxis(jax.vmap(draw)(keys), 1, 0) / math.sqrt(self.probes)
        who, h = f"Hutchinson(derivative={self.derivative!r})", self.step * sigma
        x0, jv = _products(who, denoiser, x, sigma, v, self.derivative, h)
        return x0, Jacobian(v, jv, self.derivative == "jvp")


@pytree
class Exact(Estimator):
    """All d columns of the Jacobian: d evaluations and d^2 numbers per sample; for small d."""

    def __call__(
        self, keys: Key, denoiser: Denoiser, x: Batch, sigma: Scalar
    ) -> tuple[Batch, Jacobian]:
        del keys
        size = math.prod(x.shape[1:])
        columns = jnp.eye(size, dtype=x.dtype).reshape(size, 1, *x.shape[1:])
        v = jnp.broadcast_to(columns, (size, *x.shape))
        x0, jv = _products("Exact()", denoiser, x, sigma, v)
        return x0, Jacobian(v, jv, True)


def from_probes(denoiser: Denoiser, x: Batch, sigma: Scalar, v: Probes) -> tuple[Batch, Jacobian]:
    """The denoiser and its products with given probes, for estimators of your own.

    Args:
      denoiser: (x, sigma) -> x0 estimate.
      x: (batch, *event), one row for each sample.
      sigma: its noise-to-signal ratio.
      v: (probes, batch, *event). Over the probes of a sample v v^T must add up to the identity in
        the mean; given that, all traces are unbiased.

    Returns:
      The denoiser at x, (batch, *event), and its `Jacobian`.

    Raises:
      ValueError: for probes of another shape than x, and for a network without forward mode.
    """
    if v.shape[1:] != x.shape:
        raise ValueError(f"each probe must have the shape of x, {x.shape}, got {v.shape[1:]}")
    x0, jv = _products("from_probes", denoiser, x, sigma, v)
    return x0, Jacobian(v, jv, True)


def _products(
    who: str,
    denoiser: Denoiser,
    x: Batch,
    sigma: Scalar,
    v: Probes,
    derivative: str = "jvp",
    h: Any = None,
) -> tuple[Batch, Probes]:
    """The denoiser at x, and J v there (J^T v in reverse mode); errors name `who` asked."""

    def function(x: Batch) -> Batch:
        return denoiser(x, sigma)

    try:
        if derivative == "jvp":
            x0, product = jax.linearize(function, x)
            jax.eval_shape(jax.vmap(product), v)  # a custom gradient else fails in compilation
        elif derivative == "vjp":
            x0, pull = jax.vjp(function, x)
            product = lambda v: pull(v)[0]  # noqa: E731
        else:
            x0 = function(x)
            product = lambda v: (function(x + h * v) - x0) / h  # noqa: E731
        return x0, product(v[0])[None] if len(v) == 1 else lax.map(product, v)
    except Exception as error:  # of as many kinds as there are kernels and callbacks
        jax.eval_shape(function, x)  # the network's own mistakes are raised as they are
        raise ValueError(
            f"{who} needs derivatives that this network does not have: Tweedie(), the default, and "
            "Hutchinson(derivative='secant') need none, and 'vjp' those of custom gradients, such "
            "as flash attention's"
        ) from error

"""From a score network to a denoiser: prediction -> x0, Flax adapters, guidance.

A denoiser is any callable (x, sigma) -> x0 estimate with x = x0 + sigma * noise. The adapters here
call a network the way it was trained, on alpha x at time t, and are pytrees: weights and
conditioning are data, so that new ones do not trace again.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from steindiff_jax._numerics import accurate, expand
from steindiff_jax._typing import (
    Batch,
    Denoiser,
    Numeric,
    Scalar,
    check_fields,
    check_number,
    number,
    pytree,
    static,
)


@runtime_checkable
class Schedule(Protocol):
    """The ratio sigma / alpha to time, alpha and sigma; see `schedules`."""

    def at(self, ratio: Array, /) -> tuple[Array, Array, Array]: ...


# What the network's output F means: x0 from F, the network's input x, alpha and sigma.
PREDICTIONS: dict[str, Callable[[Array, Array, Array, Array], Array]] = {
    "x0": lambda f, x, alpha, sigma: f,  # noqa: ARG005
    "epsilon": lambda f, x, alpha, sigma: (x - sigma * f) / alpha,
    "score": lambda f, x, alpha, sigma: (x + sigma**2 * f) / alpha,
    # v = alpha noise - sigma x0 (Salimans & Ho 2022, arXiv:2202.00512)
    "v": lambda f, x, alpha, sigma: (alpha * x - sigma * f) / (alpha**2 + sigma**2),
    # velocity = noise - x0 (Liu et al. 2023, arXiv:2209.03003)
    "flow": lambda f, x, alpha, sigma: (x - sigma * f) / (alpha + sigma),
}


@pytree
class Network:
    """A network as a denoiser; made by `from_linen`, `from_nnx`, or by hand.

    Attributes:
      apply: (parameters, x, t, **cond) -> F, hashable.
      parameters: any pytree of arrays.
      schedule: see `from_linen`.
      prediction: see `from_linen`.
      sigma_data: see `from_linen`.
      cond: arrays (batch, ...), one row for each sample.
    """

    apply: Callable[..., Array] = static()
    parameters: Any
    schedule: Schedule
    prediction: str = static(choices=(*PREDICTIONS, "edm"))
    sigma_data: Numeric = number(default=0.5, within="(0, inf)")
    cond: Mapping[str, ArrayLike] = dataclasses.field(default_factory=dict)

    __post_init__ = check_fields

    def __call__(self, x: Batch, sigma: Scalar) -> Batch:
        for name, value in self.cond.items():
            if jnp.shape(value)[:1] != x.shape[:1]:
                raise ValueError(
                    f"cond[{name!r}] must have one row per sample: leading axis {x.shape[0]}, "
                    f"got shape {jnp.shape(value)}"
                )
        if self.prediction == "edm":
            # Karras et al. 2022, arXiv:2206.00364, table 1
            norm = jnp.hypot(sigma, self.sigma_data)
            f = self._evaluate(x / norm, jnp.log(sigma) / 4)
            return (self.sigma_data / norm) ** 2 * x + sigma * self.sigma_data / norm * f
        t, alpha, sigma_t = self.schedule.at(sigma)
        return PREDICTIONS[self.prediction](self._evaluate(alpha * x, t), alpha * x, alpha, sigma_t)

    def _evaluate(self, x: Array, t: Array) -> Array:
        times = jnp.broadcast_to(t, x.shape[:1]).astype(x.dtype)
        return self.apply(self.parameters, x, times, **self.cond).astype(x.dtype)

    def rows(self, take: Callable[[Array], Array]) -> "Network":
        """The denoiser of some of the samples only: `take` picks rows of a (batch, ...) array."""
        return dataclasses.replace(self, cond=jax.tree.map(take, dict(self.cond)))


def from_linen(
    module: Any,
    variables: Any,
    *,
    schedule: Schedule,
    prediction: str,
    sigma_data: Numeric = 0.5,
    cond: Mapping[str, ArrayLike] | None = None,
    **options: Any,
) -> Network:
    """Denoiser from a `flax.linen` module: apply(variables, x, t, **cond, **options).

    Args:
      module: sees alpha * x (batch, *event) and the schedule's time t (batch,), with "edm"
        x / sqrt(sigma^2 + sigma_data^2) and log(sigma) / 4; returns (batch, *event).
      variables: the collections that `module.init` returned.
      schedule: how the network was trained; gives t, alpha and sigma from the ratio.
      prediction: "x0", "epsilon", "v", "score", "edm" or "flow".
      sigma_data: standard deviation of the data, for "edm" alone.
      cond: labels and any other conditioning, keyword -> array (batch, ...), a row for each sample.
      options: Python values for keywords of the module, such as train=False.

    Raises:
      ValueError: unknown prediction; at the call, a module in training mode (dropout or batch
        statistics would couple or randomise the samples), or cond without a row per sample.
    """
    apply = _Linen(module, tuple(sorted(options.items())))
    return Network(apply, variables, schedule, prediction, sigma_data, _arrays(cond))


def from_nnx(
    module: Any,
    *,
    schedule: Schedule,
    prediction: str,
    sigma_data: Numeric = 0.5,
    cond: Mapping[str, ArrayLike] | None = None,
    **options: Any,
) -> Network:
    """Denoiser from a `flax.nnx` module called as module(x, t, **cond, **options).

    As `from_linen`. The module is read once, in inference mode (deterministic dropout, running
    averages); it is not changed, and later changes to it are not seen.
    """
    from flax import nnx

    inference = nnx.view(
        module, deterministic=True, use_running_average=True, raise_if_not_found=False
    )
    graph, state = nnx.split(inference)
    apply = _Nnx(graph, tuple(sorted(options.items())))
    return Network(apply, state, schedule, prediction, sigma_data, _arrays(cond))


def _arrays(cond: Mapping[str, ArrayLike] | None) -> dict[str, Array]:
    return {name: jnp.asarray(value) for name, value in (cond or {}).items()}


@dataclasses.dataclass(frozen=True)
class _Linen:
    module: Any
    options: tuple

    def __call__(self, variables: Any, x: Array, t: Array, **cond: Array) -> Array:
        from flax import errors

        try:
            return self.module.apply(variables, x, t, **cond, **dict(self.options))
        except (errors.InvalidRngError, errors.ModifyScopeVariableError) as error:
            raise _training_mode(self.module, "from_linen") from error


def _training_mode(module: Any, adapter: str) -> ValueError:
    return ValueError(
        f"{type(module).__name__} runs in training mode; sampling needs inference mode: pass its "
        f"switch, such as train=False or deterministic=True, to {adapter}"
    )


@dataclasses.dataclass(frozen=True)
class _Nnx:
    graph: Any
    options: tuple

    def __call__(self, state: Any, x: Array, t: Array, **cond: Array) -> Array:
        from flax import nnx

        module = nnx.merge(self.graph, state, copy=True)

        def touched_by_training() -> list:
            return jax.tree.leaves(nnx.state(module, nnx.Any(nnx.RngState, nnx.BatchStat)))

        before = touched_by_training()
        f = module(x, t, **cond, **dict(self.options))
        if any(a is not b for a, b in zip(before, touched_by_training(), strict=True)):
            raise _training_mode(module, "from_nnx")
        return f


@pytree
class Guided:
    """D = unconditional + scale (conditional - unconditional); made by `guided`."""

    conditional: Denoiser
    unconditional: Denoiser
    scale: Numeric

    def __call__(self, x: Batch, sigma: Scalar) -> Batch:
        return self.with_posterior(x, sigma)[0]

    def with_posterior(self, x: Batch, sigma: Scalar) -> tuple[Batch, Batch]:
        """See the function of that name."""
        d_c, posterior = with_posterior(self.conditional, x, sigma)
        d_u = self.unconditional(x, sigma)
        return d_u + self.scale * (d_c - d_u), posterior

    def rows(self, take: Callable[[Array], Array]) -> "Guided":
        """See `Network.rows`."""
        return Guided(rows(self.conditional, take), rows(self.unconditional, take), self.scale)


@pytree
class GuidedNetwork:
    """`Guided` where both branches are one network: evaluated in one call on 2 batch rows."""

    network: Network
    unconditional: Mapping[str, ArrayLike]
    scale: Numeric

    def __call__(self, x: Batch, sigma: Scalar) -> Batch:
        return self.with_posterior(x, sigma)[0]

    def with_posterior(self, x: Batch, sigma: Scalar) -> tuple[Batch, Batch]:
        """See the function of that name."""

        # Branches alternate row by row, so that a sharded batch stays where it is.
        def both(c: Array, u: Array) -> Array:
            return jnp.stack([c, u], axis=1).reshape(2 * c.shape[0], *c.shape[1:])

        cond = jax.tree.map(both, dict(self.network.cond), dict(self.unconditional))
        d = dataclasses.replace(self.network, cond=cond)(both(x, x), sigma)
        d_c, d_u = jnp.moveaxis(d.reshape(x.shape[0], 2, *x.shape[1:]), 1, 0)
        return d_u + self.scale * (d_c - d_u), d_c

    def rows(self, take: Callable[[Array], Array]) -> "GuidedNetwork":
        """See `Network.rows`."""
        fewer = jax.tree.map(take, dict(self.unconditional))
        return GuidedNetwork(self.network.rows(take), fewer, self.scale)


def guided(
    conditional: Denoiser, unconditional: Denoiser, scale: Numeric
) -> Guided | GuidedNetwork:
    """Classifier-free guidance: D_u + scale (D_c - D_u); scale=1 is the conditional denoiser.

    Ho & Salimans 2022, arXiv:2207.12598. Two adapters that differ in nothing but the values of
    `cond` (same network, same arrays of weights) are evaluated in one batched network call. The
    result is no posterior mean, though made of one (`with_posterior`): `Tweedie` is biased.
    """
    check_number("scale", scale, "(-inf, inf)")
    if (
        isinstance(conditional, Network)
        and isinstance(unconditional, Network)
        and _differ_in_cond_alone(conditional, unconditional)
    ):
        return GuidedNetwork(conditional, unconditional.cond, scale)
    return Guided(conditional, unconditional, scale)


@pytree
class StaticThreshold:
    """The denoiser with x0 clipped to [-limit, limit], for data known to lie there."""

    denoiser: Denoiser
    limit: Numeric = number(default=1.0, within="(0, inf)")

    __post_init__ = check_fields

    def __call__(self, x: Batch, sigma: Scalar) -> Batch:
        return self.with_posterior(x, sigma)[0]

    def with_posterior(self, x: Batch, sigma: Scalar) -> tuple[Batch, Batch]:
        """See the function of that name."""
        x0, posterior = with_posterior(self.denoiser, x, sigma)
        return jnp.clip(x0, -self.limit, self.limit), posterior

    def rows(self, take: Callable[[Array], Array]) -> "StaticThreshold":
        """See `Network.rows`."""
        return dataclasses.replace(self, denoiser=rows(self.denoiser, take))


@pytree
class DynamicThreshold:
    """The denoiser with each sample's x0 clipped to its own quantile and scaled back to the limit.

    x0 -> clip(x0, -s, s) limit / s, with s the quantile of |x0| over the sample, at least limit:
    against the saturation that strong guidance brings (Saharia et al. 2022, arXiv:2205.11487,
    section 2.3). For pixels in [-limit, limit]; not for latents.
    """

    denoiser: Denoiser
    quantile: Numeric = number(default=0.995, within="[0, 1]")
    limit: Numeric = number(default=1.0, within="(0, inf)")

    __post_init__ = check_fields

    def __call__(self, x: Batch, sigma: Scalar) -> Batch:
        return self.with_posterior(x, sigma)[0]

    def with_posterior(self, x: Batch, sigma: Scalar) -> tuple[Batch, Batch]:
        """See the function of that name."""
        x0, posterior = with_posterior(self.denoiser, x, sigma)
        if not x0.size:
            return x0, posterior
        size = accurate(jnp.abs(x0)).reshape(x0.shape[0], -1)
        s = jnp.maximum(jnp.quantile(size, self.quantile, axis=1), self.limit)
        s = expand(s, x0).astype(x0.dtype)
        return jnp.clip(x0, -s, s) * (self.limit / s), posterior

    def rows(self, take: Callable[[Array], Array]) -> "DynamicThreshold":
        """See `Network.rows`."""
        return dataclasses.replace(self, denoiser=rows(self.denoiser, take))


def rows(denoiser: Denoiser, take: Callable[[Array], Array]) -> Denoiser:
    """The denoiser of some of the samples: adapters select their conditioning; others are as is."""
    select = getattr(denoiser, "rows", None)
    return denoiser if select is None else select(take)


def with_posterior(denoiser: Denoiser, x: Batch, sigma: Scalar) -> tuple[Batch, Batch]:
    """The denoiser, and the posterior mean that it is made of: guidance's conditional branch.

    A wrapper of your own that changes the value without being a posterior mean any more may offer a
    method of this name; any other denoiser is its own.
    """
    both = getattr(denoiser, "with_posterior", None)
    if both is not None:
        return both(x, sigma)
    x0 = denoiser(x, sigma)
    return x0, x0


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

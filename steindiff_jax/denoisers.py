"""From a score network to a denoiser: prediction -> x0, Flax adapters, thresholds.

A denoiser is any callable (x, sigma) -> x0 estimate with x = x0 + sigma * noise. The adapters here
call a network the way it was trained, on alpha x at time t, and are pytrees: weights and
conditioning are data, so that new ones do not trace again.
"""

import dataclasses
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from steindiff_jax import _checks
from steindiff_jax._numerics import at_least_float32, expand
from steindiff_jax._pytree import number, pytree, static
from steindiff_jax.protocols import Batch, Denoiser, Numeric, Scalar, Schedule, Sigmas

Cond = Mapping[str, Any]

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
      cond: keyword -> array (batch, ...), a pytree of such arrays, or None.
      time_scale: see `from_linen`.
    """

    apply: Callable[..., Array] = static()
    parameters: Any
    schedule: Schedule
    prediction: str = static(choices=(*PREDICTIONS, "edm"))
    sigma_data: Numeric = number(default=0.5, within="(0, inf)")
    cond: Cond = dataclasses.field(default_factory=dict)
    time_scale: Numeric = number(default=1.0, within="(-inf, inf)")

    def __post_init__(self) -> None:
        _checks.fields(self)
        _checks.instance("schedule", self.schedule, Schedule, "a schedule such as VPCosine()")

    def check(self, sigmas: Sigmas) -> None:
        """Warn where a grid starts far above what the network was trained on."""
        largest = getattr(self.schedule, "sigma_max", None)
        if largest is not None and float(sigmas[0]) > 1.1 * float(largest):
            warnings.warn(
                f"the grid starts at sigma={float(sigmas[0]):.4g}, but the network's schedule ends "
                f"at {float(largest):.4g}: pass sigma_max=schedule.sigma_max to the grid",
                stacklevel=3,
            )

    def __call__(self, x: Batch, sigma: Scalar) -> Batch:
        for path, value in jax.tree_util.tree_leaves_with_path(dict(self.cond)):
            if jnp.shape(value)[:1] != x.shape[:1]:
                raise ValueError(
                    f"cond{jax.tree_util.keystr(path)} must have one row per sample: leading axis "
                    f"{x.shape[0]}, got shape {jnp.shape(value)}"
                )
        if self.prediction == "edm":
            # Karras et al. 2022, arXiv:2206.00364, table 1
            norm = jnp.hypot(sigma, self.sigma_data)
            f = self._evaluate(x / norm, jnp.log(sigma) / 4)
            return (self.sigma_data / norm) ** 2 * x + sigma * self.sigma_data / norm * f
        t, alpha, sigma_t = self.schedule.at(sigma)
        return PREDICTIONS[self.prediction](self._evaluate(alpha * x, t), alpha * x, alpha, sigma_t)

    def _evaluate(self, x: Array, t: Array) -> Array:
        times = jnp.broadcast_to(self.time_scale * t, x.shape[:1]).astype(x.dtype)
        f = self.apply(self.parameters, x, times, **self.cond)
        f = getattr(f, "sample", f)  # what networks of diffusers and MaxDiffusion return
        if jnp.shape(f) != x.shape:
            learned = jnp.shape(f) == (*x.shape[:-1], 2 * x.shape[-1])
            raise ValueError(
                f"the network must return the shape of its input, {x.shape}, got {jnp.shape(f)}"
                + ("; leave out its learned variance, the second half" if learned else "")
            )
        return f.astype(x.dtype)

    def rows(self, take: Callable[[Array], Array]) -> "Network":
        """The denoiser of some of the samples: `take` picks rows of a (batch, ...) array."""
        return dataclasses.replace(self, cond=jax.tree.map(take, dict(self.cond)))


def from_linen(
    module: Any,
    variables: Any,
    *,
    schedule: Schedule,
    prediction: str,
    sigma_data: Numeric = 0.5,
    cond: Cond | None = None,
    time_scale: Numeric = 1.0,
    **options: Any,
) -> Network:
    """Denoiser from a `flax.linen` module: apply(variables, x, t, **cond, **options).

    Args:
      module: sees alpha * x (batch, *event) and the schedule's time t (batch,), with "edm"
        x / sqrt(sigma^2 + sigma_data^2) and log(sigma) / 4; returns (batch, *event), or an object
        with that in its field `sample`.
      variables: the collections that `module.init` returned.
      schedule: how the network was trained; gives t, alpha and sigma from the ratio.
      prediction: "x0", "epsilon", "v", "score", "edm" or "flow".
      sigma_data: standard deviation of the data, for "edm" alone.
      cond: labels and any other conditioning: keyword -> array (batch, ...) with a row for each
        sample, a pytree of such arrays, or None.
      time_scale: the network is told time_scale * t: 1000 for most flows that came from torch.
      options: Python values for keywords of the module, such as train=False.

    Raises:
      ValueError: unknown prediction; at the call, a module in training mode (dropout or batch
        statistics would couple or randomise the samples), or cond without a row per sample.
    """
    from flax import linen

    _checks.instance("module", module, linen.Module, "a flax.linen module (see also from_nnx)")
    apply = _Linen(module, tuple(sorted(options.items())))
    return Network(
        apply,
        variables,
        schedule,
        prediction,
        sigma_data,
        jax.tree.map(jnp.asarray, dict(cond or {})),
        time_scale,
    )


def from_nnx(
    module: Any,
    *,
    schedule: Schedule,
    prediction: str,
    sigma_data: Numeric = 0.5,
    cond: Cond | None = None,
    time_scale: Numeric = 1.0,
    **options: Any,
) -> Network:
    """Denoiser from a `flax.nnx` module called as module(x, t, **cond, **options).

    As `from_linen`. The module is read once, in inference mode (deterministic dropout, running
    averages); it is not changed, and later changes to it are not seen.
    """
    from flax import nnx

    _checks.instance("module", module, nnx.Module, "a flax.nnx module (see also from_linen)")
    inference = nnx.view(
        module, deterministic=True, use_running_average=True, raise_if_not_found=False
    )
    graph, state = nnx.split(inference)
    apply = _Nnx(graph, tuple(sorted(options.items())))
    arrays = jax.tree.map(jnp.asarray, dict(cond or {}))
    return Network(apply, state, schedule, prediction, sigma_data, arrays, time_scale)


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


class _Threshold:
    """A denoiser whose x0 is limited by `limit_x0`."""

    denoiser: Denoiser

    def limit_x0(self, x0: Batch) -> Batch:
        raise NotImplementedError

    def check(self, sigmas: Sigmas) -> None:
        check(self.denoiser, sigmas)

    def __call__(self, x: Batch, sigma: Scalar) -> Batch:
        return self.limit_x0(self.denoiser(x, sigma))

    def rows(self, take: Callable[[Array], Array]) -> Any:
        """See `Network.rows`."""
        return dataclasses.replace(self, denoiser=rows(self.denoiser, take))  # pyright: ignore


@pytree
class StaticThreshold(_Threshold):
    """The denoiser with x0 clipped to [-limit, limit], for data known to lie there."""

    denoiser: Denoiser
    limit: Numeric = number(default=1.0, within="(0, inf)")

    __post_init__ = _checks.fields

    def limit_x0(self, x0: Batch) -> Batch:
        return jnp.clip(x0, -self.limit, self.limit)


@pytree
class DynamicThreshold(_Threshold):
    """The denoiser with each sample's x0 clipped to its own quantile and scaled back to the limit.

    x0 -> clip(x0, -s, s) limit / s, with s the quantile of |x0| over the sample, at least limit:
    against the saturation that strong guidance brings (Saharia et al. 2022, arXiv:2205.11487,
    section 2.3). For pixels in [-limit, limit]; not for latents.
    """

    denoiser: Denoiser
    quantile: Numeric = number(default=0.995, within="[0, 1]")
    limit: Numeric = number(default=1.0, within="(0, inf)")

    __post_init__ = _checks.fields

    def limit_x0(self, x0: Batch) -> Batch:
        if not x0.size:
            return x0
        size = at_least_float32(jnp.abs(x0)).reshape(x0.shape[0], -1)
        s = jnp.maximum(jnp.quantile(size, self.quantile, axis=1), self.limit)
        s = expand(s, x0).astype(x0.dtype)
        return jnp.clip(x0, -s, s) * (self.limit / s)


def rows(denoiser: Denoiser, take: Callable[[Array], Array]) -> Denoiser:
    """The denoiser of some of the samples: adapters select their conditioning; others are as is."""
    select = getattr(denoiser, "rows", None)
    return denoiser if select is None else select(take)


def check(denoiser: Denoiser, sigmas: Sigmas) -> None:
    """What the denoiser has to say of a grid, if anything."""
    getattr(denoiser, "check", lambda _: None)(sigmas)

"""Solvers around solvers."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax

from steindiff_jax._numerics import split, standard_normal
from steindiff_jax._typing import (
    Batch,
    Denoiser,
    Key,
    Numeric,
    Scalar,
    Sigmas,
    Solver,
    State,
    Step,
    check_fields,
    number,
    pytree,
)
from steindiff_jax.denoisers import rows
from steindiff_jax.solvers.runge_kutta import Heun


@pytree
class AnalyticalFirst:
    """Analytical first step: no evaluation at the first sigma, where x is almost pure noise.

    The noise is taken to be x / sqrt(1 + sigma^2) there (Dockhorn et al. 2022, arXiv:2210.05475;
    diff-sampler's `afs`). To be put around `Stein`, whose divergence would evaluate the denoiser.
    """

    inner: Solver

    @property
    def stochastic(self) -> bool:
        return getattr(self.inner, "stochastic", False)

    def init(self, x: Batch, sigmas: Sigmas) -> State:
        state = self.inner.init(x, sigmas)
        return State(state.x, (state.history, jnp.ones((), bool)))

    def step(
        self, key: Key, denoiser: Denoiser, state: State, sigma: Scalar, sigma_next: Scalar
    ) -> tuple[State, Step]:
        history, first = state.history
        known = _PureNoise(denoiser, sigma, first)
        new, step = self.inner.step(key, known, State(state.x, history), sigma, sigma_next)
        new = State(new.x, (new.history, jnp.zeros((), bool)))
        return new, step._replace(nfe=step.nfe - first.astype(jnp.int32))


class _PureNoise:
    """The denoiser, but where `applies`, at one sigma, that of noise x / sqrt(1 + sigma^2)."""

    def __init__(self, denoiser: Denoiser, sigma: Scalar, applies: Array) -> None:
        self.denoiser, self.sigma, self.applies = denoiser, sigma, applies

    def __call__(self, x: Batch, sigma: Scalar) -> Batch:
        if sigma is not self.sigma:
            return self.denoiser(x, sigma)
        norm = jnp.hypot(1.0, sigma)
        # x - sigma x / norm without the cancellation.
        return lax.cond(
            self.applies, lambda: x / (norm * (norm + sigma)), lambda: self.denoiser(x, sigma)
        )

    def rows(self, take: Callable[[Array], Array]) -> "_PureNoise":
        """See `Network.rows`."""
        return _PureNoise(rows(self.denoiser, take), self.sigma, self.applies)


@pytree
class Churn:
    """EDM's stochastic sampler: noise is added before each step of a one-step solver.

    Karras et al. 2022, arXiv:2206.00364, algorithm 2: sigma is raised to sigma (1 + gamma),
    gamma = min(churn / steps, sqrt(2) - 1). The `Step` is that of the inner solver from the raised
    sigma. `Stein` does not take a stochastic solver.

    Attributes:
      inner: solver without memory, `Heun()` in the paper; ValueError for a multistep solver.
      churn: S_churn.
      sigma_min: noise is added from here on,
      sigma_max: up to here.
      noise: S_noise, its standard deviation.
    """

    inner: Solver = Heun()
    churn: Numeric = number(default=40.0, within="[0, inf]")
    sigma_min: Numeric = number(default=0.0, within="[0, inf]")
    sigma_max: Numeric = number(default=math.inf, within="[0, inf]")
    noise: Numeric = number(default=1.0, within="[0, inf)")

    __post_init__ = check_fields

    stochastic = True

    def init(self, x: Batch, sigmas: Sigmas) -> State:
        state = self.inner.init(x, sigmas)
        if jax.tree.leaves(state.history):
            raise ValueError(
                f"Churn needs a solver without memory, such as Heun(), got {self.inner!r}: "
                "its weights belong to sigmas that are not raised"
            )
        steps = jnp.sum(sigmas[:-1] > 0)
        return State(x, jnp.minimum(self.churn / steps, math.sqrt(2) - 1).astype(sigmas.dtype))

    def step(
        self, key: Key, denoiser: Denoiser, state: State, sigma: Scalar, sigma_next: Scalar
    ) -> tuple[State, Step]:
        key_noise, key_inner = split(key)
        x, raised = state.x, state.history
        inside = (self.sigma_min <= sigma) & (sigma <= self.sigma_max)
        # sigma_hat^2 - sigma^2 = sigma^2 gamma (2 + gamma)
        added = jnp.where(inside, sigma * jnp.sqrt(raised * (2 + raised)), 0.0)
        x += self.noise * added * standard_normal(key_noise, x)
        sigma_hat = jnp.where(inside, sigma * (1 + raised), sigma)
        new, step = self.inner.step(key_inner, denoiser, State(x), sigma_hat, sigma_next)
        return State(new.x, state.history), step

"""Solvers around solvers."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from steindiff_jax import _checks, _random
from steindiff_jax._pytree import number, pytree
from steindiff_jax.grids import decreases
from steindiff_jax.protocols import (
    Batch,
    Denoiser,
    Key,
    Numeric,
    Scalar,
    Sigmas,
    Solver,
    State,
    Step,
    StochasticSolver,
    Wrapper,
)
from steindiff_jax.solvers.runge_kutta import DDIM, Heun


class Begun(NamedTuple):
    """The inner solver's memory, and () whether the first step is still to be made."""

    inner: Any
    first: Array


@pytree
class AnalyticalFirst(Wrapper):
    """Analytical first step: no evaluation at the first sigma, where x is almost pure noise.

    The noise is taken to be x / sqrt(1 + sigma^2) there (Dockhorn et al. 2022, arXiv:2210.05475;
    diff-sampler's `afs`). Put it around `Stein`, not inside.
    """

    inner: Solver

    def __post_init__(self) -> None:
        _checks.instance("inner", self.inner, Solver, "a deterministic solver such as IPNDM(3)")

    def init(self, x: Batch, sigmas: Sigmas) -> Begun:
        return Begun(self.inner.init(x, sigmas), jnp.ones((), bool))

    def step(
        self,
        key: Key,
        denoiser: Denoiser,
        state: State,
        sigma: Scalar,
        sigma_next: Scalar,
        *,
        x0: Batch | None = None,
    ) -> tuple[Step, Begun]:
        x, (memory, first) = state
        nfe = 0
        if x0 is None:
            norm = jnp.hypot(1.0, sigma)
            # x - sigma x / norm without the cancellation.
            x0 = lax.cond(first, lambda: x / (norm * (norm + sigma)), lambda: denoiser(x, sigma))
            nfe = 1 - first.astype(jnp.int32)
        inner = State(x, memory)
        step, memory = self.inner.step(key, denoiser, inner, sigma, sigma_next, x0=x0)
        return step._replace(nfe=step.nfe + nfe), Begun(memory, jnp.zeros((), bool))


class Raised(NamedTuple):
    """By which share `Churn` raises sigma, ()."""

    gamma: Array


@pytree
class Churn(StochasticSolver):
    """EDM's stochastic sampler: noise is added before each step of a one-step solver.

    Karras et al. 2022, arXiv:2206.00364, algorithm 2: sigma is raised to sigma (1 + gamma),
    gamma = min(churn / steps, sqrt(2) - 1). The `Step` is that of the inner solver from the raised
    sigma.

    Attributes:
      inner: solver without memory, `Heun()` in the paper; ValueError for a multistep solver.
      churn: S_churn.
      sigma_min: smallest sigma at which noise is added.
      sigma_max: largest sigma at which noise is added.
      noise: S_noise, its standard deviation.
    """

    inner: Solver = Heun()
    churn: Numeric = number(default=40.0, within="[0, inf]")
    sigma_min: Numeric = number(default=0.0, within="[0, inf]")
    sigma_max: Numeric = number(default=math.inf, within="[0, inf]")
    noise: Numeric = number(default=1.0, within="[0, inf)")

    def __post_init__(self) -> None:
        _checks.fields(self)
        _checks.instance("inner", self.inner, Solver, "a deterministic solver such as Heun()")

    def init(self, x: Batch, sigmas: Sigmas) -> Raised:
        _without_memory("Churn", self.inner, x, sigmas)
        steps = jnp.sum(decreases(sigmas))
        return Raised(jnp.minimum(self.churn / steps, math.sqrt(2) - 1).astype(sigmas.dtype))

    def advance(
        self, key: Key, denoiser: Denoiser, state: State, sigma: Scalar, sigma_next: Scalar
    ) -> tuple[State, Step]:
        key_noise, key_inner = _random.split(key)
        x, raised = state.x, state.memory.gamma
        inside = (self.sigma_min <= sigma) & (sigma <= self.sigma_max)
        # sigma_hat^2 - sigma^2 = sigma^2 gamma (2 + gamma)
        added = jnp.where(inside, sigma * jnp.sqrt(raised * (2 + raised)), 0.0)
        x += self.noise * added * _random.normal(key_noise, x)
        sigma_hat = jnp.where(inside, sigma * (1 + raised), sigma)
        new, step = self.inner.advance(key_inner, denoiser, State(x), sigma_hat, sigma_next)
        return State(new.x, state.memory), step


@pytree
class Ancestral(StochasticSolver):
    """Ancestral sampling: a step of a one-step solver to sigma_down < sigma', then noise up to it.

        sigma_up = eta sigma' sqrt(1 - (sigma' / sigma)^2),  sigma_down^2 = sigma'^2 - sigma_up^2.

    With `DDIM()` it is DDIM with eta (Song et al. 2021, arXiv:2010.02502, eq. 16), at eta = 1 the
    sampler of DDPM (Ho et al. 2020, arXiv:2006.11239) and k-diffusion's euler_ancestral, which are
    all the same; with `DPM2()` and `DPMpp2S()` its dpm_2_ancestral and dpmpp_2s_ancestral. The
    `Step` is that of the inner solver to sigma_down.

    Attributes:
      inner: solver without memory; ValueError for a multistep solver.
      eta: 1 draws all of the noise that the chain of DDPM would, 0 none.
      noise: standard deviation of the noise.
    """

    inner: Solver = DDIM()
    eta: Numeric = number(default=1.0, within="[0, 1]")
    noise: Numeric = number(default=1.0, within="[0, inf)")

    def __post_init__(self) -> None:
        _checks.fields(self)
        _checks.instance("inner", self.inner, Solver, "a deterministic solver such as DDIM()")

    def init(self, x: Batch, sigmas: Sigmas) -> Any:
        return _without_memory("Ancestral", self.inner, x, sigmas)

    def advance(
        self, key: Key, denoiser: Denoiser, state: State, sigma: Scalar, sigma_next: Scalar
    ) -> tuple[State, Step]:
        key_noise, key_inner = _random.split(key)
        down, up = ancestral(sigma, sigma_next, self.eta)
        new, step = self.inner.advance(key_inner, denoiser, state, sigma, down)
        return State(new.x + self.noise * up * _random.normal(key_noise, new.x)), step


def ancestral(sigma: Scalar, sigma_next: Scalar, eta: Numeric) -> tuple[Scalar, Scalar]:
    """(sigma_down, sigma_up) of a step, see `Ancestral`."""
    q = sigma_next / sigma
    # Never exactly 0 under the roots, whose derivatives are infinite there.
    tiny = jnp.finfo(q.dtype).tiny
    up = jnp.maximum(eta**2 * (1 - q) * (1 + q), tiny)
    down = jnp.maximum((1 - eta) * (1 + eta) + (eta * q) ** 2, tiny)
    return sigma_next * jnp.sqrt(down), sigma_next * jnp.sqrt(up)


def _without_memory(name: str, inner: Solver, x: Batch, sigmas: Sigmas) -> Any:
    """The empty memory of a one-step solver, or a ValueError."""
    memory = inner.init(x, sigmas)
    if jax.tree.leaves(memory):
        raise ValueError(
            f"{name} needs a solver without memory, such as Heun(), got {inner!r}: its weights "
            "belong to sigmas that are not changed on the way"
        )
    return memory

"""`Stein`: a solver around a solver, x_next = anchor + gamma (candidate - anchor).

It knows its solver by `init` and `step` alone, its rule by `anchor`, `moments` and `gamma`, and its
divergence estimator as a function. gamma is computed inside the step from means over the batch,
or for each sample by itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from steindiff_jax._numerics import accurate, batch_mean, expand, inner, sample_keys, split
from steindiff_jax._typing import (
    Batch,
    Denoiser,
    Key,
    Rows,
    Scalar,
    Sigmas,
    Solver,
    State,
    Step,
    pytree,
    static,
)
from steindiff_jax.stein.divergence import Divergence, Tweedie
from steindiff_jax.stein.rules import Local, PosteriorLength, Previous, Rule


@pytree
class Stein:
    """The Stein correction of any solver; itself a solver.

    Attributes:
      inner: solver.
      rule: `PosteriorLength()`, `StepEnergy()`, `CleanTarget()`, the paper's, or your own.
      divergence: `Tweedie()`, free, `Hutchinson(...)` or `Exact()`; the rule's own choice where
        none is given.
      statistics: "batch", means over the batch, over all devices too where the batch is sharded, or
        "sample", each sample by itself: no communication, and good in high dimension.
      axis_name: mapped axis that the batch is also spread over, under `shard_map` or `vmap`.

    Raises:
      ValueError: for anything else.
    """

    inner: Solver
    rule: Rule = PosteriorLength()
    divergence: Divergence = None  # pyright: ignore[reportAssignmentType]  # the rule's choice
    statistics: str = static(default="batch")
    axis_name: str | None = static(default=None)

    def __post_init__(self) -> None:
        if self.statistics not in ("batch", "sample"):
            raise ValueError(f"statistics must be 'batch' or 'sample', got {self.statistics!r}")
        if isinstance(self.rule, type) or not _offers(self.rule, "anchor", "moments", "gamma"):
            raise ValueError(f"rule must have anchor, moments and gamma, got {self.rule!r}")
        if self.divergence is None:
            choice = getattr(self.rule, "estimator", lambda statistics: Tweedie())  # noqa: ARG005
            object.__setattr__(self, "divergence", choice(self.statistics))
        if isinstance(self.divergence, type) or not _offers(self.divergence, "__call__"):
            raise ValueError(
                f"divergence must be an estimator such as Tweedie(), got {self.divergence!r}"
            )
        if isinstance(self.inner, type) or not _offers(self.inner, "init", "step"):
            raise ValueError(f"the inner solver must have init and step, got {self.inner!r}")
        if getattr(self.inner, "stochastic", False):
            raise ValueError(f"the inner solver must be deterministic, got {self.inner!r}")
        if self.statistics == "sample" and getattr(self.divergence, "fraction", 1.0) < 1:
            raise ValueError(
                "statistics='sample' needs a divergence of every sample: fraction must be 1, "
                f"got {self.divergence.fraction}"  # pyright: ignore[reportAttributeAccessIssue]
            )

    def init(self, x: Batch, sigmas: Sigmas) -> State:
        previous = Previous(jnp.zeros_like(x), jnp.zeros_like(x), jnp.zeros_like(sigmas[0]))
        return State(x, _Memory(self.inner.init(x, sigmas).history, previous))

    def step(
        self, key: Key, denoiser: Denoiser, state: State, sigma: Scalar, sigma_next: Scalar
    ) -> tuple[State, Step]:
        key_inner, key_probe = split(key)
        keys = sample_keys(key_probe, state.x.shape[0], self.axis_name)
        x0, jacobian = self.divergence(keys, denoiser, state.x, sigma)

        def candidate(x: Batch, x0: Batch, elsewhere: Denoiser = denoiser) -> tuple[State, Step]:
            """The inner step, with the denoiser's value at its start known already."""
            known = _Known(elsewhere, x, sigma, x0)
            before = State(x, state.history.inner)
            return self.inner.step(key_inner, known, before, sigma, sigma_next)

        def candidate_trace() -> Rows:
            """Sum over probes of v . dT, with dT the candidate's answer to dx = v, dx0 = J v."""
            elsewhere = denoiser if jacobian.directional else _refuse

            def along(v: Batch, jv: Batch) -> Rows:
                _, moved = jax.jvp(
                    lambda x, x0: candidate(x, x0, elsewhere)[0].x, (state.x, x0), (v, jv)
                )
                return inner(v, moved)

            return jax.vmap(along)(jacobian.v, jacobian.jv).sum(0)

        new, step = candidate(state.x, x0)
        local = Local(
            x=state.x,
            x0=x0,
            delta=step.delta,
            candidate=new.x,
            sigma=sigma,
            sigma_next=sigma_next,
            jacobian=jacobian,
            previous=state.history.previous,
            candidate_trace=candidate_trace,
        )
        moments = jnp.stack([accurate(m) for m in self.rule.moments(local)], axis=-1)
        if self.statistics == "batch":
            moments = batch_mean(moments, self.axis_name, jacobian.group)
        gamma = self.rule.gamma(tuple(jnp.moveaxis(moments, -1, 0)), sigma, sigma_next)
        gamma = jnp.clip(gamma, self.rule.gamma_min, self.rule.gamma_max)
        # Written from the candidate: where gamma is 1 the step is the solver's to the last bit.
        back = expand(1 - gamma, new.x) * (self.rule.anchor(local) - new.x)
        memory = _Memory(new.history, Previous(x0, step.delta, sigma))
        return State(new.x + back.astype(new.x.dtype), memory), step._replace(gamma=gamma)


class _Memory(NamedTuple):
    inner: Any
    previous: Previous


class _Known:
    """A denoiser whose value at (x, sigma) is known, so that the network runs there once."""

    def __init__(self, denoiser: Denoiser, x: Batch, sigma: Scalar, x0: Batch) -> None:
        self.denoiser, self.x, self.sigma, self.x0 = denoiser, x, sigma, x0

    def __call__(self, x: Batch, sigma: Scalar) -> Batch:
        if x is self.x and sigma is self.sigma:
            return self.x0
        return self.denoiser(x, sigma)


def _refuse(x: Batch, sigma: Scalar) -> Batch:  # noqa: ARG001
    raise ValueError(
        "this rule needs the divergence of the whole step, and the solver evaluates the denoiser "
        "at a second point: Tweedie() knows nothing there, use Hutchinson() or Exact()"
    )


def _offers(thing: object, *names: str) -> bool:
    return all(callable(getattr(thing, name, None)) for name in names)

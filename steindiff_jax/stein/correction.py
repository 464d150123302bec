"""`Stein`: a solver around a solver, that corrects what the inner one proposes.

It knows its solver, rule, estimator and basis by the classes in `protocols` alone. The coefficients
are computed inside the step from means over the batch, or for each sample by itself.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from steindiff_jax import _checks, _random
from steindiff_jax._numerics import at_least_float32, batch_mean
from steindiff_jax._pytree import pytree, static
from steindiff_jax.protocols import (
    Bands,
    Basis,
    Batch,
    Denoiser,
    Estimator,
    Jacobian,
    Key,
    Local,
    Partition,
    Previous,
    Rule,
    Scalar,
    Sigmas,
    Solver,
    State,
    Step,
    Wrapper,
    ddim,
)
from steindiff_jax.stein.basis import default_basis
from steindiff_jax.stein.estimators import Tweedie
from steindiff_jax.stein.rules import PosteriorLength

STATISTICS = ("batch", "sample")


class Memory(NamedTuple):
    """What `Stein` remembers: the inner solver's memory, and the step before (see `Previous`)."""

    inner: Any
    previous: Previous


@pytree
class Stein(Wrapper):
    """The Stein correction of any deterministic solver; itself a solver.

    Attributes:
      inner: solver.
      rule: `PosteriorLength()`, `StepEnergy()`, `CleanTarget()`, the paper's, or your own.
      estimator: `Tweedie()`, free, `Hutchinson(...)` or `Exact()`.
      basis: `Whole()`, `Cosine(...)` or your own; by default the finest `Cosine` whose bands have
        numbers enough in the batch, for events of one axis `Whole`.
      statistics: "batch", means over the batch, over all devices too where the batch is sharded, or
        "sample", each sample by itself: no communication, and good in high dimension.
      axis_name: mapped axis that the batch is also spread over, under `shard_map` or `vmap`.

    Raises:
      ValueError: a rule, estimator, basis or solver that is not an instance of its class in
        `protocols`, a stochastic solver, other statistics.
    """

    inner: Solver
    rule: Rule = PosteriorLength()
    estimator: Estimator = Tweedie()
    basis: Basis | None = None
    statistics: str = static(default="batch", choices=STATISTICS)
    axis_name: str | None = static(default=None)

    def __post_init__(self) -> None:
        _checks.fields(self)
        _checks.instance("inner", self.inner, Solver, "a deterministic solver such as IPNDM(3)")
        _checks.instance("rule", self.rule, Rule, "a rule such as PosteriorLength()")
        _checks.instance("estimator", self.estimator, Estimator, "an estimator such as Tweedie()")
        if self.basis is not None:
            _checks.instance("basis", self.basis, Basis, "a basis such as Cosine()")

    def mapped_axis(self) -> str | None:
        return self.axis_name

    def basis_of(self, shape: tuple) -> Basis:
        """The basis that is used on a batch of this shape."""
        return default_basis(shape) if self.basis is None else self.basis

    def init(self, x: Batch, sigmas: Sigmas) -> Memory:
        previous = Previous(jnp.zeros_like(x), jnp.zeros_like(x), jnp.zeros_like(sigmas[0]))
        return Memory(self.inner.init(x, sigmas), previous)

    def step(
        self,
        key: Key,
        denoiser: Denoiser,
        state: State,
        sigma: Scalar,
        sigma_next: Scalar,
        *,
        x0: Batch | None = None,
    ) -> tuple[Step, Memory]:
        key_inner, key_probe = _random.split(key)
        nfe, jacobian = 0, None
        if x0 is None:
            keys = _random.sample_keys(key_probe, state.x.shape[0], self.axis_name)
            x0, jacobian = self.estimator(keys, denoiser, state.x, sigma)
            nfe = 1
        elif not isinstance(self.estimator, Tweedie):
            raise ValueError(f"x0 is given: {self.estimator!r} has no evaluation to probe")

        def propose(denoiser: Denoiser, x: Batch, x0: Batch) -> tuple[Step, Any]:
            here = State(x, state.memory.inner)
            return self.inner.step(key_inner, denoiser, here, sigma, sigma_next, x0=x0)

        def next_x(x: Batch, x0: Batch) -> Batch:
            outside = denoiser if jacobian is not None and jacobian.directional else _refuse
            return ddim(x, x0 + propose(outside, x, x0)[0].delta, sigma, sigma_next)

        step, memory = propose(denoiser, state.x, x0)
        step = step._replace(nfe=step.nfe + nfe)
        basis = self.basis_of(state.x.shape)
        partition = basis.partition(state.x.shape[1:])
        local = self._local(basis, partition, state, step, sigma, sigma_next)
        local = local._replace(
            trace=lambda: _trace(basis, partition, jacobian),
            step_trace=lambda: _step_trace(next_x, state.x, x0, local, basis, jacobian),
        )
        moments, sizes = self.rule.moments(local), local.sizes
        if self.statistics == "batch":
            moments, sizes = batch_mean(moments, self.axis_name), sizes[0]
        coefficients = self.rule.coefficients(moments, sizes, sigma, sigma_next)
        return self._corrected(basis, partition, step, memory, local, coefficients)

    def replay(
        self,
        coefficients: Any,
        key: Key,
        denoiser: Denoiser,
        state: State,
        sigma: Scalar,
        sigma_next: Scalar,
        *,
        x0: Batch | None = None,
    ) -> tuple[Step, Memory]:
        """The step with given coefficients: no statistics, no probes, no communication."""
        key, _ = _random.split(key)
        here = State(state.x, state.memory.inner)
        step, memory = self.inner.step(key, denoiser, here, sigma, sigma_next, x0=x0)
        basis = self.basis_of(state.x.shape)
        partition = basis.partition(state.x.shape[1:])
        local = self._local(basis, partition, state, step, sigma, sigma_next)
        return self._corrected(basis, partition, step, memory, local, coefficients)

    def _local(
        self,
        basis: Basis,
        partition: Partition,
        state: State,
        step: Step,
        sigma: Scalar,
        sigma_next: Scalar,
    ) -> Local:
        # In one product: a delta of zeros by itself would be transformed while compiling.
        x, x0, delta = jax.vmap(basis.transform)(jnp.stack([state.x, step.x0, step.delta]))
        return Local(
            x=x,
            x0=x0,
            delta=delta,
            previous=state.memory.previous,
            sigma=sigma,
            sigma_next=sigma_next,
            sizes=jnp.asarray(partition.sizes[None], at_least_float32(x).dtype),
            inner=partition.inner,
            centred=differences if self.statistics == "batch" else lambda a: a,
            trace=lambda: None,
            step_trace=_no_trace,
        )

    def _corrected(
        self,
        basis: Basis,
        partition: Partition,
        step: Step,
        memory: Any,
        local: Local,
        coefficients: Any,
    ) -> tuple[Step, Memory]:
        delta = self.rule.delta(local, jax.tree.map(partition.spread, coefficients))
        delta = basis.inverse(delta).astype(step.delta.dtype)
        previous = Previous(local.x0, local.delta, local.sigma)
        return step._replace(delta=delta, coefficients=coefficients), Memory(memory, previous)


@pytree
class Fixed(Wrapper):
    """A correction whose coefficients are the same in every step."""

    inner: Stein  # pyright: ignore[reportIncompatibleVariableOverride]
    coefficients: Any

    def step(
        self,
        key: Key,
        denoiser: Denoiser,
        state: State,
        sigma: Scalar,
        sigma_next: Scalar,
        *,
        x0: Batch | None = None,
    ) -> tuple[Step, Memory]:
        return self.inner.replay(self.coefficients, key, denoiser, state, sigma, sigma_next, x0=x0)


def differences(a: Batch) -> Array:
    """(a_1 - a_2) / sqrt(2), (a_3 - a_4) / sqrt(2), ...: the batch's covariance without its mean.

    Neighbours lie on one device, so that nothing is communicated, as it would be for the mean of
    the whole batch. A batch of one sample is returned as it is, with its mean.
    """
    size = a.shape[0]
    if isinstance(size, int) and size < 2:  # or symbolic, of jax.export
        return a
    half = size // 2
    pairs = a[: 2 * half].reshape(half, 2, *a.shape[1:])
    return (pairs[:, 0] - pairs[:, 1]) * 0.5**0.5


def _trace(basis: Basis, partition: Partition, jacobian: Jacobian | None) -> Bands | None:
    """Trace of J in each band, by the probes."""
    if jacobian is None:
        return None
    across = jax.vmap(lambda a, b: partition.inner(basis.transform(a), basis.transform(b)))
    return across(jacobian.v, jacobian.jv).sum(0)


def _step_trace(
    next_x: Any, x: Batch, x0: Batch, local: Local, basis: Basis, jacobian: Jacobian | None
) -> Bands:
    """Trace of d next_x / dx in each band, with d next_x = J' v where dx = v and dx0 = J v."""

    def moved(v: Batch, jv: Batch) -> Batch:
        return jax.jvp(next_x, (x, x0), (v, jv))[1]

    if jacobian is not None:
        across = jax.vmap(
            lambda v, jv: local.inner(basis.transform(v), basis.transform(moved(v, jv)))
        )
        return across(jacobian.v, jacobian.jv).sum(0)
    # A step with one evaluation is a x + b x0 + what it remembers, with two numbers a and b.
    ones, noise = jnp.ones_like(x), (local.x - local.x0) / local.sigma
    a, b = moved(ones, jnp.zeros_like(x)), moved(jnp.zeros_like(x), ones)
    a, b = (part.reshape(part.shape[0], -1)[:, :1] for part in (a, b))
    return a * local.sizes + b * (local.sizes - local.inner(noise, noise))


def _no_trace() -> Bands:
    raise ValueError("given coefficients need no moments")


def _refuse(x: Batch, sigma: Scalar) -> Array:  # noqa: ARG001
    raise ValueError(
        "this rule needs the divergence of the whole step, and the solver evaluates the denoiser "
        "at a second point: use an estimator with derivatives there, Hutchinson() or Exact()"
    )

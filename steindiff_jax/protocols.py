"""What the parts of a sampler must offer: denoiser, solver, rule, estimator, basis, schedule.

To write a part of your own, subclass one of the classes here, or for a denoiser any callable will
do. All of it lives in the scaled coordinates y = x / alpha and sigma = noise-to-signal ratio, so
that y = x0 + sigma * noise whatever the schedule of the network; arrays are (batch, *event).
`docs/extending.md` has one worked example of each part.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.export
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

Batch = Float[Array, "batch *event"]
Scalar = Float[Array, ""]
Rows = Float[Array, " batch"]
Bands = Float[Array, "batch bands"]
Sigmas = Float[Array, " nodes"]  # one more than steps
Numeric = Any  # a number or a scalar array; a leaf, so JAX may put anything else there
Key = Array


# --- What goes from part to part -----------------------------------------------------------------


class State(NamedTuple):
    """What the next step needs.

    Attributes:
      x: (batch, *event) sample at the current sigma.
      memory: what the solver remembers of earlier steps, any pytree of arrays.
    """

    x: Batch
    memory: Any = ()


class Step(NamedTuple):
    """A proposed step: x_next = q x + (1 - q)(x0 + delta), with q = sigma_next / sigma.

    Attributes:
      x0: (batch, *event) denoiser at the start of the step. By itself it makes the first-order
        step.
      delta: (batch, *event) what the solver and its correction add to x0.
      nfe: () evaluations of the denoiser.
      coefficients: what the correction scaled delta with, see `Rule`; () if nothing was corrected.
    """

    x0: Batch
    delta: Batch
    nfe: Any = 1
    coefficients: Any = ()

    @property
    def gamma(self) -> Any:
        """First of the coefficients: (bands,) or (batch, bands), without bands if there is one."""
        if not self.coefficients:
            return 1.0
        gamma = self.coefficients[0]
        return gamma[..., 0] if gamma.shape[-1] == 1 else gamma


class Info(NamedTuple):
    """What a person wants to see of a run; nothing in it steers the solver.

    Attributes:
      gamma: (steps, bands), or (steps, batch, bands) with per-sample statistics: the factor of what
        the solver added to the first-order step. The last axis is absent if there is one band.
        1 where nothing was corrected.
      nfe: () evaluations of the denoiser per sample. A probe costs about one more each, a guided
        denoiser runs its network on two rows per evaluation; neither is counted here.
      finite: (steps, batch) whether each sample was finite after each step.
    """

    gamma: Float[Array, " steps *shape"]
    nfe: Int[Array, ""]
    finite: Bool[Array, "steps batch"]


class Solution(NamedTuple):
    """What `sample` returns.

    Attributes:
      x: (batch, *event) samples.
      info: facts about each step.
      record: what the caller asked to keep, stacked over the steps.
    """

    x: Batch
    info: Info
    record: Any = None


Record = Callable[[State, Step], Any]

for _part in (State, Step, Info, Solution):
    jax.export.register_namedtuple_serialization(
        _part, serialized_name=f"steindiff_jax.{_part.__name__}"
    )


# --- Denoisers and schedules ---------------------------------------------------------------------


@runtime_checkable
class Denoiser(Protocol):
    """Estimates the clean sample, E[x0 | x], from x = x0 + sigma * noise. Any callable will do.

    `sample` always calls it on the whole batch, and never differentiates it unless asked to by an
    estimator (`Hutchinson`, `Exact`) or by a gradient of yours.

    Optional: a method rows(take) that returns the denoiser of some of the samples, where `take`
    picks rows of any (batch, ...) array. `sample_many` needs it of a denoiser that holds arrays
    with a row for each sample, such as labels; the adapters of this library have it. Optional: a
    method check(sigmas), which `sample` calls with a grid whose values are known.
    """

    def __call__(self, x: Batch, sigma: Scalar, /) -> Batch:
        """x: (batch, *event), sigma: (). Returns an array of the shape and dtype of x."""
        ...


@runtime_checkable
class Schedule(Protocol):
    """How a network was trained, x_t = alpha(t) x0 + sigma(t) noise; see `schedules`.

    Optional, for grids in time (`time_sigmas`) and for training: alpha(t) and sigma(t), each from
    and to arrays. Optional, for a check of the grid: sigma_min and sigma_max, the ratios that the
    network was trained for.
    """

    def at(self, ratio: Array, /) -> tuple[Array, Array, Array]:
        """Time, alpha and sigma of a noise-to-signal ratio sigma / alpha, of its shape."""
        ...


# --- Solvers -------------------------------------------------------------------------------------


class AnySolver:
    """What `sample` asks of a solver: `init` and `advance`, and the defaults of two questions."""

    def mapped_axis(self) -> str | None:
        """The mapped axis that the batch is also spread over, under `shard_map` or `vmap`."""
        return None

    def check(self, sigmas: ArrayLike) -> None:
        """ValueError if the solver cannot step along this grid, whose values are known."""

    def init(self, x: Batch, sigmas: Sigmas) -> Any:
        """The memory to start with: a pytree of arrays that keeps its shapes; () for none.

        x: (batch, *event) start; sigmas: (steps + 1,) the whole grid. Padding: a grid may end in
        several zeros. Those steps are not taken, but what `init` computes from them must be finite.
        """
        del x, sigmas
        return ()

    def advance(
        self, key: Key, denoiser: Denoiser, state: State, sigma: Scalar, sigma_next: Scalar
    ) -> tuple[State, Step]:
        """One step from sigma to sigma_next."""
        raise NotImplementedError


class Solver(AnySolver):
    """A deterministic solver. It proposes steps; `advance` makes them, in one place for all.

    A subclass gives `step`, and `init` if it remembers anything.
    """

    def step(
        self,
        key: Key,
        denoiser: Denoiser,
        state: State,
        sigma: Scalar,
        sigma_next: Scalar,
        *,
        x0: Batch | None = None,
    ) -> tuple[Step, Any]:
        """Propose a step.

        Args:
          key: one key, or keys (batch,) where `sample` was given one for each sample. Only a
            correction that draws probes uses it.
          denoiser: to evaluate.
          state: x (batch, *event) at sigma, and the solver's memory.
          sigma: () where the step starts, above 0.
          sigma_next: () where it ends, below sigma; at 0 the step should return the denoiser's
            estimate, delta = 0. It is traced: use `jnp.where`, and keep both branches finite.
          x0: the denoiser at (state.x, sigma), if it is known already. Begin with `evaluate`.

        Returns:
          The `Step`, and the memory of the next one.
        """
        raise NotImplementedError

    def advance(
        self, key: Key, denoiser: Denoiser, state: State, sigma: Scalar, sigma_next: Scalar
    ) -> tuple[State, Step]:
        """x_next = q x + (1 - q)(x0 + delta), q = sigma_next / sigma."""
        step, memory = self.step(key, denoiser, state, sigma, sigma_next)
        return State(ddim(state.x, step.x0 + step.delta, sigma, sigma_next), memory), step


class StochasticSolver(AnySolver):
    """A solver that draws noise: a subclass gives `advance`, and `init` if it remembers anything.

    `Stein` and diffrax do not take one. Its key is one key, or keys (batch,) where `sample` was
    given one for each sample; `steindiff_jax.noise(key, x)` draws from both.
    """


class Wrapper(Solver):
    """A solver around a solver: what it does not answer itself is asked of `inner`."""

    inner: Solver

    def mapped_axis(self) -> str | None:
        return self.inner.mapped_axis()

    def check(self, sigmas: ArrayLike) -> None:
        self.inner.check(sigmas)

    def init(self, x: Batch, sigmas: Sigmas) -> Any:
        return self.inner.init(x, sigmas)


def evaluate(denoiser: Denoiser, x: Batch, sigma: Scalar, x0: Batch | None) -> tuple[Batch, int]:
    """The denoiser at x, and how many evaluations that took: none where x0 is known."""
    return (denoiser(x, sigma), 1) if x0 is None else (x0, 0)


def ddim(x: Batch, x0: Batch, sigma: Scalar, sigma_next: Scalar) -> Batch:
    """The exact step if the denoiser stayed at x0: q x + (1 - q) x0, q = sigma_next / sigma."""
    q = sigma_next / sigma
    return q * x + (1 - q) * x0


# --- Parts of the correction ---------------------------------------------------------------------


class Basis:
    """An orthonormal map of the event, and a band for each of its coefficients.

    A subclass gives `labels`, and `transform` and `inverse` unless its coefficients are the entries
    of x themselves.
    """

    def labels(self, event: tuple[int, ...]) -> np.ndarray:
        """The band of each coefficient, integers from 0 without gaps; of shape event."""
        raise NotImplementedError

    def transform(self, x: Batch) -> Batch:
        """Coefficients of x, each sample by itself; of the shape of x."""
        return x

    def inverse(self, coefficients: Batch) -> Batch:
        """The x of these coefficients."""
        return coefficients

    def partition(self, event: tuple[int, ...]) -> "Partition":
        """The bands of the coefficients of an event, with sums over them."""
        return Partition(self.labels(event))


class Partition:
    """Coefficients (batch, *event) by bands.

    Attributes:
      labels: band of each coefficient, integers from 0 without gaps; of shape event.
      sizes: (bands,) how many coefficients each band has.
    """

    def __init__(self, labels: np.ndarray) -> None:
        self.labels = labels
        self.sizes = np.bincount(labels.reshape(-1), minlength=1)

    def inner(self, a: Batch, b: Batch) -> Bands:
        """Inner products within each band, in float32 or wider; (batch, bands)."""
        product = (a * b).astype(jnp.promote_types(a.dtype, jnp.float32))
        if len(self.sizes) == 1:
            return product.sum(axis=range(1, a.ndim))[:, None]
        member = np.arange(len(self.sizes)) == self.labels.reshape(-1, 1)
        flat = product.reshape(product.shape[0], -1)
        return jnp.matmul(
            flat, jnp.asarray(member, product.dtype), precision=jax.lax.Precision.HIGHEST
        )

    def spread(self, values: Array) -> Array:
        """A value for each band, (bands,) or (batch, bands), at each coefficient of that band.

        Returns (1 or batch, *event), where there is one band with 1 for each axis of the event.
        """
        values = jnp.atleast_2d(values)
        if len(self.sizes) == 1:
            return values.reshape(-1, *([1] * self.labels.ndim))
        return values[:, self.labels]


class Jacobian(NamedTuple):
    """What an estimator found out about J = dD/dx.

    Attributes:
      v: (probes, batch, *event) probes; over those of a sample v v^T adds up to the identity in the
        mean.
      jv: their products J v, or J^T v.
      directional: whether jv are derivatives along v, and not J^T v or differences.
    """

    v: Float[Array, "probes batch *event"]
    jv: Float[Array, "probes batch *event"]
    directional: bool


class Estimator:
    """Evaluates the denoiser, and with it estimates its Jacobian."""

    def __call__(
        self, keys: Key, denoiser: Denoiser, x: Batch, sigma: Scalar
    ) -> tuple[Batch, Jacobian | None]:
        """The denoiser at x (batch, *event), and its Jacobian, or None if nothing is known of it.

        keys: (batch,), one for each sample.
        """
        raise NotImplementedError


class Previous(NamedTuple):
    """The step before, as its solver proposed it; all 0 at the start.

    Attributes:
      x0: the denoiser at its start.
      delta: what the solver added to it, before any correction.
      sigma: where it started.
    """

    x0: Batch
    delta: Batch
    sigma: Scalar


class Local(NamedTuple):
    """All that a rule may look at: one proposed step, in the coefficients of the basis.

    Arrays are (batch, *event); where one is multiplied by a coefficient of a band, that has been
    spread over the band.

    Attributes:
      x: state.
      x0: denoiser there.
      delta: what the solver adds to it.
      previous: the step before.
      sigma: where the step starts.
      sigma_next: where it ends.
      sizes: (1, bands) how many coefficients each band has.
      inner: (a, b) -> (batch, bands), inner products within each band.
      centred: a -> rows of the same covariance without the mean over the batch, see `Stein`; with
        per-sample statistics a itself.
      trace: () -> (batch, bands), the trace of J within each band by the estimator's
        probes, or None if there are none.
      step_trace: () -> (batch, bands), the trace of the proposed step's own Jacobian dx_next/dx.
    """

    x: Batch
    x0: Batch
    delta: Batch
    previous: Previous
    sigma: Scalar
    sigma_next: Scalar
    sizes: Float[Array, "1 bands"]
    inner: Callable[[Batch, Batch], Bands]
    centred: Callable[[Batch], Batch]
    trace: Callable[[], Bands | None]
    step_trace: Callable[[], Bands]


class Rule:
    """A correction of delta, from a few inner products of a proposed step.

    Every rule rests on Stein's identity: for x = x0 + sigma noise and any smooth v(x),
    E<v, x - x0> = sigma^2 E[div v], so inner products with the unknown clean sample become
    divergences. It holds within each band of an orthonormal basis.
    """

    def moments(self, local: Local) -> Any:
        """What the coefficients depend on: any pytree of (rows, bands) arrays, () for none.

        They are averaged over the batch (over all devices, in one sum), or left as they are with
        per-sample statistics.
        """
        del local
        return ()

    def coefficients(
        self, moments: Any, sizes: Float[Array, "*one bands"], sigma: Scalar, sigma_next: Scalar
    ) -> tuple:
        """A NamedTuple of (bands,) or (batch, bands) arrays; the first is reported as gamma.

        moments: their means (bands,), or those of each sample (batch, bands).
        sizes: how many coefficients each band has; (bands,), or (1, bands) beside (batch, bands).
        """
        raise NotImplementedError

    def delta(self, local: Local, coefficients: Any) -> Batch:
        """The corrected delta; by default the first coefficient times local.delta."""
        return coefficients[0] * local.delta


def event_size(x: Batch) -> int:
    """Number of entries of one sample."""
    return math.prod(x.shape[1:])

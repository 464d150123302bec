"""A solver fitted to one network: grid, gamma and multistep rows, by gradients through the sampler.

A long solve of the same noise is the teacher; a few steps should end where it ends. The grid alone
is LD3 (Tong et al. 2024, arXiv:2405.15506), the rows alone are S4S and BNS (Frankel et al. 2025,
arXiv:2502.17423; Shaul et al. 2024, arXiv:2403.01329), all as corrections of a method in closed
form is GS (arXiv:2510.17699).
"""

import dataclasses
import os
from collections.abc import Callable, Iterable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.flatten_util import ravel_pytree
from jax.typing import ArrayLike
from jaxtyping import Float

from steindiff_jax import _checks, _random
from steindiff_jax._identity import fingerprint
from steindiff_jax._numerics import divide
from steindiff_jax._pytree import pytree
from steindiff_jax.calibration import Calibrated, calibrate
from steindiff_jax.grids import check_sigmas, log_snr_sigmas, unpadded
from steindiff_jax.protocols import (
    Batch,
    Denoiser,
    Key,
    Scalar,
    Sigmas,
    Solver,
    State,
    Step,
    evaluate,
)
from steindiff_jax.sample import DEFAULT, as_data, from_data, sample
from steindiff_jax.stein import Stein, Whole, default_basis
from steindiff_jax.stein.rules import Lengths

PARTS = ("sigmas", "coefficients", "rows", "levels")
Metric = Callable[[Batch, Batch], Array]


class Past(NamedTuple):
    """The memory of the corrected solver, and earlier x0's in the basis, latest first."""

    inner: Any
    x0: Float[Array, "past batch *event"]


@pytree
class Fitted(Calibrated):
    """A solver fitted to one network, with its grid; made by `fit` or `load`.

    Each step is that of a corrected solver, whose coefficients are a table as in `Calibrated`, and
    in each band of its basis differences of earlier estimates are added:

        x_next = q x + (1 - q)(x0 + delta + sum_j c_j (x0_j - x0)),  q = sigma_next / sigma,

    x0_j of j steps ago. The network may be told another level than sigma. It steps along its own
    grid only, as `Calibrated` does.

    Attributes:
      rows: (steps, past, bands), the c_j.
      levels: (steps,), log of the level that the network is told over sigma.
    """

    rows: Float[Array, "steps past bands"] = dataclasses.field(kw_only=True)
    levels: Float[Array, " steps"] = dataclasses.field(kw_only=True)

    _format: ClassVar[str] = "steindiff_jax fitted solver 1"
    _more: ClassVar[dict[str, int]] = {"rows": 3, "levels": 1}

    def init(self, x: Batch, sigmas: Sigmas) -> Past:  # pyright: ignore[reportIncompatibleMethodOverride]
        past = jnp.broadcast_to(jnp.zeros_like(x)[None], (self.rows.shape[1], *x.shape))
        return Past(super().init(x, sigmas), past)

    def step(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        key: Key,
        denoiser: Denoiser,
        state: State,
        sigma: Scalar,
        sigma_next: Scalar,
        *,
        x0: Batch | None = None,
    ) -> tuple[Step, Past]:
        rows, level = self.at(sigma, sigma_next, (self.rows, self.levels))
        x0, nfe = evaluate(denoiser, state.x, sigma * jnp.exp(level), x0)
        inner, past = state.memory
        here = State(state.x, inner)
        step, inner = super().step(key, denoiser, here, sigma, sigma_next, x0=x0)
        basis = self.inner.basis_of(x0.shape)
        rows = basis.partition(x0.shape[1:]).spread(rows)
        now = basis.transform(x0)
        change = basis.inverse((rows[:, None] * (past - now[None])).sum(0))
        delta = (step.delta + change).astype(step.delta.dtype)
        past = jnp.concatenate([now[None], past])[: len(past)]
        return step._replace(delta=delta, nfe=step.nfe + nfe), Past(inner, past)

    @classmethod
    def load(
        cls, path: str | os.PathLike, solver: Solver, denoiser: Denoiser | None = None
    ) -> "Fitted":
        """Read a fitted solver back; `solver` is what was given to `fit`. See `Calibrated.load`."""
        return super().load(path, _corrected(solver), denoiser)  # pyright: ignore[reportReturnType]


def fit(
    key: Key,
    denoiser: Denoiser,
    shape: tuple[int, ...],
    sigmas: ArrayLike,
    solver: Solver = DEFAULT,
    *,
    parts: tuple[str, ...] = ("sigmas", "coefficients", "rows"),
    past: int = 3,
    teacher: ArrayLike | None = None,
    metric: Metric | None = None,
    batches: int = 2,
    held_out: int = 1,
    iterations: int = 40,
    remat: bool = True,
    progress: Callable[[list[int]], Iterable[int]] | None = None,
) -> Fitted:
    """Fit a grid and a solver's numbers to a network, by gradients through `sample` (L-BFGS).

    Not inside `jit`. Starts from the solver as it is, with the coefficients that `calibrate`
    records, and ends with the parameters that were best on batches held out of the descent. The
    same key gives the same result.

    Args:
      key: as in `sample`; keys that are sharded shard the batches too.
      denoiser: as in `sample`.
      shape: (batch, *event) of a batch of noise.
      sigmas: (steps + 1,) grid to start from. Its first value is kept, and its last if that is 0.
      solver: a deterministic one of one evaluation a step, or a `Stein` around one, whose basis is
        then that of the coefficients and rows; one band otherwise. Or a `Fitted`, to go on.
      parts: what is fitted, names of `Fitted`'s attributes: "sigmas", "coefficients", "rows",
        "levels".
      past: how many earlier estimates the rows weigh.
      teacher: grid of the long solve, by default `log_snr_sigmas(40)` from the same start; it is
        made by the default solver.
      metric: (x, target) -> (batch,) or (), what is minimised in the mean; both (batch, *event). By
        default the squared error in each band of the default basis over the variance there of the
        targets, averaged over the bands.
      batches: of noise, all of which each iteration sees, one after the other.
      held_out: further batches, that decide which parameters are kept.
      iterations: of L-BFGS, each one or two gradients by every batch.
      remat: as in `sample`.
      progress: such as `tqdm.tqdm`, put around the list of iterations.

    Returns:
      `Fitted`: `sample(key, denoiser, shape, sigmas=fitted.sigmas, solver=fitted)`.

    Raises:
      ValueError: unknown parts; an invalid grid; numbers that are not positive; what `calibrate`
        refuses; a start or a teacher that does not stay finite.
    """
    from scipy.optimize import minimize  # jax brings it; half a second that others need not wait

    if not parts or set(parts) - set(PARTS):
        raise ValueError(f"parts must be some of {PARTS}, got {parts!r}")
    counts = {"past": past, "batches": batches, "held_out": held_out, "iterations": iterations}
    for name, value in counts.items():
        _checks.count(name, value)
    start = _start(key, denoiser, shape, sigmas, solver, past)
    steps, past, _ = start.rows.shape
    high = start.sigmas[0]
    if teacher is None:
        teacher = log_snr_sigmas(40, jnp.minimum(_positive(start.sigmas)[-1], 0.002), high)

    @jax.jit
    def noise(key: Key) -> Array:
        return high * _random.normal(key, jnp.zeros(shape, high.dtype))

    def pair(i: int) -> tuple[Array, Array]:
        x_init = noise(_random.fold_in(key, i))
        return x_init, sample(key, denoiser, sigmas=teacher, x_init=x_init).x

    pairs = [pair(i) for i in range(batches + held_out)]
    seen, unseen = (
        jax.tree.map(lambda *a: jnp.stack(a), *some) for some in (pairs[:batches], pairs[batches:])
    )
    metric = _banded(seen[1]) if metric is None else metric
    data = as_data(denoiser, high.dtype)
    parameters = {part: _parameter(start, part) for part in parts}
    origin, unravel = ravel_pytree(parameters)

    def build(flat: Array) -> Fitted:
        new = unravel(flat)
        if "sigmas" in new:
            new["sigmas"] = _grid(high, new["sigmas"], steps)
        if "rows" in new:  # what is not there yet has no weight
            here, back = jnp.arange(steps)[:, None, None], jnp.arange(past)[None, :, None]
            new["rows"] = jnp.where(back < here, new["rows"], 0.0)
        return dataclasses.replace(start, **new)

    def end(flat: Array, data: Any, x_init: Batch) -> Batch:
        solver, key = build(flat), jax.random.key(0)
        whole, grid = from_data(data), solver.sigmas
        return sample(key, whole, sigmas=grid, solver=solver, x_init=x_init, remat=remat).x

    @jax.jit
    def loss(flat: Array, data: Any, pairs: tuple[Array, Array]) -> Array:
        def one(pair: tuple[Array, Array]) -> Array:
            return jnp.mean(metric(end(flat, data, pair[0]), pair[1]))

        return lax.map(one, pairs).mean()

    first = best = loss(origin, data, unseen)
    kept = None
    if not jnp.isfinite(first):
        raise ValueError(f"the loss at the start is {first}")
    # In units of what moves the samples as far as they are from their targets: without, descent
    # takes many times longer.
    kinds, h, x_init = _kinds(parameters), 0.01, seen[0][0]
    x = sample(key, denoiser, sigmas=start.sigmas, solver=start, x_init=x_init).x
    here = x_init[None], x[None]
    moved = [loss(origin + h * (kinds == kind), data, here) for kind in np.unique(kinds)]
    scale = jnp.minimum(h * jnp.sqrt(divide(first, jnp.stack(moved), 0.0)), 1.0)[kinds]
    gradient = jax.jit(jax.value_and_grad(loss))

    def at(z: np.ndarray) -> Array:
        return origin + scale * jnp.asarray(z, origin.dtype)

    def descent(z: np.ndarray) -> tuple[float, np.ndarray]:
        value, slopes = gradient(at(z), data, seen)
        if not jnp.isfinite(value):  # a trial that diverges, which the line search turns back from
            return 1e10, np.zeros_like(z)
        return float(value / first), np.asarray(scale * slopes / first, np.float64)

    turns = iter((progress or iter)(list(range(iterations))))

    def judge(z: np.ndarray) -> None:
        nonlocal best, kept
        next(turns, None)
        found = loss(at(z), data, unseen)
        if found < best:
            best, kept = found, at(z)

    how = {"method": "L-BFGS-B", "options": {"maxiter": iterations, "maxcor": 20}}
    minimize(descent, np.zeros(origin.size), jac=True, callback=judge, **how)
    return start if kept is None else build(kept)


def _corrected(solver: Solver) -> Stein:
    """The solver as a `Stein`, in one band if it is not one."""
    return solver if isinstance(solver, Stein) else Stein(solver, basis=Whole())


def _start(
    key: Key, denoiser: Denoiser, shape: tuple, sigmas: ArrayLike, solver: Solver, past: int
) -> Fitted:
    """The solver as it is, on this grid: as `Fitted`, with corrections of 0."""
    sigmas = check_sigmas(sigmas)
    if isinstance(solver, Fitted):
        solver.check(sigmas)
        return solver
    sigmas = jnp.asarray(unpadded(sigmas))
    steps = sigmas.size - 1
    if isinstance(solver, Stein):
        table = calibrate(key, denoiser, shape, sigmas, solver)
    else:
        one = jnp.ones((steps, 1), sigmas.dtype)
        table = Calibrated(_corrected(solver), sigmas, Lengths(one, 0 * one))
    bands = jax.tree.leaves(table.coefficients)[0].shape[1]
    return Fitted(
        table.inner,
        table.sigmas,
        table.coefficients,
        fingerprint(denoiser),
        rows=jnp.zeros((steps, max(min(past, steps - 1), 1), bands), table.sigmas.dtype),
        levels=jnp.zeros(steps, table.sigmas.dtype),
    )


def _parameter(solver: Fitted, part: str) -> Any:
    """What is fitted of a part: itself, or of the grid log of its steps in log sigma, but to 0."""
    value = getattr(solver, part)
    return jnp.log(-jnp.diff(jnp.log(_positive(value)))) if part == "sigmas" else value


def _kinds(parameters: dict[str, Any]) -> np.ndarray:
    """For each entry of what `ravel_pytree` makes of these, one number for all of a step."""
    leaves = jax.tree.leaves(parameters)
    counts = [len(leaf) for leaf in leaves]
    return np.repeat(np.arange(sum(counts)), np.repeat([leaf[:1].size for leaf in leaves], counts))


def _grid(high: Scalar, increments: Array, steps: int) -> Sigmas:
    """The grid of these: from `high`, always decreasing, and then 0 if that is one of the steps."""
    below = high * jnp.exp(-jnp.cumsum(jnp.exp(increments)))
    return jnp.concatenate([high[None], below, jnp.zeros(steps - below.size, high.dtype)])


def _positive(sigmas: Sigmas) -> Array:
    return sigmas[: -1 if sigmas[-1] == 0 else None]


def _banded(targets: Float[Array, "batches batch *event"]) -> Metric:
    """Squared error in each band over the targets' variance there, averaged over the bands."""
    basis = default_basis(targets.shape[1:])
    partition = basis.partition(targets.shape[2:])
    x = jnp.concatenate([basis.transform(target) for target in targets])
    x -= x.mean(0, keepdims=True)
    weights = divide(1.0, partition.inner(x, x).mean(0), 0.0) / len(partition.sizes)

    def metric(x: Batch, target: Batch) -> Array:
        error = basis.transform(x - target)
        return partition.inner(error, error) @ weights

    return metric

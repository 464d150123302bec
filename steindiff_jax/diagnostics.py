"""What a sampler does to stability, in numbers: nothing here steers a solver.

    contractivity         local Lipschitz constants of denoiser and step along a trajectory
    stein_discrepancy     how far states are from the law that the denoiser expects
    perturbation          what a wrong law does to the paper's coefficient
    error_decay           how fast the paper's unclipped update approaches clean samples
    trajectory_report     one row of numbers per step

All are functions of arrays, batched, usable under `jit`, and of memory linear in the dimension d;
`docs/theory.md` derives them. Plots need matplotlib: `pip install "steindiff_jax[plot]"`.
"""

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float

from steindiff_jax import _checks, _random
from steindiff_jax._numerics import at_least_float32, divide, expand, inner
from steindiff_jax.grids import check_sigmas
from steindiff_jax.protocols import (
    Batch,
    Denoiser,
    Estimator,
    Key,
    Numeric,
    Rows,
    Scalar,
    Schedule,
    Sigmas,
    Solution,
    Solver,
    State,
    Step,
)
from steindiff_jax.schedules import EDM
from steindiff_jax.stein import Hutchinson, Stein, Tweedie
from steindiff_jax.stein.correction import Fixed

if TYPE_CHECKING:
    from matplotlib.axes import Axes
else:
    Axes = Any

PerStep = Float[Array, " steps"]
PerStepAndSample = Float[Array, "steps batch"]


# --- Contractivity -------------------------------------------------------------------------------


class SpectralNorm(NamedTuple):
    """Largest singular value of each sample's Jacobian J.

    Attributes:
      value: (batch,) estimate of |J|_2, never above it.
      residual: (batch,) convergence report, |J^T J v - value^2 v| / value^2: some singular value of
        J has a square within this share of value^2; 0 where J is 0. At most a few percent is as
        good as converged.
    """

    value: Rows
    residual: Rows


def spectral_norm(
    key: Key, function: Callable[[Batch], Batch], x: Batch, iterations: int = 20
) -> SpectralNorm:
    """Largest singular value of each sample's Jacobian, by power iteration on J^T J.

    Args:
      key: for the random starts.
      function: (batch, *event) -> (batch, *event), each row a function of the same row of x.
      x: (batch, *event) where the Jacobian is taken.
      iterations: one product with J and one with J^T each, on top of a linearisation.

    Returns:
      `SpectralNorm`; the memory is that of a gradient, whatever the dimension.

    Raises:
      ValueError: for fewer than one iteration.
    """
    _checks.batch("x", x)
    return _power_iteration(function, x, _random.normal(key, x), iterations)[0]


def _power_iteration(
    function: Callable[[Batch], Batch], x: Batch, start: Batch, iterations: int
) -> tuple[SpectralNorm, Batch]:
    """The norm and the unit v of its |J v|, which never falls from one iteration to the next."""
    _checks.count("iterations", iterations)
    _, forward = jax.linearize(function, x)
    backward = jax.linear_transpose(forward, x)

    def iterate(vectors: tuple[Batch, Batch], _: None) -> tuple[tuple, tuple[Rows, Rows]]:
        v = vectors[1]
        jv = forward(v)
        (back,) = backward(jv)
        square = inner(jv, jv)
        miss = back - expand(square, v).astype(v.dtype) * v
        residual = divide(jnp.sqrt(inner(miss, miss)), square, 0.0)
        return (v, _unit(back)), (jnp.sqrt(square), residual)

    start = _unit(start)
    (v, _), (values, residuals) = lax.scan(iterate, (start, start), length=iterations)
    return SpectralNorm(values[-1], residuals[-1]), v


def _unit(v: Batch) -> Batch:
    return v * expand(divide(1.0, jnp.sqrt(inner(v, v)), 0.0), v).astype(v.dtype)


class Contractivity(NamedTuple):
    """Local Lipschitz constants along a trajectory, each (steps, batch).

    Attributes:
      sigma: (steps + 1,) the grid.
      denoiser: L_D, at the start of each step.
      step: L_T, of the solver's step with its history and gamma held fixed.
      certificate: q + (1 - q) L_D with q = sigma_next / sigma, which bounds L_T of a first-order
        step.
      residual: the worse of the two convergence reports, see `SpectralNorm`.
    """

    sigma: Sigmas
    denoiser: PerStepAndSample
    step: PerStepAndSample
    certificate: PerStepAndSample
    residual: PerStepAndSample

    @property
    def violations(self) -> PerStep:
        """Share of samples whose step exceeds the certificate, by 0.1% at least; (steps,).

        None do in a first-order step, whatever the residual.
        """
        return jnp.mean(self.step > 1.001 * self.certificate, axis=1)

    @property
    def expanding(self) -> PerStep:
        """Share of samples that the certificate does not show to contract, L_D >= 1; (steps,)."""
        return jnp.mean(self.certificate >= 1, axis=1)

    def plot(self, axis: Axes | None = None) -> Axes:
        """Medians and the range of the middle 80% of samples over sigma, on matplotlib axes."""
        axis = _axes(1)[0] if axis is None else axis
        sigma = np.asarray(self.sigma[:-1])
        for name, style in (("denoiser", "C0"), ("step", "C1"), ("certificate", "C2")):
            low, middle, high = np.quantile(getattr(self, name), [0.1, 0.5, 0.9], axis=1)
            axis.plot(sigma, middle, style + ".-", label=name)
            axis.fill_between(sigma, low, high, color=style, alpha=0.2, linewidth=0)
        axis.axhline(1.0, color="0.6", linewidth=0.8)
        axis.set(xscale="log", yscale="log", xlabel="sigma", ylabel="local Lipschitz constant")
        axis.invert_xaxis()
        axis.legend()
        return axis


def contractivity(
    key: Key,
    denoiser: Denoiser,
    x_init: Batch,
    sigmas: ArrayLike,
    solver: Solver,
    iterations: int = 20,
) -> Contractivity:
    """Contractivity profile: Lipschitz constants of denoiser and step where the sampler goes.

    A first-order step T = q x + (1 - q) D has L_T <= q + (1 - q) L_D (Li & Zeng 2026,
    arXiv:2606.07835): it contracts if L_D < 1, and sharp denoisers have L_D far above 1, the
    contractivity trap. What a solver adds from its history or from further evaluations is not
    bounded so; `violations` counts where.

    Args:
      key: for the solver's probes and the random starts of the power iterations.
      denoiser: as in `sample`.
      x_init: (batch, *event) at sigmas[0].
      sigmas: (steps + 1,) as in `sample`.
      solver: any whose step acts on each sample by itself. A `Stein` is linearised at its own
        gamma, held fixed, as batch statistics would couple the samples.
      iterations: of each power iteration, see `spectral_norm`.

    Costs 2 + 4 iterations evaluations or so per step and sample.
    """
    sigmas, x_init = at_least_float32(check_sigmas(sigmas)), _checks.batch("x_init", x_init)
    key_steps, key_norms = jax.random.split(key)

    def body(state: State, inputs: tuple[Array, Scalar, Scalar]) -> tuple[State, tuple]:
        index, sigma, sigma_next = inputs
        key_step = jax.random.fold_in(key_steps, index)
        start = _random.normal(jax.random.fold_in(key_norms, index), state.x)
        new, step = solver.advance(key_step, denoiser, state, sigma, sigma_next)
        fixed = Fixed(solver, step.coefficients) if isinstance(solver, Stein) else solver

        def advance(x: Batch) -> Batch:
            return fixed.advance(key_step, denoiser, state._replace(x=x), sigma, sigma_next)[0].x

        # The denoiser's iteration starts where the step's ended, so that L_D >= |J v| along the v
        # of L_T: a first-order step never exceeds its certificate, converged or not.
        t, v = _power_iteration(advance, state.x, start, iterations)
        d, _ = _power_iteration(lambda x: denoiser(x, sigma), state.x, v, iterations)
        q = sigma_next / sigma
        certificate = q + (1 - q) * d.value
        return new, (d.value, t.value, certificate, jnp.maximum(d.residual, t.residual))

    inputs = jnp.arange(sigmas.size - 1), sigmas[:-1], sigmas[1:]
    _, profile = lax.scan(body, State(x_init, solver.init(x_init, sigmas)), inputs)
    return Contractivity(sigmas, *profile)


# --- Stein discrepancy ---------------------------------------------------------------------------


class Discrepancy(NamedTuple):
    """Each (levels,), one for each sigma.

    Attributes:
      ratio: E|x - D|^2 / (sigma^2 E[d - tr J]), 1 for states of the law that the denoiser knows.
      error: standard error of the ratio over the batch.
      sigma: noise level that the states imply, 0 where that of the data alone would be too much.
    """

    ratio: Float[Array, " levels"]
    error: Float[Array, " levels"]
    sigma: Float[Array, " levels"]


def stein_discrepancy(
    key: Key,
    denoiser: Denoiser,
    x: Float[Array, "levels batch *event"],
    sigmas: Array,
    estimator: Estimator = Hutchinson(),
) -> Discrepancy:
    """Energy of the noise that a denoiser sees, over what Stein's identity says it must be.

    For x = x0 + sigma noise and the exact denoiser, E|x - D|^2 = sigma^2 E[d - tr J] (second-order
    Tweedie). Two uses:

    - calibration of a network, on noised data: `x = data + sigmas[:, None, ...] * noise`;
    - drift of a sampler, on its own states: `x` and `sigmas` of the steps' ends, as `keep` records
      them. Above 1 the state holds more noise than its sigma says, below 1 less.

    The implied level is

        sigma_implied^2 = sigma^2 + (E|x - D|^2 - sigma^2 E[d - tr J]) / E|1 - J|_F^2,

    for Gaussian data of any covariance exactly the level that x was noised to (ours).

    Args:
      key: for the estimator's probes.
      denoiser: as in `sample`.
      x: (levels, batch, *event) states.
      sigmas: (levels,) the positive level of each.
      estimator: `Hutchinson(...)` or `Exact()`.

    Raises:
      ValueError: for `Tweedie`, which takes the identity for granted, and for shapes that disagree.
    """
    if isinstance(estimator, Tweedie):
        raise ValueError("Tweedie() assumes the identity that is measured: use Hutchinson()")
    x = _checks.batch("x", x)
    sigmas = jnp.asarray(sigmas, x.dtype)
    _checks.number("sigmas", sigmas, "(0, inf)")
    if x.shape[:1] != sigmas.shape or x.ndim < 2:
        raise ValueError(f"x must have one batch per sigma: {sigmas.shape} of them, got {x.shape}")

    def level(inputs: tuple[Array, Batch, Scalar]) -> tuple[Array, Array, Array]:
        index, x, sigma = inputs
        keys = _random.sample_keys(jax.random.fold_in(key, index), x.shape[0])
        x0, jacobian = estimator(keys, denoiser, x, sigma)
        assert jacobian is not None
        noise = (x - x0) / sigma
        left = jacobian.v - jacobian.jv
        energy, expected = inner(noise, noise), jax.vmap(inner)(jacobian.v, left).sum(0)
        away = jax.vmap(inner)(left, left).sum(0).mean()
        ratio = energy.mean() / expected.mean()
        error = jnp.std(energy - ratio * expected) / expected.mean() / math.sqrt(x.shape[0])
        implied = 1 + (energy - expected).mean() / away
        return ratio, error, sigma * jnp.sqrt(jnp.maximum(implied, 0))

    levels = jnp.arange(x.shape[0]), x, sigmas
    return Discrepancy(*lax.map(level, levels))


# --- The paper's coefficient under a wrong law ---------------------------------------------------


class Perturbation(NamedTuple):
    """The paper's coefficient under the law of the states, and the bound of its error; each ().

    Attributes:
      gamma: `[(1 - 1/alpha) E<u, x> + (sigma^2/alpha) E[div u]] / E|u|^2` over the states.
      target: `E<u, x - D> / E|u|^2`, what the denoiser's own clean estimate asks for.
      constant: C = sigma^2 / (alpha sqrt(E|u|^2)) in |gamma - target| <= C S.
      mismatch: |gamma - target| / C, the least score error S that explains the difference.
      bound: C S where the score of the states is known, else None.
    """

    gamma: Scalar
    target: Scalar
    constant: Scalar
    mismatch: Scalar
    bound: Scalar | None


def perturbation(
    key: Key,
    denoiser: Denoiser,
    state: State,
    sigma: Numeric,
    sigma_next: Numeric,
    solver: Solver,
    *,
    estimator: Estimator = Hutchinson(),
    schedule: Schedule = EDM(),
    score: Callable[[Batch], Batch] | None = None,
) -> Perturbation:
    """What drift does to the clean-target coefficient: |gamma - target| <= C S(sampler, data).

    By Stein's identity under the sampler's law p~,

        gamma - target = (sigma^2 / alpha) E~<u, r> / E~|u|^2,  r = grad log p - grad log p~,

    whence the bound by Cauchy-Schwarz, with S^2 = E~|r|^2 (our derivation of the score-controlled
    bound of arXiv:2606.07835).

    Args:
      key: for the probes.
      denoiser: as in `sample`; grad log p = (D - x) / sigma^2 in the library's coordinates.
      state: `State(x, solver.init(x, sigmas))` for a sampler's first step, or a later state.
      sigma: where the step starts.
      sigma_next: where it ends.
      solver: not corrected: u = x - T(x).
      estimator: `Hutchinson(...)` or `Exact()`, whose probes are taken through the whole step.
      schedule: coordinates alpha x in which u is taken, as in `CleanTarget`.
      score: grad log p~ at (batch, *event) in the library's coordinates, where it is known.

    Raises:
      ValueError: for `Tweedie`, which knows no derivative of the step.
    """
    if isinstance(estimator, Tweedie):
        raise ValueError("Tweedie() knows no derivative of the step: use Hutchinson() or Exact()")
    key_probe, key_step = jax.random.split(key)
    x = _checks.batch("state.x", state.x)
    _checks.number("sigma", sigma, "(0, inf)")
    _checks.number("sigma_next / sigma", sigma_next / sigma, "[0, 1)")
    sigma, sigma_next = jnp.asarray(sigma, x.dtype), jnp.asarray(sigma_next, x.dtype)
    (_, alpha, sigma_t), (_, alpha_next, _) = schedule.at(sigma), schedule.at(sigma_next)

    def residual(x: Batch) -> Batch:
        new, _ = solver.advance(key_step, denoiser, state._replace(x=x), sigma, sigma_next)
        return alpha * x - alpha_next * new.x

    x0, jacobian = estimator(_random.sample_keys(key_probe, x.shape[0]), denoiser, x, sigma)
    assert jacobian is not None
    u, derivative = jax.linearize(residual, x)
    trace = lax.map(lambda v: inner(v, derivative(v)), jacobian.v).sum(0).mean() / alpha
    energy = inner(u, u).mean()
    drift = (1 - 1 / alpha) * alpha * inner(u, x).mean()
    gamma = (drift + sigma_t**2 / alpha * trace) / energy
    target = inner(u, alpha * x - x0).mean() / energy
    constant = sigma_t**2 / alpha / jnp.sqrt(energy)
    bound = None
    if score is not None:
        wrong = (score(x) - (x0 - x) / sigma**2) / alpha  # scores of alpha x
        bound = constant * jnp.sqrt(inner(wrong, wrong).mean())
    return Perturbation(gamma, target, constant, jnp.abs(gamma - target) / constant, bound)


class Decay(NamedTuple):
    """The paper's update followed with the clean samples known.

    Attributes:
      gamma: (steps,) the least-squares coefficient, clipped as asked.
      rate: (steps,) rho = b^2 / (c E), the share of the error that the best coefficient removes.
      error: (steps + 1,) E|x - x0|^2 per sample.
    """

    gamma: PerStep
    rate: PerStep
    error: Float[Array, " nodes"]

    @property
    def product(self) -> PerStep:
        """Share of the error left after each step by the product of 1 - rho; (steps,)."""
        return jnp.cumprod(1 - self.rate)


def error_decay(
    key: Key,
    denoiser: Denoiser,
    clean: Batch,
    sigmas: ArrayLike,
    solver: Solver,
    *,
    gamma_min: Numeric = -math.inf,
    gamma_max: Numeric = math.inf,
) -> Decay:
    """Error to known clean samples along the update x' = (1 - gamma) x + gamma T(x).

    With u = x - T(x), b = `E<u, x - x0>` and c = E|u|^2 the best coefficient is b / c, and then
    E' = E - b^2 / c = (1 - rho) E; with another, E' = E - 2 gamma b + gamma^2 c, less than E if and
    only if 0 < gamma < 2 b / c (arXiv:2606.07835). Unclipped this converges to the posterior
    mean, not to samples: a diagnostic, no sampler. Here alpha = 1.

    Args:
      key: for the noise that is added to the clean samples, and for the solver.
      denoiser: as in `sample`.
      clean: (batch, *event) samples of the data.
      sigmas: (steps + 1,) as in `sample`.
      solver: not corrected.
      gamma_min: lower clip of the coefficient.
      gamma_max: upper clip.
    """
    sigmas, clean = at_least_float32(check_sigmas(sigmas)), _checks.batch("clean", clean)
    _checks.clip(gamma_min, gamma_max)
    key_noise, key_steps = jax.random.split(key)

    def body(carry: tuple, inputs: tuple[Array, Scalar, Scalar]) -> tuple[tuple, tuple]:
        state, error = carry
        index, sigma, sigma_next = inputs
        key_step = jax.random.fold_in(key_steps, index)
        new, _ = solver.advance(key_step, denoiser, state, sigma, sigma_next)
        u, away = state.x - new.x, state.x - clean
        b, c = inner(u, away).mean(), inner(u, u).mean()
        gamma = jnp.clip(divide(b, c, 0.0), gamma_min, gamma_max)
        x = state.x - gamma * u
        after = inner(x - clean, x - clean).mean()
        return (new._replace(x=x), after), (gamma, divide(b**2, c * error, 0.0), after)

    x = clean + sigmas[0] * _random.normal(key_noise, clean)
    start = inner(x - clean, x - clean).mean()
    inputs = jnp.arange(sigmas.size - 1), sigmas[:-1], sigmas[1:]
    _, (gamma, rate, error) = lax.scan(body, (State(x, solver.init(x, sigmas)), start), inputs)
    return Decay(gamma, rate, jnp.append(start, error))


# --- Reports of a run ----------------------------------------------------------------------------


class Kept(NamedTuple):
    """What `keep` records of each step; stacked, each (steps, batch, *event).

    Attributes:
      x: where the step ended.
      x0: see `Step`.
      delta: see `Step`.
    """

    x: Batch
    x0: Batch
    delta: Batch


def keep(state: State, step: Step) -> Kept:
    """For `sample(..., record=keep)`: what `trajectory_report` reads."""
    return Kept(state.x, step.x0, step.delta)


class Report(NamedTuple):
    """One row of numbers per step, each (steps,); print it, or `plot` it.

    Attributes:
      sigma: where the step starts.
      sigma_next: where it ends.
      gamma: batch mean of the coefficient.
      x: root mean square, per entry, of the state at the end.
      x0: root mean square of the denoiser.
      delta: root mean square of what solver and correction added to the denoiser.
      finite: share of finite samples.
      ratio: Stein discrepancy of the state at the end, NaN where not asked for and at
        sigma_next = 0.
      implied: the noise level that it implies.
    """

    sigma: PerStep
    sigma_next: PerStep
    gamma: PerStep
    x: PerStep
    x0: PerStep
    delta: PerStep
    finite: PerStep
    ratio: PerStep
    implied: PerStep

    def __str__(self) -> str:
        lines = ["step " + " ".join(f"{name:>10}" for name in self._fields)]
        for i, row in enumerate(zip(*map(np.asarray, self), strict=True)):
            lines.append(f"{i:4} " + " ".join(f"{value:10.4g}" for value in row))
        return "\n".join(lines)

    def plot(self, axes: Sequence[Axes] | np.ndarray | None = None) -> Sequence[Axes] | np.ndarray:
        """Gamma, discrepancy and norms over the steps, on three matplotlib axes."""
        axes = _axes(3) if axes is None else axes
        steps = np.arange(self.gamma.shape[0])
        axes[0].plot(steps, self.gamma, ".-")
        axes[0].set(ylabel="gamma")
        axes[1].plot(steps, self.ratio, ".-")
        axes[1].set(ylabel="Stein discrepancy at the end", yscale="log")
        for axis in axes[:2]:
            axis.axhline(1.0, color="0.6", linewidth=0.8)
        for name in ("x", "x0", "delta"):
            axes[2].plot(steps, getattr(self, name), ".-", label=name)
        axes[2].set_yscale("log", nonpositive="mask")
        axes[2].set(ylabel="root mean square")
        axes[2].legend()
        for axis in axes:
            axis.set(xlabel="step")
        return axes


def trajectory_report(
    solution: Solution,
    sigmas: ArrayLike,
    denoiser: Denoiser | None = None,
    *,
    key: Key | None = None,
    estimator: Estimator = Hutchinson(),
) -> Report:
    """Coefficient, norms and, with the denoiser, the Stein discrepancy after each step of a run.

    Args:
      solution: of `sample(..., record=keep)`.
      sigmas: (steps + 1,) the grid of that run.
      denoiser: evaluated once more at each state, with probes; leave it out to skip that.
      key: for the probes, needed with the denoiser.
      estimator: see `stein_discrepancy`.

    Raises:
      ValueError: a solution without that record, a grid of another length, a missing key.
    """
    sigmas = at_least_float32(check_sigmas(sigmas))
    kept, steps = solution.record, sigmas.size - 1
    if not isinstance(kept, Kept):
        raise ValueError("the solution has no record to report: run sample(..., record=keep)")
    _checks.batch("the record", kept.x)
    if kept.x.shape[0] != steps:
        raise ValueError(f"sigmas must be those of the run, {kept.x.shape[0] + 1}, got {steps + 1}")
    ratio = implied = jnp.full(steps, jnp.nan, sigmas.dtype)
    if denoiser is not None:
        if key is None:
            raise ValueError("a key is needed for the probes of the Stein discrepancy")
        inside = sigmas[1:] > 0
        levels = jnp.where(inside, sigmas[1:], sigmas[:-1])  # anything positive at the end
        found = stein_discrepancy(key, denoiser, kept.x, levels, estimator)
        ratio, implied = (jnp.where(inside, f, jnp.nan) for f in (found.ratio, found.sigma))

    def rms(a: Array) -> PerStep:
        return jnp.sqrt(jnp.mean(jnp.square(at_least_float32(a)), axis=range(1, a.ndim)))

    gamma = solution.info.gamma.reshape(steps, -1).mean(1)
    finite: Bool[Array, "steps batch"] = solution.info.finite
    return Report(
        sigmas[:-1],
        sigmas[1:],
        gamma,
        rms(kept.x),
        rms(kept.x0),
        rms(kept.delta),
        finite.mean(axis=1, dtype=sigmas.dtype),
        ratio,
        implied,
    )


def _axes(count: int) -> Sequence[Axes]:
    try:
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise ImportError('plotting needs matplotlib: pip install "steindiff_jax[plot]"') from error
    _, axes = plt.subplots(1, count, figsize=(4 * count, 3.2), layout="constrained", squeeze=False)
    return list(axes[0])

"""diffrax, both ways: its solvers Stein-corrected, and this library's solvers in `diffeqsolve`.

The probability-flow ODE in the time t = -log sigma, half the log-SNR (Lu et al. 2022,
arXiv:2206.00927), is dy/dt = D(y, sigma) - y. This time increases while sampling, so diffrax never
negates it. sigma = 0 lies at t = infinity: a solve ends at the smallest positive sigma, and
`to_data` makes the last step, to the denoiser's estimate.

    sigmas = sd.karras_sigmas(8)
    ts = times(sigmas[:-1])
    solution = diffrax.diffeqsolve(
        probability_flow(denoiser, sigmas), as_diffrax(sd.DPMpp2M()), ts[0], ts[-1], None, y0,
        stepsize_controller=diffrax.StepTo(ts),
    )
    samples = to_data(solution, denoiser)

`SteinCorrected(diffrax.Heun())` takes the place of any explicit solver there. It is `Stein` itself
around one step of that solver, made a diffrax solver the same way as any other of this library.
"""

import dataclasses
from typing import Any, ClassVar

import diffrax
import equinox as eqx
import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.core import Tracer
from jax.typing import ArrayLike

from steindiff_jax import _checks, _random
from steindiff_jax._numerics import at_least_float32, inner
from steindiff_jax._pytree import pytree, static
from steindiff_jax.grids import check_sigmas
from steindiff_jax.protocols import (
    AnySolver,
    Batch,
    Denoiser,
    Estimator,
    Key,
    Numeric,
    Rows,
    Scalar,
    Sigmas,
    Solver,
    State,
    Step,
    ddim,
    evaluate,
)
from steindiff_jax.stein import Exact, Stein


@pytree
class ProbabilityFlow:
    """The vector field of `probability_flow`, (t, y, args) -> dy/dt; args are not used."""

    denoiser: Denoiser
    sigmas: Sigmas | None = None

    def __call__(self, t: Numeric, y: Batch, args: Any) -> Batch:
        del args
        return self.denoiser(y, jnp.exp(-t)) - y


def probability_flow(denoiser: Denoiser, sigmas: ArrayLike | None = None) -> diffrax.ODETerm:
    """The probability-flow ODE dy/dt = D(y, sigma) - y in the increasing time t = -log sigma.

    Args:
      denoiser: (y, sigma) -> x0 estimate, with y = x0 + sigma * noise of shape (batch, *event).
      sigmas: (steps + 1,) the grid, needed by multistep solvers (`as_diffrax`), whose weights
        are computed from all of it; its last 0 counts as a step, as in `sample`. With a grid a
        solver of this module steps along it and nowhere else.

    ValueError for a grid that is not one.
    """
    grid = None if sigmas is None else at_least_float32(check_sigmas(sigmas))
    return diffrax.ODETerm(ProbabilityFlow(denoiser, grid))


def times(sigmas: ArrayLike) -> Array:
    """The times -log sigma of a grid without its last 0, such as `karras_sigmas(8)[:-1]`.

    ValueError for an invalid grid, or one that ends in 0 as far as its values are known.
    """
    grid = at_least_float32(check_sigmas(sigmas))
    if not isinstance(grid, Tracer) and grid[-1] == 0:
        raise ValueError(f"sigma = 0 lies at t = infinity: pass sigmas[:-1], got sigmas={grid}")
    return -jnp.log(grid)


def to_data(solution: diffrax.Solution, denoiser: Denoiser) -> Batch:
    """The step to sigma = 0 from the last saved state of a solve: D(y, sigma); (batch, *event).

    One more evaluation, the one that `sample` makes on a grid that ends in 0. ValueError for a
    solve that saved no state.
    """
    if solution.ts is None or solution.ys is None:
        raise ValueError("the solve saved no state: its saveat needs t1=True, ts or steps")
    last = jnp.isfinite(solution.ts).sum() - 1  # SaveAt(steps=True) pads with infinity
    return denoiser(solution.ys[last], jnp.exp(-solution.ts[last]))


@pytree
class FromDiffrax(Solver):
    """One step of an explicit Runge-Kutta method of diffrax in t = -log sigma, as a `Solver`.

    It remembers nothing: methods that share an evaluation between steps (FSAL) make it again, at
    the state that was in fact reached. A step to sigma = 0 is first order, one evaluation.

    solver: Euler, Heun, Midpoint, Ralston, Bosh3, Tsit5, Dopri5, Dopri8. ValueError for others.
    """

    solver: diffrax.AbstractSolver = static()

    def __post_init__(self) -> None:
        tableau = getattr(self.solver, "tableau", None)
        explicit = isinstance(tableau, diffrax.ButcherTableau) and not tableau.implicit
        if isinstance(self.solver, type) or not (
            explicit or isinstance(self.solver, diffrax.Euler)
        ):
            raise ValueError(
                "only explicit Runge-Kutta methods, such as diffrax.Heun(), make a step on their "
                f"own that can be corrected, got {self.solver!r}"
            )

    @property
    def stages(self) -> int:
        tableau = getattr(self.solver, "tableau", None)
        return 1 if tableau is None else tableau.num_stages

    def step(
        self,
        key: Key,
        denoiser: Denoiser,
        state: State,
        sigma: Scalar,
        sigma_next: Scalar,
        *,
        x0: Batch | None = None,
    ) -> tuple[Step, tuple[()]]:
        del key
        x = state.x
        x0, nfe = evaluate(denoiser, x, sigma, x0)
        # A step to 0, or one of no length (a solve that has ended, under vmap), is not made.
        made = (sigma_next > 0) & (sigma_next < sigma)
        end = jnp.where(made, sigma_next, sigma / 2)
        t0, t1 = -jnp.log(sigma), -jnp.log(end)

        def drift(t: Numeric, y: Batch, args: Any) -> Batch:
            del args
            # The method begins at (t0, x), where the denoiser has been evaluated already.
            return lax.cond(t == t0, lambda: x0, lambda: denoiser(y, jnp.exp(-t))) - y

        def beyond() -> Batch:
            """What the method adds to D in x_next = q x + (1 - q)(D + delta)."""
            term, method = diffrax.ODETerm(drift), self.solver
            if hasattr(method, "scan_kind"):  # the default loop over stages has no forward mode
                method = dataclasses.replace(method, scan_kind="bounded")
            memory = method.init(term, t0, t1, x, None)
            y1, *_ = method.step(term, t0, t1, x, None, memory, made_jump=False)
            return (y1 - ddim(x, x0, sigma, end)) / -jnp.expm1(t0 - t1)

        delta = lax.cond(made, beyond, lambda: jnp.zeros_like(x0))
        return Step(x0, delta, nfe + jnp.where(made, self.stages - 1, 0)), ()


class SigmaInterpolation(diffrax.AbstractLocalInterpolation):
    """Quadratic in sigma through both ends of a step, with the slope of the ODE at its start.

    That is the first-order path q y0 + (1 - q) x0, straight in sigma, and the rest of y1 in
    proportion to (sigma0 - sigma)^2. Third order locally, as far as y1 is.
    """

    t0: Any
    t1: Any
    y0: Array
    y1: Array
    x0: Array

    def evaluate(self, t0: Any, t1: Any = None, left: bool = True) -> Array:
        if t1 is not None:
            return self.evaluate(t1, left=left) - self.evaluate(t0, left=left)

        def straight(t: Any) -> Array:
            return self.x0 + jnp.exp(self.t0 - t) * (self.y0 - self.x0)

        part = jnp.expm1(self.t0 - t0) / jnp.expm1(self.t0 - self.t1)
        return straight(t0) + part**2 * (self.y1 - straight(self.t1))


class AsDiffrax(diffrax.AbstractSolver):
    """A solver of this library as a solver of diffrax; made by `as_diffrax`, `SteinCorrected`."""

    solver: AnySolver
    key_data: Array
    key_impl: Any = eqx.field(static=True)

    term_structure: ClassVar = diffrax.ODETerm
    interpolation_cls: ClassVar = SigmaInterpolation

    def __init__(self, solver: AnySolver, key: Key | None = None) -> None:
        _checks.instance("solver", solver, Solver, "a deterministic solver such as DPMpp2M()")
        self.solver = solver
        # Plain numbers: in reverse mode, DirectAdjoint's loop cannot carry a typed key.
        key = jax.random.key(0) if key is None else key
        self.key_data, self.key_impl = jax.random.key_data(key), jax.random.key_impl(key)

    def init(self, terms: Any, t0: Any, t1: Any, y0: Batch, args: Any) -> tuple:
        del args
        flow, sigma, sigma_next = _flow(terms, t0, t1)
        grid = flow.sigmas
        if grid is None:
            grid = jnp.stack([sigma, sigma_next])
            longer = jnp.stack([sigma, sigma_next, sigma_next])
            if jax.eval_shape(self.solver.init, y0, grid) != jax.eval_shape(
                self.solver.init, y0, longer
            ):
                raise ValueError(
                    f"{self.solver!r} computes its weights from all of the grid: pass it as "
                    "probability_flow(denoiser, sigmas)"
                )
        return self.solver.init(y0, grid.astype(sigma.dtype)), jnp.zeros((), jnp.int32)

    def step(
        self,
        terms: Any,
        t0: Any,
        t1: Any,
        y0: Batch,
        args: Any,
        solver_state: tuple,
        made_jump: Any,
    ) -> tuple:
        del args, made_jump
        memory, index = solver_state
        flow, sigma, sigma_next = _flow(terms, t0, t1)
        if flow.sigmas is None:
            sigma_next = eqx.error_if(
                sigma_next, sigma_next > sigma, "sigma must decrease: solve from ts[0] to ts[-1]"
            )
        else:
            grid = lax.dynamic_slice_in_dim(flow.sigmas.astype(sigma.dtype), index, 2)
            here = jnp.stack([sigma, sigma_next])
            sigma, sigma_next = eqx.error_if(
                grid,
                (jnp.abs(grid - here) > 1e-5 * grid).any(),
                "the step is not one of the grid's: use StepTo(times(sigmas[:-1])), or leave the "
                "grid out of probability_flow",
            )
        # As `sample` does it: one key draws the same probes.
        key = jax.random.wrap_key_data(self.key_data, impl=self.key_impl)
        key = jax.random.fold_in(jax.random.split(key)[1], index)
        state = State(y0, memory)
        new, step = self.solver.advance(key, flow.denoiser, state, sigma, sigma_next)
        dense = {"y0": y0, "y1": new.x, "x0": step.x0}
        return new.x, None, dense, (new.memory, index + 1), diffrax.RESULTS.successful

    def func(self, terms: Any, t0: Any, y0: Batch, args: Any) -> Batch:
        return terms.vf(t0, y0, args)


def as_diffrax(solver: AnySolver, *, key: Key | None = None) -> AsDiffrax:
    """A solver of this library for `diffrax.diffeqsolve`, with its history in the solver state.

    The term must be a `probability_flow`, for a multistep solver one with its grid, and the steps
    those of the grid: `StepTo(times(sigmas[:-1]))`. The states are those of `sample`.

    Args:
      solver: any deterministic one, `Stein(...)` too.
      key: for the probes, the one that was given to `sample`; default key(0).

    Raises:
      ValueError: a stochastic solver; in `diffeqsolve`, another term, or a solver that needs a grid
        where there is none. RuntimeError from inside a solve for steps that leave the grid or
        raise sigma, and, from diffrax, for an adaptive controller: there is no error estimate.
    """
    return AsDiffrax(solver, key)


class SteinCorrected(AsDiffrax):
    """The Stein correction of an explicit Runge-Kutta solver of diffrax, itself a diffrax solver.

    The candidate is one step of `solver` in t = -log sigma. The rules see what it adds to the
    first-order step, delta = (y1 - q y0) / (1 - q) - D with q = sigma' / sigma, whatever the
    method. That first-order step is exponential Euler (DDIM). Euler's method in t is longer,
    t1 - t0 > 1 - q, so it has a delta too, and `StepEnergy` shortens it towards DDIM.

    The state y0 is a batch (batch, *event). Under `vmap` over solves of (1, *event) each, use
    statistics="sample", or "batch" with the axis_name of the vmap, which also gives every solve
    probes of its own. Gradients: any adjoint that differentiates the steps themselves
    (RecursiveCheckpointAdjoint, DirectAdjoint, ForwardMode); with an axis_name DirectAdjoint.

    Guaranteed of the corrected y1: nothing evaluated at the uncorrected one is carried over (a FSAL
    method costs one evaluation a step more than on its own, others none); dense output and
    SaveAt(ts=...) are continuous and pass through every corrected state (`SigmaInterpolation`).
    There is no error estimate, since the method's own is that of the candidate: an adaptive
    controller is diffrax's RuntimeError. `diffrax.HalfSolver(SteinCorrected(...))` estimates the
    corrected step's error by halving it, and may be used with one; its dense output is that of the
    whole step, not of the halves.

    Args:
      solver: Euler, Heun, Midpoint, Ralston, Bosh3, Tsit5, Dopri5, Dopri8.
      key: for the probes, one draw per step; default key(0).
      **options: rule, estimator, basis, statistics, axis_name, as in `Stein`.

    Raises:
      ValueError: any other solver, or what `Stein` refuses. RuntimeError as in `as_diffrax`.
    """

    def __init__(
        self, solver: diffrax.AbstractSolver, *, key: Key | None = None, **options: Any
    ) -> None:
        super().__init__(Stein(FromDiffrax(solver), **options), key)

    def order(self, terms: Any) -> int:
        """2 at most, where 1 - gamma is of the order of the step."""
        return min(2, self.solver.inner.solver.order(terms))  # pyright: ignore


def log_likelihood(
    term: diffrax.ODETerm,
    x: Batch,
    *,
    sigma_min: Numeric = 0.002,
    sigma_max: Numeric = 80.0,
    estimator: Estimator = Exact(),
    key: Key | None = None,
    solver: diffrax.AbstractSolver = diffrax.Tsit5(),
    stepsize_controller: diffrax.AbstractStepSizeController = diffrax.PIDController(1e-5, 1e-5),
    **options: Any,
) -> Rows:
    """Log-density of the probability flow at level sigma_min, in nats; (batch,).

    The instantaneous change of variables along the flow to sigma_max, where the density is taken to
    be N(0, sigma_max^2):

        log p(x) = log N(y; 0, sigma_max^2) + int_sigma_min^sigma_max tr(1 - J) dsigma / sigma

    (Chen et al. 2018, arXiv:1806.07366; Song et al. 2021, arXiv:2011.13456, section 4.3). Where
    the data have mean m that end is wrong by about `<m, y>` / sigma_max^2. The density is that of
    data with noise of sigma_min; for that of a network's own alpha x subtract d log alpha.

    Args:
      term: from `probability_flow`; its grid is not used.
      x: (batch, *event) at sigma_min.
      sigma_min: level of the density.
      sigma_max: level of the prior.
      estimator: `Exact()`, or `Hutchinson(...)`, unbiased for the steps taken, with one draw of
        probes for the whole solve.
      key: for the probes; default key(0).
      solver: any solver of diffrax for ODEs.
      stepsize_controller: its controller.
      **options: others of `diffrax.diffeqsolve`, such as dt0 or adjoint.

    Raises:
      ValueError: another term; `Tweedie`, which holds in the mean over samples only.
    """
    flow, _, _ = _flow(term, 0.0, 0.0)
    x = _checks.batch("x", x)
    for name, value in {"sigma_min": sigma_min, "sigma_max": sigma_max}.items():
        _checks.number(name, value, "(0, inf)")
    _checks.number("sigma_min / sigma_max", sigma_min / sigma_max, "(0, 1)")
    keys = _random.sample_keys(jax.random.key(0) if key is None else key, x.shape[0])

    def drift(t: Numeric, state: tuple, args: Any) -> tuple:
        del args
        y, _ = state
        x0, jacobian = estimator(keys, flow.denoiser, y, jnp.exp(-t))
        if jacobian is None:
            raise ValueError(
                f"{estimator!r} holds in the mean over samples only: use Exact() or Hutchinson()"
            )
        return x0 - y, -jax.vmap(inner)(jacobian.v, jacobian.v - jacobian.jv).sum(0)

    state = (x, jnp.zeros(x.shape[:1], x.dtype))
    start, end = -jnp.log(jnp.asarray([sigma_min, sigma_max], x.dtype))
    jax.eval_shape(drift, start, state, None)  # here errors are still themselves
    options.setdefault("dt0", None)
    solution = diffrax.diffeqsolve(
        diffrax.ODETerm(drift),
        solver,
        start,
        end,
        y0=state,
        stepsize_controller=stepsize_controller,
        **options,
    )
    y, gained = jax.tree.map(lambda saved: saved[-1], solution.ys)
    noise = y / sigma_max
    size = noise[0].size
    prior = -inner(noise, noise) / 2 - size * (jnp.log(2 * jnp.pi) / 2 + jnp.log(sigma_max))
    return prior + gained


def _flow(terms: Any, t0: Any, t1: Any) -> tuple[ProbabilityFlow, Scalar, Scalar]:
    """The vector field inside a term as diffrax hands it on, and the sigmas of a step."""
    flow = getattr(getattr(terms, "term", terms), "vector_field", None)
    if not isinstance(flow, ProbabilityFlow):
        raise ValueError(f"the term must be probability_flow(denoiser), got {terms!r}")
    # diffrax negates time where it decreases.
    direction = getattr(terms, "direction", 1)
    return flow, jnp.exp(-direction * jnp.asarray(t0)), jnp.exp(-direction * jnp.asarray(t1))

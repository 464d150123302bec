"""A solver as a scheduler of MaxDiffusion, or of diffusers' Flax pipelines.

    from steindiff_jax.interop.maxdiffusion import Scheduler

    pipeline.scheduler = Scheduler.like(pipeline.scheduler, sd.Stein(sd.UniPC(2)))
    pipeline.scheduler_state = pipeline.scheduler.create_state()

A pipeline of theirs calls the network and hands the output to `step`, so the solver may not call a
denoiser itself: multistep solvers, DDIM, `Stein` with free statistics around them, and tables of
coefficients (`Calibrated`) will do. Samples stay in the network's own coordinates, alpha x0 + sigma
noise. Needs no other library.
"""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from steindiff_jax import _checks
from steindiff_jax._numerics import at_least_float32
from steindiff_jax._pytree import pytree
from steindiff_jax.denoisers import PREDICTIONS
from steindiff_jax.protocols import Batch, Scalar, Schedule, Sigmas, Solver, State, ddim
from steindiff_jax.schedules import RectifiedFlow, VPCosine

NEAR_ONE = 1 - 2**-24  # where a flow starts that is to start at t = 1: the last float32 below it


@pytree
class SchedulerState:
    """What their loops carry.

    Attributes:
      timesteps: (steps,) what the network is told.
      sigmas: (steps + 1,) ratios, as everywhere in this library.
      init_noise_sigma: () scale of the noise that sampling starts from.
      num_inference_steps: steps.
      step_index: () the step that comes next.
      memory: the solver's.
      last_sample: for pipelines that set it; not used.
      common: as last_sample.
    """

    timesteps: Any = None
    sigmas: Any = None
    init_noise_sigma: Any = 1.0
    num_inference_steps: Any = None
    step_index: Any = 0
    memory: Any = ()
    last_sample: Any = None
    common: Any = None

    def replace(self, **changes: Any) -> "SchedulerState":
        """The state with other values."""
        return dataclasses.replace(self, **changes)


class Output(NamedTuple):
    """What `Scheduler.step` returns: the sample after the step, and the state of the next one."""

    prev_sample: Any
    state: SchedulerState

    def to_tuple(self) -> tuple[Any, SchedulerState]:
        """Both in a plain tuple."""
        return self.prev_sample, self.state


@dataclasses.dataclass(frozen=True, eq=False)
class Scheduler:
    """A solver with the interface of MaxDiffusion's schedulers.

    Made by `like` from a scheduler of theirs, or from its parts, such as those of `load_scheduler`:
    Scheduler(solver, **scheduler._asdict()).

    Attributes:
      solver: deterministic, with one evaluation a step.
      schedule: how the network was trained.
      prediction: "x0", "epsilon", "v", "score" or "flow".
      grid: steps -> sigmas (steps + 1,).
      time_scale: the network is told time_scale times the schedule's time.
      sigma_data: not used.
      theirs: the scheduler that `like` was given.

    Raises:
      ValueError: a solver that evaluates the denoiser itself (Heun and all of several stages,
        estimators with probes), a stochastic one, another prediction.
    """

    solver: Any  # what is no Solver is refused below
    schedule: Schedule
    prediction: str
    grid: Callable[[int], Sigmas]
    time_scale: float = 1.0
    sigma_data: float = 0.5
    theirs: Any = None

    has_state = True

    def __post_init__(self) -> None:
        _checks.instance("solver", self.solver, Solver, "a deterministic solver such as UniPC(2)")
        if self.prediction not in PREDICTIONS:
            raise ValueError(f"prediction must be one of {[*PREDICTIONS]}, got {self.prediction!r}")
        x, sigmas = jnp.zeros((2, 4)), jnp.array([2.0, 1.0, 0.5])
        if not hasattr(self.solver, "coefficients"):  # a table is of one grid, and one basis
            jax.eval_shape(lambda: self._advance(x, self.solver.init(x, sigmas), x, *sigmas[:2]))

    @classmethod
    def like(cls, theirs: Any, solver: Solver) -> "Scheduler":
        """The solver in place of a scheduler of theirs: the same prediction, grid and times.

        Theirs may be FlaxDDIM, FlaxPNDM, FlaxDPMSolverMultistep, FlaxEulerDiscrete,
        FlaxLMSDiscrete, FlaxUniPCMultistep, FlaxFlowMatch or FlaxRectifiedFlowMultistepScheduler.
        Options that `set_timesteps` is given beside the shape are passed to theirs.

        ValueError for another one, or another prediction_type.
        """
        flow = _is_flow(theirs)
        kind = "flow_prediction" if flow else theirs.config.prediction_type
        names = {
            "epsilon": "epsilon",
            "sample": "x0",
            "v_prediction": "v",
            "flow_prediction": "flow",
        }
        if kind not in names:
            raise ValueError(f"prediction_type must be one of {[*names]}, got {kind!r}")
        schedule = RectifiedFlow() if flow else VPCosine()  # whose times are never asked for
        return cls(solver, schedule, names[kind], _no_grid, theirs=theirs)

    @property
    def config(self) -> Any:
        """Of the scheduler in whose place this one is."""
        if self.theirs is not None:
            return self.theirs.config
        return SimpleNamespace(num_train_timesteps=int(self.time_scale), solver=self.solver)

    def create_state(self, common: Any = None) -> SchedulerState:
        """The state before `set_timesteps`."""
        return SchedulerState(common=common)

    def set_timesteps(
        self,
        state: SchedulerState,
        num_inference_steps: int | None = None,
        shape: tuple[int, ...] | None = None,
        **options: Any,
    ) -> SchedulerState:
        """The state at the start of sampling.

        shape: (batch, *event) of the samples; ValueError without it, if the solver has a memory.
        """
        samples = shape or options.get("samples_shape") or ()
        if self.theirs is None:
            if options.keys() - {"samples_shape"}:
                raise ValueError(f"options are for schedulers made by `like`, got {[*options]}")
            sigmas = self.grid(num_inference_steps)  # pyright: ignore[reportArgumentType]
            times, _, start = self.schedule.at(sigmas[:-1])
            times, start = self.time_scale * times, start[0]
        else:
            sigmas, times, start = _of_theirs(self.theirs, num_inference_steps, shape, options)
        sigmas = at_least_float32(sigmas)
        memory = self.solver.init(jnp.zeros(samples or (1,), sigmas.dtype), sigmas)
        if not samples and jax.tree.leaves(memory):
            raise ValueError(f"set_timesteps needs shape=(batch, *event) for {self.solver!r}")
        return state.replace(
            timesteps=times,
            sigmas=sigmas,
            init_noise_sigma=start,
            num_inference_steps=times.shape[0],
            step_index=jnp.zeros((), jnp.int32),
            memory=memory,
        )

    def set_begin_index(self, state: SchedulerState, begin_index: int = 0) -> SchedulerState:
        """Begin later in the grid, as image to image does."""
        return state.replace(step_index=jnp.asarray(begin_index, jnp.int32))

    def scale_model_input(self, state: SchedulerState, sample: Array, timestep: Any) -> Array:
        """The sample: it is what the network sees."""
        del state, timestep
        return sample

    def step(
        self,
        state: SchedulerState,
        model_output: Array,
        timestep: Any,
        sample: Array,
        return_dict: bool = True,
        **options: Any,
    ) -> Output | tuple[Array, SchedulerState]:
        """One step, from the network's output at the sample.

        timestep and options are for schedulers of theirs: the state counts the steps.
        """
        del timestep, options
        if state.sigmas is None:
            raise ValueError("call set_timesteps before the first step")
        i = jnp.asarray(state.step_index)
        sigma, after = state.sigmas[i], state.sigmas[i + 1]
        (_, alpha, sigma_t), (_, alpha_next, _) = map(self.schedule.at, (sigma, after))
        x_t, f = at_least_float32(sample), at_least_float32(model_output)
        x0 = PREDICTIONS[self.prediction](f, x_t, alpha, sigma_t).astype(x_t.dtype)
        x, memory = self._advance(x_t / alpha, state.memory, x0, sigma, after)
        memory = jax.tree.map(lambda new, old: jnp.asarray(new, old.dtype), memory, state.memory)
        prev_sample = (alpha_next * x).astype(sample.dtype)
        state = state.replace(step_index=state.step_index + 1, memory=memory)
        return Output(prev_sample, state) if return_dict else (prev_sample, state)

    def _advance(
        self, x: Batch, memory: Any, x0: Batch, sigma: Scalar, after: Scalar
    ) -> tuple[Batch, Any]:
        def refuse(x: Batch, sigma: Scalar) -> Batch:  # noqa: ARG001
            raise ValueError(
                f"a scheduler is given one evaluation a step, and {self.solver!r} asks for another"
            )

        key = jax.random.key(0)  # a solver that is given x0 draws no probes
        step, memory = self.solver.step(key, refuse, State(x, memory), sigma, after, x0=x0)
        return ddim(x, x0 + step.delta, sigma, after), memory


def _no_grid(steps: int) -> Sigmas:
    raise ValueError(f"the grid of {steps} steps is that of `theirs`: call set_timesteps")


# --- Grids of theirs -----------------------------------------------------------------------------

RATIOS = ("FlaxEulerDiscreteScheduler", "FlaxLMSDiscreteScheduler", "FlaxUniPCMultistepScheduler")
INDICES = ("FlaxDDIMScheduler", "FlaxPNDMScheduler", "FlaxDPMSolverMultistepScheduler")
FLOWS = ("FlaxFlowMatchScheduler", "FlaxRectifiedFlowMultistepScheduler")


def _is_flow(theirs: Any) -> bool:
    name = type(theirs).__name__
    if name not in RATIOS + INDICES + FLOWS:
        raise ValueError(f"scheduler must be one of {RATIOS + INDICES + FLOWS}, got {name}")
    return name in FLOWS or bool(getattr(theirs.config, "use_flow_sigmas", False))


def _of_theirs(
    theirs: Any, steps: int | None, shape: Any, options: dict[str, Any]
) -> tuple[Array, Array, Any]:
    """Ratios, times, and the scale of the noise that sampling starts from."""
    name, first = type(theirs).__name__, theirs.create_state()
    given = {"num_inference_steps": steps, "shape": shape} | options
    given = {key: value for key, value in given.items() if value is not None}
    state = theirs.set_timesteps(first, **given)
    times, start = jnp.asarray(state.timesteps), getattr(state, "init_noise_sigma", 1.0)
    if _is_flow(theirs):
        t = jnp.minimum(at_least_float32(jnp.asarray(state.sigmas)[: times.shape[0]]), NEAR_ONE)
        return jnp.append(t / (1 - t), 0.0), times, start
    if name in RATIOS:
        sigmas = jnp.asarray(state.sigmas)
        # UniPC begins with noise of scale 1, the others in x0 + sigma noise.
        return sigmas, times, start if "UniPC" in name else start / jnp.hypot(1.0, sigmas[0])
    alphas = state.common.alphas_cumprod
    # DPM-Solver ends at the first beta, the others where they say.
    last = getattr(state, "final_alpha_cumprod", alphas[0])
    kept = jnp.append(alphas[times.astype(jnp.int32)], last)
    return jnp.sqrt((1 - kept) / kept), times, start

"""What a scheduler_config.json of diffusers says of the network and of the grid.

    scheduler = load_scheduler("stable-diffusion/scheduler")  # a local folder or file
    denoiser = sd.from_linen(module, variables, **scheduler.network)
    solution = sd.sample(key, denoiser, shape, sigmas=scheduler.grid(10))

The solver is yours to choose: `docs/names.md` has that of each scheduler. Needs no library.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

from steindiff_jax import _checks
from steindiff_jax.grids import check_sigmas
from steindiff_jax.interop import _json
from steindiff_jax.protocols import Schedule, Sigmas
from steindiff_jax.schedules import EDM, Discrete, RectifiedFlow

FILE = "scheduler_config.json"
NEAR_ONE = 1 - 1e-6  # where a flow starts that is to start at t = 1, as in diffusers' UniPC


class Scheduler(NamedTuple):
    """How a network was trained, and on which grid its scheduler samples.

    Attributes:
      schedule: of the network.
      prediction: of the network.
      time_scale: the network is told time_scale times the schedule's time.
      sigma_data: for the prediction "edm".
      grid: (steps, mu=None, tokens=None, times=None) -> sigmas (steps + 1,), ratios as everywhere
        here. The others are for flows alone, see `load_scheduler`.
    """

    schedule: Schedule
    prediction: str
    time_scale: float
    sigma_data: float
    grid: Callable[..., Sigmas]

    @property
    def network(self) -> dict[str, Any]:
        """The arguments of `from_linen` and `from_nnx`."""
        return {key: value for key, value in self._asdict().items() if key != "grid"}


def load_scheduler(path: str | Path) -> Scheduler:
    """Schedule, prediction, time and grid of a scheduler that `save_pretrained` wrote.

    Schedulers: DDIM, DDPM, PNDM, Euler (ancestral too), Heun, LMS, DPMSolver multistep and
    singlestep, UniPC, DEIS, their flow_sigmas and Karras or exponential sigmas, EDMEuler,
    EDMDPMSolver, FlowMatchEuler, FlowMatchHeun. The grid has the nodes of theirs but for this: a
    flow that starts at t = 1, where the ratio is infinite, starts at 1 - 1e-6; steps that go
    nowhere are left out; with rescale_betas_zero_snr it starts as `Discrete.zero_terminal_snr`
    says. A network is told exact times, not rounded ones.

    For flows, grid takes three more arguments. With use_dynamic_shifting one of mu, the logarithm
    of the shift (the shift itself where it is "linear"), and tokens, the length of the image's
    sequence, from which mu follows (Esser et al. 2024, arXiv:2403.03206). And times, decreasing,
    (steps,): those before the shift, where a pipeline brings its own (Flux: linspace(1, 1/n, n)).

    Args:
      path: the file, its folder, or the folder of a pipeline.

    Raises:
      ValueError: nothing to read at path, a class, a key or a value of a key that is not supported
        (it says which).
    """
    path = Path(path)
    places = [path, path / FILE, path / "scheduler" / FILE]
    file = next((place for place in places if place.is_file()), None)
    if file is None:
        raise ValueError(f"no {FILE} in {path} or {path / 'scheduler'}")
    config = _json.load(file)
    cls = config.get("_class_name")
    if not isinstance(cls, str) or cls not in CLASSES:
        raise ValueError(f"{file}: '_class_name' must be one of {[*CLASSES]}, got {cls!r}")
    if config.get("lambda_min_clipped") == -math.inf:
        config["lambda_min_clipped"] = None
    kind, build = CLASSES[cls]
    options = kind(**_json.known(kind, config, file))
    for key in sorted(config.keys() - {f.name for f in dataclasses.fields(kind)} - OF_SOLVERS):
        if not key.startswith("_"):
            raise ValueError(f"{file}: key {key!r} = {config[key]!r} is not supported")
    return build(options, cls, file)


# Keys about steps and about what is done to samples, so about neither the network nor the grid.
OF_SOLVERS = {
    "algorithm_type",
    "clip_sample",
    "clip_sample_range",
    "disable_corrector",
    "dynamic_thresholding_ratio",
    "euler_at_final",
    "lower_order_final",
    "predict_x0",
    "sample_max_value",
    "skip_prk_steps",
    "solver_order",
    "solver_p",
    "solver_type",
    "thresholding",
    "variance_type",
}
PREDICTIONS = {
    "epsilon": "epsilon",
    "sample": "x0",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
Spacing = Literal["linspace", "leading", "trailing"]
Last = Literal["zero", "sigma_min"]
No = Literal[False] | None  # what is refused where it is true


@dataclasses.dataclass(frozen=True)
class Betas:
    """Keys of the schedulers with DDPM's betas; those of flow_sigmas among them."""

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2"] = "linear"
    trained_betas: tuple[float, ...] | None = None
    rescale_betas_zero_snr: bool = False
    prediction_type: Literal["epsilon", "sample", "v_prediction", "flow_prediction"] = "epsilon"
    timestep_spacing: Spacing | None = None
    steps_offset: float = 0.0
    set_alpha_to_one: bool | None = None
    final_sigmas_type: Last | None = None
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_lu_lambdas: bool = False
    use_beta_sigmas: No = False
    use_flow_sigmas: bool = False
    flow_shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential"] = "exponential"
    shift_terminal: float | None = None
    lambda_min_clipped: float | None = None
    interpolation_type: Literal["linear"] = "linear"
    timestep_type: Literal["discrete"] = "discrete"
    sigma_min: float | None = None
    sigma_max: float | None = None


@dataclasses.dataclass(frozen=True)
class FlowMatch:
    """Keys of FlowMatchEulerDiscreteScheduler and FlowMatchHeunDiscreteScheduler."""

    num_train_timesteps: int = 1000
    shift: float = 1.0
    use_dynamic_shifting: bool = False
    time_shift_type: Literal["exponential", "linear"] = "exponential"
    base_shift: float | None = 0.5
    max_shift: float | None = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    invert_sigmas: No = False
    stochastic_sampling: bool = False
    use_karras_sigmas: bool | None = False
    use_exponential_sigmas: bool | None = False
    use_beta_sigmas: No = False


@dataclasses.dataclass(frozen=True)
class Preconditioned:
    """Keys of the EDM schedulers."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    sigma_data: float = 0.5
    sigma_schedule: Literal["karras", "exponential"] = "karras"
    rho: float = 7.0
    prediction_type: Literal["epsilon"] = "epsilon"
    final_sigmas_type: Last = "zero"
    num_train_timesteps: int = 1000


def betas_schedule(known: Any, file: Path) -> Discrete:
    """The schedule of `Betas`."""
    steps, ends = known.num_train_timesteps, (known.beta_start, known.beta_end)
    for beta in known.trained_betas or ends:
        if not 0 < beta < 1:
            raise ValueError(f"{file}: betas must lie between 0 and 1, got {beta}")
    if known.trained_betas is not None:
        schedule = Discrete(jnp.asarray(known.trained_betas))
    elif known.beta_schedule == "squaredcos_cap_v2":
        schedule = Discrete.cosine(steps)
    elif known.beta_schedule == "scaled_linear":
        schedule = Discrete.scaled_linear(steps, *ends)
    else:
        schedule = Discrete.linear(steps, *ends)
    if known.rescale_betas_zero_snr:
        if (n := jnp.shape(schedule.betas)[0]) < 3:
            raise ValueError(f"{file}: 'rescale_betas_zero_snr' needs 3 betas or more, got {n}")
        schedule = schedule.zero_terminal_snr()
    return schedule


# Schedulers that lay a grid with one node more, and leave the last one out.
MULTISTEP = ("DPMSolverMultistep", "DPMSolverSinglestep", "UniPCMultistep", "DEISMultistep")


def _of_betas(known: Betas, cls: str, file: Path) -> Scheduler:
    prediction = PREDICTIONS[known.prediction_type]
    if known.use_flow_sigmas != (prediction == "flow"):
        raise ValueError(
            f"{file}: 'use_flow_sigmas' and prediction_type 'flow_prediction' belong together, got "
            f"{known.use_flow_sigmas} and {known.prediction_type!r}"
        )
    multistep = cls.startswith(MULTISTEP)
    # Where no key says so: DEIS ends at the first beta, PNDM by default.
    zero = known.set_alpha_to_one if known.set_alpha_to_one is not None else cls[:4] != "PNDM"
    last = known.final_sigmas_type or ("zero" if zero and cls[:4] != "DEIS" else "sigma_min")
    ends = known.use_karras_sigmas or known.use_exponential_sigmas or known.use_lu_lambdas
    if known.use_flow_sigmas:
        if ends or known.final_sigmas_type == "sigma_min":
            raise ValueError(
                f"{file}: 'use_flow_sigmas' beside other sigmas, or with final_sigmas_type "
                "'sigma_min', is not supported"
            )
        shift = _Shift(known.flow_shift, known.use_dynamic_shifting, False, None, file)

        def flow(steps: int, mu: Any = None, tokens: Any = None, times: Any = None) -> Sigmas:
            n = _checks.count("steps", steps)
            least = 1 / known.num_train_timesteps
            span = (1.0, least) if cls.startswith("UniPC") else (1 - least, 0.0)
            t = np.linspace(*span, n + 1)[:-1] if times is None else _times(times, n)
            t = _stretched(shift(t, mu, tokens), known.shift_terminal)
            return _flow_ratios(t, cls[:4] != "DEIS")

        return Scheduler(RectifiedFlow(), "flow", float(known.num_train_timesteps), 0.5, flow)

    schedule = betas_schedule(known, file)
    total = int(jnp.size(schedule.betas))
    table = np.asarray(schedule.ratio(jnp.arange(total, dtype=float)), np.float64)
    usable = total
    if known.lambda_min_clipped is not None:
        usable = int((-np.log(table) >= known.lambda_min_clipped).sum())

    def grid(steps: int, mu: Any = None, tokens: Any = None, times: Any = None) -> Sigmas:
        _only_for_flows(mu, tokens, times)
        n = _checks.count("steps", steps)
        nodes = n + multistep
        leads = cls.startswith(("DDIM", "DDPM", "PNDM"))
        spacing = known.timestep_spacing or ("leading" if leads else "linspace")
        if spacing == "linspace":
            t = np.linspace(usable - 1, 0, nodes)
            # Those that work in sigma interpolate instead.
            t = t if cls.startswith(("Euler", "Heun", "LMS")) else t.round()
        elif spacing == "leading":
            t = np.arange(nodes)[::-1] * (usable // nodes) + known.steps_offset
        else:
            t = np.arange(usable, 0, -total / n).round() - 1
        sigmas = np.interp(t[:n], np.arange(total), table)
        if ends:
            high, low = (table[-1], table[0]) if multistep else (sigmas[0], sigmas[-1])
            sigmas = _spaced(known, known.sigma_max or high, known.sigma_min or low, n)
        return _ending(sigmas, 0.0 if last == "zero" else table[0])

    return Scheduler(schedule, prediction, 1.0, 0.5, grid)


def _of_flow(known: FlowMatch, cls: str, file: Path) -> Scheduler:
    tokens = None
    if known.base_shift is not None and known.max_shift is not None:
        lengths = known.base_image_seq_len, known.max_image_seq_len
        tokens = lengths, (known.base_shift, known.max_shift)
    linear = known.time_shift_type == "linear"
    shift = _Shift(known.shift, known.use_dynamic_shifting, linear, tokens, file)

    def grid(steps: int, mu: Any = None, tokens: Any = None, times: Any = None) -> Sigmas:
        n = _checks.count("steps", steps)
        if times is None:
            least = np.array([1 / known.num_train_timesteps])
            if not known.use_dynamic_shifting:  # they shift this end twice
                least = shift(least)
            t = np.linspace(1.0, least[0], n)
        else:
            t = _times(times, n)
        t = _stretched(shift(t, mu, tokens), known.shift_terminal)
        if known.use_karras_sigmas or known.use_exponential_sigmas:
            t = _spaced(known, t[0], t[-1], n)
        return _flow_ratios(t)

    del cls
    return Scheduler(RectifiedFlow(), "flow", float(known.num_train_timesteps), 0.5, grid)


def _of_edm(known: Preconditioned, cls: str, file: Path) -> Scheduler:
    del cls, file

    def grid(steps: int, mu: Any = None, tokens: Any = None, times: Any = None) -> Sigmas:
        _only_for_flows(mu, tokens, times)
        n = _checks.count("steps", steps)
        rho = known.rho if known.sigma_schedule == "karras" else None
        sigmas = _between(known.sigma_max, known.sigma_min, n, rho)
        return _ending(sigmas, 0.0 if known.final_sigmas_type == "zero" else known.sigma_min)

    return Scheduler(EDM(), "edm", 1.0, known.sigma_data, grid)


@dataclasses.dataclass(frozen=True)
class _Shift:
    """The shift of a flow's times, shift t / (1 + (shift - 1) t), constant or dynamic."""

    shift: float
    dynamic: bool
    linear: bool
    lengths: tuple | None  # ((base, max) of tokens, the same of mu)
    file: Path

    def __call__(self, t: np.ndarray, mu: Any = None, tokens: Any = None) -> np.ndarray:
        shift = self.shift
        if not self.dynamic:
            if mu is not None or tokens is not None:
                raise ValueError(f"{self.file} has no dynamic shift: leave out mu and tokens")
        else:
            if mu is None and tokens is not None and self.lengths is not None:
                (few, many), (low, high) = self.lengths
                mu = low + (tokens - few) * (high - low) / (many - few)
            if mu is None:
                ways = "mu or tokens" if self.lengths is not None else "mu"
                raise ValueError(f"{self.file} has 'use_dynamic_shifting': the grid needs {ways}")
            shift = mu if self.linear else math.exp(mu)
        return shift * t / (1 + (shift - 1) * t)


def _only_for_flows(*arguments: Any) -> None:
    if any(argument is not None for argument in arguments):
        raise ValueError("mu, tokens and times are for flows")


def _times(times: Any, steps: int) -> np.ndarray:
    t = np.asarray(times, np.float64)
    if t.shape != (steps,) or not ((t > 0) & (t <= 1)).all():
        raise ValueError(f"times must be {steps} numbers in (0, 1], got {times}")
    return t


def _stretched(t: np.ndarray, terminal: float | None) -> np.ndarray:
    """The times such that the last is `terminal`."""
    return t if not terminal else 1 - (1 - t) * (1 - terminal) / (1 - t[-1])


def _flow_ratios(t: np.ndarray, zero: bool = True) -> Sigmas:
    t = np.minimum(t, NEAR_ONE)
    return _ending(t / (1 - t), 0.0 if zero else np.inf)


def _spaced(known: Any, high: float, low: float, steps: int) -> np.ndarray:
    return _between(high, low, steps, 7.0 if known.use_karras_sigmas else None)


def _between(high: float, low: float, steps: int, rho: float | None) -> np.ndarray:
    """Uniform in sigma^(1/rho), or in log sigma."""
    if rho is None:
        return np.exp(np.linspace(math.log(high), math.log(low), steps))
    return np.linspace(high ** (1 / rho), low ** (1 / rho), steps) ** rho


def _ending(sigmas: np.ndarray, last: float) -> Sigmas:
    """The grid with its last node, but for a last step that goes nowhere."""
    goes = last < sigmas[-1] * (1 - 1e-6)
    return check_sigmas(jnp.asarray(np.append(sigmas, last) if goes else sigmas, float))


CLASSES: dict[str, tuple[type, Callable[..., Scheduler]]] = {
    **dict.fromkeys(
        (
            "DDIMScheduler",
            "DDIMParallelScheduler",
            "DDPMScheduler",
            "DDPMParallelScheduler",
            "DEISMultistepScheduler",
            "DPMSolverMultistepScheduler",
            "DPMSolverSinglestepScheduler",
            "EulerAncestralDiscreteScheduler",
            "EulerDiscreteScheduler",
            "HeunDiscreteScheduler",
            "LMSDiscreteScheduler",
            "PNDMScheduler",
            "UniPCMultistepScheduler",
        ),
        (Betas, _of_betas),
    ),
    **dict.fromkeys(
        ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"),
        (FlowMatch, _of_flow),
    ),
    **dict.fromkeys(
        ("EDMEulerScheduler", "EDMDPMSolverMultistepScheduler"), (Preconditioned, _of_edm)
    ),
}

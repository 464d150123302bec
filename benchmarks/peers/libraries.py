"""The other libraries behind one signature, and this one.

`Peer.run` is (denoise, x, sigmas) -> x as in `formulas`, on arrays of the peer's own kind. Each
library steps with its own code; of diffusers' schedulers the sigmas are replaced, and nothing else.
A library that is not installed has no peers here.
"""

import importlib
import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import numpy as np

import steindiff_jax as sd
import sweep
from peers import dpm_v3, formulas, grids, stabilisers


@dataclass(frozen=True)
class Peer:
    """A sampler of a library.

    run: (denoise, x, sigmas) -> x; stages: evaluations a step, of which the last step to 0 takes
    one; arrays: "numpy", "torch" or "jax"; to_zero: whether its last step goes to 0 or to the
    smallest level; own_grid: steps -> the library's own default sigmas, where it has any; only_own:
    it takes no other; every_grid: it is also run on the published and the fitted grids; choices:
    parameters to tune; needs: what it wants to know of the problem, see `compare.Facts`; extra:
    steps that cost nothing; network: whether run on the networks too, where of several libraries'
    versions of one method one is enough.
    """

    library: str
    method: str
    run: Callable
    stages: int = 1
    arrays: str = "numpy"
    to_zero: bool = True
    own_grid: Callable[[int], np.ndarray] | None = None
    choices: tuple[dict, ...] = ()
    needs: tuple[str, ...] = ()
    extra: int = 0
    network: bool = True
    only_own: bool = False
    every_grid: bool = False

    @property
    def name(self) -> str:
        return f"{self.method} ({self.library})"

    def steps(self, evaluations: int) -> int:
        """As many as these evaluations allow."""
        if self.to_zero:
            return (evaluations - 1) // self.stages + 1 + self.extra
        return evaluations // self.stages + self.extra


def installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


# Formulas


def without_zero(steps: int) -> np.ndarray:
    """diff-sampler's own grid: Karras's levels, the last step to the smallest of them."""
    return grids.above_zero(steps)["Karras to 0.002"]


def of_formulas() -> list[Peer]:
    k = partial(Peer, "k-diffusion's formulas")  # whose own grid is Karras's
    d = partial(Peer, "diff-sampler's formulas", own_grid=without_zero)
    return [
        k("Euler", formulas.euler),
        k("Heun", formulas.heun, stages=2),
        k("DPM-2", formulas.dpm2, stages=2, network=False),
        k("DPM++ 2S", formulas.dpmpp_2s, stages=2),
        k("DPM++ 2M", formulas.dpmpp_2m, every_grid=True),
        k("DPM++ 3M", formulas.dpmpp_3m, every_grid=True),
        k("LMS-4", formulas.lms),
        d("iPNDM-2", partial(formulas.ipndm, order=2)),
        d("iPNDM-3", partial(formulas.ipndm, order=3), every_grid=True),
        d("iPNDM-4", partial(formulas.ipndm, order=4), every_grid=True),
        Peer("paper's formulas", "aDDIM", formulas.addim),
        Peer(
            "authors' formulas",
            "DPM-Solver-v3",
            dpm_v3.sample,
            to_zero=False,
            needs=("statistics",),
        ),
    ]


def of_stabilisers() -> list[Peer]:
    peers = []
    for base, sampler in stabilisers.BASES.items():
        made = partial(Peer, "stabiliser", network=base != "DPM++ 2M")
        scaled, clipped, first = (
            partial(f, sampler)
            for f in (stabilisers.scaled, stabilisers.thresholded, stabilisers.with_first)
        )
        peers += [
            made(f"epsilon scaling, {base}", scaled, choices=(*stabilisers.SCALES,)),
            made(
                f"dynamic threshold, {base}",
                clipped,
                choices=(*stabilisers.QUANTILES,),
                needs=("limit",),
            ),
            made(f"analytical first step, {base}", first, extra=1),
        ]
    first = partial(stabilisers.with_first, partial(formulas.ipndm, order=4))
    peers.append(Peer("stabiliser", "analytical first step, iPNDM-4", first, extra=1))
    for order in (1, 2):
        run = partial(stabilisers.time_shift, order=order)
        base = "DDIM" if order == 1 else "iPNDM-2"
        peers.append(
            Peer(
                "stabiliser",
                f"time shift, {base}",
                run,
                choices=(*stabilisers.SHIFTS,),
                needs=("data_variance",),
                network=order > 1,
            )
        )
    lower = "lower-order-final, DPM++ 2M"
    return [*peers, Peer("stabiliser", lower, stabilisers.LOWER, network=False)]


# diffusers


@cache
def _made(name: str, options: tuple):
    import diffusers

    return getattr(diffusers, name)(**dict(options))


def _scheduler(name: str, options: dict, sigmas):
    """A scheduler of diffusers, made once, that steps through sigmas."""
    import torch

    scheduler = _made(name, tuple(options.items()))
    steps = len(sigmas) - 1
    scheduler.set_timesteps(steps)
    scheduler.sigmas = torch.tensor(np.asarray(sigmas), dtype=torch.float32)
    scheduler.timesteps = torch.arange(steps, 0, -1).float()
    scheduler.num_inference_steps = steps
    scheduler.set_begin_index(0)
    return scheduler


def preserving(name: str, options: dict, denoise, x, sigmas):
    """The schedulers whose state is x / sqrt(1 + sigma^2), fed with x0."""
    scheduler = _scheduler(name, {"prediction_type": "sample", **options}, sigmas)
    state = x / math.hypot(1.0, sigmas[0])
    for sigma, t in zip(sigmas, scheduler.timesteps, strict=False):
        x0 = denoise(state * math.hypot(1.0, sigma), sigma)
        state = scheduler.step(x0, t, state).prev_sample
    return state * math.hypot(1.0, sigmas[-1])


def exploding(name: str, options: dict, denoise, x, sigmas):
    """Those whose state is x itself, fed with the noise."""
    scheduler = _scheduler(name, options, sigmas)
    for sigma, t in zip(sigmas, scheduler.timesteps, strict=False):
        scheduler.is_scale_input_called = True
        x = scheduler.step((x - denoise(x, sigma)) / sigma, t, x).prev_sample
    return x


def heun(denoise, x, sigmas):
    """Heun, which lists every level but the first and last twice."""
    import torch

    scheduler = _scheduler("HeunDiscreteScheduler", {}, sigmas)
    s = scheduler.sigmas
    scheduler.sigmas = torch.cat([s[:1], s[1:-1].repeat_interleave(2), s[-1:]])
    scheduler.timesteps = torch.arange(len(scheduler.sigmas) - 1, 0, -1).float()
    for i, t in enumerate(scheduler.timesteps):
        sigma = float(scheduler.sigmas[i])
        x = scheduler.step((x - denoise(x, sigma)) / sigma, t, x).prev_sample
    return x


def edm(order: int, denoise, x, sigmas, sigma_data=0.5):
    """EDM's scheduler, fed with the raw network's output of Karras et al., table 1."""
    options = {"solver_order": order, "sigma_data": sigma_data}
    scheduler = _scheduler("EDMDPMSolverMultistepScheduler", options, sigmas)
    for sigma, t in zip(sigmas, scheduler.timesteps, strict=False):
        norm = math.hypot(sigma, sigma_data)
        raw = (denoise(x, sigma) - (sigma_data / norm) ** 2 * x) * norm / (sigma * sigma_data)
        x = scheduler.step(raw, t, x).prev_sample
    return x


def ipndm(denoise, x, sigmas):
    """IPNDMScheduler, whose state and output are those of an angle, alpha noise - sigma x0."""
    scheduler = _scheduler("IPNDMScheduler", {}, sigmas)
    scheduler.alphas = 1 / (1 + scheduler.sigmas**2).sqrt()
    scheduler.betas = scheduler.sigmas * scheduler.alphas
    state = x / math.hypot(1.0, sigmas[0])
    for sigma, t in zip(sigmas, scheduler.timesteps, strict=False):
        norm = math.hypot(1.0, sigma)
        x0 = denoise(state * norm, sigma)
        noise = (state * norm - x0) / sigma
        state = scheduler.step((noise - sigma * x0) / norm, t, state).prev_sample
    return state * math.hypot(1.0, sigmas[-1])


def default_sigmas(name: str, options: dict, steps: int) -> np.ndarray:
    """What the scheduler itself sets for so many steps."""
    scheduler = _made(name, tuple(options.items()))
    scheduler.set_timesteps(steps)
    return scheduler.sigmas.double().numpy()


def of_diffusers() -> list[Peer]:
    def made(method, name, call=preserving, own=True, **rest):
        options = rest.pop("options", {})
        grid = partial(default_sigmas, name, options) if own else None
        run = partial(call, name, options)
        return Peer("diffusers", method, run, arrays="torch", own_grid=grid, **rest)

    dpm, unipc = "DPMSolverMultistepScheduler", "UniPCMultistepScheduler"
    with_zero = {"final_sigmas_type": "zero"}
    torch_peer = partial(Peer, "diffusers", arrays="torch")
    return [
        made("DPM++ 2M", dpm, options={"solver_order": 2, **with_zero}),
        made("DPM++ 3M", dpm, options={"solver_order": 3, **with_zero}),
        made("UniPC-2", unipc, options={"solver_order": 2, **with_zero}),
        made("UniPC-3", unipc, options={"solver_order": 3, **with_zero}),
        made(
            "DEIS-3",
            "DEISMultistepScheduler",
            own=False,
            to_zero=False,
            options={"solver_order": 3},
        ),
        made("Euler", "EulerDiscreteScheduler", exploding, network=False),
        made("LMS-4", "LMSDiscreteScheduler", exploding, own=False, network=False),
        torch_peer("Heun", heun, stages=2, network=False),
        torch_peer("EDM DPM++ 2M", partial(edm, 2), network=False),
        torch_peer("iPNDM-4", ipndm, network=False),
    ]


# azula


@cache
def _azula():
    import torch
    from azula import denoise, noise

    class Table(noise.Schedule):
        """The given sigmas at equidistant times from 1 to 0."""

        def __init__(self, sigmas):
            self.sigmas = torch.tensor(np.asarray(sigmas))

        def __call__(self, t):
            index = ((1 - t) * (len(self.sigmas) - 1)).round().long()
            sigma = self.sigmas.to(t)[index]
            return torch.ones_like(sigma), sigma

    class Given(denoise.Denoiser):
        def __init__(self, function, sigmas):
            super().__init__()
            self.function, self.schedule = function, Table(sigmas)

        def forward(self, x_t, t):
            sigma = self.schedule(t)[1]
            return denoise.DiracPosterior(mean=self.function(x_t, float(sigma)))

    return Given


def azula(sampler: str, options: dict, denoise, x, sigmas):
    import torch
    from azula import sample

    given = _azula()(denoise, sigmas)
    steps = len(sigmas) - 1
    made = getattr(sample, sampler)(given, steps=steps, silent=True, dtype=torch.float64, **options)
    return made(x)


def azula_sigmas(steps: int) -> np.ndarray:
    """Equidistant times of azula's variance-preserving schedule, its first and the usual one."""
    import torch
    from azula import noise

    alpha, sigma = noise.VPSchedule()(torch.linspace(1.0, 0.0, steps + 1, dtype=torch.float64))
    return (sigma / alpha).numpy()


def of_azula() -> list[Peer]:
    methods = {
        "AB-3": ("zABSampler", {"order": 3}, True),
        "v-AB-3": ("vABSampler", {"order": 3}, True),
        # On a grid that ends in 0 these return NaN.
        "z-EAB-3": ("zEABSampler", {"order": 3}, False),
        "x-EAB-2": ("xEABSampler", {"order": 2}, False),
        "x-EAB-3": ("xEABSampler", {"order": 3}, True),
    }
    peers = [
        Peer(
            "azula",
            method,
            partial(azula, name, options),
            arrays="torch",
            to_zero="EAB" not in method,
            own_grid=azula_sigmas,
            network=network,
        )
        for method, (name, options, network) in methods.items()
    ]
    run = partial(azula, "HeunSampler", {})
    return [*peers, Peer("azula", "Heun", run, 2, "torch", to_zero=False, network=False)]


# diffrax


@cache
def _diffrax_step(name: str):
    """(denoiser, x, sigma, sigma_next) -> x by one step of the solver, in increasing -sigma."""
    import diffrax
    import jax

    solver = getattr(diffrax, name)()

    @jax.jit
    def step(denoiser, x, sigma, sigma_next):
        term = diffrax.ODETerm(lambda t, x, _: (x - denoiser(x, -t)) / t)
        state = solver.init(term, -sigma, -sigma_next, x, None)
        return solver.step(term, -sigma, -sigma_next, x, None, state, made_jump=False)[0]

    return step


def diffrax(name: str, denoise, x, sigmas):
    """Steps of a plain solver on dx/dsigma = (x - D) / sigma, and the denoiser where that ends."""
    step = _diffrax_step(name)
    for i in range(len(sigmas) - 2):
        x = step(denoise.denoiser, x, x.dtype.type(sigmas[i]), x.dtype.type(sigmas[i + 1]))
    return denoise(x, sigmas[-2])


def of_diffrax() -> list[Peer]:
    # Bosh3 and Tsit5 hand their last stage on; called step by step it is computed anew, so it is
    # not counted, but for the first.
    made = partial(Peer, "diffrax", arrays="jax", network=False)
    return [
        made("Heun", partial(diffrax, "Heun"), stages=2),
        made("Bosh3", partial(diffrax, "Bosh3"), stages=3),
        made("Tsit5", partial(diffrax, "Tsit5"), stages=6),
    ]


# The Flax schedulers of older diffusers


@cache
def flax_step(solver_order: int, steps: int):
    """(x_next, state) of the scheduler's step, its first state, and its timesteps and levels."""
    import jax
    from diffusers import FlaxDPMSolverMultistepScheduler as Scheduler

    scheduler = Scheduler(solver_order=solver_order, prediction_type="sample")
    first = scheduler.create_state()
    alphas = np.asarray(first.common.alphas_cumprod, np.float64)
    times = np.asarray(scheduler.set_timesteps(first, steps, (1,)).timesteps)
    levels = np.sqrt((1 - alphas) / alphas)
    step = jax.jit(lambda state, x0, t, x: scheduler.step(state, x0, t, x, return_dict=False))
    return scheduler, first, step, times, levels


def flax(solver_order: int, denoise, x, sigmas):
    """Its own grid alone: the levels come with the timesteps."""
    scheduler, first, step, times, levels = flax_step(solver_order, len(sigmas) - 1)
    state = scheduler.set_timesteps(first, len(times), x.shape)
    x = x / math.hypot(1.0, sigmas[0])
    for t in times:
        x0 = denoise(x * math.hypot(1.0, levels[t]), float(levels[t]))
        x, state = step(state, x0, t, x)
    return x * math.hypot(1.0, sigmas[-1])


def flax_sigmas(solver_order: int, steps: int) -> np.ndarray:
    *_, times, levels = flax_step(solver_order, steps)
    return levels[np.append(times, 0)]


def of_flax() -> list[Peer]:
    return [
        Peer(
            "diffusers Flax 0.39",
            f"DPM++ {order}M",
            partial(flax, order),
            arrays="jax",
            own_grid=partial(flax_sigmas, order),
            only_own=True,
        )
        for order in (2, 3)
    ]


# dewml


@cache
def _dewml():
    """A process whose time is sigma itself, and what a solver steps with on it, compiled."""
    import jax
    from dew.diffusion import DirectPredictionTransform, GeneralizedNoiseScheduler, Process

    class Sigma(GeneralizedNoiseScheduler):
        def sigmas(self, t):
            return t

        def t_of_sigma(self, sigma):
            return sigma

    process, key = Process(Sigma(), DirectPredictionTransform()), jax.random.key(0)

    @partial(jax.jit, static_argnums=0)
    def step(solver, x, t, t_next, x0, noise, state):
        return solver.step(x, t, t_next, x0, noise, state, key, process, None)

    return process, key, step


def dewml(name: str, options: dict, denoise, x, sigmas):
    """A solver that takes one evaluation a step, which is handed to it."""
    import jax.numpy as jnp
    from dew.sampling import solvers

    process, key, step = _dewml()
    x, times = jnp.asarray(x), jnp.asarray(sigmas, x.dtype)
    solver = getattr(solvers, name)(**options)
    state = solver.init(x, times, process, key=key)
    for i, sigma in enumerate(sigmas[:-1]):
        x0 = denoise(x, sigma)
        t, t_next = (jnp.full(len(x), times[j]) for j in (i, i + 1))
        x, state = step(solver, x, t, t_next, x0, (x - x0) / x.dtype.type(sigma), state)
    return x


def dewml_heun(denoise, x, sigmas):
    """Heun, which evaluates for itself, and the denoiser where that ends, as its `sample` does."""
    import jax.numpy as jnp
    from dew.sampling import solvers

    process, key, _ = _dewml()

    def both(x, t):
        x0 = denoise(x, float(t[0]))
        return x0, (x - x0) / t[0]

    x, times = jnp.asarray(x), jnp.asarray(sigmas, x.dtype)
    for i in range(len(sigmas) - 2):
        t, t_next = (jnp.full(len(x), times[j]) for j in (i, i + 1))
        x, _ = solvers.Heun().step(x, t, t_next, *both(x, t), (), key, process, both)
    return denoise(x, sigmas[-2])


def of_dewml() -> list[Peer]:
    dpm, grouped = "DPMSolverMultistep", "DPMSolverSinglestep"
    methods = {
        "DDIM": ("DDIM", {}, False),  # what its pipelines take
        "DPM++ 2M": (dpm, {"order": 2}, False),
        "DPM++ 3M": (dpm, {"order": 3}, False),
        "DPM++ 2S grouped": (grouped, {"order": 2}, True),
        "DPM++ 3S grouped": (grouped, {"order": 3}, True),
        "UniPC-2": ("UniPC", {"order": 2}, False),
        "UniPC-3": ("UniPC", {"order": 3}, False),
        "DEIS-3": ("DEIS", {"order": 3}, True),
        "LMS-4": ("LMS", {"order": 4}, False),
        "FlaxDiff's multistep": ("MultiStepDPM", {}, True),
    }
    made = partial(Peer, "dewml", arrays="jax")
    peers = [
        made(method, partial(dewml, name, options), network=network)
        for method, (name, options, network) in methods.items()
    ]
    return [*peers, made("Heun", dewml_heun, stages=2, network=False)]


# diffuse-jax


def flow_grid(steps: int) -> np.ndarray:
    """Equidistant times of a rectified flow, then 0.

    So diffuse-jax and hackable-diffusion space theirs, from 1 down; here between the ends of all.
    """
    first, last = (sigma / (1 + sigma) for sigma in grids.ENDS)
    times = np.linspace(first, last, steps)
    return np.append(times / (1 - times), 0.0)


@cache
def _diffuse_step(name: str, prediction: str):
    """(denoiser, x, times, i) -> x and its evaluations, by a step of an integrator on its Flow.

    prediction: what the integrator steps with, so that nothing is converted, which adds 1e-8 to
    squares of the noise level.
    """
    import jax
    from diffuse import integrator
    from diffuse.diffusion.sde import Flow
    from diffuse.predictor import Predictor
    from diffuse.timer import VpTimer

    class Table(VpTimer):
        """The given times."""

        def __init__(self, times):
            super().__init__(len(times) - 1, times[-1], times[0])
            self.times = times

        def __call__(self, step):
            return self.times[step]

    @jax.jit
    def step(denoiser, x, times, i):
        calls = 0

        def network(x, t):
            nonlocal calls
            calls += 1
            x0 = denoiser(x / (1 - t), t / (1 - t))
            noise = (x - (1 - t) * x0) / t
            return {"noise": noise, "score": -noise / t, "velocity": noise - x0}[prediction]

        state = integrator.IntegratorState(x, jax.random.key(0), i)
        predictor = Predictor(Flow(), network, prediction)
        made = getattr(integrator, name)(model=Flow(), timer=Table(times))
        return made(state, predictor).position, calls

    return step


def diffuse(name: str, prediction: str, denoise, x, sigmas):
    """Down to the smallest level, then the denoiser: its Flow has no levels under 0.001."""
    step, sigma = _diffuse_step(name, prediction), np.asarray(sigmas[:-1], x.dtype)
    x, times = x / (1 + sigma[0]), sigma / (1 + sigma)
    for i in range(len(times) - 1):
        x, calls = step(denoise.denoiser, x, times, i)
        denoise.calls += int(calls)
    return denoise(x * (1 + sigma[-1]), sigmas[-2])


def of_diffuse() -> list[Peer]:
    # Its Euler is its DDIM, and its EDM model cuts noise levels at 0.999.
    methods = {
        "DDIM": ("DDIMIntegrator", "noise", 1),
        "Heun in flow time": ("HeunIntegrator", "velocity", 2),
        "DPM++ 2S, middle in flow time": ("DPMpp2sIntegrator", "score", 2),
    }
    made = partial(Peer, "diffuse-jax", arrays="jax", own_grid=flow_grid)
    return [
        made(method, partial(diffuse, name, kind), stages=stages, network=stages > 1)
        for method, (name, kind, stages) in methods.items()
    ]


# hackable-diffusion


@cache
def _hackable(name: str, points: tuple[float, ...]):
    """A stepper on alpha = 1 and sigma = t, its compiled steps, and what it is told of each."""
    import jax
    import jax.numpy as jnp
    from hackable_diffusion.lib import corruption, sampling

    class Sigma(corruption.GaussianSchedule):
        def alpha(self, time):
            return jnp.ones_like(time)

        def sigma(self, time):
            return time

    class Table:
        def all_step_infos(self, rng, num_steps, data_spec):
            dtype, ones = data_spec.dtype, (1,) * data_spec.ndim
            times = jnp.asarray(points, dtype).reshape(num_steps, *ones)
            keys = jax.random.split(rng, num_steps)
            return sampling.StepInfo(step=jnp.arange(num_steps), time=times, rng=keys)

    options = {"corruption_process": corruption.GaussianProcess(schedule=Sigma())}
    if name == "DDIMStep":
        options["stoch_coeff"] = 0.0
    if name == "HeunStep":
        options |= {"time_schedule": Table(), "num_steps": len(points)}
    stepper = getattr(sampling, name)(**options)
    return stepper, jax.jit(stepper.update), jax.jit(stepper.finalize), Table().all_step_infos


def hackable(name: str, denoise, x, sigmas):
    """Its loop; Heun counts the half of a step as one, and its last has no other half."""
    import jax
    import jax.numpy as jnp

    points = [s for s in sigmas[:-1] for _ in range(2)] if name == "HeunStep" else sigmas
    points = (*points[:-1], sigmas[-1])
    stepper, update, finalize, told = _hackable(name, points)
    told = told(jax.random.key(0), len(points), x)
    infos = [jax.tree.map(lambda leaf, i=i: leaf[i], told) for i in range(len(points))]
    step = stepper.initialize(jnp.asarray(x), infos[0])
    for i, info in enumerate(infos[1:], 2):
        x0 = denoise(step.xt, float(step.step_info.time.item()))
        step = (update if i < len(infos) else finalize)({"x0": x0}, step, info)
    return step.xt


def of_hackable() -> list[Peer]:
    made = partial(Peer, "hackable-diffusion", arrays="jax", own_grid=flow_grid)
    return [
        made("DDIM", partial(hackable, "DDIMStep"), network=False),
        made("aDDIM", partial(hackable, "AdjustedDDIMStep")),
        made("Heun", partial(hackable, "HeunStep"), stages=2, network=False),
    ]


# MaxDiffusion's schedulers, of a checkout


MAX_DDIM = "ddim_flax FlaxDDIMScheduler"
MAX_EULER = "euler_discrete_flax FlaxEulerDiscreteScheduler"


@cache
def _maxdiffusion(name: str, options: tuple, dtype):
    """A scheduler and its compiled step."""
    import jax

    module, cls = name.split()
    module = importlib.import_module(f"maxdiffusion.schedulers.scheduling_{module}")
    scheduler = getattr(module, cls)(dtype=dtype, **dict(options))
    return scheduler, jax.jit(partial(scheduler.step, return_dict=False))


def _with_levels(state, sigmas):
    """A scheduler's state on these levels and integer times that count them, wherever it looks."""
    import jax.numpy as jnp

    sigmas = jnp.asarray(sigmas)
    times = jnp.arange(len(sigmas) - 1, 0, -1)
    if hasattr(state, "sigmas"):
        return state.replace(sigmas=sigmas, timesteps=times.astype(jnp.int32))
    levels = sigmas[::-1]  # by time
    alphas = 1 / (1 + levels**2)
    if hasattr(state, "final_alpha_cumprod"):
        common = state.common.replace(alphas_cumprod=alphas[1:])
        return state.replace(common=common, timesteps=times - 1)
    alpha, log_snr = jnp.sqrt(alphas), -jnp.log(levels)
    tables = {"alpha_t": alpha, "sigma_t": levels * alpha, "lambda_t": log_snr}
    return state.replace(timesteps=times, **tables)


def maxdiffusion(name: str, options: dict, denoise, x, sigmas):
    """All but Euler are fed with x0, and their state is x / sqrt(1 + sigma^2)."""
    steps = len(sigmas) - 1
    if name == MAX_DDIM:  # its step is a share of all times
        options = options | {"num_train_timesteps": steps}
    scheduler, step = _maxdiffusion(name, tuple(options.items()), x.dtype)
    state = scheduler.set_timesteps(scheduler.create_state(), steps, x.shape)
    state = _with_levels(state, sigmas)
    for sigma, sigma_next, t in zip(sigmas, sigmas[1:], state.timesteps, strict=False):
        x0 = denoise(x, sigma)
        if name == MAX_EULER:
            x, state = step(state, (x - x0) / x.dtype.type(sigma), t, x)
        else:
            norm, norm_next = (x.dtype.type(math.hypot(1.0, s)) for s in (sigma, sigma_next))
            x, state = step(state, x0, t, x / norm)
            x = x * norm_next
    return x


def maxdiffusion_sigmas(name: str, options: dict, steps: int) -> np.ndarray:
    scheduler, _ = _maxdiffusion(name, tuple(options.items()), np.dtype("float32"))
    state = scheduler.create_state()
    alphas = np.asarray(state.common.alphas_cumprod, np.float64)
    state = scheduler.set_timesteps(state, steps, (1,))
    if hasattr(state, "sigmas"):
        return np.asarray(state.sigmas, np.float64)
    levels = np.sqrt((1 - alphas) / alphas)
    last = 0.0 if name == MAX_DDIM else levels[0]
    return np.append(levels[np.asarray(state.timesteps)], last)


def of_maxdiffusion() -> list[Peer]:
    def made(method, name, options, **rest):
        own = partial(maxdiffusion_sigmas, name, options)
        run = partial(maxdiffusion, name, options)
        return Peer("MaxDiffusion", method, run, arrays="jax", own_grid=own, **rest)

    second = {"solver_order": 2, "prediction_type": "sample"}
    dpm = "dpmsolver_multistep_flax FlaxDPMSolverMultistepScheduler"
    return [
        made("DPM++ 2M", dpm, second, to_zero=False),  # from 15 steps on, NaN at 0
        made("UniPC-2", "unipc_multistep_flax FlaxUniPCMultistepScheduler", second),
        made("DDIM", MAX_DDIM, {"prediction_type": "sample"}, network=False),
        made("Euler", MAX_EULER, {}, network=False),
    ]


# This library


LONGEST = 20  # steps
SOLVERS = {
    "DPM++ 2M": sd.DPMpp2M(),
    "DPM++ 3M": sd.DPMpp3M(),
    "UniPC-2": sd.UniPC(2),
    "UniPC-3": sd.UniPC(3),
    "DEIS-3": sd.DEIS(3),
    "iPNDM-2": sd.IPNDM(2),
    "iPNDM-3": sd.IPNDM(3),
    "iPNDM-4": sd.IPNDM(4),
}


def ours(solver: sd.Solver | None, denoise, x, sigmas, limit: float | None = None):
    """limit: inside `sd.DynamicThreshold`, told the extent of the data as the stabilisers are."""
    import jax

    denoiser = denoise.denoiser
    if limit is not None:
        denoiser = sd.DynamicThreshold(denoiser, limit=limit)
    sigmas = sweep.padded(np.asarray(sigmas, x.dtype), LONGEST)
    key = jax.random.key(0)  # of probes, which none of these has
    solution = sd.sample(key, denoiser, sigmas=sigmas, solver=solver, x_init=x)
    denoise.calls += int(solution.info.nfe)
    return solution.x


def of_ours() -> list[Peer]:
    def made(method, solver, **rest):
        return Peer("ours", method, partial(ours, solver), arrays="jax", every_grid=True, **rest)

    return [
        made("default", None),
        made("default, dynamic threshold", None, needs=("limit",)),
        *(made(f"Stein {name}", sd.Stein(solver)) for name, solver in SOLVERS.items()),
    ]


# Name -> what must be installed, and its samplers. The Flax ones need a diffusers of their own;
# MaxDiffusion is a checkout.
PARTS = {
    "ours": ((), of_ours),
    "formulas": ((), of_formulas),
    "stabilisers": ((), of_stabilisers),
    "diffusers": (("diffusers", "torch"), of_diffusers),
    "azula": (("azula", "torch"), of_azula),
    "diffrax": (("diffrax",), of_diffrax),
    "flax": (("diffusers",), of_flax),
    "dewml": (("dew",), of_dewml),
    "diffuse-jax": (("diffuse",), of_diffuse),
    "hackable-diffusion": (("hackable_diffusion", "kauldron"), of_hackable),
    "maxdiffusion": (("maxdiffusion",), of_maxdiffusion),
}


def of(part: str) -> list[Peer]:
    """The samplers of a part; none where a library is not installed."""
    needed, made = PARTS[part]
    return made() if all(map(installed, needed)) else []

"""Time per sample, compilation and memory, each library natively on the same network.

"network": the digits network, in JAX and as `twin` in torch, where the network takes the time;
"overhead": a denoiser of a few operations, where the loop does. All take `EVALUATIONS`. Programs
of one process are timed in turns, so that what else runs on the machine hits them alike; what came
before the first sample, and the peak of memory, are those of a process of its own.
"""

import os
import resource
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import jax
import jax.numpy as jnp
import numpy as np

import steindiff_jax as sd
from peers import formulas, libraries

EVALUATIONS = 9  # of multistep solvers in nine steps, and of Heun's in five
SHAPES = {"network": (100, 8, 8, 1), "overhead": (16, 2)}


@sd.pytree
class Tiny:
    """Exact for standard normal data."""

    variance: float = 1.0

    def __call__(self, x, sigma):
        return x / (1 + sigma**2 / self.variance)


def in_jax(case: str):
    """The denoiser, and where to start from."""
    shape = SHAPES[case]
    x = 80.0 * jax.random.normal(jax.random.key(0), shape, jnp.float32)
    if case == "overhead":
        return Tiny(), x
    import digits

    return digits.load(jnp.arange(shape[0]) % 10), x


def in_torch(case: str):
    import torch

    x = torch.tensor(np.array(in_jax(case)[1]), device=device())
    if case == "overhead":
        return lambda x, sigma: x / (1 + sigma**2), x
    from peers import twin

    return twin.Denoiser(np.arange(len(x)) % 10).to(device()), x


def device() -> str:
    """Torch's name of what JAX runs on."""
    return "cuda" if jax.default_backend() == "gpu" else "cpu"


def machine() -> str:
    """What JAX runs on."""
    name = jax.devices()[0].device_kind
    return name if device() == "cuda" else f"{os.cpu_count()} cores"


def of_jax(case: str) -> dict[str, Callable[[], object]]:
    """Name -> one batch of samples, finished when it returns."""
    denoiser, x = in_jax(case)
    key, sigmas = jax.random.key(0), sd.karras_sigmas(EVALUATIONS)

    def ours(solver):
        return sd.sample(key, denoiser, sigmas=sigmas, solver=solver, x_init=x).x

    def own_jit(solver):
        def solve(denoiser, x):
            return sd.sample(key, denoiser, sigmas=sigmas, solver=solver, x_init=x).x

        return partial(jax.jit(solve), denoiser, x)

    bare = jax.jit(lambda denoiser, x, sigma: denoiser(x, sigma))
    levels = [jnp.float32(s) for s in sigmas[:-1]]
    solves = {
        "ours: default": partial(ours, None),
        "ours: Stein(DPM++ 2M)": partial(ours, sd.Stein(sd.DPMpp2M())),
        "ours: Stein(DPM++ 2M), StepEnergy": partial(ours, sd.Stein(sd.DPMpp2M(), sd.StepEnergy())),
        "ours: DPM++ 2M": partial(ours, sd.DPMpp2M()),
        "ours: iPNDM-3": partial(ours, sd.IPNDM(3)),
        "ours: default in one's own jit": own_jit(None),
        "ours: DPM++ 2M in one's own jit": own_jit(sd.DPMpp2M()),
        "bare: denoiser in JAX": lambda: [bare(denoiser, x, s) for s in levels],
    }
    if libraries.installed("diffrax"):
        solves["diffrax: Heun"] = partial(_diffrax(), denoiser, x)
    return {name: partial(_finished, solve) for name, solve in solves.items()}


def _finished(solve):
    return jax.block_until_ready(solve())


def _diffrax():
    import diffrax

    sigmas = sd.karras_sigmas(EVALUATIONS // 2 + 1)
    # The denoiser where the ODE ends is one evaluation.
    times = -sigmas[:-1]
    terms = diffrax.ODETerm(lambda t, x, denoiser: (x - denoiser(x, -t)) / t)

    @jax.jit
    def solve(denoiser, x):
        x = diffrax.diffeqsolve(
            terms,
            diffrax.Heun(),
            times[0],
            times[-1],
            None,
            x,
            denoiser,
            stepsize_controller=diffrax.StepTo(times),
        ).ys[0]
        return denoiser(x, -times[-1])

    return solve


def of_torch(case: str) -> dict[str, Callable[[], object]]:
    import torch

    denoise, x = in_torch(case)
    torch.set_num_threads(_fastest(lambda: denoise(x, 1.0)))
    sigmas = [float(s) for s in sd.karras_sigmas(EVALUATIONS)]
    chosen = ("DPM++ 2M (diffusers)", "UniPC-2 (diffusers)", "iPNDM-4 (diffusers)", "AB-3 (azula)")
    runs = {p.name: p.run for p in libraries.of_diffusers() + libraries.of_azula()}
    solves = {name: partial(runs[name], denoise, x, sigmas) for name in chosen}
    for name, sampler in {"DPM++ 2M": formulas.dpmpp_2m, "iPNDM-3": formulas.ipndm}.items():
        solves[f"{name} (formulas in torch)"] = partial(sampler, denoise, x, sigmas)
    solves["bare: denoiser in torch"] = lambda: [denoise(x, s) for s in sigmas[:-1]]

    def without_gradients(solve):
        with torch.inference_mode():
            solve()
            if device() == "cuda":
                torch.cuda.synchronize()

    return {name: partial(without_gradients, solve) for name, solve in solves.items()}


def _fastest(call) -> int:
    """Torch's number of threads, one or all: on small networks and busy machines one may be."""
    import torch

    def seconds(threads: int) -> float:
        torch.set_num_threads(threads)
        found = []
        with torch.inference_mode():
            for _ in range(7):
                start = time.perf_counter()
                call()
                found.append(time.perf_counter() - start)
        return statistics.median(found)

    return min({1, torch.get_num_threads()}, key=seconds)


def of_flax(case: str) -> dict[str, Callable[[], object]]:
    """The Flax scheduler in a jitted scan, on the grid that is its own."""
    scheduler, first, _, times, levels = libraries.flax_step(2, EVALUATIONS)
    denoiser, x = in_jax(case)
    ratios = jnp.asarray(levels[times], jnp.float32)
    times = jnp.asarray(times)

    @jax.jit
    def solve(denoiser, x):
        def step(carry, inputs):
            state, x = carry
            t, ratio = inputs
            x0 = denoiser(x * jnp.hypot(1.0, ratio), ratio)
            x, state = scheduler.step(state, x0, t, x, return_dict=False)
            return (state, x), None

        state = scheduler.set_timesteps(first, EVALUATIONS, x.shape)
        return jax.lax.scan(step, (state, x / 80), (times, ratios))[0][1]

    return {"DPM++ 2M (diffusers Flax 0.39)": partial(_finished, partial(solve, denoiser, x))}


KINDS = {"jax": of_jax, "torch": of_torch, "flax": of_flax}


def first(kind: str, case: str, name: str) -> tuple[float, float]:
    """Seconds of the first sample beyond those of the second, and growth of memory in MB."""
    program = KINDS[kind](case)[name]
    before = _memory()
    seconds = []
    for _ in range(2):
        start = time.perf_counter()
        program()
        seconds.append(time.perf_counter() - start)
    return max(seconds[0] - seconds[1], 0.0), _memory() - before


def _memory() -> float:
    """Peak so far of this process, in MB: on a GPU, of what was allocated there."""
    if device() == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    peak = jax.devices()[0].memory_stats()["peak_bytes_in_use"]
    if libraries.installed("torch"):
        import torch

        peak += torch.cuda.max_memory_allocated()
    return peak / 2**20


def turns(kinds: tuple[str, ...], case: str, repeats: int) -> dict[str, float]:
    """Name -> milliseconds a sample, the median over the turns."""
    programs = {k: v for kind in kinds for k, v in KINDS[kind](case).items()}
    for program in programs.values():
        program()
    seconds = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            start = time.perf_counter()
            program()
            seconds[name].append(time.perf_counter() - start)
    batch = SHAPES[case][0]
    return {name: 1e3 * statistics.median(s) / batch for name, s in seconds.items()}


def run(
    kinds: tuple[str, ...], case: str, repeats: int, alone: int, prepare: Callable[[], None]
) -> list[dict]:
    """A record for each program of these kinds.

    alone: how many of them, on the network, also get a process of their own; prepare: what a new
    process does first.
    """

    def spawned(function, *arguments):
        with ProcessPoolExecutor(1, get_context("spawn"), initializer=prepare) as pool:
            return pool.submit(function, *arguments).result()

    records = []
    found = spawned(turns, kinds, case, repeats)
    for i, (name, milliseconds) in enumerate(found.items()):
        kind = "flax" if "Flax" in name else "torch" if _in_torch(name) else "jax"
        once, memory = (None, None)
        if case == "network" and i < alone:
            once, memory = spawned(first, kind, case, name)
        records.append(
            {
                "case": f"{case}, {machine()}",
                "program": name,
                "milliseconds": milliseconds,
                "compile": once,
                "memory": memory,
            }
        )
    return records


def _in_torch(name: str) -> bool:
    return not name.startswith(("ours", "diffrax", "bare: denoiser in JAX"))

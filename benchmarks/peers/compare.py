"""Every sampler on one noise, the same grids and one denoiser, at no more than so many evaluations.

`run` runs one part on one problem, in a process of its own for the sake of compiled programs and of
the two versions of diffusers. Each row is written when it is found, and not found again.
"""

import itertools
import json
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

import metrics
import problems
import steindiff_jax as sd
from peers import dpm_v3, grids, libraries

NETWORKS = ("digits network", "images network")
# Mixtures of classes, each every other component; those of one component have none to ask for.
GUIDED = (*NETWORKS, "clumps", "grid", "curve", "offset", "grey patches 8x8", "colour patches 6x6")
GUIDANCE = (1.0, 3.0, 5.0, 7.0)
PROBLEMS = (*NETWORKS, *problems.REPORT)
TUNING_SEED = 1000
FINE = "fine solve", "log-SNR"  # its sampler and grid


class Row(NamedTuple):
    problem: str
    guidance: float
    side: str  # "ours", "peer", or "fine" for the fine solve
    sampler: str
    grid: str
    evaluations: int  # at most
    seed: int
    taken: int  # evaluations
    steps: int
    pixels: float  # as in `metrics.Distance`
    bands: float
    rmse: float
    tuning: int = 0  # evaluations of one sample, to choose a parameter or grid, or for statistics

    @property
    def run(self) -> tuple:
        return self.sampler, self.grid, self.evaluations, self.seed


class Sizes(NamedTuple):
    """How much is run."""

    samples: int = 400
    network_samples: int = 200
    evaluations: tuple[int, ...] = (3, 4, 5, 6, 8, 10, 16)
    network_evaluations: tuple[int, ...] = (3, 4, 5, 6, 8, 10)
    seeds: int = 5
    law: int = 50_000  # draws of an exact law
    draws: int = 2000  # of the fine solve that stands for it under guidance
    network_draws: int = 2000
    fine: int = 100  # steps
    levels: int = 121  # of DPM-Solver-v3's statistics
    points: int = 1024
    gits: int = 61  # nodes, and draws, of the long solve that GITS chooses from
    gits_draws: int = 128


class Counted:
    """A jitted denoiser, called with arrays of another library, that counts its calls."""

    def __init__(self, denoiser: sd.Denoiser, arrays: str) -> None:
        self.denoiser, self.arrays, self.calls = denoiser, arrays, 0

    def __call__(self, x, sigma):
        self.calls += 1
        if self.arrays == "jax":
            return _evaluate(self.denoiser, x, x.dtype.type(sigma))
        if self.arrays == "numpy":
            return np.asarray(_evaluate(self.denoiser, x, x.dtype.type(sigma)))
        import torch

        value = _evaluate(self.denoiser, x.numpy(), x.numpy().dtype.type(sigma))
        return torch.tensor(np.asarray(value))


@jax.jit
def _evaluate(denoiser, x, sigma):
    return denoiser(x, sigma)


def half(mixture: problems.Mixture) -> problems.Mixture:
    """Every other component: the class that guidance asks for."""
    weights = mixture.log_weights[::2]
    return problems.Mixture(
        mixture.means[::2],
        mixture.axes[::2],
        mixture.spread[::2],
        mixture.floor,
        weights - jax.nn.logsumexp(weights),
        mixture.event,
    )


def scales(name: str) -> tuple[float, ...]:
    """Guidance that a problem is run with; 1 is none, of a network the unconditional one."""
    return GUIDANCE if name in GUIDED else GUIDANCE[:1]


def setting(name: str, guidance: float, sizes: Sizes) -> tuple[problems.Problem, int]:
    """A problem whose law is that of the data, or else of a fine solve, and how many to sample."""
    if name in NETWORKS:
        n = sizes.network_samples
        make = problems.network if name == "digits network" else problems.images16
        return make(guidance if guidance > 1 else 0.0, n, sizes.network_draws), n
    whole, n = problems.REPORT[name](), sizes.samples
    if guidance == 1:
        return problems.exact(whole, sizes.law)._replace(fine=sizes.fine), n
    condition = half(whole)
    event = whole.event or whole.means.shape[1:]
    denoiser = sd.guided(condition, whole, guidance)
    problem = problems.Problem(denoiser, event, np.empty(0), condition, fine=sizes.fine)
    seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + -(-sizes.draws // n))
    law = [problems.fine_solve(problem, noise(seed, problem, n)) for seed in seeds]
    return problem._replace(law=np.concatenate(law)), n


def noise(seed: int, problem: problems.Problem, n: int) -> np.ndarray:
    """What all samplers start from, times sigma."""
    dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
    return np.random.default_rng(seed).standard_normal((n, *problem.event)).astype(dtype)


class Facts:
    """What some samplers want to know of a problem, found when it is first asked for."""

    def __init__(self, problem: problems.Problem, batch: int, sizes: Sizes) -> None:
        self.problem, self.batch, self.sizes = problem, batch, sizes
        self.gits = cache(self._gits)

    @cached_property
    def limit(self) -> float:
        return float(np.abs(self.problem.law).max())

    @cached_property
    def data_variance(self) -> float:
        return float(self.problem.law.reshape(len(self.problem.law), -1).var(axis=1).mean())

    @cached_property
    def statistics(self) -> dpm_v3.Statistics:
        law, sizes = self.problem.law, self.sizes
        denoiser = self.problem.denoiser
        return dpm_v3.statistics(denoiser, law, self.batch, sizes.levels, sizes.points)

    def _gits(self, steps: int) -> np.ndarray:
        teacher = sd.karras_sigmas(self.sizes.gits - 1)
        shape = self.batch, *self.problem.event
        key = jax.random.key(TUNING_SEED)
        return np.asarray(sd.gits_sigmas(key, self.problem.denoiser, shape, steps, teacher))

    def cost(self, peer: libraries.Peer, grid: str) -> int:
        """Evaluations that a peer's statistics and a grid took."""
        taken = self.statistics.evaluations if "statistics" in peer.needs else 0
        return taken + (self.batch * (self.sizes.gits - 1) if grid == "GITS" else 0)


def draw(peer: libraries.Peer, denoiser, start: np.ndarray, sigmas, options: dict):
    """Samples as NumPy, and the evaluations that they took."""
    x = (float(sigmas[0]) * start).astype(start.dtype)
    if peer.arrays == "torch":
        import torch

        x = torch.tensor(x)
    denoise = Counted(denoiser, peer.arrays)
    with np.errstate(all="ignore"):
        x = np.asarray(peer.run(denoise, x, [float(s) for s in sigmas], **options))
    return x, denoise.calls


def judged(distances: metrics.Distances, x: np.ndarray, seed: int) -> tuple[float, float, float]:
    """Distances in pixels and bands and RMSE, infinite where a sample is not finite."""
    if not np.isfinite(x).all():
        return np.inf, np.inf, np.inf
    found = distances(x, seed)
    return found.pixels, found.bands, found.rmse


def tuned(peer, distances: metrics.Distances, sigmas, fixed: dict):
    """The best of a peer's choices on noise of its own, and the evaluations that this took."""
    start, spent, found = distances.noise(TUNING_SEED), 0, []
    for choice in peer.choices:
        x, calls = draw(peer, distances.problem.denoiser, start, sigmas, choice | fixed)
        spent += calls * len(x)
        pixels, bands, _ = judged(distances, x, TUNING_SEED)
        found.append(pixels * bands)
    return peer.choices[int(np.argmin(found))], spent


def run(name: str, guidance: float, part: str, sizes: Sizes, path: Path) -> None:
    """Append what `path` does not have yet of a part's samplers on one problem."""
    # The Flax schedulers fail in float64; a network is of float32.
    jax.config.update("jax_enable_x64", not (name in NETWORKS or part == "flax"))
    peers = [p for p in libraries.of(part) if p.network or name not in NETWORKS]
    if not peers:
        return
    problem, n = setting(name, guidance, sizes)
    problem = problem._replace(law=problem.law.astype(noise(0, problem, 1).dtype))
    # A network holds the labels of all of its batch.
    batch = n if name in NETWORKS else min(n, sizes.gits_draws)
    distances, facts = metrics.Distances(problem, n), Facts(problem, batch, sizes)
    done = {row.run for row in read(path)}
    budgets = sizes.network_evaluations if name in NETWORKS else sizes.evaluations
    with path.open("a") as file:
        file.write("\n")  # the last line may be half of one

        def add(side: str, run: tuple, x: np.ndarray, taken: int, steps: int, tuning: int = 0):
            row = Row(
                name, guidance, side, *run, taken, steps, *judged(distances, x, run[-1]), tuning
            )
            file.write(json.dumps(row) + "\n")
            file.flush()

        for seed in range(sizes.seeds if part == "ours" else 0):
            key = *FINE, problem.fine, seed
            if key not in done:
                x = problems.fine_solve(problem, distances.noise(seed))
                add("fine", key, x, problem.fine, problem.fine)
        for peer, budget in itertools.product(peers, budgets):
            steps = peer.steps(budget)
            if steps < 1:
                continue
            on = grids.of(peer, steps, facts.gits)
            wanted = [
                (grid, seed)
                for grid, seed in itertools.product(on, range(sizes.seeds))
                if (peer.name, grid, budget, seed) not in done
            ]
            if not wanted:
                continue
            options, tuning = {need: getattr(facts, need) for need in peer.needs}, 0
            if peer.choices:  # on one grid, for all
                choice, tuning = tuned(peer, distances, on["Karras"], options)
                options |= choice
            for grid, seed in wanted:
                start = distances.noise(seed)
                x, taken = draw(peer, problem.denoiser, start, on[grid], options)
                if taken > budget:
                    raise AssertionError(f"{peer.name} took {taken} of {budget} evaluations")
                side = "ours" if part == "ours" else "peer"
                cost = tuning + facts.cost(peer, grid)
                add(side, (peer.name, grid, budget, seed), x, taken, len(on[grid]) - 1, cost)


def read(*paths: Path) -> list[Row]:
    """What `run` wrote; lines that were cut short are left out."""
    found = []
    for path in paths:
        for line in path.read_text().splitlines() if path.exists() else ():
            try:
                found.append(Row(*json.loads(line)))
            except (json.JSONDecodeError, TypeError):
                continue
    return found

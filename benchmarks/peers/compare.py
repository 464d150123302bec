"""Every sampler on one noise, one set of grids and one denoiser, at equal evaluations.

`run` compares on one problem; it is meant to have a process of its own, for the sake of compiled
programs and of the two versions of diffusers.
"""

import csv
import itertools
from functools import cache
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import diversity
import metrics
import problems
import steindiff_jax as sd
from peers import libraries

EVALUATIONS = (3, 4, 5, 6, 8, 10, 12, 16, 20)
GUIDANCE = (1.0, 3.0, 5.0, 7.0)
NETWORK = "digits network"
EXACT = (
    "clumps",
    "few clumps",
    "grid",
    "curve",
    "smooth",
    "gaussian",
    "anisotropic",
    "offset",
    "grey patches 8x8",
)
GUIDED = ("clumps", "grid", "curve", "offset")  # as in diversity.py
PLACES = (5, 10)  # evaluations at which coverage, precision and recall are measured
TUNING_SEED = 1000


class Row(NamedTuple):
    problem: str
    guidance: float
    side: str  # "ours", "plain" (ours too, uncorrected), "peer", or "fine" for the fine solve
    sampler: str
    grid: str
    evaluations: int
    seed: int
    distance: float  # sliced-W2 to the law
    rmse: float  # to the fine solve from the same noise, over the law's std
    modes: float = np.nan
    precision: float = np.nan
    recall: float = np.nan
    tuning: int = 0  # evaluations of one sample


class Sizes(NamedTuple):
    """How much is run."""

    samples: int = 400
    network_samples: int = 80
    evaluations: tuple[int, ...] = EVALUATIONS
    network_evaluations: tuple[int, ...] = (3, 4, 5, 6, 8, 10, 16)
    guidance: tuple[float, ...] = GUIDANCE
    seeds: int = 1
    draws: int = 2000  # of the fine solve
    fine: int = 100  # steps


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


def setting(name: str, guidance: float, sizes: Sizes) -> problems.Problem:
    """A problem whose law is that of the data, or where there is none of a fine solve."""
    if name == NETWORK:
        import digits

        n = sizes.network_samples
        condition, event = digits.load(jnp.arange(n) % 10), (8, 8, 1)
        free, mixture = digits.load(jnp.full(n, digits.NULL)), None
    else:
        whole, n = problems.REPORT[name](), sizes.samples
        if guidance == 1:
            return problems.exact(whole)._replace(fine=sizes.fine)
        condition, free, event = half(whole), whole, whole.means.shape[1:]
        mixture = condition
    denoiser = sd.guided(condition, free, guidance)
    problem = problems.Problem(denoiser, event, np.empty(0), mixture, fine=sizes.fine)
    seeds = range(TUNING_SEED + 1, TUNING_SEED + 1 + -(-sizes.draws // n))
    law = [problems.fine_solve(problem, noise(seed, problem, n)) for seed in seeds]
    return problem._replace(law=np.concatenate(law))


@cache
def common_grids(steps: int) -> dict[str, np.ndarray]:
    """Name -> sigmas (steps + 1,), which end in 0."""
    makers = {"Karras": sd.karras_sigmas, "log-SNR": sd.log_snr_sigmas}
    return {name: np.asarray(make(steps), np.float64) for name, make in makers.items()}


@cache
def our_grids(steps: int) -> dict[str, np.ndarray]:
    """Those, and DDPM's integer steps, which diffusers' schedulers take by default."""
    ddpm = sd.ddpm_sigmas(steps, sd.Discrete.linear(), "linspace")
    return common_grids(steps) | {"DDPM": np.asarray(ddpm, np.float64)}


def grids(peer: libraries.Peer, steps: int) -> dict[str, np.ndarray]:
    """Those that the peer can step through, its own among them."""
    own = {} if peer.own_grid is None else {"own": peer.own_grid(steps)}
    if peer.only_own:
        return own
    if peer.to_zero:
        return common_grids(steps) | own
    return {name: sigmas[:-1] for name, sigmas in common_grids(steps + 1).items()} | own


def noise(seed: int, problem: problems.Problem, n: int) -> np.ndarray:
    """What all samplers start from, times sigma."""
    dtype = np.float64 if jax.config.jax_enable_x64 else np.float32
    return np.random.default_rng(seed).standard_normal((n, *problem.event)).astype(dtype)


def draw(peer: libraries.Peer, denoiser, start: np.ndarray, sigmas, options: dict):
    """Samples as NumPy, and the evaluations that they took."""
    x = float(sigmas[0]) * start
    if peer.arrays == "torch":
        import torch

        x = torch.tensor(x)
    denoise = Counted(denoiser, peer.arrays)
    with np.errstate(all="ignore"):
        x = np.asarray(peer.run(denoise, x, [float(s) for s in sigmas], **options))
    return x, denoise.calls


def tuned(peer, problem, distance, n: int, sigmas, fixed: dict):
    """The best of a peer's choices on noise of its own, and the evaluations that this took."""
    start, spent, found = noise(TUNING_SEED, problem, n), 0, []
    for choice in peer.choices:
        x, calls = draw(peer, problem.denoiser, start, sigmas, choice | fixed)
        spent += calls * n
        found.append(distance(x) if np.isfinite(x).all() else np.inf)
    return peer.choices[int(np.argmin(found))], spent


def run(name: str, sizes: Sizes, with_flax: bool = False) -> list[Row]:
    """Everything on one problem; with_flax: the Flax schedulers alone, which fail in float64."""
    on_network = name == NETWORK
    jax.config.update("jax_enable_x64", not (on_network or with_flax))
    # A problem of one component has no class to ask for.
    scales = sizes.guidance if on_network or name in GUIDED else sizes.guidance[:1]
    return [row for scale in scales for row in _run(name, scale, sizes, with_flax)]


def _run(name: str, guidance: float, sizes: Sizes, with_flax: bool) -> list[Row]:
    on_network = name == NETWORK
    n = sizes.network_samples if on_network else sizes.samples
    budgets = sizes.network_evaluations if on_network else sizes.evaluations
    problem = setting(name, guidance, sizes)
    distance = metrics.SlicedWasserstein(problem.law, n)
    flat = problem.law.reshape(len(problem.law), -1)
    facts = {"limit": float(np.abs(flat).max()), "data_variance": float(flat.var(axis=1).mean())}
    starts = [noise(seed, problem, n) for seed in range(sizes.seeds)]
    fine = [problems.fine_solve(problem, start) for start in starts]
    std = float(np.sqrt(flat.var(axis=0).mean()))
    rows, kept = [], {}

    def add(side, sampler, grid, budget, seed, x, tuning=0):
        finite = np.isfinite(x).all()
        w2, rmse = np.inf, np.inf
        if finite:
            w2, rmse = distance(x), float(np.sqrt(np.mean((x - fine[seed]) ** 2))) / std
        at = (name, guidance, side, sampler, grid, budget, seed, w2, rmse)
        if side == "fine" or (budget in PLACES and grid == "Karras"):
            best = "ours" if side == "plain" else side, budget, seed
            if finite and (best not in kept or w2 < rows[kept[best][0]].distance):
                kept[best] = len(rows), x
        rows.append(Row(*at, tuning=tuning))

    for seed in () if with_flax else range(sizes.seeds):
        add("fine", "fine solve", "log-SNR", sizes.fine, seed, fine[seed])

    for peer in libraries.peers(with_flax):
        if on_network and not peer.network:
            continue
        fixed = {name: facts[name] for name in peer.needs}
        for budget in budgets:
            steps = peer.steps(budget)
            if steps < 1:
                continue
            choice, tuning = {}, 0
            if peer.choices:  # on one grid, for all
                sigmas = common_grids(steps)["Karras"]
                choice, tuning = tuned(peer, problem, distance, n, sigmas, fixed)
            for seed, (grid, sigmas) in itertools.product(
                range(sizes.seeds), grids(peer, steps).items()
            ):
                start = noise(seed, problem, n)
                x, calls = draw(peer, problem.denoiser, start, sigmas, choice | fixed)
                if calls > budget:
                    raise AssertionError(f"{peer.name} took {calls} of {budget} evaluations")
                add("peer", peer.name, grid, budget, seed, x, tuning)
    for (method, solver), budget, seed in itertools.product(
        () if with_flax else (libraries.OURS | libraries.CLIPPED).items(),
        budgets,
        range(sizes.seeds),
    ):
        denoiser = problem.denoiser
        if method in libraries.CLIPPED:
            denoiser = sd.DynamicThreshold(denoiser, limit=facts["limit"])
        corrected = solver is None or isinstance(solver, sd.Stein)
        for grid, sigmas in our_grids(budget).items():
            start = noise(seed, problem, n)
            padded = np.pad(sigmas, (0, max(budgets) + 1 - budget))  # one program for all
            solution = sd.sample(
                jax.random.key(seed),
                denoiser,
                sigmas=padded.astype(start.dtype),
                solver=solver,
                x_init=start.dtype.type(sigmas[0]) * start,
            )
            side = "ours" if corrected else "plain"
            add(side, method, grid, budget, seed, np.asarray(solution.x))
    for i, x in kept.values():  # of the best of each side alone: it takes its time
        modes, _, precision, recall = diversity.judge(problem, x)
        rows[i] = rows[i]._replace(modes=modes, precision=precision, recall=recall)
    return rows


def write(rows: list[Row], path: Path) -> None:
    with path.open("w") as file:
        writer = csv.writer(file)
        writer.writerow(Row._fields)
        writer.writerows(rows)


def read(path: Path) -> list[Row]:
    """Rows as `write` wrote them."""
    kinds = list(Row.__annotations__.values())
    with path.open() as file:
        lines = list(csv.reader(file))[1:]
    return [Row(*(kind(cell) for kind, cell in zip(kinds, line, strict=True))) for line in lines]

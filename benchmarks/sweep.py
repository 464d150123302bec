"""The sweep that the scripts share, solver x correction x grid x steps x seed, and its statistics.

Plain and corrected start from the same noise. `Results` compares them: geometric means of ratios,
with 95% intervals over the seeds.
"""

import argparse
import contextlib
import itertools
import json
import multiprocessing
import shlex
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats
from tqdm import tqdm

import metrics
import problems
import steindiff_jax as sd

STEPS = (3, 4, 5, 6, 8, 10, 16)
GRIDS = {"Karras": sd.karras_sigmas, "log-SNR": sd.log_snr_sigmas}
# The same with all steps between the ends.
ABOVE_ZERO = {f"{name} to 0.002": partial(make, to_zero=False) for name, make in GRIDS.items()}
EVERY_GRID = GRIDS | ABOVE_ZERO
SOLVERS = {
    "DDIM": sd.DDIM(),
    "Heun": sd.Heun(),
    "2M": sd.DPMpp2M(),
    "3M": sd.DPMpp3M(),
    "iPNDM-2": sd.IPNDM(2),
    "iPNDM-3": sd.IPNDM(3),
    "iPNDM-4": sd.IPNDM(4),
    "UniPC-3": sd.UniPC(3),
    "DEIS-3": sd.DEIS(3),
    "UniPC-2": sd.UniPC(2),
    "DEIS-2": sd.DEIS(2),
    "LMS-3": sd.LMS(3),
    "DPM2": sd.DPM2(),
    "2S": sd.DPMpp2S(),
    "3S": sd.DPMpp3S(),
}
SEVERAL = {"Heun": 2, "DPM2": 2, "2S": 2, "3S": 3}  # evaluations a step, where not one


def plain(solver: sd.Solver) -> sd.Solver:
    return solver


CORRECTIONS = {"plain": plain, "corrected": sd.Stein}
# Of networks, which cost more: steps, and samples at most.
NETWORK_STEPS = (3, 4, 5, 8)
NETWORK_SAMPLES = {"digits": 200, "images": 64}


# Name -> solver -> corrected solver, or a function from the problem to that.
Corrections = dict[str, Callable] | Callable[[problems.Problem], dict[str, Callable]]


class Run(NamedTuple):
    problem: str
    solver: str
    correction: str
    grid: str
    steps: int
    seed: int


def sweep(
    distances: metrics.Distances,
    solvers: Iterable[str],
    corrections: Corrections,
    *,
    steps: Iterable[int] = STEPS,
    seeds: int = 1,
    grids: dict[str, Callable] = GRIDS,
    denoiser: Callable[[int], sd.Denoiser] | None = None,
    level: float = 1.0,
    judge: Callable[[np.ndarray, int], Any] | None = None,
    name: str = "",
) -> dict[Run, Any]:
    """Every run's `Distance`, or what `judge` makes of the samples (n, *event) and the seed.

    grids: name -> steps -> sigmas; denoiser: seed -> another one than the problem's; level: of the
    initial noise, over what the grid says.
    """
    problem, longest, found = distances.problem, max(steps), {}
    if callable(corrections):
        corrections = corrections(problem)
    for s, (c, correct) in itertools.product(solvers, corrections.items()):
        solver = correct(SOLVERS[s])
        for (g, grid), k, seed in itertools.product(grids.items(), steps, range(seeds)):
            noise = distances.noise(seed)
            sigmas = padded(np.asarray(grid(k)).astype(noise.dtype), longest)
            solution = sd.sample(
                jax.random.key(seed),
                denoiser(seed) if denoiser else problem.denoiser,
                sigmas=sigmas,
                solver=solver,
                x_init=noise.dtype.type(level) * sigmas[0] * noise,
            )
            found[Run(name, s, c, g, k, seed)] = (judge or distances)(np.asarray(solution.x), seed)
    return found


def padded(sigmas: np.ndarray, longest: int) -> np.ndarray:
    """For one program for all numbers of steps."""
    return np.pad(sigmas, (0, longest + 1 - len(sigmas)), mode="edge")


@contextlib.contextmanager
def prepared(half: str, name: str, n: int):
    """`Distances` from a problem of a half, in the precision that it needs."""
    network = name in problems.NETWORKS
    if network:
        n = min(n, NETWORK_SAMPLES[name.split()[0]])
    with jax.enable_x64(not network):
        yield metrics.Distances(problems.build(half, name, n), n)


def _one(name: str, half: str, solvers, corrections, n: int, grids, steps, seeds) -> dict[Run, Any]:
    if name in problems.NETWORKS:
        steps = [k for k in steps if k in NETWORK_STEPS] or steps
    try:
        with prepared(half, name, n) as distances:
            grids = {grid: EVERY_GRID[grid] for grid in grids}
            options = {"grids": grids, "steps": steps, "seeds": seeds, "name": name}
            return sweep(distances, solvers, corrections, **options)
    except FileNotFoundError as error:
        print(f"{name} is left out: {error}", file=sys.stderr)
        return {}


def interpolated(levels: np.ndarray, count: int) -> np.ndarray:
    """Levels at so many equidistant places among these, in log sigma."""
    places = np.linspace(0, len(levels) - 1, count)
    return np.exp(np.interp(places, np.arange(len(levels)), np.log(np.asarray(levels, float))))


def sweep_all(half: str, arguments: argparse.Namespace, corrections: Corrections) -> dict:
    """The sweep over problems of a half, as `options` asks for; the corrections must pickle."""
    # A process for each problem: hundreds of compiled programs in one exhaust its memory maps.
    a, results, spawn = arguments, {}, multiprocessing.get_context("spawn")
    work = partial(
        _one,
        half=half,
        solvers=a.solvers,
        corrections=corrections,
        n=a.samples,
        grids=a.grids,
        steps=a.steps,
        seeds=a.seeds,
    )
    with ProcessPoolExecutor(a.jobs, spawn, max_tasks_per_child=1) as pool:
        for found in tqdm(pool.map(work, a.problems), total=len(a.problems)):
            results |= found
    return results


def options(
    doc: str,
    half: str,
    solvers: Iterable[str] = tuple(SOLVERS),
    chosen: Iterable[str] = (),
    *,
    seeds: int = 5,
    n: int = 400,
    steps: Iterable[int] = STEPS,
) -> argparse.ArgumentParser:
    """What every sweep can be asked for, and its defaults; the first line of `doc` describes it."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    names = list(problems.HALVES[half])
    where = {"nargs": "*", "metavar": "NAME", "help": "default: %(default)s"}
    parser.add_argument("--problems", default=list(chosen) or names, choices=names, **where)
    parser.add_argument("--solvers", default=list(solvers), choices=list(SOLVERS), **where)
    parser.add_argument("--grids", default=list(GRIDS), choices=list(EVERY_GRID), **where)
    parser.add_argument("--steps", nargs="*", type=int, default=list(steps))
    parser.add_argument("--seeds", type=int, default=seeds)
    parser.add_argument("--samples", type=int, default=n)
    parser.add_argument("--jobs", type=int, default=2, help="problems at a time")
    return parser


MEASURES = {
    "pixels": lambda d: d.pixels,
    "bands": lambda d: d.bands,
    "both": lambda d: (d.pixels * d.bands) ** 0.5,
    "rmse": lambda d: d.rmse,
    "energy": lambda d: d.energy,
}
FAILED = 1e3  # stands for a distance that is not finite


class Results:
    """Runs as arrays: `columns` of what was run, and for each correction log distances.

    NaN, which is left out, where a correction was not run.
    """

    def __init__(self, runs: dict[Run, metrics.Distance]) -> None:
        self.runs = runs
        cases = [run for run in runs if run.correction == "plain"]
        self.corrections = list(dict.fromkeys(run.correction for run in runs))
        self.problems = list(dict.fromkeys(run.problem for run in runs))
        self.solvers = list(dict.fromkeys(run.solver for run in runs))
        self.columns = {name: np.array([getattr(r, name) for r in cases]) for name in Run._fields}
        self.logs = {
            c: {
                m: self._logs([runs.get(r._replace(correction=c)) for r in cases], m)
                for m in MEASURES
            }
            for c in self.corrections
        }

    @staticmethod
    def _logs(distances: list[metrics.Distance | None], measure: str) -> np.ndarray:
        values = [np.nan if d is None else MEASURES[measure](d) for d in distances]
        failed = [d is not None and not np.isfinite(d).all() for d in distances]
        return np.log(np.where(failed, FAILED, values))

    def chosen(self, **where) -> np.ndarray:
        """Which cases have these values, or one of these."""
        every = [np.isin(self.columns[name], value) for name, value in where.items()]
        return np.logical_and.reduce(every) if every else np.ones(len(self.columns["seed"]), bool)

    def ratio(self, measure: str, correction: str = "corrected", **where) -> tuple[float, float]:
        """Geometric mean of corrected / plain, and the half-width of its interval over seeds."""
        logs = self.logs[correction][measure] - self.logs["plain"][measure]
        return self._interval(logs, self.chosen(**where))

    def best_ratio(self, measure: str, correction: str = "corrected", **where) -> tuple:
        """The same of the best solver and grid, for each problem, number of steps and seed.

        Of solvers with one evaluation a step; the best corrected over the best plain.
        """
        solvers = [s for s in self.solvers if s not in SEVERAL]
        here = self.chosen(**where) & self.chosen(solver=solvers)
        cases = [self.columns[name][here] for name in ("problem", "steps", "seed")]
        _, first, group = np.unique(
            ["/".join(map(str, case)) for case in zip(*cases, strict=True)],
            return_index=True,
            return_inverse=True,
        )
        best = {}
        for c in ("plain", correction):
            best[c] = np.full(len(first), np.inf)
            np.minimum.at(best[c], group, self.logs[c][measure][here])
        logs = best[correction] - best["plain"]
        seeds = self.columns["seed"][here][first]
        return interval([logs[seeds == seed].mean() for seed in np.unique(seeds)])

    def cells(self, measure: str, correction: str = "corrected") -> list[tuple]:
        """(ratio, problem, solver, grid, steps) of every single cell, the worst first."""
        logs = self.logs[correction][measure] - self.logs["plain"][measure]
        names = [self.columns[name] for name in ("problem", "solver", "grid", "steps")]
        found = {}
        for log, *cell in zip(logs, *names, strict=True):
            if not np.isnan(log):
                found.setdefault(tuple(cell), []).append(log)
        return sorted(((float(np.exp(np.mean(v))), *k) for k, v in found.items()), reverse=True)

    def mean(self, measure: str, correction: str = "corrected", **where) -> float:
        """Geometric mean of the distances themselves."""
        return float(np.exp(self.logs[correction][measure][self.chosen(**where)].mean()))

    def _interval(self, logs: np.ndarray, here: np.ndarray) -> tuple[float, float]:
        seeds, here = self.columns["seed"], here & ~np.isnan(logs)
        return interval([logs[here & (seeds == seed)].mean() for seed in np.unique(seeds[here])])


def interval(logs: list[float]) -> tuple[float, float]:
    """Exp of the mean, and the half-width of its 95% interval (Student's t over the seeds)."""
    if not logs:
        return float("nan"), float("nan")
    mean = float(np.exp(np.mean(logs)))
    if len(logs) < 2:
        return mean, float("nan")
    return mean, float(mean * stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs))


def shown(ratio: tuple[float, float]) -> str:
    value, half = ratio
    if np.isnan(value):
        return ""
    return f"{value:.2f}" if np.isnan(half) else f"{value:.2f} ± {half:.2f}"


def write(runs: dict[Run, metrics.Distance], path: Path) -> None:
    """As JSON with the command: problem -> ... -> steps -> four distances of each seed."""
    tree = {}
    for run, distance in runs.items():
        node = tree
        for key in run[:-1]:
            node = node.setdefault(str(key), {})
        node[str(run.seed)] = [float(f"{value:.4g}") for value in distance]
    path.parent.mkdir(exist_ok=True, parents=True)
    command = "python " + shlex.join(["benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]])
    content = {"command": command, "distances": metrics.Distance._fields, "runs": tree}
    path.write_text(json.dumps(content, separators=(",", ":")))


def read(path: Path) -> dict[Run, metrics.Distance]:
    """What `write` wrote."""
    runs = {}
    for problem, a in json.loads(path.read_text())["runs"].items():
        for solver, b in a.items():
            for correction, c in b.items():
                for grid, d in c.items():
                    for steps, e in d.items():
                        for seed, values in e.items():
                            run = Run(problem, solver, correction, grid, int(steps), int(seed))
                            runs[run] = metrics.Distance(*values)
    return runs

"""Every solver, plain and with the default correction (about 40 minutes on two cores).

Sliced-W2 to the law, over {Karras, log-SNR} grids, steps {3, 4, 5, 6, 8, 10, 16} and five seeds;
steps, not evaluations: Heun, DPM2 and 2S take two each, 3S three. Ratios corrected / plain are
geometric means, with 95% intervals over the seeds. The problems are `problems.REPORT`, which no
rule was tuned on, and the digits network at guidance 1.5 and 6. Losses are printed first. Writes
quality.csv, of every single run, and quality.png beside this file.
"""

import argparse
import csv
import itertools
import multiprocessing
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from scipy import stats
from tqdm import tqdm

import metrics
import problems
import steindiff_jax as sd

STEPS = (3, 4, 5, 6, 8, 10, 16)
GRIDS = {"karras": sd.karras_sigmas, "log-SNR": sd.log_snr_sigmas}
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
CORRECTIONS = {"plain": lambda solver: solver, "corrected": sd.Stein}
TARGETS = {"2M": 0.68, "3M": 0.35, "iPNDM-3": 0.85, "iPNDM-4": 0.85}


def steps_of(solver: str, evaluations: int) -> int:
    """As many as the evaluations allow; Heun takes two a step, and one in the last to 0."""
    return (evaluations + 1) // 2 if solver == "Heun" else evaluations


def measure(name: str, solvers: tuple[str, ...], n: int, seeds: int) -> dict:
    """(problem, solver, correction, grid, steps, seed) -> sliced-W2."""
    guided = name in problems.GUIDED
    jax.config.update("jax_enable_x64", not guided)
    if guided:  # a network costs more: fewer samples and step counts
        n, steps = n // 2, (4, 5, 6, 10)
        problem = problems.network(problems.GUIDED[name], n)
    else:
        steps = STEPS
        problem = problems.exact((problems.REPORT | problems.TUNE)[name]())
    distance = metrics.SlicedWasserstein(problem.law, n)
    results = {}
    for s, (c, correct) in itertools.product(solvers, CORRECTIONS.items()):
        if s == "DDIM" and c != "plain":
            continue  # a first-order step has nothing to correct
        for (g, grid), k, seed in itertools.product(GRIDS.items(), steps, range(seeds)):
            sigmas = jnp.pad(grid(k), (0, max(steps) - k))  # one program for all grids
            solution = sd.sample(
                jax.random.key(seed),
                problem.denoiser,
                (n, *problem.event),
                sigmas=sigmas,
                solver=correct(SOLVERS[s]),
            )
            results[name, s, c, g, k, seed] = distance(solution.x)
    return results


class Results:
    """(problem, solver, correction, grid, steps, seed) -> distance, and ratios of them."""

    def __init__(self, results: dict) -> None:
        self.results = results
        self.problems = list(dict.fromkeys(k[0] for k in results))
        self.seeds = sorted({k[-1] for k in results})
        steps = {p: {k[4] for k in results if k[0] == p} for p in self.problems}
        most = max(map(len, steps.values()))
        self.whole = [p for p in self.problems if len(steps[p]) == most]

    def ratio(self, correction: str, **where: str | int) -> tuple[float, float]:
        """Geometric mean of corrected / plain, and the half-width of its interval over seeds."""
        logs = {seed: [] for seed in self.seeds}
        for key, value in self.results.items():
            problem, solver, c, grid, steps, seed = key
            names = {"problem": problem, "solver": solver, "grid": grid, "steps": steps}
            if c == correction and all(names[k] == v for k, v in where.items()):
                logs[seed].append(
                    np.log(value / self.results[problem, solver, "plain", grid, steps, seed])
                )
        return interval([np.mean(v) for v in logs.values()])

    def best_ratio(self, correction: str, problem: str | None = None) -> tuple[float, float]:
        """The same of the best solver's distance, DDIM among both, per problem, grid and steps."""
        best = {}
        for (p, s, c, *rest), value in self.results.items():
            if problem in (None, p):
                for kind in ("plain", correction) if s == "DDIM" else (c,):
                    best[kind, p, *rest] = min(value, best.get((kind, p, *rest), np.inf))
        logs = {seed: [] for seed in self.seeds}
        for (kind, *rest), value in best.items():
            if kind == correction:
                logs[rest[-1]].append(np.log(value / best["plain", *rest]))
        return interval([np.mean(v) for v in logs.values()])

    def mean(self, solver: str, correction: str, steps: int) -> float:
        """Distance, over the problems that were measured at every number of steps."""
        where = {(p, solver, correction, steps) for p in self.whole}
        return metrics.geometric_mean(
            [v for k, v in self.results.items() if (*k[:3], k[4]) in where]
        )


def interval(logs: list[float]) -> tuple[float, float]:
    """Exp of the mean, and the half-width of its 95% interval (Student's t over the seeds)."""
    mean = np.exp(np.mean(logs))
    if len(logs) < 2:
        return float(mean), float("nan")
    half = stats.t.ppf(0.975, len(logs) - 1) * stats.sem(logs)
    return float(mean), float(mean * half)


def show(results: Results, correction: str) -> None:
    corrected = list(dict.fromkeys(k[1] for k in results.results if k[1] != "DDIM"))
    cells = {
        (p, s): results.ratio(correction, problem=p, solver=s)
        for p, s in itertools.product(results.problems, corrected)
    }
    print(f"\n## {correction}\n\nlosses (ratio > 1 over all steps and grids):")
    losses = sorted(((r, h, p, s) for (p, s), (r, h) in cells.items() if r > 1), reverse=True)
    print("\n".join(f"  {p}, {s}: {r:.2f} +- {h:.2f}" for r, h, p, s in losses) or "  none")
    print("\n| corrected / plain | " + " | ".join(corrected) + " | best of all |")
    print("|---" * (len(corrected) + 2) + "|")
    for p in results.problems:
        row = [cells[p, s] for s in corrected] + [results.best_ratio(correction, p)]
        print(f"| {p} | " + " | ".join(f"{r:.2f} ± {h:.2f}" for r, h in row) + " |")
    row = [results.ratio(correction, solver=s) for s in corrected]
    row.append(results.best_ratio(correction))
    print("| **all** | " + " | ".join(f"**{r:.2f} ± {h:.2f}**" for r, h in row) + " |")
    targets = [f"≤ {TARGETS.get(s, 1.0):.2f}" for s in corrected] + ["≤ 0.87"]
    print("| target | " + " | ".join(targets) + " |")
    steps = sorted({k[4] for k in results.results})
    print("\n| corrected / plain | " + " | ".join(f"{k} steps" for k in steps) + " |")
    print("|---" * (len(steps) + 1) + "|")
    for s in corrected:
        row = [results.ratio(correction, solver=s, steps=k)[0] for k in steps]
        print(f"| {s} | " + " | ".join(f"{r:.2f}" for r in row) + " |")
    print(
        "\nevaluations that the plain solver needs for what the corrected one reaches at 5 steps:"
    )
    for s in corrected:
        reached = results.mean(s, correction, 5) if 5 in steps else np.nan
        enough = [k for k in steps if results.mean(s, "plain", k) <= reached]
        print(f"  {s}: {f'{enough[0]} steps' if enough else f'more than {steps[-1]} steps'}")


def plot(results: Results, path: Path) -> None:
    """Distance against steps, as `Results.mean`; dashed plain, solid corrected."""
    steps = sorted({k[4] for k in results.results})
    names = list(dict.fromkeys(k[1] for k in results.results))
    figure, axis = plt.subplots(figsize=(7, 4.5), layout="constrained")
    for i, s in enumerate(names):
        for c, style in (("plain", "--"), ("corrected", "-")):
            if (s, c) != ("DDIM", "corrected"):
                values = [results.mean(s, c, k) for k in steps]
                label = s if c == "plain" else None
                axis.loglog(steps, values, style, color=f"C{i % 10}", label=label, lw=1)
    axis.set(xlabel="steps (dashed plain, solid corrected)", ylabel="sliced-W2")
    axis.set_xticks(steps, steps)
    axis.minorticks_off()
    axis.legend(ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="*", default=[*problems.REPORT, *problems.GUIDED])
    parser.add_argument("--solvers", nargs="*", default=list(SOLVERS), choices=list(SOLVERS))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--samples", type=int, default=500)
    parser.add_argument("--jobs", type=int, default=2, help="problems at a time")
    parser.add_argument("--read", nargs="*", default=[], help="quality.csv of earlier runs, to add")
    arguments = parser.parse_args()
    results = {}
    for path in arguments.read:
        with Path(path).open() as file:
            for problem, solver, c, grid, steps, seed, distance in list(csv.reader(file))[1:]:
                results[problem, solver, c, grid, int(steps), int(seed)] = float(distance)
    # A process for each problem: hundreds of compiled programs in one exhaust its memory maps.
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(arguments.jobs, spawn, max_tasks_per_child=1) as pool:
        sizes = {"n": arguments.samples, "seeds": arguments.seeds}
        work = partial(measure, solvers=arguments.solvers, **sizes)
        for measured in tqdm(pool.map(work, arguments.problems), total=len(arguments.problems)):
            results |= measured
    with Path(__file__).with_suffix(".csv").open("w") as file:
        writer = csv.writer(file)
        writer.writerow(["problem", "solver", "correction", "grid", "steps", "seed", "distance"])
        writer.writerows([*key, f"{value:.5f}"] for key, value in results.items())
    for correction in CORRECTIONS:
        if correction != "plain":
            show(Results(results), correction)
    plot(Results(results), Path(__file__).with_suffix(".png"))


if __name__ == "__main__":
    main()

"""Whether a gain in distance is a collapse: coverage, precision, recall (3 minutes on two cores).

Modes: the share of the mixture's components that are the nearest of at least one sample. Entropy:
exp(H) of that assignment over the number of components. Precision: the share of samples within
the 5-nearest-neighbour balls of draws of the law; recall: the share of draws within those of the
samples (Kynkaanniemi et al. 2019, arXiv:1904.06991, by `prdc`, arXiv:2002.09797). The law of the
digits network is its own fine solve. As a control the same of other exact draws, as many: a sampler
without fault reaches that, and no more than that is meant. Means over {Karras, log-SNR} grids, 5
and 10 steps and the seeds; each cell reads plain / corrected, in the order of quality.py.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import metrics
import problems
import quality
import steindiff_jax as sd

STEPS = (5, 10)
SOLVERS = {name: quality.SOLVERS[name] for name in ("2M", "3M", "iPNDM-3")}
PROBLEMS = ("clumps", "grid", "curve", "offset", *problems.GUIDED)
MEASURES = ("modes", "entropy", "precision", "recall")
NEIGHBOURS = 5


def modes(mixture: problems.Mixture, x: np.ndarray) -> tuple[float, float]:
    """Share of components hit and exp(H) / components, each sample counted for the nearest mean."""
    means = np.asarray(mixture.means)
    nearest = ((means**2).sum(1) - 2 * x @ means.T).argmin(axis=1)
    share = np.bincount(nearest, minlength=len(means)) / len(x)
    hit = share[share > 0]
    return len(hit) / len(means), float(np.exp(-(hit * np.log(hit)).sum())) / len(means)


def judge(problem: problems.Problem, x: np.ndarray) -> tuple[float, ...]:
    """The `MEASURES` of samples (n, *event), the first two NaN where there are no components."""
    x = np.asarray(x, np.float64).reshape(len(x), -1)
    draws = np.float64(problem.law[: 2 * len(x)]).reshape(-1, x.shape[1])
    hit = modes(problem.mixture, x) if problem.mixture else (np.nan, np.nan)
    return *hit, *metrics.precision_recall(draws, x, NEIGHBOURS)


def measure(problem: problems.Problem, n: int, seeds: int) -> dict:
    """(solver, correction) -> mean `MEASURES`, and "exact draws" -> those of the law itself."""
    others = problem.law[2 * n :]
    controls = [others[i : i + n] for i in range(0, min(len(others), 12 * n), n)]
    found = {"exact draws": [judge(problem, x) for x in controls]}
    for (s, solver), (c, correct) in itertools.product(
        SOLVERS.items(), quality.CORRECTIONS.items()
    ):
        found[s, c] = []
        for grid, k, seed in itertools.product(quality.GRIDS.values(), STEPS, range(seeds)):
            solution = sd.sample(
                jax.random.key(seed),
                problem.denoiser,
                (n, *problem.event),
                sigmas=jnp.pad(grid(k), (0, max(STEPS) - k)),  # one program for all grids
                solver=correct(solver),
            )
            found[s, c].append(judge(problem, solution.x))
    return {k: np.mean(v, axis=0) for k, v in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="*", default=PROBLEMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=400)
    arguments = parser.parse_args()
    rows = []
    for name in tqdm(arguments.problems):
        on_network = name in problems.GUIDED
        n = arguments.samples // 2 if on_network else arguments.samples
        with jax.enable_x64(not on_network):
            if on_network:
                problem = problems.network(problems.GUIDED[name], n, draws=10 * n)
            else:
                problem = problems.exact(problems.REPORT[name]())
            found = measure(problem, n, arguments.seeds)
        rows.append([name, "exact draws", *map(cell, found["exact draws"])])
        for s in SOLVERS:
            each = zip(*(found[s, c] for c in quality.CORRECTIONS), strict=True)
            rows.append([name, s, *(" / ".join(map(cell, values)) for values in each)])
    print(" / ".join(quality.CORRECTIONS))
    print(metrics.table(["problem", "solver", *MEASURES], rows))


def cell(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


if __name__ == "__main__":
    main()

"""Whether a gain in distance is a collapse: coverage, precision, recall (10 minutes on two cores).

Modes: the share of the mixture's components that are the nearest of at least one sample. Entropy:
exp(H) of that assignment over the number of components. Precision: the share of samples within
the 5-nearest-neighbour balls of draws of the law; recall: the share of draws within those of the
samples (Kynkaanniemi et al. 2019, arXiv:1904.06991, by `prdc`, arXiv:2002.09797). The law of a
network is its own fine solve. As a control the same of other exact draws, as many: a sampler
without fault reaches that, and no more than that is meant. Means over {Karras, log-SNR} grids, 5
and 10 steps and the seeds; each cell reads plain / corrected. What falls most is printed first.
"""

import numpy as np
from tqdm import tqdm

import metrics
import problems
import sweep

STEPS = (5, 10)
SOLVERS = ("2M", "3M", "iPNDM-3")
PROBLEMS = (
    "clumps",
    "grid",
    "curve",
    "offset",
    "colour patches 6x6",
    "digits network, guidance 1.5",
    "digits network, guidance 6",
)
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


def measure(distances: metrics.Distances, arguments) -> dict:
    """(solver, correction) -> mean `MEASURES`, and "exact draws" -> those of the law itself."""
    problem, n = distances.problem, distances.n
    others = problem.law[2 * n :]
    controls = [others[i : i + n] for i in range(0, min(len(others) - n + 1, 12 * n), n)]
    found = {"exact draws": [judge(problem, x) for x in controls]}
    for run, value in sweep.sweep(
        distances,
        arguments.solvers,
        sweep.CORRECTIONS,
        steps=arguments.steps,
        seeds=arguments.seeds,
        judge=lambda x, _: judge(problem, x),
    ).items():
        found.setdefault((run.solver, run.correction), []).append(value)
    return {k: np.mean(v, axis=0) for k, v in found.items()}


def main() -> None:
    parser = sweep.options(__doc__, "report", SOLVERS, PROBLEMS, seeds=3, n=400, steps=STEPS)
    arguments = parser.parse_args()
    rows, falls = [], []
    for name in tqdm(arguments.problems):
        with sweep.prepared("report", name, arguments.samples) as distances:
            found = measure(distances, arguments)
        rows.append([name, "exact draws", *map(cell, found["exact draws"])])
        for s in arguments.solvers:
            plain, corrected = found[s, "plain"], found[s, "corrected"]
            each = zip(plain, corrected, strict=True)
            rows.append([name, s, *(" / ".join(map(cell, values)) for values in each)])
            falls += [
                (fall, f"{name}, {s}, {m}")
                for m, fall in zip(MEASURES, plain - corrected, strict=True)
                if fall > 0
            ]
    print("what falls most:\n")
    print("\n".join(f"- {where}: by {fall:.2f}" for fall, where in sorted(falls)[::-1][:10]))
    print("\nplain / corrected\n")
    print(metrics.table(["problem", "solver", *MEASURES], rows))


def cell(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


if __name__ == "__main__":
    main()

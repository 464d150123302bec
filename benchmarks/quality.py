"""Every solver, plain and with the default correction (3 hours on two cores, less for a selection).

Over grids {Karras, log-SNR, the model's own if it has one}, steps {3, 4, 5, 6, 8, 10, 16} and five
seeds; of networks fewer. Steps, not evaluations: Heun, DPM2 and 2S take two each, 3S three. The
problems are those of `problems.HALVES["report"]`, which no rule was tuned on; distances are those
of `metrics.Distance`, and "both" is the geometric mean of those in pixels and with bands scaled.
Ratios corrected / plain are geometric means, with 95% intervals over the seeds. Losses are printed
first. Writes results/quality.json, of every run, and results/quality.png; --read prints and draws
from such files alone. --exact adds what exact draws of the law, as many, would reach: the floor.
"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

import metrics
import problems
import sweep

WORST = 10
EXACT = "exact draws"


def show(results: sweep.Results) -> None:
    print("losses (ratio above 1 over all steps and grids):\n")
    losses = [
        (*results.ratio(m, problem=p, solver=s), m, p, s)
        for m in ("pixels", "bands", "both")
        for p in results.problems
        for s in results.solvers
    ]
    for value, half, m, p, s in sorted(losses, reverse=True):
        if value > 1:
            print(f"- {p}, {s}, {m}: {sweep.shown((value, half))}")
    print(f"\nThe {WORST} worst single cells in both, and the worst of each distance:\n")
    worst = {m: results.cells(m) for m in ("both", "pixels", "bands")}
    listed = [("both", cell) for cell in worst["both"][:WORST]]
    for m, (value, *cell) in [*listed, *((m, worst[m][0]) for m in ("pixels", "bands"))]:
        print(f"- {m}: {value:.2f} at {', '.join(map(str, cell))} steps")
    print(f"\n{len([c for c in worst['both'] if c[0] > 1])} of {len(worst['both'])} cells lose.")
    for m in ("pixels", "bands", "both", "rmse", "energy"):
        print(f"\n### {m}, corrected / plain\n")
        rows = [[p, *row(results, m, problem=p)] for p in results.problems]
        rows.append(["**all**", *(f"**{cell}**" for cell in row(results, m))])
        print(metrics.table(["", *results.solvers, "best / best"], rows))
    groups = {}
    for p in results.problems:
        groups.setdefault(problems.kind(p), []).append(p)
    for kind, names in groups.items():
        by_steps(results, kind, names)


def by_steps(results: sweep.Results, kind: str, names: list[str]) -> None:
    steps = sorted(set(results.columns["steps"][results.chosen(problem=names)].tolist()))
    print(f"\n### {kind}, by steps, both, corrected / plain\n")
    rows = []
    for s in results.solvers:
        every = [results.ratio("both", solver=s, steps=k, problem=names)[0] for k in steps]
        rows.append([s, *("" if np.isnan(r) else f"{r:.2f}" for r in every)])
    for m in ("both", "pixels", "bands"):
        best = [sweep.shown(results.best_ratio(m, steps=k, problem=names)) for k in steps]
        rows.append([f"best / best, {m}", *best])
    if EXACT in results.corrections and kind != "networks":
        best = [
            sweep.shown(results.best_ratio("both", EXACT, steps=k, problem=names)) for k in steps
        ]
        rows.append([f"{EXACT} / best plain, both", *best])
    print(metrics.table(["", *(f"{k} steps" for k in steps)], rows))


def exact_draws(runs: dict, n: int) -> dict:
    """The distance of n other draws of the law, what a perfect sampler reaches, beside each run."""
    seeds, found = {}, {}
    for run in runs:
        seeds.setdefault(run.problem, set()).add(run.seed)
    for p in seeds.keys() - problems.NETWORKS.keys():
        with sweep.prepared("report", p, n) as distances:
            for seed in seeds[p]:
                draws = distances.problem.denoiser.draw(1000 + seed, n)
                found[p, seed] = distances(draws, seed)
    every = [run for run in runs if run.correction == "plain" and (run.problem, run.seed) in found]
    return {run._replace(correction=EXACT): found[run.problem, run.seed] for run in every}


def row(results: sweep.Results, measure: str, **where) -> list[str]:
    every = [results.ratio(measure, solver=s, **where) for s in results.solvers]
    return [sweep.shown(ratio) for ratio in [*every, results.best_ratio(measure, **where)]]


def plot(results: sweep.Results, path: Path) -> None:
    """Both distances against steps, over all problems; dashed plain, solid corrected."""
    every = sorted(set(results.columns["steps"].tolist()))
    complete = [p for p in results.problems if results.chosen(problem=p, steps=every[0]).any()]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for axis, m in zip(axes, ("pixels", "bands"), strict=True):
        for i, s in enumerate(results.solvers):
            for c, style in (("plain", "--"), ("corrected", "-")):
                where = {"solver": s, "problem": complete}
                values = [results.mean(m, c, steps=k, **where) for k in every]
                label = s if c == "plain" else None
                axis.loglog(every, values, style, color=f"C{i % 10}", label=label, lw=1)
        axis.set(xlabel="steps (dashed plain, solid corrected)", ylabel=f"sliced-W2, {m}")
        axis.set_xticks(every, every)
        axis.minorticks_off()
    axes[1].legend(ncols=3, fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    here = Path(__file__).parent
    parser = sweep.options(__doc__, "report")
    parser.add_argument("--output", type=Path, default=here / "results" / "quality.json")
    parser.add_argument("--read", type=Path, nargs="*", help="results of earlier runs")
    parser.add_argument("--exact", action="store_true", help="also what exact draws would reach")
    arguments = parser.parse_args()
    if arguments.read is None:
        runs = sweep.sweep_all("report", arguments, sweep.CORRECTIONS)
        sweep.write(runs, arguments.output)
    else:
        runs = {run: d for path in arguments.read for run, d in sweep.read(path).items()}
    if arguments.exact:
        runs |= exact_draws(runs, arguments.samples)
    results = sweep.Results(runs)
    show(results)
    plot(results, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()

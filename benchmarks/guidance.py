"""Each guidance method, plain and corrected (ten minutes on one core; the network is for a GPU).

Samples are held against two laws, since guidance changes what is sampled: "own", the fine solve of
the same guided denoiser from other noise, and "data", those of the class. The distance is `both` of
metrics.py (--measure: another one); "rmse" is to the fine solve from the same noise, of the guided
and of the conditional denoiser. Both branches together count as one evaluation. CFG++ has no fine
solve of its own: its guidance is of the grid. Autoguidance is by the class with 1.1 the std, or by
the network with coarse weights; scales by band are on images alone. Ratios are corrected / plain,
intervals over seeds; losses are printed first. Writes results/guidance.json after each method;
--read prints it.
"""

import argparse
import itertools
import sys
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

import metrics
import problems
import steindiff_jax as sd
import sweep

OCTAVES = sd.Cosine(colour=False)
LAWS = ("own", "data")


def by_band(scale: float, event: tuple[int, ...]) -> dict:
    """From half the guidance in the lowest octave to all of it in the highest."""
    bands = len(OCTAVES.partition(event).sizes)
    return {"scale": 1 + (scale - 1) * np.linspace(0.5, 1, bands), "basis": OCTAVES}


def cfgpp(scale: float, sigmas: np.ndarray) -> dict:
    """The strength at which the scale is the one asked for in the geometric mean over the grid."""
    nodes = sigmas[sigmas > 0]
    shares = 1 - np.append(nodes[1:], 0) / nodes
    return {"scale": sd.CFGpp(scale * metrics.geometric_mean(shares), sigmas)}


# Scale, event and grid -> options of `sd.guided`.
METHODS = {
    "CFG": lambda w, *_: {"scale": w},
    "rescale": lambda w, *_: {"scale": w, "rescale": 0.7},
    "APG": lambda w, *_: {"scale": w, "difference": sd.APG(norm=2.5)},
    "CFG-Zero*": lambda w, *_: {
        "scale": w,
        "difference": sd.CFGZeroStar(),
        "prediction": "flow",
    },
    "MAMBO-G": lambda w, *_: {"scale": w, "difference": sd.MAMBOG(), "prediction": "flow"},
    "CFG++": lambda w, _, sigmas: cfgpp(w, sigmas),
    "interval": lambda w, *_: {"scale": sd.GuidanceInterval(w, low=0.2, high=5.0)},
    "by band": lambda w, event, _: by_band(w, event),
    "autoguidance": lambda w, *_: {"scale": w},
}


def measure(
    name: str, classes: problems.Classes, data: metrics.Distances, method: str, scale: float, a
) -> dict[sweep.Run, metrics.Distance]:
    """Every run's distances from both laws; what stands for the problem says method and law too."""
    problem, n, found = data.problem, data.n, {}
    against = classes.weaker if method == "autoguidance" else classes.unconditional
    if against is None or (method == "by band" and len(problem.event) == 1):
        return found

    def guided(sigmas):
        options = METHODS[method](scale, problem.event, sigmas)
        return sd.guided(problem.denoiser, against, **options)

    def padded(k: int) -> np.ndarray:  # each of them, so that one program does for all
        return sweep.padded(np.asarray(sweep.EVERY_GRID[a.grid](k)), max(a.steps))

    laws = {"data": data}
    if method != "CFG++":
        own = problem._replace(denoiser=guided(None))
        noise = [data.noise(1000 + i) for i in range(-(-a.draws // n))]
        law = np.concatenate([problems.fine_solve(own, start) for start in noise])
        laws["own"] = metrics.Distances(own._replace(law=law), n)
    for k in a.steps:
        denoiser = guided(padded(k))
        runs = sweep.sweep(
            data,
            a.solvers,
            sweep.CORRECTIONS,
            steps=[k],
            seeds=a.seeds,
            grids={a.grid: padded},
            denoiser=lambda _, denoiser=denoiser: denoiser,
            judge=lambda x, seed: {law: distance(x, seed) for law, distance in laws.items()},
        )
        for run, distances in runs.items():
            for law, distance in distances.items():
                key = "; ".join((name, method, f"{scale:g}", law))
                found[run._replace(problem=key)] = distance
    return found


def show(runs: dict[sweep.Run, metrics.Distance], measure: str) -> None:
    r = sweep.Results(runs)
    steps = np.unique(r.columns["steps"])
    ratios = {
        (*p.split("; "), s, k): r.ratio(measure, problem=p, solver=s, steps=k)
        for p, s, k in itertools.product(r.problems, r.solvers, steps)
    }
    losses = sorted(((v, where) for where, v in ratios.items() if v[0] > 1.02), reverse=True)
    print(f"losses (corrected / plain above 1.02), {len(losses)} of {len(ratios)}:\n")
    for value, (*where, s, k) in losses:
        print(f"- {', '.join(where)}, {s}, {k} evaluations: {sweep.shown(value)}")
    header = ["method", "guidance", *(f"{k}, {law}" for k in steps for law in LAWS)]
    for name, s in itertools.product(dict.fromkeys(where[0] for where in ratios), r.solvers):
        print(f"\n### {name}, {s}: corrected / plain (plain)\n")
        rows = []
        for method, scale in dict.fromkeys(w[1:3] for w in ratios if w[0] == name):
            cells = []
            for k, law in itertools.product(steps, LAWS):
                ratio = ratios.get((name, method, scale, law, s, k))
                where = {"problem": "; ".join((name, method, scale, law)), "solver": s, "steps": k}
                plain = ratio and f" ({r.mean(measure, 'plain', **where):.2f})"
                cells.append(sweep.shown(ratio) + plain if ratio else "")
            rows.append([method, scale, *cells])
        print(metrics.table(header, rows))


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    named = {"nargs": "+", "metavar": "NAME", "help": "default: %(default)s"}
    mixtures = ["families", "thumbnails 8x8"]
    names = list(problems.REPORT_CLASSES)
    parser.add_argument("--problems", default=mixtures, choices=names, **named)
    parser.add_argument("--methods", default=list(METHODS), choices=list(METHODS), **named)
    parser.add_argument("--solvers", default=["2M", "iPNDM-3"], choices=sweep.SOLVERS, **named)
    parser.add_argument("--grid", default="Karras", choices=sweep.EVERY_GRID)
    parser.add_argument("--guidance", nargs="+", type=float, default=[3, 6, 10])
    parser.add_argument("--steps", nargs="+", type=int, default=[4, 6, 10])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--draws", type=int, default=600, help="of a guided law")
    parser.add_argument("--measure", default="both", choices=sweep.MEASURES)
    parser.add_argument("--output", type=Path, default=here / "results" / "guidance.json")
    parser.add_argument("--read", action="store_true", help="print what --output holds already")
    a = parser.parse_args()
    if a.read:
        show(sweep.read(a.output), a.measure)
        return
    runs = {}
    for name in a.problems:
        with jax.enable_x64(name in mixtures):
            try:
                classes = problems.REPORT_CLASSES[name](a.samples)
            except FileNotFoundError as error:
                print(f"{name} is left out: {error}", file=sys.stderr)
                continue
            data = metrics.Distances(classes.conditional, a.samples)
            for method in tqdm(a.methods, desc=name):
                for scale in a.guidance:
                    runs |= measure(name, classes, data, method, scale, a)
                jax.clear_caches()  # hundreds of compiled programs exhaust a process's memory maps
                sweep.write(runs, a.output)
    show(runs, a.measure)


if __name__ == "__main__":
    main()

"""Solvers fitted to a network, against closed forms (an hour on two cores, less with --quick).

Few evaluations of the digits network and, with --problems, of the network of natural images. Plain:
the best of some solvers on two grids, of each distance by itself. Closed form: the default, on the
better of the two grids. GITS: iPNDM-3 on a grid by dynamic programming. Fitted: the grid alone
(as LD3), the rows alone (as S4S), both (as GS), all together from the closed form. "40 steps" is
what they imitate, and as far from the law as so few samples are in any case. Each seed has a
fit of its own; distances are those of `metrics.Distance`, on noise that no fit has seen. What
loses is printed first. Of the photographs also "fid", the Fréchet distance of all draws together to
the test images. Writes results/fitting.json; --read prints such a file. --transfer: how far a fit
carries to other guidance, to another class, and its grid to other numbers of steps.
"""

import argparse
import itertools
import json
import math
import re
import shlex
import sys
import time
from pathlib import Path

import jax
import numpy as np
from tqdm import tqdm

import fid
import metrics
import problems
import steindiff_jax as sd
import sweep
from steindiff_jax.denoisers import rows

PLAIN = ("DDIM", "2M", "iPNDM-3", "UniPC-2")
INNER, ALL = sd.IPNDM(3), ("sigmas", "coefficients", "rows")
FITS = {
    "grid alone (LD3)": (INNER, ("sigmas",)),
    "rows alone (S4S)": (INNER, ("rows",)),
    "grid and rows (GS)": (INNER, ("sigmas", "rows")),
    "all": (sd.Stein(INNER), ALL),
}
QUICK = ["--steps", "4", "5", "6", "--seeds", "0", "--iterations", "15", "--batch", "32"]
TEACHER = sd.log_snr_sigmas(40)
FIELDS = (*metrics.Distance._fields, "fid")
MEASURES = ("pixels", "bands", "rmse", "fid")


def peak(reset: bool = False) -> float:
    """Most memory that this process held since the last reset, in MB; NaN where not on Linux."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024
    except (OSError, TypeError):
        return math.nan


class Bench:
    """One problem at one number of steps: samplers by name, judged on noise of their own."""

    def __init__(self, distances: metrics.Distances, steps: int, arguments, test=None) -> None:
        self.distances, self.steps, self.a, self.test = distances, steps, arguments, test
        self.batch = min(arguments.batch, distances.n)
        self.denoiser = rows(distances.problem.denoiser, lambda row: row[: self.batch])

    def judge(self, solver, sigmas, seed: int) -> np.ndarray:
        """`FIELDS`, geometric means over `draws` batches of noise; `fid` is of all and may lack."""
        found, samples, denoiser = [], [], self.distances.problem.denoiser
        for draw in range(seed * self.a.draws, (seed + 1) * self.a.draws):
            noise = self.distances.noise(draw)
            start = np.asarray(sigmas, noise.dtype)
            key, x_init = jax.random.key(draw), start[0] * noise
            start = sweep.padded(start, max(*self.a.steps, len(start) - 1))
            x = sd.sample(key, denoiser, sigmas=start, solver=solver, x_init=x_init).x
            samples.append(np.asarray(x))
            found.append(self.distances(samples[-1], draw))
        distance = np.exp(np.log(np.array(found)).mean(axis=0))
        return np.append(distance, self.test(samples)) if self.test else distance

    def fit(self, method: str, seed: int):
        """The solver and its grid."""
        key, shape = jax.random.key(100 + seed), (self.batch, *self.distances.event)
        if method == "GITS":
            return INNER, sd.gits_sigmas(key, self.denoiser, shape, self.steps, TEACHER)
        start, (solver, parts) = sd.karras_sigmas(self.steps), FITS[method]
        options = {"parts": parts, "teacher": TEACHER, "iterations": self.a.iterations}
        options |= {"batches": self.a.batches, "remat": False}  # the networks are small
        fitted = sd.fit(key, self.denoiser, shape, start, solver, **options)
        return fitted, fitted.sigmas

    def run(self, method: str, seed: int) -> dict:
        """Its distances; of a fit also the grid, minutes and megabytes."""
        if method in REFERENCES:
            found = [self.judge(solver, grid, seed) for solver, grid in REFERENCES[method](self)]
            return {"distance": np.min(found, axis=0).tolist()}  # each of the best by itself
        before, begun = peak(reset=True), time.perf_counter()
        solver, sigmas = self.fit(method, seed)
        minutes, megabytes = (time.perf_counter() - begun) / 60, peak() - before
        return {
            "distance": self.judge(solver, sigmas, seed).tolist(),
            "sigmas": np.asarray(sigmas).tolist(),
            "minutes": minutes,
            "megabytes": megabytes,
        }

    def grids(self) -> list:
        return [grid(self.steps) for grid in sweep.GRIDS.values()]


REFERENCES = {
    "plain": lambda bench: [(sweep.SOLVERS[s], g) for s in bench.a.plain for g in bench.grids()],
    "closed form": lambda bench: [(sd.Stein(INNER), g) for g in bench.grids()],
    "40 steps": lambda _: [(sd.Stein(INNER), TEACHER)],
}
METHODS = [*REFERENCES, "GITS", *FITS]


def mean(logs: np.ndarray) -> str:
    """Geometric mean over the seeds that were run."""
    found = np.exp(logs[np.isfinite(logs)])
    return f"{metrics.geometric_mean(found):.3f}" if found.size else ""


def show(runs: list[dict]) -> None:
    methods = [name for name in METHODS if any(run["method"] == name for run in runs)]
    logs = {
        (run["method"], run["problem"], run["steps"], run["seed"], measure): math.log(value)
        for run in runs
        for measure, value in zip(FIELDS, run["distance"], strict=False)
    }
    seeds = sorted({run["seed"] for run in runs})

    def ratio(a: str, b: str, *case) -> tuple[float, float]:
        """Geometric mean of a / b, and the half-width of its interval over the seeds."""
        pairs = [[logs.get((m, *case[:2], s, case[2]), math.nan) for m in (a, b)] for s in seeds]
        return sweep.interval([x - y for x, y in pairs if not math.isnan(x - y)])

    cases = sorted({(run["problem"], run["steps"]) for run in runs})
    print("What loses to the closed form:\n")
    for case, method, measure in itertools.product(cases, methods, MEASURES):
        found = ratio(method, "closed form", *case, measure)
        if found[0] > 1 and method != "plain":
            print(f"- {case[0]}, {case[1]} steps, {method}, {measure}: {sweep.shown(found)}")
    for measure in MEASURES:
        lines = []
        for method in methods:
            every = ((method, *case, s, measure) for case in cases for s in seeds)
            cells = np.array([logs.get(run, math.nan) for run in every]).reshape(len(cases), -1)
            lines.append([method, *map(mean, cells)])
        for a, b in (("all", "closed form"), ("closed form", "grid alone (LD3)")):
            cells = [ratio(a, b, *case, measure) for case in cases]
            lines.append([f"{a} / {b}", *map(sweep.shown, cells)])
        print(f"\n### {measure}\n")
        print(metrics.table(["", *(f"{p}, {k}" for p, k in cases)], lines))
    print("\n### Minutes and MB (on top of what the process held) of a fit\n")
    lines = []
    for method in methods:
        here = [run for run in runs if run["method"] == method and "minutes" in run]
        if here:
            cost = (np.mean([run[name] for run in here]) for name in ("minutes", "megabytes"))
            lines.append([method, *(f"{value:.1f}" for value in cost)])
    print(metrics.table(["", "minutes", "MB"], lines))


def to_test_images(name: str):
    """Samples -> Fréchet distance to the test images, of the network of photographs; or None."""
    if not name.startswith("images network"):
        return None
    import images
    import images_classifier as classifier

    test = fid.statistics([images.images(problems.DATA, "test")[0]], classifier.features)
    return lambda x: fid.frechet_distance(test, fid.statistics(x, classifier.features))


def prepared(name: str, a: argparse.Namespace):
    half = next(half for half, names in problems.HALVES.items() if name in names)
    return sweep.prepared(half, name, a.samples)


def transfer(a: argparse.Namespace) -> None:
    """Fits to the first problem with the first number of steps, over the closed form elsewhere."""
    (first, *others), (steps, *more), logs = a.problems, a.steps, {}

    def compare(bench: Bench, where: str, solver, sigmas, seed: int) -> None:
        closed = bench.run("closed form", seed)["distance"]
        logs.setdefault(where, []).append(np.log(bench.judge(solver, sigmas, seed) / closed))

    fits = []
    with prepared(first, a) as distances:
        for seed in a.seeds:
            fits.append(Bench(distances, steps, a).fit("all", seed))
            compare(Bench(distances, steps, a), f"{first}, {steps} steps", *fits[-1], seed)
            for k in more:
                solver, sigmas = FITS["all"][0], np.asarray(fits[-1][1])
                sigmas = np.append(sweep.interpolated(sigmas[:-1], k), 0.0)
                compare(Bench(distances, k, a), f"its grid at {k} steps", solver, sigmas, seed)
    for other in others:
        with prepared(other, a) as distances:
            for seed, fit in zip(a.seeds, fits, strict=True):
                compare(Bench(distances, steps, a), f"{other}, {steps} steps", *fit, seed)
    cells = [
        [where, *(sweep.shown(sweep.interval(list(v))) for v in np.array(found).T[:3])]
        for where, found in logs.items()
    ]
    print(metrics.table(["fitted / closed form", *MEASURES[:3]], cells))


def main() -> None:
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="+", default=["digits network"])
    parser.add_argument("--steps", nargs="+", type=int, default=[3, 4, 5, 6, 8])
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS, metavar="NAME")
    parser.add_argument("--plain", nargs="+", default=PLAIN, choices=sweep.SOLVERS, metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="of a fit each")
    parser.add_argument("--draws", type=int, default=2, help="batches of noise that judge it")
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--batches", type=int, default=2, help="that a fit sees")
    parser.add_argument("--iterations", type=int, default=40)
    parser.add_argument("--quick", action="store_true", help=f"stands for {shlex.join(QUICK)}")
    parser.add_argument("--output", type=Path, default=here / "results" / "fitting.json")
    parser.add_argument("--transfer", action="store_true")
    parser.add_argument("--read", type=Path, nargs="*", help="results of earlier runs")
    given = sys.argv[1:]
    arguments = parser.parse_args([*QUICK, *given] if "--quick" in given else given)
    if arguments.read is not None:
        show([run for path in arguments.read for run in json.loads(path.read_text())["runs"]])
        return
    if arguments.transfer:
        transfer(arguments)
        return
    command = "python " + shlex.join(["benchmarks/" + Path(sys.argv[0]).name, *given])
    content = {"command": command, "distances": FIELDS, "runs": []}
    arguments.output.parent.mkdir(exist_ok=True, parents=True)
    for problem in arguments.problems:
        cases = [*itertools.product(arguments.seeds, arguments.steps, arguments.methods)]
        test, long = to_test_images(problem), {}
        with prepared(problem, arguments) as distances:
            for seed, steps, method in tqdm(cases):
                at = {"problem": problem, "steps": steps, "seed": seed, "method": method}
                bench = Bench(distances, steps, arguments, test)
                result = long.get((method, seed)) or bench.run(method, seed)
                if method == "40 steps":  # the same beside any number of steps
                    long[method, seed] = result
                content["runs"].append(at | result)
                # Of a run that is stopped, what is done so far.
                arguments.output.write_text(json.dumps(content, separators=(",", ":")))
    show(content["runs"])


if __name__ == "__main__":
    main()

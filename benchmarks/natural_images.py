"""Natural images: Fréchet distances of solvers, plain and corrected (hours; less for a selection).

The network is `examples/images16.safetensors`, its law its own fine solve; the features are those
of `examples/images16_classifier.safetensors`, so that no published figure compares. FID is to the
test images, and to the fine solve ("own"), which a perfect solver would reach; it is biased by the
number of samples, and the floor is that of as many draws of the fine solve. Plain solvers are those
of other libraries, to 1e-9 (tests/test_parity.py). Of grids {Karras, log-SNR, Karras to 0.002} the
best counts, plain and corrected alike. Intervals are over seeds. Losses are printed first. Writes
results/natural_images.json after each guidance scale, and a picture beside it; --read prints the
tables alone.
"""

import argparse
import json
import time
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import fid
import metrics
import problems
import steindiff_jax as sd
import sweep

HERE = Path(__file__).parent
SOLVERS = ("DDIM", "2M", "iPNDM-3", "UniPC-3")
STEPS = (3, 4, 5, 6, 8, 10)
SCALES = (0.0, 2.0, 5.0)
FEW = "Karras to 0.002"


class Score(NamedTuple):
    """Fréchet distances to the test images and to the fine solve, and `metrics.Distance`."""

    fid: float
    own: float
    precision: float
    recall: float
    pixels: float
    bands: float
    rmse: float
    energy: float


def measure(scale: float, a: argparse.Namespace) -> dict:
    """Every run's `Score`, and those of other draws of the fine solve, the floor."""
    import images
    import images_classifier as classifier

    problem = problems.images16(scale, a.samples, draws=3 * a.samples)
    # A third is the law that samples are held against, the rest other draws of it.
    law, *others = np.split(problem.law, 3)
    distances = metrics.Distances(problem._replace(law=law), a.samples)
    test = fid.statistics([images.images(a.data, "test")[0]], classifier.features)
    own = fid.statistics([law], classifier.features)

    def judge(x: np.ndarray, seed: int) -> Score:
        found = fid.statistics([x], classifier.features)
        shares = metrics.precision_recall(test.first[: len(x)], found.first, fid.NEIGHBOURS)
        distances_of = fid.frechet_distance(test, found), fid.frechet_distance(own, found)
        return Score(*distances_of, *shares, *distances(x, seed))

    options = {"steps": a.steps, "seeds": a.seeds, "name": f"{scale:g}", "judge": judge}
    options["grids"] = sweep.GRIDS | {FEW: sweep.ABOVE_ZERO[FEW]}
    runs = sweep.sweep(distances, a.solvers, sweep.CORRECTIONS, **options)
    if not scale:  # how far the plain ones must go for the same
        plain = {"plain": sweep.plain}
        runs |= sweep.sweep(distances, a.solvers, plain, **options | {"steps": a.further})
    return {"runs": runs, "floor": [judge(x, 0) for x in others]}


def pictures(scale: float, steps: tuple[int, ...], path: Path) -> None:
    """One sample of each class from the same noise: plain, corrected, and the fine solve."""
    import images

    labels = jnp.arange(10)
    denoiser = images.load(labels)
    if scale:
        free = images.load(jnp.full(10, images.NULL))
        denoiser = sd.guided(denoiser, free, scale)

    def draw(solver, k):
        grid = sd.karras_sigmas(k, to_zero=False)
        found = sd.sample(jax.random.key(3), denoiser, (10, 16, 16, 3), sigmas=grid, solver=solver)
        return np.concatenate(list(images.to_bytes(found.x)), axis=1)

    rows = {}
    for k in steps:
        rows[f"DPM-Solver++(2M), {k} evaluations"] = draw(sd.DPMpp2M(), k)
        rows[f"the same corrected, {k} evaluations"] = draw(sd.Stein(sd.DPMpp2M()), k)
    rows["DPM-Solver++(2M), 40 evaluations"] = draw(sd.DPMpp2M(), 40)
    figure, axes = plt.subplots(len(rows), 1, figsize=(8, len(rows)), layout="constrained")
    for axis, (name, row) in zip(axes, rows.items(), strict=True):
        axis.imshow(row, interpolation="nearest")
        axis.set_axis_off()
        axis.set_title(name, loc="left", fontsize="small")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def seconds(batch: int = 100, steps: int = 5, turns: int = 5) -> tuple[float, float]:
    """Milliseconds a sample at 5 evaluations, plain and corrected, the medians of some turns."""
    problem = problems.images16(0.0, batch, draws=batch)
    times = {}
    for turn in range(turns + 1):
        for name, solver in (("plain", sd.IPNDM(3)), ("corrected", sd.Stein(sd.IPNDM(3)))):
            start = time.perf_counter()
            shape, grid = (batch, *problem.event), sd.karras_sigmas(steps)
            found = sd.sample(
                jax.random.key(turn), problem.denoiser, shape, sigmas=grid, solver=solver
            )
            jax.block_until_ready(found.x)
            if turn:
                times.setdefault(name, []).append(time.perf_counter() - start)
    return tuple(float(np.median(t)) / batch * 1e3 for t in times.values())


# --- Tables --------------------------------------------------------------------------------------


class Table:
    """The best grid's values (seeds,), by (scale, solver, correction, steps)."""

    def __init__(self, runs: dict[sweep.Run, Score], measure: str) -> None:
        every = {}
        for run, score in runs.items():
            cell = run.problem, run.solver, run.correction, run.steps
            grids = every.setdefault(cell, {})
            grids.setdefault(run.grid, []).append(getattr(score, measure))
        self.cells = {
            cell: np.array(min(grids.values(), key=np.mean)) for cell, grids in every.items()
        }

    def best(self, scale: str, correction: str, steps: int) -> tuple[np.ndarray, str]:
        """Of the solver that is best in the mean over seeds."""
        found = {
            solver: values
            for (p, solver, c, k), values in self.cells.items()
            if (p, c, k) == (scale, correction, steps)
        }
        name = min(found, key=lambda solver: found[solver].mean())
        return found[name], name

    def ratio(self, scale: str, steps: int) -> str:
        """Best corrected over best plain, with its interval."""
        corrected, plain = (self.best(scale, c, steps)[0] for c in ("corrected", "plain"))
        return sweep.shown(sweep.interval(list(np.log(corrected / plain))))


def show(scores: dict[str, dict], times: tuple[float, float] | None) -> None:
    runs = {run: score for found in scores.values() for run, score in found["runs"].items()}
    for measure in ("fid", "own"):
        table = Table(runs, measure)
        steps = sorted({cell[3] for cell in table.cells if cell[2] == "corrected"})
        losses = []
        for (p, s, c, k), values in table.cells.items():
            if c == "corrected":
                ratio = values.mean() / table.cells[p, s, "plain", k].mean()
                losses += [(ratio, f"guidance {p}, {s}, {k} evaluations")] if ratio > 1.02 else []
        print(f"\n### {measure}\n\nlosses (corrected / the same solver plain above 1.02):\n")
        print("\n".join(f"- {where}: {ratio:.2f}" for ratio, where in sorted(losses)[::-1]))
        rows = []
        for p, found in scores.items():
            floor = np.mean([getattr(score, measure) for score in found["floor"]])
            done = {cell[3] for cell in table.cells if cell[0] == p}  # of this scale's run
            for s in dict.fromkeys(cell[1] for cell in table.cells if cell[0] == p):
                for c in ("plain", "corrected"):
                    means = [table.cells[p, s, c, k].mean() if k in done else None for k in steps]
                    rows.append(
                        [p, f"{s}, {c}", *("" if v is None else f"{v:.3f}" for v in means), ""]
                    )
            ratios = [table.ratio(p, k) if k in done else "" for k in steps]
            rows.append([p, "best / best", *ratios, f"{floor:.3f}"])
        print("\n" + metrics.table(["guidance", "", *map(str, steps), "floor"], rows))
        further(table, scores)
    if times:
        print(f"\nms a sample at 5 evaluations: plain {times[0]:.2f}, corrected {times[1]:.2f}")


def further(table: Table, scores: dict[str, dict]) -> None:
    """How many evaluations the best plain solver needs for what the best corrected one reaches."""
    for p in scores:
        tried = sorted({cell[3] for cell in table.cells if cell[0] == p})
        corrected = {cell[3] for cell in table.cells if cell[0] == p and cell[2] == "corrected"}
        for k in {3, 5} & corrected:
            reached = table.best(p, "corrected", k)[0].mean()
            enough = [n for n in tried if table.best(p, "plain", n)[0].mean() <= reached]
            needs = str(enough[0]) if enough else f"more than {tried[-1]}"
            print(f"\nguidance {p}: what {k} corrected evaluations reach takes {needs} plain ones")


def write(scores: dict[str, dict], path: Path) -> None:
    content = {
        scale: {
            "runs": [[*run, *map(float, score)] for run, score in found["runs"].items()],
            "floor": [list(map(float, score)) for score in found["floor"]],
        }
        for scale, found in scores.items()
    }
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text(json.dumps(content))


def read(path: Path) -> dict[str, dict]:
    """What `write` wrote."""
    fields = len(sweep.Run._fields)
    return {
        scale: {
            "runs": {sweep.Run(*row[:fields]): Score(*row[fields:]) for row in found["runs"]},
            "floor": [Score(*row) for row in found["floor"]],
        }
        for scale, found in json.loads(path.read_text()).items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=problems.DATA, help="directory of CIFAR-10")
    parser.add_argument("--guidance", nargs="*", type=float, default=SCALES, help="0: none")
    parser.add_argument("--solvers", nargs="*", default=SOLVERS, choices=list(sweep.SOLVERS))
    parser.add_argument("--steps", nargs="*", type=int, default=STEPS)
    parser.add_argument("--further", nargs="*", type=int, default=(13, 16, 20), help="plain alone")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=1000)
    parser.add_argument("--output", type=Path, default=HERE / "results" / "natural_images.json")
    parser.add_argument("--read", action="store_true", help="print what --output holds already")
    a = parser.parse_args()
    if a.read:
        show(read(a.output), None)
        return
    scores = {}
    for scale in a.guidance:
        scores[f"{scale:g}"] = measure(scale, a)
        write(scores, a.output)
    pictures(0.0, (3, 5, 8), a.output.with_suffix(".png"))
    show(scores, seconds())


if __name__ == "__main__":
    main()

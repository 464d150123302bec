"""Distance against time: every solver, plain and corrected, on the digits network (20 minutes).

Sliced-W2 of the samples to the network's own fine solve, geometric mean over the seeds, against
milliseconds per sample on this machine, median over the seeds, which all programs take in turns; on
two cores, guided and not. Prints a table and writes quality_per_second.png beside this file.
"""

import argparse
import itertools
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from tqdm import tqdm

import metrics
import problems
import quality
import steindiff_jax as sd

STEPS = (4, 5, 6, 8, 10, 16)
SOLVERS = {
    name: quality.SOLVERS[name] for name in ("DDIM", "Heun", "2M", "3M", "iPNDM-3", "UniPC-3")
}
SCALES = {"unguided": 0.0, "guidance 3": 3.0}


def measure(problem, n, seeds):
    """(solver, correction, steps) -> sliced-W2 and milliseconds per sample."""
    distance = metrics.SlicedWasserstein(problem.law, n)
    programs = [
        (s, c, solve)
        for (s, solver), (c, correct) in itertools.product(
            SOLVERS.items(), quality.CORRECTIONS.items()
        )
        if (solve := correct(solver)) is solver or s != "DDIM"  # nothing to correct in DDIM
    ]
    found = {}
    for seed in tqdm(range(-1, seeds)):  # the first time, to compile
        for (s, c, solver), k in itertools.product(programs, STEPS):
            steps = quality.steps_of(s, k)
            sigmas = jnp.pad(sd.karras_sigmas(steps), (0, max(STEPS) + 1 - steps))  # all padded
            if seed < 0 and k > STEPS[0]:
                continue  # one program for all numbers of steps
            start = time.perf_counter()
            solution = sd.sample(
                jax.random.key(seed + 1),
                problem.denoiser,
                (n, *problem.event),
                sigmas=sigmas,
                solver=solver,
            )
            jax.block_until_ready(solution)
            milliseconds = 1e3 * (time.perf_counter() - start) / n
            if seed >= 0:
                found.setdefault((s, c, k), []).append((distance(solution.x), milliseconds))
    return {
        key: (metrics.geometric_mean([d for d, _ in runs]), float(np.median([t for _, t in runs])))
        for key, runs in found.items()
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=5)
    arguments = parser.parse_args()
    n = arguments.samples
    figure, axes = plt.subplots(
        1, len(SCALES), figsize=(10, 4.5), sharey=True, layout="constrained"
    )
    rows = []
    for axis, (setting, scale) in zip(axes, SCALES.items(), strict=True):
        problem = problems.network(scale, n, draws=max(2000, 4 * n))
        found = measure(problem, n, arguments.seeds)
        for i, s in enumerate(SOLVERS):
            for c, style in (("plain", "--"), ("corrected", "-")):
                points = [found[s, c, k] for k in STEPS if (s, c, k) in found]
                if points:
                    distances, milliseconds = zip(*points, strict=True)
                    rows += [
                        [setting, s, c, str(k), f"{d:.3f}", f"{t:.2f}"]
                        for k, d, t in zip(STEPS, distances, milliseconds, strict=True)
                    ]
                    label = f"{s}, {c}" if s != "DDIM" else s
                    axis.plot(
                        milliseconds, distances, f"{style}o", color=f"C{i}", ms=3, label=label
                    )
        axis.set(title=setting, xscale="log", yscale="log", xlabel="milliseconds per sample")
    axes[0].set_ylabel("sliced-W2 to the fine solve")
    axes[0].legend(fontsize=7)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
    print(metrics.table(["", "solver", "", "evaluations", "sliced-W2", "ms / sample"], rows))


if __name__ == "__main__":
    main()

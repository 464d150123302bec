"""Five-step samples of a digits network, plain and Stein-corrected, beside a 200-step reference.

Writes quickstart.png and prints a table: distance of the law (sliced-W2, relative to the
reference's standard deviation) and of each sample (RMSE) to the reference from the same noise.
Under a minute on two cores.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import ot

import digits
import steindiff_jax as sd

STEPS, SCALE, SEED = 5, 3.0, 0
PICTURE = Path(__file__).with_suffix(".png")

labels = jnp.tile(jnp.arange(10), 10)
conditional, unconditional = digits.load(labels), digits.load(jnp.full(100, digits.NULL))
denoisers = {
    "unguided": unconditional,
    f"guidance {SCALE:g}": sd.guided(conditional, unconditional, SCALE),
}
solvers = {
    "DPM-Solver++(3M)": (sd.DPMpp3M(), STEPS),
    "Stein-corrected": (sd.Stein(sd.DPMpp3M()), STEPS),
    "reference": (sd.DPMpp2M(), 200),
}


def sample(denoiser, solver, steps):
    """Samples, and milliseconds per sample once compiled; the long reference runs only once."""
    key, sigmas = jax.random.key(SEED), sd.karras_sigmas(steps)  # one key, one noise
    for _ in range(1 if steps > STEPS else 3):
        start = time.perf_counter()
        solution = sd.sample(key, denoiser, (100, 8, 8, 1), sigmas=sigmas, solver=solver)
        jax.block_until_ready(solution)
        seconds = time.perf_counter() - start
    return solution, "" if steps > STEPS else f"{1e3 * seconds / 100:.2f}"


def main():
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), layout="constrained")
    print(f"{'':31}sliced-W2   RMSE  evaluations  ms/sample  gamma per step")
    for row, (setting, denoiser) in zip(axes, denoisers.items(), strict=True):
        solutions = {name: sample(denoiser, *how) for name, how in solvers.items()}
        truth = np.asarray(solutions["reference"][0].x).reshape(100, -1)
        for axis, (name, (solution, milliseconds)) in zip(row, solutions.items(), strict=True):
            x = np.asarray(solution.x).reshape(100, -1)
            distance = ot.sliced_wasserstein_distance(x, truth, n_projections=128, seed=0)
            distance /= np.sqrt(truth.var(axis=0).mean())
            rmse = np.sqrt(np.mean((x - truth) ** 2))
            nfe = int(solution.info.nfe)
            gamma = " ".join(f"{g:.2f}" for g in solution.info.gamma[:STEPS])
            print(
                f"{setting:12} {name:18}{distance:9.3f} {rmse:6.3f} {nfe:12} {milliseconds:>10}"
                f"  {gamma if nfe == STEPS else ''}"
            )
            tiles = np.pad(x.reshape(10, 10, 8, 8), [(0, 0), (0, 0), (1, 1), (1, 1)], "minimum")
            axis.imshow(tiles.swapaxes(1, 2).reshape(100, 100), cmap="gray", vmin=-0.5, vmax=1.0)
            axis.set_title(f"{name}, {setting}\n{nfe} evaluations, distance {distance:.2f}", size=9)
            axis.axis("off")
    figure.savefig(PICTURE, dpi=110)
    print(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    main()

"""Guidance scales from 1 to 7 in five steps, plain and corrected, beside a fine solve.

The scale is data of the compiled program, like the weights: each solver compiles once, for the
first scale, and then runs all of them. Writes guidance_sweep.png with one digit of each class in
every cell. Prints two distances to the fine solve of the same scale and noise: of the distribution
(sliced-W2 divided by its standard deviation) and of the samples (RMSE). Half a minute on two cores.
"""

import time
from pathlib import Path

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

import digits
import steindiff_jax as sd
from mixture import distance

SCALES = (1.0, 2.0, 3.0, 5.0, 7.0)
SAMPLES = 100
PICTURE = Path(__file__).with_suffix(".png")
SOLVERS = {
    "plain": (sd.IPNDM(3), 5),
    "corrected": (sd.Stein(sd.IPNDM(3)), 5),
    "fine solve": (sd.DPMpp2M(), 64),
}


def sweep():
    """Samples by solver, (scales, SAMPLES, 64), and the seconds that each scale took."""
    label = jnp.arange(SAMPLES) % 10
    conditional, unconditional = digits.load(label), digits.load(jnp.full(SAMPLES, digits.NULL))
    samples, seconds = {}, {}
    for name, (solver, steps) in SOLVERS.items():
        samples[name], seconds[name] = [], []
        for scale in SCALES:
            start = time.perf_counter()
            solution = sd.sample(
                jax.random.key(0),  # one key, one noise
                sd.guided(conditional, unconditional, scale),
                (SAMPLES, 8, 8, 1),
                sigmas=sd.karras_sigmas(steps),
                solver=solver,
            )
            samples[name].append(np.asarray(solution.x).reshape(SAMPLES, 64))
            seconds[name].append(time.perf_counter() - start)
    return samples, seconds


def strip(x):
    """The first ten samples side by side."""
    tiles = np.pad(x[:10].reshape(10, 8, 8), [(0, 0), (1, 1), (1, 1)], "minimum")
    return tiles.swapaxes(0, 1).reshape(10, 100)


def main():
    samples, seconds = sweep()
    figure, axes = plt.subplots(len(SCALES), 3, figsize=(9, 2.4), layout="constrained")
    print("scale   sliced-W2: plain  corrected    RMSE: plain  corrected")
    distances = []
    for row, scale, *runs in zip(axes, SCALES, *samples.values(), strict=True):
        fine = runs[-1]
        w2 = [distance(x, fine) for x in runs[:2]]
        rmse = [np.sqrt(np.mean((x - fine) ** 2)) for x in runs[:2]]
        distances.append((w2, rmse))
        print(f"{scale:5g}{w2[0]:19.3f}{w2[1]:11.3f}{rmse[0]:15.3f}{rmse[1]:11.3f}")
        for axis, x in zip(row, runs, strict=True):
            axis.imshow(strip(x), cmap="gray", vmin=-0.5, vmax=1.0, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
        row[0].set_ylabel(f"{scale:g}", rotation=0, ha="right", va="center")
    for axis, (name, (_, steps)) in zip(axes[0], SOLVERS.items(), strict=True):
        axis.set_title(f"{name}, {steps} steps", size=9)
    for name, times in seconds.items():
        rest = " ".join(f"{t:.2f}" for t in times[1:])
        print(f"seconds, {name}: {times[0]:.2f} with compilation, then {rest}")
    figure.savefig(PICTURE, dpi=100)
    print(f"wrote {PICTURE.name}")
    return distances


if __name__ == "__main__":
    main()

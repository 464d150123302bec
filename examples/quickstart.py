"""Five-step samples of a digits network: two plain solvers, the default, and a fine solve.

Writes quickstart.png and prints a table with two distances to the 100-step solve from the same
noise: of the distribution (sliced-W2 divided by its standard deviation) and of the samples (RMSE).
The picture shows the plain solver that has the smaller RMSE. A minute on two cores.
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
    "2M": (sd.DPMpp2M(), STEPS),
    "iPNDM-3": (sd.IPNDM(3), STEPS),
    "default": (sd.Stein(sd.IPNDM(3)), STEPS),
    "reference": (sd.DPMpp2M(), 100),
}


def sample(denoiser, solver, steps):
    """Samples, and milliseconds per sample once compiled; the long reference runs only once."""
    key, sigmas = jax.random.key(SEED), sd.karras_sigmas(steps, to_zero=False)  # one noise
    for _ in range(1 if steps > STEPS else 3):
        start = time.perf_counter()
        solution = sd.sample(key, denoiser, (100, 8, 8, 1), sigmas=sigmas, solver=solver)
        jax.block_until_ready(solution)
        seconds = time.perf_counter() - start
    return solution, "" if steps > STEPS else f"{1e3 * seconds / 100:.2f}"


def draw(axis, x, title):
    tiles = np.pad(x.reshape(10, 10, 8, 8), [(0, 0), (0, 0), (1, 1), (1, 1)], "minimum")
    axis.imshow(tiles.swapaxes(1, 2).reshape(100, 100), cmap="gray", vmin=-0.5, vmax=1.0)
    axis.set_title(title, size=9)
    axis.axis("off")


def main():
    figure, axes = plt.subplots(2, 3, figsize=(9, 6.4), layout="constrained")
    print(f"{'':23}sliced-W2   RMSE  evaluations  ms/sample")
    for row, (setting, denoiser) in zip(axes, denoisers.items(), strict=True):
        runs = {name: sample(denoiser, *how) for name, how in solvers.items()}
        samples = {name: np.asarray(run[0].x).reshape(100, -1) for name, run in runs.items()}
        truth, errors = samples["reference"], {}
        for name, (solution, milliseconds) in runs.items():
            w2 = ot.sliced_wasserstein_distance(samples[name], truth, n_projections=128, seed=0)
            w2 /= np.sqrt(truth.var(axis=0).mean())
            errors[name] = np.sqrt(np.mean((samples[name] - truth) ** 2))
            nfe = int(solution.info.nfe)
            print(
                f"{setting:12} {name:10}{w2:9.3f} {errors[name]:6.3f} {nfe:12} {milliseconds:>10}"
            )
        plain = min(("2M", "iPNDM-3"), key=errors.get)
        for axis, name in zip(row, (plain, "default", "reference"), strict=True):
            steps, error = solvers[name][1], errors[name]
            title = f"{name}, {setting}\n{steps} evaluations, RMSE {error:.3f}"
            draw(axis, samples[name], title)
    figure.savefig(PICTURE, dpi=110)
    print(f"wrote {PICTURE.name}")


if __name__ == "__main__":
    main()

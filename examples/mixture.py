"""Five steps on eight Gaussian clumps with their exact denoiser: all of the error is the solver's.

Writes mixture.png, which shows samples and some of their paths over the data. Prints gamma and the
distance of the samples to the data (sliced-W2 divided by the data's standard deviation). Five steps
put the mass in place. Separating the clumps takes more steps. Fifteen seconds on two cores.
"""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import ot

import steindiff_jax as sd

STEPS, FINE, SAMPLES = 5, 200, 2000
PICTURE = Path(__file__).with_suffix(".png")
SOLVERS = {"iPNDM-3": sd.IPNDM(3), "2M": sd.DPMpp2M(), "3M": sd.DPMpp3M()}  # the first is drawn


@sd.pytree
class Mixture:
    """Equal Gaussians N(mean_k, std^2) and their denoiser; means (k, d), std a number."""

    means: Any
    std: Any

    def __call__(self, x, sigma):
        """E[x0 | x]: the components' posterior means, weighted by their probability given x."""
        variance = self.std**2 + sigma**2
        half_square = jnp.square(self.means).sum(axis=1) / 2
        mean = jax.nn.softmax((x @ self.means.T - half_square[None]) / variance) @ self.means
        return mean + self.std**2 / variance * (x - mean)

    def draw(self, seed, n):
        """(n, d) exact samples."""
        rng = np.random.default_rng(seed)
        means = np.asarray(self.means)[rng.integers(len(self.means), size=n)]
        return means + self.std * rng.standard_normal(means.shape)


def ring(modes=8, radius=0.7, std=0.05):
    angle = 2 * np.pi * np.arange(modes) / modes
    return Mixture(jnp.asarray(radius * np.stack([np.cos(angle), np.sin(angle)], axis=1)), std)


def distance(x, data):
    """Sliced-W2 of samples (n, d) to data (m, d), divided by the data's standard deviation."""
    x, data = np.asarray(x, float), np.asarray(data, float)
    w2 = ot.sliced_wasserstein_distance(x, data, n_projections=128, seed=0)
    return w2 / np.sqrt(data.var(axis=0).mean())


def path(state, step):
    del step
    return state.x


def draw_paths(axis, data, sigmas, solution, x_init):
    """Samples over the data, and 20 of their paths, scaled to constant spread."""
    axis.hist2d(*data.T, bins=140, range=[[-1.4, 1.4]] * 2, cmap="Greys")
    steps = np.concatenate([x_init[None], solution.record])[:, :20]
    steps = steps * (0.5 / np.hypot(0.5, np.asarray(sigmas)))[:, None, None]
    axis.plot(*np.moveaxis(steps, 2, 0), color="tab:blue", linewidth=0.5)
    axis.plot(*np.asarray(solution.x).T, ".", color="tab:red", markersize=1)
    axis.set(aspect="equal", xlim=(-2.2, 2.2), ylim=(-2.2, 2.2), xticks=[], yticks=[])


def main():
    denoiser = ring()
    data = denoiser.draw(0, SAMPLES)
    noise = jax.random.normal(jax.random.key(0), data.shape)

    def sample(solver, steps=STEPS):
        sigmas = sd.karras_sigmas(steps)
        x_init, key = sigmas[0] * noise, jax.random.key(1)
        return (
            sigmas,
            x_init,
            sd.sample(key, denoiser, sigmas=sigmas, x_init=x_init, solver=solver, record=path),
        )

    figure, axes = plt.subplots(1, 3, figsize=(9, 3.2), layout="constrained")
    print(f"{STEPS} evaluations    plain  corrected  gamma per step")
    distances = {}
    for name, solver in SOLVERS.items():
        runs = {"plain": sample(solver), "corrected": sample(sd.Stein(solver))}
        plain, corrected = (distance(run[2].x, data) for run in runs.values())
        distances[name] = plain, corrected
        gamma = " ".join(f"{g:.2f}" for g in runs["corrected"][2].info.gamma)
        print(f"{name:14}{plain:9.3f}{corrected:11.3f}  {gamma}")
        if name == next(iter(SOLVERS)):
            for axis, (kind, (sigmas, x_init, solution)) in zip(axes, runs.items(), strict=False):
                draw_paths(axis, data, sigmas, solution, x_init)
                axis.set_title(f"{name}, {kind}, {STEPS} evaluations", size=9)
    sigmas, x_init, solution = sample(sd.DPMpp2M(), FINE)
    draw_paths(axes[2], data, sigmas, solution, x_init)
    axes[2].set_title(f"the flow itself, {FINE} evaluations", size=9)
    distances["flow"] = distance(solution.x, data)
    distances["draws"] = distance(denoiser.draw(1, SAMPLES), data)
    print(f"the flow      {distances['flow']:9.3f}\nexact draws   {distances['draws']:9.3f}")
    figure.savefig(PICTURE, dpi=100)
    print(f"wrote {PICTURE.name}")
    return distances


if __name__ == "__main__":
    main()

"""What narrow networks and few probes do to gamma and to the samples (ten minutes on two cores).

First table: the digits network computed in float32, bfloat16 and float16, weights and every layer,
with the state in float32, against all of it in float64: the largest error of gamma over steps and
bands, and the RMSE of the samples over their standard deviation. Second: gamma from probes: by how
much another draw of the probes alone moves gamma, the samples (RMSE over their standard deviation)
and their sliced-W2 to the network's own fine solve, and how far other noise moves the same.
"""

import argparse
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import _path  # noqa: F401
import digits
import metrics
import problems
import steindiff_jax as sd

NARROW = ("float32", "bfloat16", "float16")
RULES = {
    "PosteriorLength": sd.Stein(sd.DPMpp2M()),
    "PosteriorLength, one probe": sd.Stein(sd.DPMpp2M(), estimator=sd.Hutchinson()),
    "StepEnergy": sd.Stein(sd.DPMpp2M(), sd.StepEnergy()),
}
PROBES = (1, 4, 16)


@dataclasses.dataclass(frozen=True)
class Rounded:
    """A linen network with its weights, and what goes into and out of every layer, in `dtype`."""

    apply: Callable
    dtype: str

    def __call__(self, variables, x, t, **cond):
        def cast(tree):
            return jax.tree.map(self.cast, tree)

        def layer(method, args, kwargs, _):
            return cast(method(*cast(args), **cast(kwargs)))

        with nn.intercept_methods(layer):
            return self.apply(cast(variables), cast(x), cast(t), **cond)

    def cast(self, leaf):
        floating = hasattr(leaf, "dtype") and jnp.issubdtype(leaf.dtype, jnp.floating)
        return leaf.astype(self.dtype) if floating else leaf


def denoiser(n, scale, dtype):
    """The digits network in `dtype`, guided where scale > 0."""

    def network(label):
        loaded = digits.load(label)
        return dataclasses.replace(loaded, apply=Rounded(loaded.apply, dtype))

    free = network(jnp.full(n, digits.NULL))
    return sd.guided(network(jnp.arange(n) % 10), free, scale) if scale else free


def rounding(n, steps):
    """Rows of the first table."""
    noise = np.random.default_rng(0).standard_normal((n, 8, 8, 1))

    def run(scale, solver, dtype):
        wide = "float64" if dtype == "float64" else "float32"
        sigmas = sd.karras_sigmas(steps).astype(wide)
        x = jnp.asarray(80 * noise, wide)
        key, network = jax.random.key(0), denoiser(n, scale, dtype)
        solution = sd.sample(key, network, sigmas=sigmas, solver=solver, x_init=x)
        assert solution.x.dtype == wide
        return np.asarray(solution.info.gamma, float), np.asarray(solution.x, float)

    rows = []
    for scale in (0, 3):
        for name, solver in RULES.items():
            gamma, x = run(scale, solver, "float64")
            for dtype in NARROW:
                other_gamma, other_x = run(scale, solver, dtype)
                error = np.abs(other_gamma - gamma).max()
                distance = np.sqrt(np.mean((other_x - x) ** 2)) / x.std()
                rows.append([str(scale), name, dtype, f"{error:.1e}", f"{distance:.1e}"])
    return rows


class Runs(NamedTuple):
    """gamma (runs, steps, bands), samples (runs, n, d), distances (runs,)."""

    gamma: np.ndarray
    x: np.ndarray
    distance: np.ndarray

    def spread(self):
        """Root mean squared deviations over the runs; of x relative to the samples' own."""
        gamma = np.sqrt(self.gamma[:, :-1].var(axis=0, ddof=1).mean())
        x = np.sqrt(self.x.var(axis=0, ddof=1).mean()) / self.x.std()
        return [f"{v:.4f}" for v in (gamma, x, self.distance.std(ddof=1))]


def probing(n, steps, draws):
    """Rows of the second table."""
    rows = []
    for scale in (0, 3):
        problem = problems.network(scale, n, draws=4 * n)
        distance = metrics.SlicedWasserstein(problem.law, n)

        def noise(seed):
            return 80 * jax.random.normal(jax.random.key(seed), (n, *problem.event))  # noqa: B023

        def runs(estimator, keys, seeds):
            solver = sd.Stein(sd.DPMpp2M(), estimator=estimator)
            solutions = [
                sd.sample(
                    jax.random.key(k),
                    problem.denoiser,  # noqa: B023
                    sigmas=sd.karras_sigmas(steps),
                    solver=solver,
                    x_init=noise(s),
                )
                for k, s in zip(keys, seeds, strict=True)
            ]
            gamma = np.array([s.info.gamma for s in solutions])
            distances = np.array([distance(s.x) for s in solutions])  # noqa: B023
            return Runs(gamma, np.array([s.x for s in solutions]).reshape(draws, n, -1), distances)

        free = runs(sd.Tweedie(), range(draws), range(draws))
        rows.append([str(scale), "noise", "0", *free.spread()])
        for probes in PROBES:
            estimator = sd.Hutchinson(probes)
            # Over the probes for one noise, the mean of the variance over three such noises.
            each = [runs(estimator, range(draws), [s] * draws).spread() for s in range(3)]
            mean = np.sqrt(np.mean(np.square(np.array(each, float)), axis=0))
            rows.append([str(scale), "probes", str(probes), *(f"{m:.4f}" for m in mean)])
    return rows


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=256)
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--draws", type=int, default=6, help="of seeds and of probes")
    arguments = parser.parse_args()
    with jax.enable_x64(True):
        rows = rounding(arguments.samples, arguments.steps)
    header = ["guidance", "rule", "network in", "error of gamma", "RMSE of samples"]
    print(metrics.table(header, rows), end="\n\n")
    rows = probing(arguments.samples, arguments.steps, arguments.draws)
    header = ["guidance", "varied", "probes", "gamma", "samples", "sliced-W2"]
    print(metrics.table(header, rows))


if __name__ == "__main__":
    main()

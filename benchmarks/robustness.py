"""Corrected / plain under distribution shift, and gamma's answer (about 5 minutes on two cores).

Sliced-W2 as in quality.py, while something is not as the solver believes. The distance is to the
law without the shift: of the mixtures their own, of the digits network its own fine solve with its
weights and noise levels as trained. Guidance 10 is asked for rather than an accident, and measured
against the fine solve at guidance 10. Losses are printed first. Writes robustness.png, gamma of
the last of quality.py's corrections along the Karras grid, the mean over the seeds.
"""

import argparse
import dataclasses
import itertools
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import Array
from tqdm import tqdm

import metrics
import problems
import quality
import steindiff_jax as sd
from steindiff_jax.denoisers import rows, with_posterior

STEPS = (4, 5, 6, 10)
SOLVERS = {name: quality.SOLVERS[name] for name in ("2M", "3M", "iPNDM-3")}
NETWORK = "digits network"
PROBLEMS = ("clumps", "smooth", "offset", NETWORK)


class Shift(NamedTuple):
    """What is not as the solver believes.

    noise: the initial state over what the grid says; sigma_max: where the grid starts, from
    noise without any signal; level: the noise level that the denoiser is told over the true one;
    weights: std of the noise on each array of the network, relative to the array's own;
    guidance: scale of the network's.
    """

    noise: float = 1.0
    sigma_max: float = 80.0
    level: float = 1.0
    weights: float = 0.0
    guidance: float = 1.5


SHIFTS = {
    "none": Shift(),
    "initial noise + 10%": Shift(noise=1.1),
    "initial noise - 10%": Shift(noise=0.9),
    "s_max 5": Shift(sigma_max=5.0),
    "noise level + 5%": Shift(level=1.05),
    "noise level - 5%": Shift(level=0.95),
    "weights 3%": Shift(weights=0.03),
    "guidance 10": Shift(guidance=10.0),
}


@sd.pytree
class Misled:
    """A denoiser that is told `level` times the true noise level."""

    denoiser: sd.Denoiser
    level: float

    def __call__(self, x: Array, sigma: Array) -> Array:
        return self.denoiser(x, self.level * sigma)

    def with_posterior(self, x: Array, sigma: Array) -> tuple[Array, Array]:
        return with_posterior(self.denoiser, x, self.level * sigma)

    def rows(self, take) -> "Misled":
        return Misled(rows(self.denoiser, take), self.level)


def perturbed(denoiser, relative: float, seed: int):
    """Gaussian noise on every array of a guided network, relative to its root mean square."""
    rng = np.random.default_rng(seed)

    def perturb(a: Array) -> Array:
        scale = relative * jnp.sqrt(jnp.mean(a**2))
        return a + scale * rng.standard_normal(a.shape).astype(a.dtype)

    parameters = jax.tree.map(perturb, denoiser.network.parameters)
    network = dataclasses.replace(denoiser.network, parameters=parameters)
    return dataclasses.replace(denoiser, network=network)


def measure(
    problem: problems.Problem,
    distance: metrics.SlicedWasserstein,
    shift: Shift,
    n: int,
    seeds: int,
) -> tuple[dict, dict]:
    """(solver, correction, grid, steps, seed) -> sliced-W2, and -> (sigma, gamma) (2, steps)."""
    distances, gammas = {}, {}
    for seed in range(seeds):
        denoiser = problem.denoiser
        if shift.weights:
            denoiser = perturbed(denoiser, shift.weights, seed)
        denoiser = Misled(denoiser, shift.level)  # even if not: one program for all shifts
        key_noise, key = jax.random.split(jax.random.key(seed))
        noise = shift.noise * jax.random.normal(key_noise, (n, *problem.event))
        for s, (c, correct) in itertools.product(SOLVERS, quality.CORRECTIONS.items()):
            for (g, grid), k in itertools.product(quality.GRIDS.items(), STEPS):
                sigmas = jnp.pad(grid(k, sigma_max=shift.sigma_max), (0, max(STEPS) - k))
                solution = sd.sample(
                    key,
                    denoiser,
                    sigmas=sigmas,
                    solver=correct(SOLVERS[s]),
                    x_init=sigmas[0] * noise,
                )
                distances[s, c, g, k, seed] = distance(solution.x)
                gammas[s, c, g, k, seed] = np.stack([sigmas[:-1], solution.info.gamma])
    return distances, gammas


def show(results: dict[str, dict], correction: str) -> None:
    """results: shift -> those of `quality.Results`."""
    losses, lines = [], []
    for shift, cells in results.items():
        line = [shift]
        for on_network, solver in itertools.product((False, True), SOLVERS):
            chosen = {k: v for k, v in cells.items() if (k[0] == NETWORK) == on_network}
            one = quality.Results(chosen)
            ratio = one.ratio(correction, solver=solver) if chosen else None
            line.append(f"{ratio[0]:.2f} ± {ratio[1]:.2f}" if ratio else "")
            each = ((*one.ratio(correction, solver=solver, problem=p), p) for p in one.problems)
            losses += [(r, h, shift, p, solver) for r, h, p in each if r > 1]
        lines.append(line)
    print(f"\n## {correction}\n\nlosses (ratio > 1 over all steps and grids):")
    losses = [f"  {t}, {p}, {s}: {r:.2f} ± {h:.2f}" for r, h, t, p, s in sorted(losses)[::-1]]
    print("\n".join(losses) or "  none")
    header = [f"{s}, {kind}" for kind, s in itertools.product(("mixtures", "network"), SOLVERS)]
    print("\n" + metrics.table(["corrected / plain", *header], lines))


def plot(gammas: dict, names: list[str]) -> None:
    """gammas: (shift, problem, solver, correction, grid, steps, seed) -> (2, steps)."""
    correction = list(quality.CORRECTIONS)[-1]
    shape = len(SOLVERS), len(names)
    size = 1.5 + 2.8 * shape[1], 0.5 + 2.4 * shape[0]
    figure, axes = plt.subplots(*shape, figsize=size, squeeze=False, layout="constrained")
    for (i, s), (j, problem) in itertools.product(enumerate(SOLVERS), enumerate(names)):
        for shift, color in zip(SHIFTS, ["black", *plt.cm.tab10.colors], strict=False):
            at = shift, problem, s, correction, "karras", max(STEPS)
            found = [v for k, v in gammas.items() if k[:-1] == at]
            if found:
                axes[i, j].plot(*np.mean(found, axis=0), ".-", color=color, label=shift, lw=1)
        axes[i, j].set(xscale="log", title=f"{problem}, {s}" if i == 0 else s)
        axes[i, j].invert_xaxis()
    for axis in axes[-1]:
        axis.set_xlabel("sigma")
    for axis in axes[:, 0]:
        axis.set_ylabel("gamma")
    lines = {line.get_label(): line for axis in axes.flat for line in axis.lines}
    figure.legend(lines.values(), lines.keys(), loc="outside right center", fontsize=8)
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="*", default=PROBLEMS)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=200)
    arguments = parser.parse_args()
    results, gammas = {shift: {} for shift in SHIFTS}, {}
    for name in tqdm(arguments.problems):
        on_network = name == NETWORK
        n = arguments.samples // 2 if on_network else arguments.samples
        with jax.enable_x64(not on_network):
            laws = {}  # guidance -> problem and distance
            for shift, how in SHIFTS.items():
                if not on_network and (how.weights or how.guidance != Shift().guidance):
                    continue
                if how.guidance not in laws:
                    if on_network:
                        problem = problems.network(how.guidance, n, draws=1000)
                    else:
                        problem = problems.exact(problems.REPORT[name]())
                    laws[how.guidance] = problem, metrics.SlicedWasserstein(problem.law, n)
                distances, found = measure(*laws[how.guidance], how, n, arguments.seeds)
                results[shift] |= {(name, *k): v for k, v in distances.items()}
                gammas |= {(shift, name, *k): v for k, v in found.items()}
    plot(gammas, arguments.problems)
    for correction in list(quality.CORRECTIONS)[1:]:
        show({shift: cells for shift, cells in results.items() if cells}, correction)


if __name__ == "__main__":
    main()

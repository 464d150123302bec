"""The correction when something is not as the solver believes (half an hour on two cores).

Corrected / plain in `both` distances, as in quality.py; the distance is to the law without the
shift: of the exact problems their own, of the network its own fine solve with its weights and noise
levels as trained. Guidance 10 is asked for rather than an accident, and measured against the fine
solve at guidance 10. Losses are printed first.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

import metrics
import problems
import steindiff_jax as sd
import sweep
from steindiff_jax.denoisers import rows

STEPS = (4, 6, 10)
SOLVERS = ("DDIM", "2M", "3M", "iPNDM-3")
NETWORK = "digits network, guidance 1.5"
PROBLEMS = ("clumps", "smooth", "offset", "spectrum k^-2, 16x16x3", "colour patches 6x6", NETWORK)


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

    def rows(self, take) -> "Misled":
        return Misled(rows(self.denoiser, take), self.level)


def perturbed(denoiser, relative: float, seed: int):
    """Gaussian noise on every array of a guided network, relative to its root mean square."""
    rng = np.random.default_rng(seed)

    def perturb(a: Array) -> Array:
        scale = relative * jnp.sqrt(jnp.mean(a**2))
        return a + scale * rng.standard_normal(a.shape).astype(a.dtype)

    parameters = jax.tree.map(perturb, denoiser.conditional.parameters)
    network = dataclasses.replace(denoiser.conditional, parameters=parameters)
    return dataclasses.replace(denoiser, conditional=network)


def measure(distances: metrics.Distances, shift: Shift, name: str, arguments) -> dict:
    denoiser = distances.problem.denoiser

    def misled(seed: int) -> Misled:  # even if not: one program for all shifts
        weights = perturbed(denoiser, shift.weights, seed) if shift.weights else denoiser
        return Misled(weights, shift.level)

    return sweep.sweep(
        distances,
        arguments.solvers,
        sweep.CORRECTIONS,
        steps=arguments.steps,
        seeds=arguments.seeds,
        grids={g: partial(grid, sigma_max=shift.sigma_max) for g, grid in sweep.GRIDS.items()},
        denoiser=misled,
        level=shift.noise,
        name=name,
    )


def show(results: dict[str, sweep.Results]) -> None:
    losses, lines = [], []
    for shift, r in results.items():
        line = [shift]
        for on_network in (False, True):
            chosen = [p for p in r.problems if (p == NETWORK) == on_network]
            for s in r.solvers:
                line.append(sweep.shown(r.ratio("both", solver=s, problem=chosen)))
                losses += [(*r.ratio("both", solver=s, problem=p), shift, p, s) for p in chosen]
        lines.append(line)
    print("losses (ratio above 1 over all steps and grids):\n")
    for value, half, *where in sorted(losses, reverse=True):
        if value > 1:
            print(f"- {', '.join(where)}: {sweep.shown((value, half))}")
    solvers = next(iter(results.values())).solvers
    header = [f"{s}, {kind}" for kind in ("exact", "network") for s in solvers]
    print("\n" + metrics.table(["corrected / plain", *header], lines))


def main() -> None:
    parser = sweep.options(__doc__, "report", SOLVERS, PROBLEMS, seeds=3, n=200, steps=STEPS)
    arguments = parser.parse_args()
    runs = {shift: {} for shift in SHIFTS}
    for name in tqdm(arguments.problems):
        n = arguments.samples
        with jax.enable_x64(name != NETWORK):
            distances = {}  # of each guidance
            for shift, how in SHIFTS.items():
                if name != NETWORK and (how.weights or how.guidance != Shift().guidance):
                    continue
                if how.guidance not in distances:
                    problem = (
                        problems.network(how.guidance, n)
                        if name == NETWORK
                        else problems.build("report", name, n)
                    )
                    distances[how.guidance] = metrics.Distances(problem, n)
                runs[shift] |= measure(distances[how.guidance], how, name, arguments)
        jax.clear_caches()  # hundreds of compiled programs exhaust a process's memory maps
    show({shift: sweep.Results(found) for shift, found in runs.items() if found})


if __name__ == "__main__":
    main()

"""Quality of every correction on exact denoisers (about 6 minutes on two cores).

Sliced-W2 of 2000 samples to the data, geometric mean over four problems x {Karras, log-SNR} grids x
steps {4, 5, 6, 8, 10, 16}, in float64; the second table is steps <= 6 alone. In brackets the number
that an independent numpy prototype of the same experiment gave, with other seeds.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import metrics
import problems
import steindiff_jax as sd

STEPS = (4, 5, 6, 8, 10, 16)
GRIDS = {"karras": sd.karras_sigmas, "log-SNR": sd.log_snr_sigmas}
SOLVERS = {
    "DPM++2M": sd.DPMpp2M(),
    "DPM++3M": sd.DPMpp3M(),
    "iPNDM-2": sd.IPNDM(2),
    "iPNDM-3": sd.IPNDM(3),
    "iPNDM-4": sd.IPNDM(4),
}
PAPER = sd.CleanTarget(gamma_min=0.1)
CORRECTIONS = {
    "plain": lambda s: s,
    "paper, Tweedie": lambda s: sd.Stein(s, PAPER, sd.Tweedie()),
    "energy, exact": lambda s: sd.Stein(s, sd.StepEnergy(), problems.Analytic()),
    "energy, Tweedie": lambda s: sd.Stein(s, sd.StepEnergy(), sd.Tweedie()),
    "length, 1/8 probed": lambda s: sd.Stein(s, sd.PosteriorLength()),
}
PROTOTYPE = {
    "DPM++2M": (0.130, 0.108, 0.087, 0.084),
    "DPM++3M": (0.210, 0.136, 0.085, 0.088),
    "iPNDM-2": (0.083, 0.087, 0.096, 0.085),
    "iPNDM-3": (0.087, 0.083, 0.080, 0.072),
    "iPNDM-4": (0.089, 0.088, 0.077, 0.071),
}


def measure(problem: problems.Mixture, seeds: int, n: int = 2000) -> dict:
    """(solver, correction, grid, steps, seed) -> sliced-W2."""
    distance = metrics.SlicedWasserstein(problem.draw(0, 200_000), n)
    shape, longest = (n, problem.means.shape[1]), max(STEPS)
    results = {}
    for (s, solver), (c, correct) in itertools.product(SOLVERS.items(), CORRECTIONS.items()):
        for (g, grid), steps, seed in itertools.product(GRIDS.items(), STEPS, range(seeds)):
            sigmas = jnp.pad(grid(steps), (0, longest - steps))  # one program for all grids
            key = jax.random.key(seed)
            solution = sd.sample(key, problem, shape, sigmas=sigmas, solver=correct(solver))
            results[s, c, g, steps, seed] = distance(solution.x)
    return results


def table(results: dict, steps: tuple[int, ...], prototype: dict | None = None) -> str:
    """Rows: solvers; columns: corrections; geometric means over all else."""
    lines = ["| solver | " + " | ".join(CORRECTIONS) + " |", "|---" * (1 + len(CORRECTIONS)) + "|"]
    for s in SOLVERS:
        cells = []
        for i, c in enumerate(CORRECTIONS):
            chosen = [v for k, v in results.items() if k[1:3] == (s, c) and k[4] in steps]
            known = f" ({prototype[s][i]:.3f})" if prototype and i < len(prototype[s]) else ""
            cells.append(f"{metrics.geometric_mean(chosen):.3f}{known}")
        lines.append(f"| {s} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--problems", nargs="+", default=list(problems.PROTOTYPE))
    arguments = parser.parse_args()
    jax.config.update("jax_enable_x64", True)
    results = {}
    for name in tqdm(arguments.problems):
        problem = problems.PROTOTYPE[name]()
        measured = measure(problem, arguments.seeds)
        results |= {(name, *key): value for key, value in measured.items()}
    print(f"geometric mean over {', '.join(arguments.problems)}; (prototype)")
    print(table(results, STEPS, PROTOTYPE))
    print("\nsteps <= 6 alone")
    print(table(results, (4, 5, 6)))
    ratios = [
        np.log(v / results[(p, s, "plain", *rest)])
        for (p, s, c, *rest), v in results.items()
        if c == "energy, Tweedie"
    ]
    print(f"\nenergy, Tweedie / plain: {np.exp(np.mean(ratios)):.2f} over all cells; ", end="")
    print(f"worse in {np.mean(np.array(ratios) > 0):.0%} of them")


if __name__ == "__main__":
    main()

"""Step by step, what the solver adds, what the correction makes of it, and what is exact (5 min).

Along corrected runs of 8 Karras steps, on problems of the half that rules are developed on. The
exact flow from each state to the next sigma is solved finely: delta* is what a solver should have
added to the first-order step. For each step, |delta - delta*| / |delta*| of the solver's own delta
and of the corrected one: below 1 is better than adding nothing. Where the correction made it worse
is printed first. The last step, to 0, adds nothing.
"""

import jax
import numpy as np
from jax import Array
from tqdm import tqdm

import metrics
import steindiff_jax as sd
import sweep

STEPS = 8
SOLVERS = ("DDIM", "2M", "3M", "iPNDM-3")
PROBLEMS = (
    "clumps",
    "curve",
    "anisotropic",
    "spectrum k^-2.5, 12x12x3",
    "grey patches 6x6",
    "digits network, guidance 3",
)


def keep(state: sd.State, step: sd.Step) -> tuple[Array, ...]:
    return state.x, step.x0, step.delta, state.memory.previous.delta


def exact_delta(denoiser, x: Array, x0: Array, sigma: float, sigma_next: float) -> Array:
    """delta* of x_next = q x + (1 - q)(x0 + delta*), from a fine solve of this one step."""
    sigmas = np.geomspace(sigma, sigma_next, 33)
    fine = sd.sample(jax.random.key(0), denoiser, sigmas=sigmas, solver=sd.DPMpp3M(), x_init=x)
    q = sigma_next / sigma
    return (fine.x - q * x) / (1 - q) - x0


def errors(distances: metrics.Distances, solver: sd.Solver) -> np.ndarray:
    """(own or corrected, steps - 1)."""
    sigmas, start = np.asarray(sd.karras_sigmas(STEPS)), distances.noise(0)
    sigmas, stein, denoiser = (
        sigmas.astype(start.dtype),
        sd.Stein(solver),
        distances.problem.denoiser,
    )
    x = sigmas[0] * start
    run = sd.sample(jax.random.key(0), denoiser, sigmas=sigmas, solver=stein, x_init=x, record=keep)
    found = []
    for k, (after, x0, delta, own) in enumerate(zip(*run.record, strict=True)):
        if k < STEPS - 1:
            star = exact_delta(denoiser, x, x0, sigmas[k], sigmas[k + 1])
            own = stein.basis_of(x.shape).inverse(own)  # it is remembered in the basis
            norms = [np.linalg.norm(d) for d in (own - star, delta - star, star)]
            found.append((norms[0] / norms[2], norms[1] / norms[2]))
        x = after
    return np.array(found).T


def main() -> None:
    parser = sweep.options(__doc__, "tune", SOLVERS, PROBLEMS, seeds=1, n=200)
    arguments = parser.parse_args()
    rows, worse = [], []
    for name in tqdm(arguments.problems):
        with sweep.prepared("tune", name, arguments.samples) as distances:
            for s in arguments.solvers:
                own, corrected = errors(distances, sweep.SOLVERS[s])
                cells = (f"{a:.2f} / {b:.2f}" for a, b in zip(own, corrected, strict=True))
                rows.append([name, s, *cells])
                worse += [
                    (b - a, f"{name}, {s}, step {k + 1}: {a:.2f} to {b:.2f}")
                    for k, (a, b) in enumerate(zip(own, corrected, strict=True))
                    if b > a
                ]
    print(f"the correction made delta worse in {len(worse)} of {len(rows) * (STEPS - 1)} steps:\n")
    print("\n".join(f"- {where}" for _, where in sorted(worse)[::-1][:15]))
    print("\nerror of delta over |delta*|, the solver's own / corrected\n")
    steps = [f"step {k + 1}" for k in range(STEPS - 1)]
    print(metrics.table(["problem", "solver", *steps], rows))


if __name__ == "__main__":
    main()

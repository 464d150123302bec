"""How far a table of coefficients carries, on the digits network (ten minutes on two cores).

A table is recorded once, 250 samples of all classes, and replayed on other seeds, batch sizes,
guidance scales and class labels. First what live gamma scatters by; then RMSE from, and
sliced-W2 to, the 50-step solution of the same noise: plain, live, and replayed.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

import _path  # noqa: F401
import digits
import metrics
import steindiff_jax as sd

N, STEPS, SCALES = 250, 5, (1.0, 3.0, 6.0)
RULES = {"PosteriorLength": sd.PosteriorLength(), "StepEnergy": sd.StepEnergy()}
GRID = sd.karras_sigmas(STEPS)
BASIS = sd.Cosine(2, colour=False)  # the same for all batch sizes


def denoiser(labels, scale):
    """Guided to the labels; scale 1 is the conditional network."""
    conditional = digits.load(labels)
    if scale == 1:
        return conditional
    return sd.guided(conditional, digits.load(jnp.full_like(labels, digits.NULL)), scale)


def every_class(n=N):
    return jnp.tile(jnp.arange(10), -(-n // 10))[:n]


def run(seed, labels, scale, solver, sigmas=GRID):
    key, shape = jax.random.key(seed), (len(labels), 8, 8, 1)
    return sd.sample(key, denoiser(labels, scale), shape, sigmas=sigmas, solver=solver)


def calibrate(seed, labels, scale, solver):
    """Through `run`'s arguments; the fingerprint is left out, so that all share one program."""
    key, shape = jax.random.key(seed), (len(labels), 8, 8, 1)
    table = sd.calibrate(key, denoiser(labels, scale), shape, GRID, solver)
    return sd.Calibrated(table.inner, table.sigmas, table.coefficients)


def scatter(solver, table, scale, seeds):
    """Root mean square over seeds of gamma - table, the worst step, for several batch sizes."""
    cells = []
    for n in (5, 20, N):
        gamma = [run(100 + s, every_class(n), scale, solver).info.gamma for s in range(seeds)]
        cells.append(np.sqrt(np.mean((np.array(gamma) - table.gamma[None]) ** 2, axis=0)).max())
    return " ".join(f"{cell:7.3f}" for cell in cells)


class Reference:
    """The long solution of one batch; calling it measures a solver on the same noise."""

    def __init__(self, seed, labels, scale):
        self.arguments = seed, labels, scale
        self.x = np.asarray(run(*self.arguments, sd.DPMpp2M(), sd.karras_sigmas(50)).x)
        self.distance = metrics.SlicedWasserstein(self.x, len(self.x))

    def __call__(self, solver):
        x = run(*self.arguments, solver).x
        return f"{np.sqrt(np.mean((x - self.x) ** 2)):.3f} {self.distance(x):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=10, help="of the live runs that scatter")
    parser.add_argument("--rules", nargs="+", default=list(RULES), choices=list(RULES))
    arguments = parser.parse_args()
    seeds = arguments.seeds
    labels, one = every_class(), jnp.full(N, 3)
    references = {scale: Reference(1, labels, scale) for scale in SCALES}
    single = {scale: Reference(2, one, scale) for scale in SCALES}
    for name in arguments.rules:
        solver = sd.Stein(sd.DPMpp3M(), RULES[name], basis=BASIS)
        tables = {scale: calibrate(0, labels, scale, solver) for scale in SCALES}
        print(f"\n{name}, DPM++3M, {STEPS} steps: gamma")
        for scale in SCALES:
            gamma = np.round(np.asarray(tables[scale].gamma), 3).tolist()
            print(f"  guidance {scale:g}: {gamma}")
        print(f"  live gamma - table, RMS over {seeds} seeds, worst step; batch 5, 20, {N}")
        for scale in SCALES:
            print(f"  guidance {scale:g}: {scatter(solver, tables[scale], scale, seeds)}")
        print("  RMSE and sliced-W2, another seed", *(f"| guidance {s:g}  " for s in SCALES))
        small, alone = (
            {scale: calibrate(3, few, scale, solver) for scale in SCALES}
            for few in (every_class(20), one)
        )
        rows = {
            "plain": dict.fromkeys(SCALES, sd.DPMpp3M()),
            "live": dict.fromkeys(SCALES, solver),
            "table": tables,
            "table of a batch of 20": small,
            "table of digit 3 alone": alone,
        }
        rows |= {f"table of guidance {t:g}": dict.fromkeys(SCALES, tables[t]) for t in SCALES}
        for row, chosen in rows.items():
            cells = (references[scale](chosen[scale]) for scale in SCALES)
            print(f"  {row:32}", *(f"| {cell}" for cell in cells), flush=True)
        print("  digit 3 alone")
        for row in ("plain", "live", "table"):
            cells = (single[scale](rows[row][scale]) for scale in SCALES)
            print(f"  {row:32}", *(f"| {cell}" for cell in cells), flush=True)


if __name__ == "__main__":
    main()

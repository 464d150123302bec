"""What decides gamma, step by step, beside what an exact flow does (about 2 minutes on two cores).

Along runs corrected by `PosteriorLength`, on problems of the half that it was developed on. The
statistics are taken again at the recorded states with the whole Jacobian, and the exact flow from
each state to the next sigma is solved finely: delta*, what a solver should have added. Rows of
anatomy.png: gamma and the length of delta* over that of delta (dotted); V / E|delta|^2; the
eigenvalue |J|_F^2 / tr J and its cap; E|delta*|^2 / V (dotted) and the share phi that the rule
takes for it; surprise and its cap. Prints gamma over the length of delta*. Least squares would ask
for less than that length: it shrinks what points elsewhere, and loses variance.
"""

import argparse
import itertools
from pathlib import Path

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
from steindiff_jax.stein.rules import Local, Previous

STEPS = 8
SOLVERS = {name: quality.SOLVERS[name] for name in ("2M", "3M", "iPNDM-3")}
NETWORK = "digits network, guidance 3"
PROBLEMS = ("clumps", "curve", "smooth", "anisotropic", NETWORK)
RULE = sd.PosteriorLength()
ROWS = {  # axis label -> solid lines, dotted lines, horizontal line
    "gamma": ("gamma", "length of delta*", 1.0),
    "V / E|delta|²": ("variance", None, None),
    "|J|² / tr J": ("eigenvalue", None, 1.0),
    "E|delta*|² / V": ("share", "share of delta*", None),
    "surprise": ("surprise", None, RULE.surprise_max),
}


def keep(state: sd.State, step: sd.Step) -> tuple[Array, Array, Array]:
    return state.x, step.x0, step.delta


@jax.jit
def statistics(denoiser, x, x0, delta, previous, sigma, sigma_next) -> dict[str, Array]:
    """What the rule sees of one step, with the exact Jacobian of all samples."""
    keys = jax.random.split(jax.random.key(0), len(x))  # for nothing: it has no probes
    _, jacobian = sd.Exact()(keys, denoiser, x, sigma)
    local = Local(x, x0, delta, x, sigma, sigma_next, jacobian, previous, lambda: None)
    left, guided, unguided, change, _, surprise, confirmed = (m.mean() for m in RULE.moments(local))
    trace = jacobian.posterior_trace.mean()
    return {
        "V": sigma**2 * trace,
        "variance": trace / change,
        "eigenvalue": jacobian.posterior_squared_norm.mean() / trace,
        "share": left * guided / unguided / trace,
        "surprise": surprise / confirmed,
    }


def exact_delta(denoiser, x: Array, x0: Array, sigma: Array, sigma_next: Array) -> Array:
    """delta* of x_next = q x + (1 - q)(x0 + delta*), from a fine solve of this one step."""
    sigmas = np.geomspace(sigma, max(sigma_next, 1e-3 * sigma), 33)
    sigmas[-1] = sigma_next
    fine = sd.sample(jax.random.key(0), denoiser, sigmas=sigmas, solver=sd.DPMpp3M(), x_init=x)
    q = sigma_next / sigma
    return (fine.x - q * x) / (1 - q) - x0


def anatomy(problem: problems.Problem, solver: sd.Solver, n: int) -> dict[str, np.ndarray]:
    """Each (steps - 2,): the first and the last step are first order, and add nothing."""
    sigmas = sd.karras_sigmas(STEPS)
    key_noise, key = jax.random.split(jax.random.key(0))
    start = sigmas[0] * jax.random.normal(key_noise, (n, *problem.event))
    solution = sd.sample(
        key,
        problem.denoiser,
        sigmas=sigmas,
        solver=sd.Stein(solver, RULE),
        x_init=start,
        record=keep,
    )
    x, x0, delta = solution.record
    found = []
    for k in range(1, STEPS - 1):
        previous = Previous(x0[k - 1], delta[k - 1], sigmas[k - 1])
        here = x[k - 1], x0[k]  # x was recorded after each step
        seen = statistics(problem.denoiser, *here, delta[k], previous, sigmas[k], sigmas[k + 1])
        star = exact_delta(problem.denoiser, *here, sigmas[k], sigmas[k + 1])
        energy = (star**2).sum() / n
        seen["gamma"] = solution.info.gamma[k]
        seen["length of delta*"] = jnp.sqrt(energy / ((delta[k] ** 2).sum() / n))
        seen["share of delta*"] = energy / seen["V"]
        found.append(seen)
    return jax.tree.map(lambda *values: np.array(values, np.float64), *found)


def plot(found: dict[tuple[str, str], dict], names: list[str]) -> None:
    sigma = np.asarray(sd.karras_sigmas(STEPS))[1:-2]
    size = 1 + 2.6 * len(names), 0.5 + 2 * len(ROWS)
    shape = len(ROWS), len(names)
    figure, axes = plt.subplots(
        *shape, figsize=size, sharex=True, sharey="row", squeeze=False, layout="constrained"
    )
    for (i, (label, (solid, dotted, line))), (j, name) in itertools.product(
        enumerate(ROWS.items()), enumerate(names)
    ):
        axis = axes[i, j]
        for s, color in zip(SOLVERS, plt.cm.tab10.colors, strict=False):
            axis.plot(sigma, found[name, s][solid], ".-", color=color, label=s, lw=1)
            if dotted:
                axis.plot(sigma, found[name, s][dotted], ":", color=color)
        if line:
            axis.axhline(line, color="gray", lw=0.5)
        axis.set(xscale="log", yscale="log")
        if j == 0:
            axis.set_ylabel(label)
        if i == 0:
            axis.set_title(name, fontsize=10)
    axes[0, 0].invert_xaxis()  # all share it
    axes[0, 0].legend(fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("sigma")
    figure.savefig(Path(__file__).with_suffix(".png"), dpi=110)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="*", default=PROBLEMS)
    parser.add_argument("--samples", type=int, default=128)
    arguments = parser.parse_args()
    found = {}
    for name in tqdm(arguments.problems):
        on_network = name == NETWORK
        with jax.enable_x64(not on_network):
            if on_network:
                problem = problems.network(3.0, arguments.samples, draws=1)
            else:
                problem = problems.exact(problems.TUNE[name](), draws=1)
            for s, solver in SOLVERS.items():
                found[name, s] = anatomy(problem, solver, arguments.samples)
    plot(found, arguments.problems)
    rows = [
        [name, s, *(f"{g:.2f}" for g in seen["gamma"] / seen["length of delta*"])]
        for (name, s), seen in found.items()
    ]
    steps = [f"step {k + 1}" for k in range(1, STEPS - 1)]
    print("gamma over the length that an exact step has")
    print(metrics.table(["problem", "solver", *steps], rows))


if __name__ == "__main__":
    main()

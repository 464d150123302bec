"""What was tried in place of `PosteriorLength`'s parts, and lost (25 minutes on two cores).

Ratios corrected / plain of sliced-W2, geometric mean over {Karras, log-SNR} grids and 4, 6 and 10
steps, one seed, on problems of the half that rules are developed on. Exploratory: read differences
of a few percent as none. All rules have the exact divergence where the problem has one.
"""

import argparse
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from tqdm import tqdm

import metrics
import problems
import quality
import steindiff_jax as sd
from steindiff_jax._numerics import divide
from steindiff_jax.stein.rules import MODE_EIGENVALUE, Local, gaussian_share, mean_weight

STEPS = (4, 6, 10)
SOLVERS = ("2M", "3M", "iPNDM-3")
NETWORK = "digits network, guidance 3"
PROBLEMS = ("clumps", "curve", "smooth", "gaussian", "offset", NETWORK)


@sd.pytree
class ConstantShare(sd.PosteriorLength):
    """The same share of the variance in every step."""

    share: float = 0.3

    def moments(self, local: Local):
        return (self.share * local.jacobian.posterior_trace, *super().moments(local)[1:])


@sd.pytree
class NoModes(sd.PosteriorLength):
    """The Gaussian share of an eigenvalue close to 1, that is none, where modes are chosen."""

    def moments(self, local: Local):
        jacobian, q = local.jacobian, local.sigma_next / local.sigma
        norm, trace = jacobian.posterior_squared_norm, jacobian.posterior_trace
        share = gaussian_share(jnp.minimum(divide(norm, trace, 0.999), 0.999), q)
        return (share * trace, *super().moments(local)[1:])


@sd.pytree
class BatchShare(sd.PosteriorLength):
    """One share for the batch, of its mean eigenvalue, at most that of two modes."""

    def moments(self, local: Local):
        return (local.jacobian.posterior_trace, *super().moments(local)[1:])

    def gamma(self, moments, sigma, sigma_next):
        trace, guided, unguided, *rest = moments
        eigenvalue = jnp.minimum(divide(unguided, trace, MODE_EIGENVALUE), MODE_EIGENVALUE)
        left = gaussian_share(eigenvalue, sigma_next / sigma) * trace
        return super().gamma((left, guided, unguided, *rest), sigma, sigma_next)


@sd.pytree
class GuidedVariance(sd.PosteriorLength):
    """sigma^2 tr J of the guided denoiser itself, as if it were a posterior mean."""

    def moments(self, local: Local):
        own = local.jacobian
        own = own._replace(posterior_trace=own.trace, posterior_squared_norm=own.squared_norm)
        return super().moments(local._replace(jacobian=own))


@sd.pytree
class SelfConsistent:
    """A solver that corrects its last step with the evaluation that the next one needs anyway.

    x' = q x + (1 - q)(D + g omega (D_next - D)), a corrector as UniPC's without an evaluation of
    its own: D_next is kept for x'. g = min(gamma, 1)^gated.
    """

    inner: sd.Stein
    gated: float = 1.0

    def init(self, x, sigmas):
        start = self.inner.init(x, sigmas)
        zero = jnp.zeros_like(sigmas[0])
        return sd.State(x, (start.history, jnp.zeros_like(x), jnp.zeros_like(x), zero, zero))

    def step(self, key, denoiser, state, sigma, sigma_next):
        history, x, x0, before, g = state.history
        keys = jax.random.split(key, len(x))
        known = self.inner.divergence(keys, denoiser, state.x, sigma)
        omega = mean_weight(before, sigma)
        q = sigma / jnp.where(before > 0, before, sigma)
        corrected = q * x + (1 - q) * (x0 + g * omega * (known[0] - x0))
        now = jnp.where(before > 0, corrected, state.x)
        stein = sd.Stein(self.inner.inner, self.inner.rule, Known(*known))
        new, step = stein.step(key, denoiser, sd.State(now, history), sigma, sigma_next)
        g = jnp.minimum(step.gamma, 1.0) ** self.gated
        return sd.State(new.x, (new.history, now, known[0], sigma, g)), step


@sd.pytree
class Known:
    """A divergence that was estimated already."""

    x0: Array
    jacobian: sd.Jacobian

    def __call__(self, *_):
        return self.x0, self.jacobian


NO_DOUBT = 1e-20  # surprise_max that every surprise exceeds
VARIANTS = {
    "as it is": sd.PosteriorLength(),
    "energy: `StepEnergy`": sd.StepEnergy(),
    "one share for the batch": BatchShare(),
    "constant share .3": ConstantShare(),
    "constant share .3, gamma at most 1": ConstantShare(gamma_max=1.0),
    "Gaussian share also where modes are chosen": NoModes(),
    "gamma at most 2": sd.PosteriorLength(gamma_max=2.0),
    "gamma unbounded": sd.PosteriorLength(gamma_max=jnp.inf),
    "always in full (no surprise)": sd.PosteriorLength(surprise_max=NO_DOUBT),
    "surprise_max 1": sd.PosteriorLength(surprise_max=1.0),
    "variance of the guided denoiser": GuidedVariance(),
}


ESTIMATORS = {
    "one probe each": sd.Hutchinson(),
    "one probe on 1/8": sd.Hutchinson(fraction=1 / 8),
    "one probe on 1/32": sd.Hutchinson(fraction=1 / 32),
    "no probe: `Tweedie`": sd.Tweedie(),
}


def solvers(inner: sd.Solver, divergence) -> dict[str, sd.Solver]:
    corrected = {name: sd.Stein(inner, rule, divergence) for name, rule in VARIANTS.items()}
    best = corrected["as it is"]
    estimated = {
        name: sd.Stein(inner, best.rule, estimator) for name, estimator in ESTIMATORS.items()
    }
    corrected |= {
        "self-consistent, gated by gamma": SelfConsistent(best),
        "self-consistent in full": SelfConsistent(best, gated=0.0),
    }
    return corrected | estimated


def measure(name: str, n: int, variants: list[str]) -> dict:
    """(variant, solver) -> logs of corrected / plain."""
    network = name == NETWORK
    jax.config.update("jax_enable_x64", not network)
    problem = problems.network(3.0, n) if network else problems.exact(problems.TUNE[name]())
    distance = metrics.SlicedWasserstein(problem.law, n)
    results = {}
    for s in SOLVERS:
        inner = quality.SOLVERS[s]
        estimator = sd.Hutchinson() if network else problems.Analytic()
        chosen = {
            v: r for v, r in solvers(inner, estimator).items() if not variants or v in variants
        }
        runs = {"plain": inner} | chosen
        for (variant, solver), grid in itertools.product(runs.items(), quality.GRIDS.values()):
            for k in STEPS:
                solution = sd.sample(
                    jax.random.key(0),
                    problem.denoiser,
                    (n, *problem.event),
                    sigmas=jnp.pad(grid(k), (0, max(STEPS) - k)),
                    solver=solver,
                )
                results.setdefault((variant, s), []).append(np.log(distance(solution.x)))
        jax.clear_caches()  # hundreds of compiled programs exhaust a process's memory maps
    return {
        (v, s): np.subtract(logs, results["plain", s])
        for (v, s), logs in results.items()
        if v != "plain"
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--problems", nargs="*", default=PROBLEMS)
    parser.add_argument("--variants", nargs="*", default=[], help="default all")
    parser.add_argument("--samples", type=int, default=400)
    arguments = parser.parse_args()
    sizes = arguments.samples, arguments.variants
    found = {name: measure(name, *sizes) for name in tqdm(arguments.problems)}
    variants = list(dict.fromkeys(v for v, _ in next(iter(found.values()))))

    def cell(logs) -> str:
        return f"{np.exp(np.mean(logs)):.2f}"

    exact = [name for name in found if name != NETWORK]
    rows = []
    for v in variants:
        row = [cell([found[p][v, s] for p in exact]) for s in SOLVERS] if exact else []
        row += [cell([found[NETWORK][v, s]]) for s in SOLVERS] if NETWORK in found else []
        rows.append([v, *row])
    header = ["variant", *(SOLVERS if exact else ())]
    header += [f"{s}, guidance 3" for s in SOLVERS] if NETWORK in found else []
    print(metrics.table(header, rows))


if __name__ == "__main__":
    main()

"""Write a solver: subclass `sd.Solver`, give it a step, and check its order and its claim.

The flow of Gaussian data is known in closed form. It gives the order of convergence, and tests what
this solver claims: to be exact on isotropic Gaussian data. The last column is the ring of
`mixture.py` in five steps. `Stein` wraps this solver like any other. Fifteen seconds on two cores.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import steindiff_jax as sd
from mixture import distance, ring

STEPS, SAMPLES = (32, 128), 2000  # of the order, of the ring


@sd.pytree
class GaussianTwoStep(sd.Solver):
    """The exact flow if D is a straight line in 1 / r, r = sqrt(scale^2 + sigma^2); second order.

    On data N(mean, scale^2) it is such a line, and the flow scales x - mean in proportion to r. The
    line goes through D and the D of the previous step, at r_before. With q = sigma_next / sigma,

        x_next = q x + (1 - q)(D + delta),
        delta = (D - D_before) (r - r_next) / (r_before - r) r_before / (r_next + q r).

    Attributes:
      scale: standard deviation of the data. It is data of the program: a new value does not compile
        again.
    """

    scale: Any = 0.5

    def init(self, x, sigmas):
        """The memory: D and sigma of the previous step. sigma = 0 says that there was none."""
        return jnp.zeros_like(x), jnp.zeros_like(sigmas[0])

    def step(self, key, denoiser, state, sigma, sigma_next, *, x0=None):
        """Propose delta. `advance`, which the base class has, makes the step."""
        del key  # this solver draws nothing
        x0_before, before = state.memory
        x0, nfe = sd.evaluate(denoiser, state.x, sigma, x0)
        q = sigma_next / sigma
        r_before, r, r_next = (jnp.hypot(self.scale, s) for s in (before, sigma, sigma_next))
        # r - r_next and r_before - r, without cancellation at small sigma.
        ahead = (sigma**2 - sigma_next**2) / (r + r_next)
        behind = jnp.where(before > 0, (before**2 - sigma**2) / (r_before + r), 1.0)
        weight = ahead / behind * r_before / (r_next + q * r)
        used = (before > 0) & (sigma_next > 0)  # a step to 0 returns D
        delta = jnp.where(used, weight, 0.0) * (x0 - x0_before)
        return sd.Step(x0, delta, nfe), (x0, sigma)


@sd.pytree
class Gaussian:
    """N(0, diag(variance)): its denoiser, and its flow from sigma to sigma_next."""

    variance: Any  # (d,)

    def __call__(self, x, sigma):
        return x * (self.variance / (self.variance + sigma**2))[None]

    def flow(self, x, sigma, sigma_next):
        return x * jnp.sqrt((self.variance + sigma_next**2) / (self.variance + sigma**2))[None]


def error(solver, variance, sigmas):
    """RMSE to the flow relative to its size, on a grid that ends above 0."""
    data = Gaussian(jnp.asarray(variance))
    noise = jax.random.normal(jax.random.key(0), (64, len(variance)))
    x_init = jnp.hypot(jnp.sqrt(data.variance), sigmas[0])[None] * noise
    x = sd.sample(jax.random.key(1), data, sigmas=sigmas, x_init=x_init, solver=solver).x
    flow = data.flow(x_init, sigmas[0], sigmas[-1])
    return float(jnp.linalg.norm(x - flow) / jnp.linalg.norm(flow))


def order(solver):
    """Slope of log error over log steps, on data of three different scales."""
    grids = [10 * jnp.linspace(1, 0.1, n + 1) ** 2 for n in STEPS]
    errors = [error(solver, [0.02, 0.2, 1.0], sigmas) for sigmas in grids]
    return float(np.log(errors[0] / errors[1]) / np.log(STEPS[1] / STEPS[0]))


SOLVERS = {
    "DDIM": sd.DDIM(),
    "2M": sd.DPMpp2M(),
    "GaussianTwoStep": GaussianTwoStep(),
    "Stein(GaussianTwoStep)": sd.Stein(GaussianTwoStep()),
}


def main():
    data, sigmas = ring(), sd.karras_sigmas(5)
    truth = data.draw(0, SAMPLES)
    print(f"{'':23}order  error on N(0, 1/4)  sliced-W2 to the ring")
    table = {}
    for name, solver in SOLVERS.items():
        x = sd.sample(jax.random.key(0), data, truth.shape, sigmas=sigmas, solver=solver).x
        row = order(solver), error(solver, [0.25] * 3, sigmas[:-1]), distance(x, truth)
        print(f"{name:23}{row[0]:5.2f}{row[1]:20.4f}{row[2]:23.3f}")
        table[name] = row
    return table


if __name__ == "__main__":
    main()

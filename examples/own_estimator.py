"""Write an estimator and a rule: `Stein` takes both like the library's.

The estimator is Hutch++. On the exact denoiser of blurred digits its trace is compared with that of
the whole Jacobian, beside Hutchinson's probes at equal cost. Both parts then run in five steps.
Twenty seconds on two cores.
"""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import digits
import steindiff_jax as sd
from mixture import Mixture, distance

SAMPLES, SIGMAS = 200, (0.1, 0.2, 0.5, 2.0)


@sd.pytree
class HutchPlusPlus(sd.Estimator):
    """Hutch++ (Meyer et al. 2021, arXiv:2010.09649): 2 rank + probes products with J per sample.

    The columns of an orthonormal Q span J S for a random S. With P = 1 - Q Q^T

        tr J = tr Q^T J Q + tr P J P.

    The first trace is computed in full and the second one with random probes. The second is small
    where J is close to a matrix of low rank, which it is where few modes compete. The probes lie on
    a sphere (as in XTrace, Epperly et al. 2024, arXiv:2301.07825). An estimator is a choice of
    probes v whose v v^T add up to the identity in the mean; `sd.from_probes` does the rest.
    """

    rank: int = sd.static(default=4)
    probes: int = sd.static(default=4)

    def __call__(self, keys, denoiser, x, sigma):
        """Keys (batch,), x (batch, *event) -> the denoiser at x, and products with J."""
        size = math.prod(x.shape[1:])
        if not 0 < self.rank < size:
            raise ValueError(f"rank must be between 1 and {size - 1}, got {self.rank}")

        def draw(key):
            return jax.random.normal(key, (size, self.rank + self.probes), x.dtype)

        s, g = jnp.split(jax.vmap(draw)(keys), [self.rank], axis=2)
        _, sketch = sd.from_probes(denoiser, x, sigma, as_probes(s, x))
        q = jnp.linalg.qr(as_columns(sketch.jv))[0]
        g -= q @ (q.mT @ g)
        g *= math.sqrt((size - self.rank) / self.probes) / jnp.linalg.norm(g, axis=1, keepdims=True)
        return sd.from_probes(denoiser, x, sigma, as_probes(jnp.concatenate([q, g], axis=2), x))


def as_probes(columns, x):
    """(batch, size, probes) -> (probes, batch, *event)."""
    return jnp.moveaxis(columns, 2, 0).reshape(-1, *x.shape)


def as_columns(v):
    """(probes, batch, *event) -> (batch, size, probes)."""
    return jnp.moveaxis(v.reshape(*v.shape[:2], -1), 0, 2)


class Share(NamedTuple):
    gamma: Any


@sd.pytree
class FixedShare(sd.Rule):
    """gamma^2 = share sigma^2 E[tr J] / E|delta|^2 in each band, at most 1.

    sigma^2 tr J is the posterior variance, and delta cannot be longer than what is uncertain. This
    rule allows it a fixed share. `sd.PosteriorLength` computes the share that is exact on Gaussian
    data.
    """

    share: Any = 0.3

    def moments(self, local):
        """What gamma depends on, (batch, bands) each: `Stein` averages them over the batch."""
        change = local.delta / local.sigma
        return local.trace(), local.inner(change, change)

    def coefficients(self, moments, sizes, sigma, sigma_next):
        """Of the means, (bands,) each. `Rule.delta` then multiplies delta by the first."""
        del sizes, sigma, sigma_next
        trace, energy = moments
        length = jnp.sqrt(self.share * jnp.maximum(trace, 0) / jnp.where(energy > 0, energy, 1.0))
        return Share(jnp.where(energy > 0, jnp.minimum(length, 1.0), 1.0))


ESTIMATORS = {"Hutchinson(12)": sd.Hutchinson(12), "HutchPlusPlus(4, 4)": HutchPlusPlus(4, 4)}
SOLVERS = {
    "3M": sd.DPMpp3M(),
    "StepEnergy": sd.Stein(sd.DPMpp3M(), sd.StepEnergy()),
    "StepEnergy, Hutch++": sd.Stein(sd.DPMpp3M(), sd.StepEnergy(), HutchPlusPlus()),
    "FixedShare, Hutch++": sd.Stein(sd.DPMpp3M(), FixedShare(), HutchPlusPlus()),
}


@jax.jit
def trace(estimator, denoiser, x, sigma):
    """Trace of the Jacobian of each sample, (batch,)."""
    keys = jax.random.split(jax.random.key(2), len(x))
    _, jacobian = estimator(keys, denoiser, x, sigma)
    products = jacobian.v * jacobian.jv
    return products.reshape(*products.shape[:2], -1).sum(axis=(0, 2))


def main():
    scans = digits.images()[0].reshape(-1, 64)
    denoiser = Mixture(jnp.asarray(scans), 0.1)
    data = denoiser.draw(0, SAMPLES)
    noise = np.random.default_rng(1).standard_normal(data.shape)
    print(f"sigma  mean of tr J{'':6}" + "".join(f"{name:>26}" for name in ESTIMATORS))
    table = {}
    for sigma in SIGMAS:
        x = jnp.asarray(data + sigma * noise, jnp.float32)
        exact = trace(sd.Exact(), denoiser, x, sigma)
        row = f"{sigma:5g}{exact.mean():14.3f}{'':8}"
        for name, estimator in ESTIMATORS.items():
            error = np.asarray(trace(estimator, denoiser, x, sigma) - exact)
            table[name, sigma] = error.mean(), error.std()
            row += f"{error.mean():+14.3f}, std {error.std():6.3f}"
        print(row)

    print("\n5 evaluations            sliced-W2  gamma per step")
    truth = denoiser.draw(2, SAMPLES)
    for name, solver in SOLVERS.items():
        solution = sd.sample(
            jax.random.key(0), denoiser, truth.shape, sigmas=sd.karras_sigmas(5), solver=solver
        )
        table[name] = distance(solution.x, truth)
        gamma = " ".join(f"{g:.2f}" for g in solution.info.gamma)
        print(f"{name:25}{table[name]:9.3f}  {gamma}")
    return table


if __name__ == "__main__":
    main()

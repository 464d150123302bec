"""Rules: what a corrected step is anchored at, how far it goes from there, and its clip.

A corrected step is x_next = anchor + gamma (candidate - anchor). A rule is a small class with

    anchor(local)                  where gamma = 0 leads, (batch, *event)
    moments(local)                 what gamma depends on: (batch,) arrays
    gamma(moments, sigma, sigma_next)   the coefficient, from the means of those (or from each
                                   sample's own), before the clip to [gamma_min, gamma_max]

and nothing else in the library knows it. Every rule rests on Stein's identity: for
x = x0 + sigma noise and any smooth v(x), E<v, x - x0> = sigma^2 E[div v], so inner products with
the unknown clean sample become divergences.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from steindiff_jax._numerics import divide, inner
from steindiff_jax._typing import Batch, Numeric, Rows, Scalar, pytree
from steindiff_jax.denoisers import Schedule
from steindiff_jax.schedules import EDM
from steindiff_jax.stein.divergence import Jacobian


class Local(NamedTuple):
    """All that a rule may look at: one step of the wrapped solver, not yet corrected.

    x: state; x0: denoiser there; delta: what the solver adds to it; candidate: where it leads;
    jacobian: what the divergence estimator knows; candidate_trace: () -> (batch,) trace of the
    candidate's own Jacobian in x, computed only for the rule that asks.
    """

    x: Batch
    x0: Batch
    delta: Batch
    candidate: Batch
    sigma: Scalar
    sigma_next: Scalar
    jacobian: Jacobian
    candidate_trace: Callable[[], Rows]


Moments = tuple[Float[Array, "*batch"], ...]


@runtime_checkable
class Rule(Protocol):
    """See the head of this file."""

    @property
    def gamma_min(self) -> Numeric: ...

    @property
    def gamma_max(self) -> Numeric: ...

    def anchor(self, local: Local) -> Batch: ...

    def moments(self, local: Local) -> Moments: ...

    def gamma(self, moments: Moments, sigma: Scalar, sigma_next: Scalar) -> Array: ...


def check_clip(gamma_min: Numeric, gamma_max: Numeric) -> None:
    """ValueError if both are known and the wrong way round."""
    known = isinstance(gamma_min, int | float) and isinstance(gamma_max, int | float)
    if known and not gamma_min <= gamma_max:
        raise ValueError(f"gamma_min must not exceed gamma_max, got {gamma_min} > {gamma_max}")


@pytree
class StepEnergy:
    """Damp what the solver adds to the first-order step, to the energy that Stein allows a step.

    A(x) = q x + (1 - q) D is the mean of x0 + sigma_next noise given x; for u_A = x - A Stein's
    identity therefore reads E|u_A|^2 = sigma (sigma - sigma_next) E[div u_A], the Stein energy.
    The anchor is A, and gamma the Stein energy over the candidate's own, E|x - T|^2. With the noise
    estimates e = (x - D) / sigma of the anchor and e - delta / sigma of the candidate that is

        gamma = E[d - tr J] / E|e - delta / sigma|^2,

    1 where the solver adds nothing. This project's rule; 1 - gamma = O(step), so a second-order
    solver stays one.
    """

    gamma_min: Numeric = 0.0
    gamma_max: Numeric = 1.0

    def __post_init__(self) -> None:
        check_clip(self.gamma_min, self.gamma_max)

    def anchor(self, local: Local) -> Batch:
        return first_order(local)

    def moments(self, local: Local) -> Moments:
        noise = (local.x - local.x0 - local.delta) / local.sigma
        change = local.delta / local.sigma
        return local.jacobian.complement, inner(noise, noise), inner(change, change)

    def gamma(self, moments: Moments, sigma: Scalar, sigma_next: Scalar) -> Array:
        del sigma, sigma_next
        complement, energy, change = moments
        return jnp.where(adds_nothing(change, energy), 1.0, divide(complement, energy, 1.0))


@pytree
class CleanTarget:
    """The paper's rule: the convex combination of state and candidate closest to the clean sample.

    x_next = (1 - gamma) x + gamma T(x), u = x - T(x), in the coordinates alpha x of `schedule`:

        gamma = argmin E|x_next - x0|^2
              = [(1 - 1/alpha) E<u, x> + (sigma^2/alpha) E[div u]] / E|u|^2

    (Li & Zeng, "Mitigating the Contractivity Trap in Diffusion ODEs via Stein Stabilization",
    ICML 2026, arXiv:2606.07835). With alpha = 1, the default, the drift term vanishes. The upper
    clip is not optional: the target is the clean sample, and unclipped a first-order step lands on
    the posterior mean. With a variance-preserving schedule at small alpha the two terms cancel and
    the mean over a batch is very noisy; the default is the well-conditioned form.
    """

    gamma_min: Numeric = 0.0
    gamma_max: Numeric = 1.0
    schedule: Schedule = EDM()

    def __post_init__(self) -> None:
        check_clip(self.gamma_min, self.gamma_max)

    def _alphas(self, local: Local) -> tuple[Array, Array]:
        return self.schedule.at(local.sigma)[1], self.schedule.at(local.sigma_next)[1]

    def anchor(self, local: Local) -> Batch:
        alpha, alpha_next = self._alphas(local)
        return alpha / alpha_next * local.x

    def moments(self, local: Local) -> Moments:
        alpha, alpha_next = self._alphas(local)
        x = alpha * local.x
        u = x - alpha_next * local.candidate
        divergence = math.prod(x.shape[1:]) - alpha_next / alpha * local.candidate_trace()
        return inner(u, x), divergence, inner(u, u)

    def gamma(self, moments: Moments, sigma: Scalar, sigma_next: Scalar) -> Array:
        del sigma_next
        drift, divergence, energy = moments
        _, alpha, sigma_t = self.schedule.at(sigma)
        return divide((1 - 1 / alpha) * drift + sigma_t**2 / alpha * divergence, energy, 1.0)


def first_order(local: Local) -> Batch:
    """A(x) = q x + (1 - q) D: the DDIM step, whatever the solver."""
    q = local.sigma_next / local.sigma
    return q * local.x + (1 - q) * local.x0


def adds_nothing(change: Array, energy: Array) -> Array:
    """Whether E|delta|^2 is 0, or rounding noise beside the step's own energy."""
    return change <= (4 * jnp.finfo(change.dtype).eps) ** 2 * energy

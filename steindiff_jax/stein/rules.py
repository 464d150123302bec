"""Rules: what a corrected step is anchored at, how far it goes from there, and its clip.

A corrected step is x_next = anchor + gamma (candidate - anchor). A rule is a small class with

    anchor(local)                  where gamma = 0 leads, (batch, *event)
    moments(local)                 what gamma depends on: (batch,) arrays
    gamma(moments, sigma, sigma_next)   the coefficient, from the means of those (or from each
                                   sample's own), before the clip to [gamma_min, gamma_max]

and nothing else in the library knows it. A rule that needs a real divergence may also name its
default, estimator(statistics); it is `Tweedie` otherwise. Every rule rests on Stein's identity: for
x = x0 + sigma noise and any smooth v(x), E<v, x - x0> = sigma^2 E[div v], so inner products with
the unknown clean sample become divergences.
"""

import math
from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from steindiff_jax._numerics import divide, exponential_moments, inner
from steindiff_jax._typing import (
    Batch,
    Numeric,
    Rows,
    Scalar,
    check_fields,
    check_number,
    number,
    pytree,
)
from steindiff_jax.denoisers import Schedule
from steindiff_jax.schedules import EDM
from steindiff_jax.stein.divergence import Divergence, Hutchinson, Jacobian


class Previous(NamedTuple):
    """The step before, as its solver proposed it: all 0 at the start."""

    x0: Batch
    delta: Batch
    sigma: Scalar


class Local(NamedTuple):
    """All that a rule may look at: one step of the wrapped solver, not yet corrected.

    Attributes:
      x: state.
      x0: denoiser there.
      delta: what the solver adds to it.
      candidate: where it leads.
      sigma: where the step starts.
      sigma_next: where it ends.
      jacobian: what the divergence estimator knows.
      previous: the step before.
      candidate_trace: () -> (batch,) trace of the candidate's own Jacobian in x, computed only for
        the rule that asks.
    """

    x: Batch
    x0: Batch
    delta: Batch
    candidate: Batch
    sigma: Scalar
    sigma_next: Scalar
    jacobian: Jacobian
    previous: Previous
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
    """ValueError if they are no numbers or, both known, the wrong way round."""
    check_number("gamma_min", gamma_min, "[-inf, inf)")
    check_number("gamma_max", gamma_max, "(-inf, inf]")
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


# tanh(u), u ~ cosh, is the denoiser between two modes: its path to the chosen one is this share of
# the variance, int cosh (1 - tanh)^2 / int cosh sech^2 = (4 - pi) / pi, whatever the step.
# The Gaussian share reaches it at this eigenvalue, ((pi - 2) / 2)^2 = 0.326.
MODE_EIGENVALUE = ((math.pi - 2) / 2) ** 2


@pytree
class PosteriorLength:
    """Let history give the direction of delta, and Stein its length.

    The exact step is x_next = q x + (1 - q)(D + delta*) with delta* the way that the denoiser has
    still to go, and that cannot exceed what is uncertain: the posterior variance, by second-order
    Tweedie V = tr Cov[x0 | x] = sigma^2 tr J. For a Gaussian posterior with Jacobian eigenvalue l
    it is a known share of it, |delta*|^2 = phi(l, q) V (`gaussian_share`); the eigenvalue that
    weighs the variance is l = |J|_F^2 / tr J, from the same probe. It cannot reach 1 on Gaussian
    data: where it does a mode is being chosen, and the share is that of two (`MODE_EIGENVALUE`).
    Samples differ in that, so each has a share of its own:

        length = sqrt(g E[phi(l, q) V] / E|delta|^2).

    A guided denoiser is no posterior mean, but its conditional branch is, and V and l are those
    of that one, J its Jacobian. Where the branch answers a change of x with J, guidance answers
    with J_w, and makes the way longer alike: g = E|J_w|_F^2 / E|J|_F^2, from the same probe.

    The last step tells for free how far the solver's own length can be trusted: the evaluation
    that followed it gives delta anew, omega (D - D_previous) with omega the mean weight of the
    exponential integral. The length is taken in full where that was missed by half or more, and

        gamma = length ^ min(1, surprise / surprise_max),
        surprise = E|delta_previous - that|^2 / E|that|^2,  surprise_max = (1/2)^2.

    As steps shrink surprise = O(step^2), so a third-order multistep solver stays one; a one-step
    solver does if its first step, where nothing is known yet, is short. This project's rule.
    """

    gamma_min: Numeric = 0.0
    gamma_max: Numeric = 8.0
    surprise_max: Numeric = number(default=0.25, within="(0, inf]")

    def __post_init__(self) -> None:
        check_fields(self)
        check_clip(self.gamma_min, self.gamma_max)

    def estimator(self, statistics: str) -> Divergence:
        return Hutchinson(fraction=1 / 8 if statistics == "batch" else 1.0)

    def anchor(self, local: Local) -> Batch:
        return first_order(local)

    def moments(self, local: Local) -> Moments:
        change = local.delta / local.sigma
        noise = (local.x - local.x0) / local.sigma
        before = local.previous
        # At the start there is no step before, and delta_previous = 0 is all surprise.
        confirmed = mean_weight(before.sigma, local.sigma) * (local.x0 - before.x0)
        surprise = before.delta - confirmed
        trace, norm = local.jacobian.posterior_trace, local.jacobian.posterior_squared_norm
        eigenvalue = divide(norm, trace, 1.0)
        eigenvalue = jnp.where(eigenvalue < 1, eigenvalue, MODE_EIGENVALUE)
        return (
            gaussian_share(eigenvalue, local.sigma_next / local.sigma) * trace,
            local.jacobian.squared_norm,
            norm,
            inner(change, change),
            inner(noise, noise),
            inner(surprise, surprise),
            inner(confirmed, confirmed),
        )

    def gamma(self, moments: Moments, sigma: Scalar, sigma_next: Scalar) -> Array:
        del sigma, sigma_next
        left, guided, unguided, change, energy, surprise, confirmed = moments
        tiny = jnp.finfo(left.dtype).tiny
        left = left * divide(guided, unguided, 1.0)
        length = jnp.sqrt(jnp.maximum(divide(left, change, 1.0), tiny))
        doubt = jnp.minimum(divide(surprise, confirmed, 1.0) / self.surprise_max, 1.0)
        length = jnp.clip(length, self.gamma_min, self.gamma_max)
        return jnp.where(adds_nothing(change, energy), 1.0, jnp.maximum(length, tiny) ** doubt)


def gaussian_share(eigenvalue: Array, q: Numeric) -> Array:
    """Phi = E|delta*|^2 / V of the exact step on Gaussian data, q = sigma_next / sigma.

    With D = l (x - mean) + mean the flow scales x - mean by r = sqrt(l + (1 - l) q^2), so that
    delta* = ((r - q) / (1 - q) - l)(x - mean), with E|x - mean|^2 = sigma^2 d / (1 - l) and
    V = sigma^2 l d. Written without cancellation at either end of l; (1 - sqrt l) / (1 + sqrt l)
    at q = 0.
    """
    eigenvalue = jnp.maximum(eigenvalue, jnp.finfo(eigenvalue.dtype).eps)
    r = jnp.sqrt(eigenvalue + (1 - eigenvalue) * q**2)
    return (1 - eigenvalue) * eigenvalue * ((1 - q**2) / ((r + q) * (1 + r))) ** 2


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


def mean_weight(before: Scalar, sigma: Scalar) -> Array:
    """Omega, the mean weight of the exponential integral from `before` to sigma; 0: no step."""
    ratio = jnp.where(before > 0, before, sigma) / sigma
    return exponential_moments(jnp.log(ratio)[None], 2)[0, 0]


def first_order(local: Local) -> Batch:
    """A(x) = q x + (1 - q) D: the DDIM step, whatever the solver."""
    q = local.sigma_next / local.sigma
    return q * local.x + (1 - q) * local.x0


def adds_nothing(change: Array, energy: Array) -> Array:
    """Whether E|delta|^2 is 0, or rounding noise beside the step's own energy."""
    return change <= (4 * jnp.finfo(change.dtype).eps) ** 2 * energy

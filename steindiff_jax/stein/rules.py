"""Rules: how a proposed step is corrected, within each band of a basis by itself.

A step is x_next = q x + (1 - q)(D + delta), q = sigma_next / sigma; a rule changes delta, what the
solver adds to the first-order step. See `protocols.Rule`.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import Array

from steindiff_jax import _checks
from steindiff_jax._numerics import divide, exponential_moments
from steindiff_jax._pytree import pytree
from steindiff_jax.protocols import Bands, Batch, Local, Numeric, Rule, Scalar, Schedule
from steindiff_jax.schedules import EDM

# Least l of `PosteriorLength`, as a share of the linear a. States of a sampler hold errors that
# the identity takes for nonlinearity, and an l of 0 would stop the solver.
LEAST = 0.3
SMALL = 1e-18  # a ratio that stands for 0, and its inverse for infinity, also in float32


class Gamma(NamedTuple):
    """One coefficient for each band: delta becomes gamma delta."""

    gamma: Array


class Lengths(NamedTuple):
    """Coefficients of `PosteriorLength`: delta becomes gamma delta + drift (D - x).

    Attributes:
      gamma: factor of what the solver adds.
      drift: factor of the Gaussian step's direction, 0 where the solver's is long enough.
    """

    gamma: Array
    drift: Array


class LengthMoments(NamedTuple):
    """What `PosteriorLength` averages; (rows, bands) each, e = (x - D) / sigma the noise estimate.

    Attributes:
      signal: |D|^2, without the batch's mean, as all of these.
      noise: |e|^2.
      cross: <D, e>.
      delta: |delta|^2.
      along: <delta, e>.
      surprise: |delta_previous - confirmed|^2.
      confirmed: |confirmed|^2, what delta_previous should have been, now that D is known.
      trace: tr J, from probes, or None.
    """

    signal: Bands
    noise: Bands
    cross: Bands
    delta: Bands
    along: Bands
    surprise: Bands
    confirmed: Bands
    trace: Bands | None


@pytree
class PosteriorLength(Rule):
    """History gives the direction of delta, Stein its length; where history is silent, Gauss both.

    On data whose covariance is constant within a band the posterior mean is affine,
    D - mean = l (x - mean), and the exact step is known without the mean and without history:

        delta* = eta(l) (D - x),   eta(l) = (q - r) / (1 + r),   r = sqrt(l + (1 - l) q^2).

    For any data, with l = tr J / d, this step keeps the band's energy that of the law. This l comes
    from x and D alone. With a the slope of their regression and R^2 its coefficient of
    determination, Stein's identity for v = D - a x reads

        l = tr J / d = a - (1 - R^2) Var D / (sigma^2 d):

    the linear part without noise, and the identity only for the rest (at least 0.3 a, where that is
    more). delta* also says how long the solver's own delta should be, g = |delta*| / |delta|. One
    that is too long is shortened. For one that is too short R^2, the share of D's variance that is
    linear, decides what makes up for it, its own direction or D - x:

        delta <- gamma delta + (1 - gamma / g) eta (D - x),   gamma = g if g < 1 else g^(1 - R^2).

    In a first step, and for a first-order solver, delta = 0 and D - x is all there is; but along it
    lies most of what has no signal and needs no correction. There the factor is eta' = c eta(l'):
    with the eigenvalues of J in a band 0 or l' = 1 - (1 - a) l / a, which have the mean l and give
    the slope a, eta' makes delta as long as the exact one, c^2 being the part of |D - x|^2 where J
    is l'. Where l = a, eta' = eta.

    Both are exact on Gaussian data. Of a delta that points away from delta* the share cos^2 is
    replaced by delta*. As steps shrink nothing is changed: the evaluation after a step tells how
    far its delta was right, and g becomes g^min(1, surprise / (1 - R^2)), with surprise the
    relative squared error of the previous delta. So a solver keeps its order. This project's rule.

    Attributes:
      gamma_max: gamma is at most this; the Gaussian step's direction makes up for the rest.
    """

    gamma_max: Numeric = 8.0

    def __post_init__(self) -> None:
        _checks.clip(0.0, self.gamma_max)
        object.__setattr__(self, "gamma_max", _checks.as_float(self.gamma_max))

    def moments(self, local: Local) -> LengthMoments:
        x0, before = local.centred(local.x0), local.previous
        noise = local.centred((local.x - local.x0) / local.sigma)
        # At the start there is no step before, and delta_previous = 0 is all surprise.
        confirmed = mean_weight(before.sigma, local.sigma) * (local.x0 - before.x0)
        surprise, confirmed = local.centred(before.delta - confirmed), local.centred(confirmed)
        delta, inner = local.centred(local.delta), local.inner
        trace = local.trace()
        if trace is not None and trace.shape[0] != noise.shape[0]:  # those are of pairs
            trace = trace[: 2 * noise.shape[0]].reshape(-1, 2, trace.shape[1]).mean(axis=1)
        return LengthMoments(
            signal=inner(x0, x0),
            noise=inner(noise, noise),
            cross=inner(x0, noise),
            delta=inner(delta, delta),
            along=inner(delta, noise),
            surprise=inner(surprise, surprise),
            confirmed=inner(confirmed, confirmed),
            trace=trace,
        )

    def coefficients(
        self, moments: LengthMoments, sizes: Array, sigma: Scalar, sigma_next: Scalar
    ) -> Lengths:
        m, q = moments, sigma_next / sigma
        j = jacobian(m, sizes, sigma)
        eta = gaussian(j.mean, q)
        alone = jnp.sqrt(jnp.clip(j.within, SMALL, 1)) * gaussian(j.other, q)
        square = divide((eta * sigma) ** 2 * m.noise, m.delta, 1 / SMALL)
        doubt = jnp.minimum(divide(m.surprise, m.confirmed * j.nonlinear, 1.0), 1)
        g = jnp.clip(square, SMALL, 1 / SMALL) ** (doubt / 2)
        gamma = jnp.minimum(jnp.where(g < 1, g, g**j.nonlinear), self.gamma_max)
        drift = jnp.maximum(1 - gamma / g, 0)
        # eta < 0, so that delta* points along e; a delta that points the other way is left out.
        wrong = divide(-m.along * jnp.abs(m.along), m.delta * m.noise, 0.0)
        wrong = doubt * jnp.clip(wrong, 0, 1)
        gamma, drift = (1 - wrong) * gamma, drift + wrong * (1 - drift)
        drift = jnp.where(m.delta > 0, eta * drift, alone)
        # A step to 0 returns the denoiser's estimate, whatever the data.
        made = sigma_next > 0
        return Lengths(
            gamma=jnp.where(made & (m.delta > 0), gamma, 1.0),
            drift=jnp.where(made, drift, 0.0),
        )

    def delta(self, local: Local, coefficients: Lengths) -> Batch:
        gamma, drift = coefficients
        return gamma * local.delta + drift * (local.x0 - local.x)


class EnergyMoments(NamedTuple):
    """What `StepEnergy` averages; (batch, bands) each."""

    allowed: Bands
    energy: Bands
    delta: Bands


@pytree
class StepEnergy(Rule):
    """Damp what the solver adds to the first-order step, to the energy that Stein allows a step.

    A(x) = q x + (1 - q) D is the mean of x0 + sigma_next noise given x; for u_A = x - A Stein's
    identity therefore reads E|u_A|^2 = sigma (sigma - sigma_next) E[div u_A], the Stein energy.
    gamma is the Stein energy over the proposal's own, E|x - T|^2. With the noise estimates
    e = (x - D) / sigma of the first-order step and e - delta / sigma of the proposal that is

        gamma = E[d - tr J] / E|e - delta / sigma|^2,

    1 where the solver adds nothing. This project's rule; 1 - gamma = O(step), so a second-order
    solver stays one.
    """

    gamma_min: Numeric = 0.0
    gamma_max: Numeric = 1.0

    def __post_init__(self) -> None:
        _checks.clip(self.gamma_min, self.gamma_max)

    def moments(self, local: Local) -> EnergyMoments:
        noise, change = (local.x - local.x0) / local.sigma, local.delta / local.sigma
        trace = local.trace()
        anchored = local.inner(noise, noise)
        return EnergyMoments(
            allowed=anchored if trace is None else local.sizes - trace,
            energy=local.inner(noise - change, noise - change),
            delta=local.inner(change, change),
        )

    def coefficients(
        self, moments: EnergyMoments, sizes: Array, sigma: Scalar, sigma_next: Scalar
    ) -> Gamma:
        del sizes, sigma, sigma_next
        # Where delta is rounding noise beside the step, the solver adds nothing.
        nothing = moments.delta <= (4 * jnp.finfo(moments.delta.dtype).eps) ** 2 * moments.energy
        gamma = jnp.where(nothing, 1.0, divide(moments.allowed, moments.energy, 1.0))
        return Gamma(jnp.clip(gamma, self.gamma_min, self.gamma_max))


class TargetMoments(NamedTuple):
    """What `CleanTarget` averages; (batch, bands) each."""

    drift: Bands
    divergence: Bands
    energy: Bands


@pytree
class CleanTarget(Rule):
    """The paper's rule: the convex combination of state and proposal closest to the clean sample.

    x_next = (1 - gamma) x + gamma T(x), u = x - T(x), in the coordinates alpha x of `schedule`:

        gamma = argmin E|x_next - x0|^2
              = [(1 - 1/alpha) E<u, x> + (sigma^2/alpha) E[div u]] / E|u|^2

    (Li & Zeng, "Mitigating the Contractivity Trap in Diffusion ODEs via Stein Stabilization",
    ICML 2026, arXiv:2606.07835). With alpha = 1, the default, the drift term vanishes. The upper
    clip is not optional: the target is the clean sample, and unclipped a first-order step lands on
    the posterior mean. With a variance-preserving schedule at small alpha the two terms cancel and
    the mean over a batch is very noisy; the default is the well-conditioned form.

    The paper's coefficient is one for all of a sample: `Stein(..., basis=Whole())`.
    """

    gamma_min: Numeric = 0.0
    gamma_max: Numeric = 1.0
    schedule: Schedule = EDM()

    def __post_init__(self) -> None:
        _checks.clip(self.gamma_min, self.gamma_max)

    def _alphas(self, local: Local) -> tuple[Array, Array]:
        return self.schedule.at(local.sigma)[1], self.schedule.at(local.sigma_next)[1]

    def moments(self, local: Local) -> TargetMoments:
        alpha, alpha_next = self._alphas(local)
        q = local.sigma_next / local.sigma
        x = alpha * local.x
        u = x - alpha_next * (q * local.x + (1 - q) * (local.x0 + local.delta))
        divergence = local.sizes - alpha_next / alpha * local.step_trace()
        return TargetMoments(local.inner(u, x), divergence, local.inner(u, u))

    def coefficients(
        self, moments: TargetMoments, sizes: Array, sigma: Scalar, sigma_next: Scalar
    ) -> Gamma:
        del sizes, sigma_next
        _, alpha, sigma_t = self.schedule.at(sigma)
        asked = (1 - 1 / alpha) * moments.drift + sigma_t**2 / alpha * moments.divergence
        gamma = divide(asked, moments.energy, 1.0)
        return Gamma(jnp.clip(gamma, self.gamma_min, self.gamma_max))

    def delta(self, local: Local, coefficients: Gamma) -> Batch:
        alpha, alpha_next = self._alphas(local)
        gamma, q = coefficients.gamma, local.sigma_next / local.sigma
        anchor = (alpha / alpha_next - q) / (1 - q) * local.x - local.x0
        return gamma * local.delta + (1 - gamma) * anchor


class Spectrum(NamedTuple):
    """Eigenvalues of J in a band, taken to be 0 or one other; (bands,) or (rows, bands) each.

    Attributes:
      mean: of all, tr J / d.
      other: the one that is not 0.
      within: the part of |x - D|^2 in its directions.
      nonlinear: 1 - R^2.
    """

    mean: Array
    other: Array
    within: Array
    nonlinear: Array


def jacobian(m: LengthMoments, sizes: Array, sigma: Scalar) -> Spectrum:
    """What the moments tell of J, see `PosteriorLength`."""
    # <D, x>, <x - D, x> and |D|^2 |x|^2 - <D, x>^2 from D and e, without cancellation at any sigma.
    together, apart = m.signal + sigma * m.cross, sigma * (m.cross + sigma * m.noise)
    energy = together + apart
    gap = jnp.maximum(m.signal * m.noise - m.cross**2, 0)
    slope, rest = divide(together, energy, 0.0), divide(sigma**2 * gap, energy, 0.0)
    if m.trace is None:
        mean = jnp.maximum(slope - rest / (sigma**2 * sizes), LEAST * slope)
    else:
        mean = m.trace / sizes
    mean = jnp.clip(mean, SMALL, 1)
    share = jnp.clip(divide(mean, slope, 1.0), 0, 1)
    away = share * jnp.clip(divide(apart, energy, 1.0), 0, 1)  # 1 - other
    within = divide(mean * away, mean * away + 1 - share, 1.0)
    nonlinear = jnp.clip(divide(rest, m.signal, 1.0), 0, 1)
    return Spectrum(mean, 1 - away, within, nonlinear)


def gaussian(eigenvalue: Array, q: Scalar) -> Array:
    """Of the exact step delta* = eta (D - x) where J is this multiple of the identity."""
    r = jnp.sqrt(eigenvalue + (1 - eigenvalue) * q**2)
    return -eigenvalue * (1 - q**2) / ((r + q) * (1 + r))


def mean_weight(before: Scalar, sigma: Scalar) -> Array:
    """Mean weight of the exponential integral from `before` to sigma; before = 0: no such step."""
    ratio = jnp.where(before > 0, before, sigma) / sigma
    return exponential_moments(jnp.log(ratio)[None], 2)[0, 0]

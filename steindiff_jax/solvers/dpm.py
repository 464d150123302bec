"""DPM-Solver and its relatives: exponential methods in lambda = -log sigma.

A step of size h in lambda is exactly x' = q x + int_0^h e^{-(h - u)} x0(u) du, q = e^{-h}, so that
the integral of x0 has the weight e^u; with the noise in place of x0 it is e^-u. DPM-Solver++ (Lu et
al. 2022, arXiv:2211.01095) interpolates x0, DPM-Solver (Lu et al. 2022, arXiv:2206.00927) the
noise: prediction="x0" and "epsilon" here. A step to sigma = 0 returns the denoiser's estimate.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from steindiff_jax import _checks, _random
from steindiff_jax._numerics import exponential_moments
from steindiff_jax._pytree import number, pytree, static
from steindiff_jax.protocols import (
    Batch,
    Denoiser,
    Key,
    Numeric,
    Scalar,
    Sigmas,
    State,
    Step,
    StochasticSolver,
    ddim,
)
from steindiff_jax.solvers.multistep import Memory, Multistep, Weights, interpolation_weights
from steindiff_jax.solvers.runge_kutta import RungeKutta, Tableau
from steindiff_jax.solvers.wrappers import ancestral

PREDICTED = ("x0", "epsilon")
KINDS = ("midpoint", "heun")


def log_snr(sigmas: Sigmas) -> Sigmas:
    """-log sigma; nodes at 0 and padding each one unit after the one before, so all is finite."""
    smallest = jnp.min(sigmas, where=sigmas > 0, initial=jnp.inf)
    return jnp.cumsum(beyond(sigmas)) - jnp.log(jnp.where(sigmas > 0, sigmas, smallest))


def beyond(sigmas: Sigmas) -> Array:
    """Which nodes are at 0 or padding."""
    return (sigmas == 0) | (sigmas == jnp.roll(sigmas, 1))


def moments_of(h: Float[Array, " n"], order: int, prediction: str) -> Float[Array, " n {order}-1"]:
    """Moments of the weight that the prediction has in a step of size h."""
    return exponential_moments(h if prediction == "x0" else -h, order)


@pytree
class DEIS(Multistep):
    """Exponential Adams-Bashforth method. Of order `order` (1 to 4), one evaluation a step.

    With "epsilon", the default, it is log-rho DEIS (Zhang & Chen 2023, arXiv:2204.13902). With "x0"
    order 2 is `DPMpp2M(kind="heun")` and order 3 is `DPMpp3M(curvature=1.0)`. For rho-DEIS see
    `LMS`.
    """

    order: int = static(default=3, choices=(1, 2, 3, 4))
    prediction: str = static(default="epsilon", choices=PREDICTED, kw_only=True)

    def weights(self, sigmas: Sigmas) -> Weights:
        z = log_snr(sigmas)
        exact = moments_of(jnp.diff(z), self.order, self.prediction)
        return interpolation_weights(z, exact, self.past_used(sigmas, self.order))


@pytree
class DPMpp2M(Multistep):
    """DPM-Solver++(2M), second order, one evaluation a step; "epsilon" is DPM-Solver(2M).

    Attributes:
      kind: "midpoint", the slope of x0 weighs h / 2, as in k-diffusion and in diffusers' default,
        or "heun", its exact integral (the official code's "taylor").
    """

    kind: str = static(default="midpoint", choices=KINDS)

    def weights(self, sigmas: Sigmas) -> Weights:
        z = log_snr(sigmas)
        return interpolation_weights(z, self.slope(jnp.diff(z)), self.past_used(sigmas, 2))

    def slope(self, h: Float[Array, " steps"]) -> Float[Array, "steps 1"]:
        """The first moment."""
        exact = moments_of(h, 2, self.prediction)
        return jnp.full_like(exact, 0.5) if self.kind == "midpoint" else exact


@pytree
class DPMpp3M(Multistep):
    """DPM-Solver++(3M), one evaluation a step; "epsilon" is DPM-Solver(3M).

    Attributes:
      curvature: weight of the second difference relative to the exact integral. 0.5 is what every
        public "3M" uses (official, diffusers, k-diffusion) and is second order; there it damps
        few large steps. 1.0 is the exact exponential multistep method, third order.
      kind: of its second-order steps, see `DPMpp2M`: "heun" as k-diffusion, "midpoint" as
        diffusers.
    """

    curvature: Numeric = number(default=0.5, within="(-inf, inf)")
    kind: str = static(default="heun", choices=KINDS)

    def weights(self, sigmas: Sigmas) -> Weights:
        z, count = log_snr(sigmas), self.past_used(sigmas, 3)
        scale = jnp.stack([jnp.ones_like(z[0]), jnp.asarray(self.curvature, z.dtype)])
        row = scale[None] * self.moments(jnp.diff(z))
        if self.kind == "midpoint":
            row = jnp.where(count[:, None] == 1, 0.5, row)
        return interpolation_weights(z, row, count)

    def moments(self, h: Float[Array, " steps"]) -> Float[Array, "steps 2"]:
        """The first two moments."""
        return moments_of(h, 3, self.prediction)


class MultistepSDE(StochasticSolver):
    """Base of the multistep solvers of the reverse SDE; a subclass gives the deterministic part."""

    eta: Numeric

    __post_init__ = _checks.fields

    def deterministic(self) -> Multistep:
        """The solver whose x0 has the weight e^((1 + eta) u)."""
        raise NotImplementedError

    def init(self, x: Batch, sigmas: Sigmas) -> Memory:
        return self.deterministic().init(x, sigmas)

    def advance(
        self, key: Key, denoiser: Denoiser, state: State, sigma: Scalar, sigma_next: Scalar
    ) -> tuple[State, Step]:
        step, memory = self.deterministic().step(key, denoiser, state, sigma, sigma_next)
        h = jnp.log(sigma / jnp.where(sigma_next > 0, sigma_next, sigma))
        kept = sigma_next / sigma * jnp.exp(-self.eta * h)
        # Never exactly 0 under the root, whose derivative is infinite there.
        variance = jnp.maximum(-jnp.expm1(-2 * self.eta * h), jnp.finfo(h.dtype).tiny)
        x = kept * state.x + (1 - kept) * (step.x0 + step.delta)
        x += sigma_next * jnp.sqrt(variance) * _random.normal(key, state.x)
        return State(x, memory), step


@pytree
class DPMpp2MSDE(MultistepSDE):
    """SDE-DPM-Solver++(2M): `DPMpp2M` for the reverse SDE, in k-diffusion's form.

        x' = q^(1+eta) x + (1 - q^(1+eta))(x0 + delta) + sigma' sqrt(1 - q^(2 eta)) noise,

    second order in its deterministic part. The `Step` is that of the ODE.

    Attributes:
      kind: see `DPMpp2M`.
      eta: 1 is the reverse SDE of Song et al. 2021 (arXiv:2011.13456), 0 the ODE.
      lower_order_final: see `Multistep`.
    """

    kind: str = static(default="midpoint", choices=KINDS)
    eta: Numeric = number(default=1.0, within="[0, inf)")
    lower_order_final: bool = static(default=False)

    def deterministic(self) -> "Stretched2M":
        return Stretched2M(self.kind, self.eta, lower_order_final=self.lower_order_final)


@pytree
class Stretched2M(DPMpp2M):
    """The deterministic part of `DPMpp2MSDE`, whose weight of x0 is e^((1 + eta) u)."""

    eta: Numeric = 0.0

    def slope(self, h: Float[Array, " steps"]) -> Float[Array, "steps 1"]:
        return super().slope(h * (1 + self.eta))


@pytree
class DPMpp3MSDE(MultistepSDE):
    """SDE-DPM-Solver++(3M): `DPMpp3M` for the reverse SDE, in k-diffusion's form; see `DPMpp2MSDE`.

    Attributes:
      curvature: see `DPMpp3M`.
      kind: see `DPMpp3M`.
      eta: see `DPMpp2MSDE`.
      lower_order_final: see `Multistep`.
    """

    curvature: Numeric = number(default=0.5, within="(-inf, inf)")
    kind: str = static(default="heun", choices=KINDS)
    eta: Numeric = number(default=1.0, within="[0, inf)")
    lower_order_final: bool = static(default=False)

    def deterministic(self) -> "Stretched3M":
        last = self.lower_order_final
        return Stretched3M(self.curvature, self.kind, self.eta, lower_order_final=last)


@pytree
class Stretched3M(DPMpp3M):
    """The deterministic part of `DPMpp3MSDE`, whose weight of x0 is e^((1 + eta) u)."""

    eta: Numeric = 0.0

    def moments(self, h: Float[Array, " steps"]) -> Float[Array, "steps 2"]:
        return super().moments(h * (1 + self.eta))


@pytree
class DPMppSDE(StochasticSolver):
    """DPM-Solver++ for the reverse SDE in two stages: k-diffusion's dpmpp_sde.

    Both the stage and the step go to sigma_down and add sigma_up noise, see `Ancestral`; the step
    has x0 + (D(stage) - x0) / (2 r). Their noise is that of one Brownian path in sigma, as with
    k-diffusion's Brownian tree. A step to sigma = 0 is first order and costs one evaluation.

    Attributes:
      r: place of the stage, as a fraction of the step in lambda.
      eta: see `Ancestral`.
    """

    r: Numeric = number(default=0.5, within="(0, 1]")
    eta: Numeric = number(default=1.0, within="[0, 1]")

    __post_init__ = _checks.fields

    def advance(
        self, key: Key, denoiser: Denoiser, state: State, sigma: Scalar, sigma_next: Scalar
    ) -> tuple[State, Step]:
        x, x0 = state.x, denoiser(state.x, sigma)
        end = jnp.where(sigma_next > 0, sigma_next, sigma / 2)  # see `RungeKutta`
        at = sigma ** (1 - self.r) * end**self.r
        first, second = (_random.normal(k, x) for k in _random.split(key))

        def delta() -> Batch:
            down, up = ancestral(sigma, at, self.eta)
            stage = ddim(x, x0, sigma, down) + up * first
            return ((denoiser(stage, at) - x0) / (2 * self.r)).astype(x.dtype)

        change = lax.cond(sigma_next > 0, delta, lambda: jnp.zeros_like(x0))
        down, up = ancestral(sigma, sigma_next, self.eta)
        share = (sigma - at) / (sigma - end)  # of the path, that the stage has made
        noise = jnp.sqrt(share) * first + jnp.sqrt(1 - share) * second
        nfe = 1 + (sigma_next > 0).astype(jnp.int32)
        return State(ddim(x, x0 + change, sigma, down) + up * noise), Step(x0, change, nfe)


@pytree
class DPMpp2S(RungeKutta):
    """DPM-Solver++(2S): two stages, second order. "epsilon" is DPM-Solver-2, see `DPM2`.

    Attributes:
      r: place of the second stage, as a fraction of the step in lambda.
      kind: see `DPMpp2M`.
    """

    r: Numeric = number(default=0.5, within="(0, 1]")
    kind: str = static(default="midpoint", choices=KINDS)
    prediction: str = static(default="x0", choices=PREDICTED, kw_only=True)

    def tableau(self, h: Scalar) -> Tableau:
        exact = moments_of(h[None], 2, self.prediction)[0, 0]
        slope = 0.5 if self.kind == "midpoint" else exact
        return (self.r,), ((), (slope / self.r,))


@pytree
class DPM2(DPMpp2S):
    """DPM-Solver-2: two stages, second order. Lu et al. 2022, arXiv:2206.00927, algorithm 1.

    r = 1/2 evaluates at the geometric mean of the sigmas (k-diffusion's dpm_2); r = 1 is `Heun`.
    """

    prediction: str = static(default="epsilon", choices=PREDICTED, kw_only=True)


@pytree
class DPMpp3S(RungeKutta):
    """DPM-Solver++(3S): three stages, third order for r2 = 2/3. "epsilon" is DPM-Solver-3.

    Attributes:
      r1: place of the second stage, as a fraction of the step in lambda.
      r2: place of the third stage.
      kind: "midpoint" ends with the slope from the last stage alone, the usual form, "heun" with
        the parabola through all three (the official code's "taylor").
    """

    r1: Numeric = number(default=1 / 3, within="(0, 1)")
    r2: Numeric = number(default=2 / 3, within="(0, 1]")
    kind: str = static(default="midpoint", choices=KINDS)
    prediction: str = static(default="x0", choices=PREDICTED, kw_only=True)

    def __post_init__(self) -> None:
        _checks.fields(self)
        _checks.number("r1 / r2", self.r1 / self.r2, "(0, 1)")

    def tableau(self, h: Scalar) -> Tableau:
        r1, r2 = self.r1, self.r2
        inner = moments_of((r2 * h)[None], 2, self.prediction)[0, 0] * r2 / r1
        m1, m2 = moments_of(h[None], 3, self.prediction)[0]
        if self.kind == "midpoint":
            last = (0.0, m1 / r2)
        else:  # w_1 r1 + w_2 r2 = m1, w_1 r1^2 + w_2 r2^2 = m2
            last = ((m1 * r2 - m2) / (r1 * (r2 - r1)), (m2 - m1 * r1) / (r2 * (r2 - r1)))
        return (r1, r2), ((), (inner,), last)

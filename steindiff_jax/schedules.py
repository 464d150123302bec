"""Noise schedules: x_t = alpha(t) x0 + sigma(t) noise, as the network saw it in training.

Everywhere else in the library `sigma` is the noise-to-signal ratio sigma(t) / alpha(t), here
`ratio`. Each schedule gives alpha(t), sigma(t), the inverse `time(ratio)`, and `at(ratio)`, all
three at once with alpha and sigma computed from the ratio itself, which loses no digits where
alpha(t) or sigma(t) vanishes.
"""

import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.typing import ArrayLike

from steindiff_jax._typing import Numeric, pytree


@pytree
class EDM:
    """alpha = 1, sigma = t (variance exploding; Karras et al. 2022, arXiv:2206.00364)."""

    def alpha(self, t: Array) -> Array:
        return jnp.ones_like(t)

    def sigma(self, t: Array) -> Array:
        return t

    def time(self, ratio: Array) -> Array:
        return ratio

    def at(self, ratio: Array) -> tuple[Array, Array, Array]:
        return ratio, jnp.ones_like(ratio), ratio


class _VariancePreserving:
    """alpha^2 + sigma^2 = 1, whence alpha = 1 / sqrt(1 + ratio^2); subclasses give the times."""

    def time(self, ratio: Array) -> Array:
        raise NotImplementedError

    def at(self, ratio: Array) -> tuple[Array, Array, Array]:
        # hypot, not ratio^2: float32 overflows at 1e19.
        norm = jnp.hypot(1.0, ratio)
        return self.time(ratio), 1 / norm, ratio / norm


@pytree
class VPLinear(_VariancePreserving):
    """-2 log alpha = beta_min t + (beta_max - beta_min) t^2 / 2, t in [0, 1].

    Song et al. 2021, arXiv:2011.13456, eq. 33.
    """

    beta_min: Numeric = 0.1
    beta_max: Numeric = 20.0

    def _integral(self, t: Array) -> Array:
        return t * (self.beta_min + t * (self.beta_max - self.beta_min) / 2)

    def alpha(self, t: Array) -> Array:
        return jnp.exp(-self._integral(t) / 2)

    def sigma(self, t: Array) -> Array:
        return jnp.sqrt(-jnp.expm1(-self._integral(t)))

    def time(self, ratio: Array) -> Array:
        integral = jnp.logaddexp(0.0, 2 * jnp.log(ratio))  # log(1 + ratio^2) without overflow
        slope = self.beta_max - self.beta_min
        root = jnp.sqrt(self.beta_min**2 + 2 * slope * integral)
        return 2 * integral / (self.beta_min + root)


@pytree
class VPCosine(_VariancePreserving):
    """alpha = cos(a) / cos(a_0), a = (pi / 2)(t + shift) / (1 + shift), a_0 = a(t=0), t in [0, 1].

    Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17; shift=0 is alpha = cos(pi t / 2).
    """

    shift: Numeric = 0.008

    def _angles(self, t: Array) -> tuple[Array, Array]:
        scale = math.pi / 2 / (1 + self.shift)
        return jnp.asarray(scale * t), jnp.asarray(scale * self.shift, jnp.asarray(t).dtype)

    def alpha(self, t: Array) -> Array:
        a, a_0 = self._angles(t)
        return jnp.cos(a + a_0) / jnp.cos(a_0)

    def sigma(self, t: Array) -> Array:
        a, a_0 = self._angles(t)  # cos^2(a_0) - cos^2(a + a_0) = sin(a) sin(a + 2 a_0)
        return jnp.sqrt(jnp.sin(a) * jnp.sin(a + 2 * a_0)) / jnp.cos(a_0)

    def time(self, ratio: Array) -> Array:
        # a - a_0 from its sine and cosine, both times sqrt(1 + ratio^2); the difference
        # root - sin(a_0) of the sine is written as a quotient to keep its digits at ratio -> 0.
        unit, a_0 = self._angles(jnp.ones_like(ratio))
        root = jnp.hypot(ratio, jnp.sin(a_0))
        sine = jnp.cos(a_0) * ratio * (ratio / (root + jnp.sin(a_0)))
        return jnp.arctan2(sine, jnp.cos(a_0) ** 2 + jnp.sin(a_0) * root) / unit


@pytree
class RectifiedFlow:
    """alpha = 1 - s, sigma = s, s = shift t / (1 + (shift - 1) t), t in [0, 1).

    Linear paths of rectified flow and flow matching (Liu et al. 2023, arXiv:2209.03003), with the
    time shift of Esser et al. 2024 (arXiv:2403.03206, eq. 23). The network is told t; one that is
    told the shifted time itself has shift 1, and a shifted grid (`flow_sigmas`). The ratio is
    infinite at t = 1: start below it.
    """

    shift: Numeric = 1.0

    def alpha(self, t: Array) -> Array:
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Array) -> Array:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def time(self, ratio: Array) -> Array:
        return ratio / (self.shift + ratio)

    def at(self, ratio: Array) -> tuple[Array, Array, Array]:
        return self.time(ratio), 1 / (1 + ratio), ratio / (1 + ratio)


@pytree
class Discrete(_VariancePreserving):
    """DDPM's discrete betas (steps,): alpha_n^2 = prod_{m <= n} (1 - beta_m), n = 0 .. steps - 1.

    Ho et al. 2020, arXiv:2006.11239. Times between the steps interpolate log ratio linearly, as
    k-diffusion does; the network receives n as a float. Ratios outside the table are clamped.
    """

    betas: ArrayLike

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> "Discrete":
        """Betas uniform from start to end (Ho et al. 2020)."""
        return cls(jnp.linspace(start, end, steps))

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, start: float = 0.00085, end: float = 0.012
    ) -> "Discrete":
        """Square roots of betas uniform (Rombach et al. 2022, arXiv:2112.10752)."""
        return cls(jnp.linspace(start**0.5, end**0.5, steps) ** 2)

    @classmethod
    def cosine(cls, steps: int = 1000, max_beta: float = 0.999) -> "Discrete":
        """Betas of `VPCosine`, at most max_beta (Nichol & Dhariwal 2021, arXiv:2102.09672)."""
        alpha = VPCosine().alpha(jnp.linspace(0.0, 1.0, steps + 1))
        return cls(jnp.minimum(1 - (alpha[1:] / alpha[:-1]) ** 2, max_beta))

    def zero_terminal_snr(self) -> "Discrete":
        """The betas rescaled such that x is noise alone at the last step.

        Lin et al. 2023, arXiv:2305.08891, algorithm 1. There alpha vanishes at the last step and
        the ratio is infinite, where no step can start; here the last ratio continues the two
        before it geometrically, to some ten thousands.
        """
        alpha = jnp.exp(self._log_alpha())
        alpha = alpha[0] * (alpha - alpha[-1]) / (alpha[0] - alpha[-1])
        alpha = alpha.at[-1].set(alpha[-2] ** 2 / alpha[-3])
        return Discrete(1 - (alpha / jnp.append(1.0, alpha[:-1])) ** 2)

    def _log_alpha(self) -> Array:
        return jnp.cumsum(jnp.log1p(-jnp.asarray(self.betas))) / 2

    def _table(self, dtype: Any) -> tuple[Array, Array]:
        """Times and log ratios, both increasing; (steps,)."""
        log_alpha = self._log_alpha()
        log_ratios = jnp.log(-jnp.expm1(2 * log_alpha)) / 2 - log_alpha
        return jnp.arange(log_alpha.size, dtype=dtype), log_ratios.astype(dtype)

    def ratio(self, t: Array) -> Array:
        times, log_ratios = self._table(jnp.asarray(t).dtype)
        return jnp.exp(jnp.interp(t, times, log_ratios))

    def alpha(self, t: Array) -> Array:
        return 1 / jnp.hypot(1.0, self.ratio(t))

    def sigma(self, t: Array) -> Array:
        return self.ratio(t) * self.alpha(t)

    def time(self, ratio: Array) -> Array:
        times, log_ratios = self._table(ratio.dtype)
        return jnp.interp(jnp.log(ratio), log_ratios, times)

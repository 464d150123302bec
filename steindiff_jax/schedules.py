"""Noise schedules: x_t = alpha(t) x0 + sigma(t) noise, as the network saw it in training.

Everywhere else in the library `sigma` is the noise-to-signal ratio sigma(t) / alpha(t), here
`ratio`. Each schedule gives alpha(t), sigma(t), the inverse `time(ratio)`, and `at(ratio)`, all
three at once with alpha and sigma computed from the ratio itself, which loses no digits where
alpha(t) or sigma(t) vanishes.
"""

import math
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from steindiff_jax import _checks
from steindiff_jax._numerics import divide
from steindiff_jax._pytree import number, pytree
from steindiff_jax.protocols import Numeric


def _parts(ratio: Array) -> tuple[Array, Array]:
    """(a, b) with b / a = ratio, the larger of them 1.

    Of these alpha, sigma and time are made without overflow at any ratio, and without cancellation,
    also in the derivatives: 1 / (1 + r) - r / (1 + r)^2 is rounding noise at large r.
    """
    above = ratio > 1
    q = jnp.where(above, 1 / jnp.where(above, ratio, 1.0), ratio)
    return jnp.where(above, q, 1.0), jnp.where(above, 1.0, q)


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
        a, b = _parts(ratio)
        norm = jnp.sqrt(a**2 + b**2)
        return self.time(ratio), a / norm, b / norm


@pytree
class VPLinear(_VariancePreserving):
    """-2 log alpha = beta_min t + (beta_max - beta_min) t^2 / 2, t in [0, 1].

    Song et al. 2021, arXiv:2011.13456, eq. 33.
    """

    beta_min: Numeric = number(default=0.1, within="(0, inf)")
    beta_max: Numeric = number(default=20.0, within="(0, inf)")

    def __post_init__(self) -> None:
        _checks.fields(self)
        _checks.number("beta_min / beta_max", self.beta_min / self.beta_max, "[0, 1]")

    @property
    def sigma_max(self) -> Array:
        """The ratio at t = 1."""
        return jnp.sqrt(jnp.expm1((self.beta_min + self.beta_max) / 2))

    def _integral(self, t: Array) -> Array:
        return t * (self.beta_min + t * (self.beta_max - self.beta_min) / 2)

    def alpha(self, t: Array) -> Array:
        return jnp.exp(-self._integral(t) / 2)

    def sigma(self, t: Array) -> Array:
        return jnp.sqrt(-jnp.expm1(-self._integral(t)))

    def time(self, ratio: Array) -> Array:
        a, b = _parts(ratio)
        integral = jnp.log1p((a * b) ** 2) - 2 * jnp.log(a)  # log(1 + ratio^2)
        slope = self.beta_max - self.beta_min
        root = jnp.sqrt(self.beta_min**2 + 2 * slope * integral)
        return 2 * integral / (self.beta_min + root)


@pytree
class VPCosine(_VariancePreserving):
    """alpha = cos(a) / cos(a_0), a = (pi / 2)(t + shift) / (1 + shift), a_0 = a(t=0), t in [0, 1].

    Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17; shift=0 is alpha = cos(pi t / 2).
    """

    shift: Numeric = number(default=0.008, within="[0, inf)")

    __post_init__ = _checks.fields

    def _angles(self, t: Array) -> tuple[Array, Array]:
        """(a - a_0, a_0)."""
        scale = math.pi / 2 / (1 + self.shift)
        return jnp.asarray(scale * t), jnp.asarray(scale * self.shift, jnp.asarray(t).dtype)

    def alpha(self, t: Array) -> Array:
        # cos(a) as the sine of what is left to pi / 2, which keeps its digits at t -> 1.
        left, a_0 = self._angles(1 - t)
        return jnp.sin(left) / jnp.cos(a_0)

    def sigma(self, t: Array) -> Array:
        a, a_0 = self._angles(t)  # cos^2(a_0) - cos^2(a + a_0) = sin(a) sin(a + 2 a_0)
        return jnp.sqrt(jnp.sin(a) * jnp.sin(a + 2 * a_0)) / jnp.cos(a_0)

    def time(self, ratio: Array) -> Array:
        # a - a_0 from its sine and cosine, both times sqrt(a^2 + b^2); the difference root - a sin
        # of the sine is written as a quotient to keep its digits at ratio -> 0.
        unit, a_0 = self._angles(jnp.ones_like(ratio))
        sin, cos = jnp.sin(a_0), jnp.cos(a_0)
        a, b = _parts(ratio)
        root = jnp.hypot(b, a * sin)
        sine = cos * b * divide(b, root + a * sin, 0.0)
        return jnp.arctan2(sine, a * cos**2 + sin * root) / unit


@pytree
class RectifiedFlow:
    """alpha = 1 - s, sigma = s, s = shift t / (1 + (shift - 1) t), t in [0, 1).

    Linear paths of rectified flow and flow matching (Liu et al. 2023, arXiv:2209.03003), with the
    time shift of Esser et al. 2024 (arXiv:2403.03206, eq. 23). The network is told t; one that is
    told the shifted time itself has shift 1, and a shifted grid (`flow_sigmas`). The ratio is
    infinite at t = 1: start below it.
    """

    shift: Numeric = number(default=1.0, within="(0, inf)")

    __post_init__ = _checks.fields

    def alpha(self, t: Array) -> Array:
        return (1 - t) / (1 + (self.shift - 1) * t)

    def sigma(self, t: Array) -> Array:
        return self.shift * t / (1 + (self.shift - 1) * t)

    def time(self, ratio: Array) -> Array:
        a, b = _parts(ratio / self.shift)
        return b / (a + b)

    def at(self, ratio: Array) -> tuple[Array, Array, Array]:
        a, b = _parts(ratio)
        return self.time(ratio), a / (a + b), b / (a + b)


@pytree
class Discrete(_VariancePreserving):
    """DDPM's discrete betas (steps,): alpha_n^2 = prod_{m <= n} (1 - beta_m), n = 0 .. steps - 1.

    Ho et al. 2020, arXiv:2006.11239. Times between the steps interpolate log ratio linearly, as
    k-diffusion does; the network receives n as a float. Ratios outside the table are clamped.
    """

    betas: ArrayLike = number(within="(0, 1)")

    def __post_init__(self) -> None:
        _checks.fields(self)
        if np.ndim(self.betas) != 1 or not np.size(self.betas):
            raise ValueError(f"betas must have shape (steps,), got {np.shape(self.betas)}")

    @classmethod
    def linear(cls, steps: int = 1000, start: float = 1e-4, end: float = 0.02) -> "Discrete":
        """Betas uniform from start to end (Ho et al. 2020)."""
        return cls(jnp.linspace(start, end, _checks.count("steps", steps)))

    @classmethod
    def scaled_linear(
        cls, steps: int = 1000, start: float = 0.00085, end: float = 0.012
    ) -> "Discrete":
        """Square roots of betas uniform (Rombach et al. 2022, arXiv:2112.10752)."""
        return cls(jnp.linspace(start**0.5, end**0.5, _checks.count("steps", steps)) ** 2)

    @classmethod
    def cosine(cls, steps: int = 1000, max_beta: float = 0.999) -> "Discrete":
        """Betas of `VPCosine`, at most max_beta (Nichol & Dhariwal 2021, arXiv:2102.09672)."""
        # alpha is sin(w), with w = 0 at the end: 1 - sin(w')^2 / sin(w)^2 without cancellation.
        # In float64: w + w' is near pi at the start, whose sine in float32 moves steps by 0.01.
        w = math.pi / 2 / 1.008 * np.linspace(1.0, 0.0, _checks.count("steps", steps) + 1)
        betas = np.sin(w[-2]) * np.sin(w[1:] + w[:-1]) / np.sin(w[:-1]) ** 2
        return cls(jnp.minimum(betas, max_beta))

    def zero_terminal_snr(self) -> "Discrete":
        """The betas rescaled such that x is noise alone at the last step.

        Lin et al. 2023, arXiv:2305.08891, algorithm 1. There alpha vanishes at the last step and
        the ratio is infinite, where no step can start; here the last ratio continues the two
        before it geometrically, to some ten thousands. ValueError for fewer than 3 betas.
        """
        if jnp.size(self.betas) < 3:
            raise ValueError(f"zero terminal SNR needs 3 betas or more, got {self.betas}")
        # alpha' = c (alpha - alpha[-1]) falls from one step to the next by this share of itself.
        betas = jnp.asarray(self.betas)
        log_steps = jnp.log1p(-betas[1:]) / 2
        rest = jnp.cumsum(log_steps[::-1])[::-1]  # log of alpha[-1] / alpha, from each step on
        drop = jnp.expm1(log_steps) / jnp.expm1(rest)
        drop = drop.at[-1].set(drop[-2])
        return Discrete(jnp.append(betas[0], drop * (2 - drop)))

    @property
    def sigma_min(self) -> Array:
        """The ratio at the first timestep."""
        return self.ratio(jnp.zeros(()))

    @property
    def sigma_max(self) -> Array:
        """The ratio at the last timestep."""
        return self.ratio(jnp.asarray(jnp.size(self.betas) - 1.0))

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
        times, log_ratios = self._table(jnp.asarray(ratio).dtype)
        return jnp.interp(jnp.log(ratio), log_ratios, times)

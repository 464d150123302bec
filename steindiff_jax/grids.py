"""Grids: decreasing sequences of sigma (noise-to-signal ratio) that a sampler steps through.

Any array that `check_sigmas` accepts is one; these are the ones that the field uses. Where they end
in 0, the last evaluation is at sigma_min and changes little. With to_zero=False all steps lie
between the two ends and the samples keep noise of sigma_min, 0.002 of images in [-1, 1] with which
no pixel changes: one more evaluation where it helps, which is much where steps are few.
"""

from collections.abc import Callable
from typing import Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from steindiff_jax import _checks
from steindiff_jax.protocols import Numeric, Sigmas
from steindiff_jax.schedules import Discrete


@runtime_checkable
class TimeSchedule(Protocol):
    """What a grid in time needs of a schedule, see `schedules`."""

    def alpha(self, t: Array, /) -> Array: ...

    def sigma(self, t: Array, /) -> Array: ...


def karras_sigmas(
    steps: int,
    sigma_min: Numeric = 0.002,
    sigma_max: Numeric = 80.0,
    rho: Numeric = 7.0,
    *,
    to_zero: bool = True,
) -> Sigmas:
    """Uniform in sigma^(1/rho) from sigma_max to sigma_min, then 0 if `to_zero`; (steps + 1,).

    Karras et al. 2022, arXiv:2206.00364, eq. 5. ValueError for fewer than one step.
    """
    low, high = _ends(sigma_min=sigma_min, sigma_max=sigma_max)
    _checks.number("rho", rho, "(0, inf)")
    return _uniform(steps, high ** (1 / rho), low ** (1 / rho), lambda u: u**rho, to_zero)


def log_snr_sigmas(
    steps: int,
    sigma_min: Numeric = 0.002,
    sigma_max: Numeric = 80.0,
    *,
    to_zero: bool = True,
) -> Sigmas:
    """Uniform in -log sigma, from sigma_max to sigma_min, then 0 if `to_zero`; (steps + 1,).

    Lu et al. 2022, arXiv:2206.00927; k-diffusion's "exponential". ValueError for fewer than one
    step.
    """
    low, high = _ends(sigma_min=sigma_min, sigma_max=sigma_max)
    return _uniform(steps, jnp.log(high), jnp.log(low), jnp.exp, to_zero)


def cosine_sigmas(
    steps: int,
    sigma_min: Numeric = 0.002,
    sigma_max: Numeric = 80.0,
    *,
    to_zero: bool = True,
) -> Sigmas:
    """Uniform in arctan sigma, the time of `VPCosine(shift=0)`, then 0 if `to_zero`; (steps + 1,).

    Nichol & Dhariwal 2021, arXiv:2102.09672. ValueError for fewer than one step.
    """
    low, high = _ends(sigma_min=sigma_min, sigma_max=sigma_max)
    return _uniform(steps, jnp.arctan(high), jnp.arctan(low), jnp.tan, to_zero)


def time_sigmas(
    steps: int,
    schedule: TimeSchedule,
    t_min: Numeric = 1e-3,
    t_max: Numeric = 1.0,
    power: Numeric = 1.0,
    *,
    to_zero: bool = True,
) -> Sigmas:
    """Uniform in t^(1/power) of a schedule from t_max to t_min, then 0 if `to_zero`; (steps + 1,).

    power: 1 is uniform in time, 2 quadratic (Song et al. 2021, arXiv:2010.02502, section D.3).
    ValueError for fewer than one step, and where the ratio at t_max is infinite, as for
    `RectifiedFlow` and `VPCosine` at 1: start below.
    """

    def ratio(u: Array) -> Array:
        t = u**power
        return schedule.sigma(t) / schedule.alpha(t)

    low, high = _ends("[0, inf)", t_min=t_min, t_max=t_max)
    _checks.number("power", power, "(0, inf)")
    start = schedule.sigma(high) / schedule.alpha(high)
    if not isinstance(start, Tracer) and not np.isfinite(start):
        raise ValueError(f"t_max={t_max} has an infinite ratio: start below, such as at 0.999")
    return _uniform(steps, high ** (1 / power), low ** (1 / power), ratio, to_zero)


def flow_sigmas(steps: int, shift: Numeric = 1.0, t_max: Numeric = 0.999) -> Sigmas:
    """Uniform in the time t of a rectified flow from t_max to 0, then shifted; (steps + 1,).

    The shifted time is shift t / (1 + (shift - 1) t) (Esser et al. 2024, arXiv:2403.03206, eq. 23),
    whose ratio t / (1 - t) is `shift` times that of t. ValueError for fewer than one step.
    """
    _checks.number("shift", shift, "(0, inf)")
    _checks.number("t_max", t_max, "(0, 1)")
    t = jnp.linspace(t_max, 0.0, _checks.count("steps", steps) + 1)
    return check_sigmas(shift * t / (1 - t))


def ddpm_sigmas(steps: int, schedule: Discrete, spacing: str = "trailing") -> Sigmas:
    """The ratios at integer timesteps of a DDPM with N of them, then 0; (steps + 1,).

    Args:
      steps: at most N.
      schedule: of the network.
      spacing: of the timesteps, as in Lin et al. 2023, arXiv:2305.08891, table 2. "leading": 0, k,
        2k, ... with k = N // steps, "linspace": from 0 to N - 1, "trailing": N - 1, N - 1 - k, ...
        with k = N / steps, which alone ends as far from 0 as it should.

    Raises:
      ValueError: for any other spacing, and unless 1 <= steps <= N.
    """
    total = jnp.size(schedule.betas)
    if not (isinstance(steps, int | np.integer) and 1 <= steps <= total):
        raise ValueError(f"steps must be an integer between 1 and {total}, got {steps}")
    steps = int(steps)
    spacings = {
        "leading": np.arange(steps)[::-1] * (total // steps),
        "linspace": np.linspace(total - 1, 0, steps).round(),
        "trailing": np.round(total - np.arange(steps) * total / steps) - 1,
    }
    if spacing not in spacings:
        raise ValueError(f"spacing must be one of {[*spacings]}, got {spacing!r}")
    return check_sigmas(jnp.append(schedule.ratio(jnp.asarray(spacings[spacing], float)), 0.0))


def check_sigmas(sigmas: ArrayLike) -> Array:
    """The grid as an array, or a ValueError that says what is wrong; traced values pass unseen."""
    grid = _checks.array(sigmas)
    if not jnp.issubdtype(grid.dtype, jnp.floating):
        raise ValueError(f"sigmas must be floating point, got {grid.dtype}")
    if grid.ndim != 1 or grid.size < 2:
        raise ValueError(f"sigmas must have shape (steps + 1,) with steps >= 1, got {grid.shape}")
    if isinstance(grid, Tracer):
        return grid
    values = np.asarray(grid)
    if values[0] < np.inf and values[-1] >= 0 and (values[1:] < values[:-1]).all():
        return grid  # as nearly all are; what follows finds padding, and what is wrong
    if not np.isfinite(values).all():
        raise ValueError(f"sigmas must be finite, got {values}; start a flow at t < 1")
    positive = values[: np.argmin(values > 0)] if values[-1] <= 0 else values
    if not positive.size or (values[positive.size :] != 0).any():
        raise ValueError(f"sigmas must be positive, 0 only at the end, got {values}")
    steps = np.argmax(np.append(values[1:] >= values[:-1], True))
    if steps == 0 or (values[steps:] != values[-1]).any():
        raise ValueError(f"sigmas must decrease strictly, got {values}")
    return grid


def decreases(sigmas: Sigmas) -> Array:
    """(steps,): False where a step repeats the last level, which is padding."""
    return sigmas[1:] < sigmas[:-1]


def unpadded(sigmas: ArrayLike) -> np.ndarray:
    """A grid that is known by value, as far as it decreases."""
    values = np.asarray(sigmas)
    return values[: np.count_nonzero(values[1:] < values[:-1]) + 1]


def _ends(within: str = "(0, inf)", **ends: Numeric) -> tuple[Array, Array]:
    """Both ends of a grid as arrays, which overflow to infinity where numbers raise."""
    (low, start), (high, end) = ends.items()
    _checks.number(low, start, within)
    _checks.number(high, end, "(0, inf)")
    start, end = jnp.asarray(start), jnp.asarray(end)
    _checks.number(f"{low} / {high}", start / end, "[0, 1]")
    return start, end


def _uniform(
    steps: int, start: Array, end: Array, ratio: Callable[[Array], Array], to_zero: bool
) -> Sigmas:
    """The ratio at equidistant points from start to end, and 0 after the last if `to_zero`."""
    ramp = jnp.linspace(0.0, 1.0, _checks.count("steps", steps) + (not to_zero))
    sigmas = ratio((1 - ramp) * start + ramp * end)
    return check_sigmas(jnp.append(sigmas, 0.0) if to_zero else sigmas)

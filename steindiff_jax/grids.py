"""Grids: decreasing sequences of sigma (noise-to-signal ratio) that a sampler steps through."""

import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.core import Tracer
from jax.typing import ArrayLike

from steindiff_jax._typing import Numeric, Sigmas


def karras_sigmas(
    steps: int, sigma_min: Numeric = 0.002, sigma_max: Numeric = 80.0, rho: Numeric = 7.0
) -> Sigmas:
    """Uniform in sigma^(1/rho) from sigma_max to sigma_min, then 0; (steps + 1,).

    Karras et al. 2022, arXiv:2206.00364, eq. 5. ValueError for fewer than one step.
    """
    ramp = _ramp(steps)
    return _ending_in_zero(
        (sigma_max ** (1 / rho) + ramp * (sigma_min ** (1 / rho) - sigma_max ** (1 / rho))) ** rho
    )


def log_snr_sigmas(steps: int, sigma_min: Numeric = 0.002, sigma_max: Numeric = 80.0) -> Sigmas:
    """Uniform in log-SNR, that is in -log sigma, from sigma_max to sigma_min, then 0; (steps + 1,).

    Lu et al. 2022, arXiv:2206.00927. ValueError for fewer than one step.
    """
    ramp = _ramp(steps)
    return _ending_in_zero(jnp.exp((1 - ramp) * jnp.log(sigma_max) + ramp * jnp.log(sigma_min)))


def check_sigmas(sigmas: ArrayLike) -> Array:
    """The grid as an array, or a ValueError that says what is wrong; traced values pass unseen."""
    grid = jnp.asarray(sigmas)
    if not jnp.issubdtype(grid.dtype, jnp.floating):
        raise ValueError(f"sigmas must be floating point, got {grid.dtype}")
    if grid.ndim != 1 or grid.size < 2:
        raise ValueError(f"sigmas must have shape (steps + 1,) with steps >= 1, got {grid.shape}")
    if isinstance(grid, Tracer):
        return grid
    values = np.asarray(grid)
    if not np.isfinite(values).all():
        raise ValueError(f"sigmas must be finite, got {values}; start a flow at t < 1")
    positive = values[: np.argmin(values > 0)] if values[-1] <= 0 else values
    if not positive.size or (values[positive.size :] != 0).any():
        raise ValueError(f"sigmas must be positive, 0 only at the end, got {values}")
    if (np.diff(positive) >= 0).any():
        raise ValueError(f"sigmas must decrease strictly, got {values}")
    return grid


def _ramp(steps: int) -> Array:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return jnp.linspace(0.0, 1.0, steps)


def _ending_in_zero(sigmas: Array) -> Array:
    return jnp.append(sigmas, 0.0)

"""Adams-Bashforth methods: the slope dx/dsigma = (x - x0) / sigma, extrapolated."""

import jax.numpy as jnp

from steindiff_jax._typing import Sigmas, pytree, static
from steindiff_jax.solvers.multistep import EpsilonMultistep, Weights, interpolation_weights


@pytree
class IPNDM(EpsilonMultistep):
    """Improved pseudo numerical methods: Adams-Bashforth weights of a uniform grid on any grid.

    Liu et al. 2022, arXiv:2202.09778; Zhang & Chen 2023, arXiv:2204.13902. One evaluation a step.
    Of order `order` (1 to 4) where the grid is uniform in sigma, first order elsewhere.

    denoise_last: a step to sigma = 0 returns the denoiser's estimate; False extrapolates there too,
        as diff-sampler and diffusers do.
    """

    order: int = static(default=4)
    denoise_last: bool = static(default=True)

    def __post_init__(self) -> None:
        if self.order not in (1, 2, 3, 4):
            raise ValueError(f"order must be 1, 2, 3 or 4, got {self.order}")

    def weights(self, sigmas: Sigmas) -> Weights:
        steps = sigmas.size - 1
        uniform = jnp.arange(steps + 1, dtype=sigmas.dtype)
        moments = 1 / jnp.arange(2, self.order + 1, dtype=sigmas.dtype)  # int_0^1 u^k du
        return interpolation_weights(
            uniform,
            jnp.broadcast_to(moments, (steps, self.order - 1)),
            (sigmas[1:] == 0) & self.denoise_last,
        )

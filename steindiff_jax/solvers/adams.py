"""Adams-Bashforth methods: the slope of the ODE, extrapolated by a polynomial.

The ODE is dx/dsigma = (x - x0) / sigma, or with prediction="flow" that of the flow-matching path
(1 - t) x0 + t noise in its own time t = sigma / (1 + sigma): the slope is then the velocity that a
flow network predicts.
"""

import jax.numpy as jnp
from jax import Array

from steindiff_jax._pytree import pytree, static
from steindiff_jax.protocols import Sigmas
from steindiff_jax.solvers.multistep import Multistep, Weights, interpolation_weights


@pytree
class LMS(Multistep):
    """Linear multistep method: Adams-Bashforth with the weights of the actual, uneven grid.

    k-diffusion's LMS, rhoAB-DEIS (Zhang & Chen 2023, arXiv:2204.13902) and what iPNDM_v stands for
    are this same method. Of order `order` (1 to 4), one evaluation a step.

    Attributes:
      order: 1 to 4.
      denoise_last: a step to sigma = 0 returns the denoiser's estimate; False extrapolates there
        too, as k-diffusion, diff-sampler and diffusers do.
      prediction: "epsilon", in sigma; "flow", in the time of a rectified flow.
    """

    order: int = static(default=4, choices=(1, 2, 3, 4))
    denoise_last: bool = static(default=True)
    prediction: str = static(default="epsilon", choices=("epsilon", "flow"), kw_only=True)

    def nodes(self, sigmas: Sigmas) -> Array:
        """The variable in which the slope is a polynomial."""
        return sigmas / (1 + sigmas) if self.prediction == "flow" else sigmas

    def weights(self, sigmas: Sigmas) -> Weights:
        moments = 1 / jnp.arange(2, self.order + 1, dtype=sigmas.dtype)  # int_0^1 u^k du
        return interpolation_weights(
            self.nodes(sigmas),
            jnp.broadcast_to(moments, (sigmas.size - 1, self.order - 1)),
            self.past_used(sigmas, self.order, denoise_last=self.denoise_last),
        )


@pytree
class IPNDM(LMS):
    """Improved pseudo numerical methods: Adams-Bashforth weights of a uniform grid on any grid.

    Liu et al. 2022, arXiv:2202.09778; Zhang & Chen 2023, arXiv:2204.13902. One evaluation a step.
    Of order `order` (1 to 4) where the grid is uniform in sigma (in t with prediction="flow"),
    second order at most where its steps change smoothly, as on every usual grid, and first order
    where they do not. The fields are those of `LMS`.
    """

    def nodes(self, sigmas: Sigmas) -> Array:
        return jnp.arange(sigmas.size, dtype=sigmas.dtype)

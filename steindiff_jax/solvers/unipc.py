"""UniPC: a multistep predictor, and a corrector that costs no evaluation of its own.

The predictor leads from the state x to the next one. The evaluation there, which the next step
needs anyway, then corrects it, as one more node of the interpolation (Zhao et al. 2023,
arXiv:2302.04867). Both start from the same x, so the correction is a combination of differences of
what was interpolated; here it is made at the beginning of the next step, as a part of that step's
own row of weights.
"""

import jax.numpy as jnp

from steindiff_jax._pytree import pytree, static
from steindiff_jax.protocols import Sigmas
from steindiff_jax.solvers.dpm import beyond, log_snr, moments_of
from steindiff_jax.solvers.multistep import Counts, Multistep, Weights, interpolation_weights


@pytree
class UniPC(Multistep):
    """UniPC with its corrector, of order `order` + 1; one evaluation a step.

    A step to sigma = 0 is first order and returns the denoiser's estimate, whatever the options.

    Attributes:
      order: of the predictor, 1, 2 or 3.
      kind: which value the first moment takes when a step has a single past node (with more nodes
        all three agree): "bh2", 1/2; "bh1", 1/2 at the other end of the step; "vary_coeff", the
        exact one.
      lower_order_final: as in every public UniPC. On a grid that ends above 0 this lowers the whole
        method to second order. At few steps it still pays: on the Karras grid it takes a third off
        UniPC-3's error at 4 to 16 steps, and costs nothing elsewhere.
    """

    order: int = static(default=2, choices=(1, 2, 3))
    kind: str = static(default="bh2", choices=("bh1", "bh2", "vary_coeff"))
    lower_order_final: bool = static(default=True, kw_only=True)

    def weights(self, sigmas: Sigmas) -> Weights:
        z, count = log_snr(sigmas), self.past_used(sigmas, self.order)
        h = jnp.diff(z) if self.prediction == "x0" else -jnp.diff(z)
        exact = moments_of(jnp.diff(z), self.order + 1, self.prediction)
        simple = {"bh1": h / -jnp.expm1(-h) / 2, "bh2": jnp.full_like(h, 0.5)}

        def rows(count: Counts, size: int, back: list[int]) -> Weights:
            row = exact
            if self.kind in simple:
                row = jnp.where(count[:, None] == 1, simple[self.kind][:, None], exact)
            return interpolation_weights(z, row[:, :size], count, back)

        before = list(range(1, self.order))
        predictor = rows(count, self.order - 1, before)
        corrector = rows(count + 1, self.order, [-1, *before])
        # What the corrector adds to the step before, in differences from the value at its end.
        change = corrector.at[:, 1:].add(-predictor)
        change = change.at[:, 0].set(-change.sum(axis=1))
        # ... and in units of this step's own change.
        last = beyond(sigmas)[1:]
        drop = -jnp.diff(sigmas)
        scale = drop[:-1] / jnp.where(last, 1.0, drop)[1:]
        if self.prediction == "x0":
            scale = scale * sigmas[2:] / jnp.where(last[1:], 1.0, sigmas[:-2])
        predictor = jnp.pad(predictor, ((0, 0), (0, 1)))
        row = predictor.at[1:].add(scale[:, None] * change[:-1])
        return jnp.where(last[:, None], 0.0, row)

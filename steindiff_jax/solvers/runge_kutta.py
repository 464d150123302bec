"""One-step methods for dx/dsigma = (x - D(x, sigma)) / sigma."""

import jax.numpy as jnp
from jax import lax

from steindiff_jax import _checks
from steindiff_jax._pytree import pytree, static
from steindiff_jax.protocols import (
    Batch,
    Denoiser,
    Key,
    Scalar,
    Solver,
    State,
    Step,
    ddim,
    evaluate,
)
from steindiff_jax.solvers.interpolants import INTERPOLANTS

# The places of the stages after the first, as fractions of the step in log sigma, and for each of
# them, and for the step itself, the weights of what the stages before it changed.
Tableau = tuple[tuple, tuple[tuple, ...]]


@pytree
class DDIM(Solver):
    """x' = q x + (1 - q) D(x, sigma), q = sigma' / sigma. First order, one evaluation a step.

    DDIM (Song et al. 2021, arXiv:2010.02502), Euler in sigma, Euler in the time of a rectified flow
    and the exponential Euler method are this same step.
    """

    def step(
        self,
        key: Key,
        denoiser: Denoiser,
        state: State,
        sigma: Scalar,
        sigma_next: Scalar,
        *,
        x0: Batch | None = None,
    ) -> tuple[Step, tuple[()]]:
        del key, sigma_next
        x0, nfe = evaluate(denoiser, state.x, sigma, x0)
        return Step(x0, jnp.zeros_like(x0), nfe), ()


@pytree
class RungeKutta(Solver):
    """Base of the solvers with several stages; a subclass gives its tableau.

    Attributes:
      prediction: what is interpolated within the step, "x0", "epsilon" (the noise) or "flow" (the
        velocity). A step to sigma = 0 is first order and costs one evaluation.
    """

    prediction: str = static(default="epsilon", choices=("x0", "epsilon"), kw_only=True)

    __post_init__ = _checks.fields

    def tableau(self, h: Scalar) -> Tableau:
        """The coefficients of a step of size h in -log sigma."""
        raise NotImplementedError

    def step(
        self,
        key: Key,
        denoiser: Denoiser,
        state: State,
        sigma: Scalar,
        sigma_next: Scalar,
        *,
        x0: Batch | None = None,
    ) -> tuple[Step, tuple[()]]:
        del key
        x = state.x
        x0, nfe = evaluate(denoiser, x, sigma, x0)
        interpolant = INTERPOLANTS[self.prediction]
        first = interpolant.quantity(x, x0, sigma)
        # Under vmap both branches run: the sigma of the unused one must be safe as well.
        end = jnp.where(sigma_next > 0, sigma_next, sigma / 2)
        places, rows = self.tableau(jnp.log(sigma / end))

        def stages() -> Batch:
            changes = []

            def x0_change(row: tuple) -> Batch:
                zero = jnp.zeros_like(x)
                change = sum((w * c for w, c in zip(row, changes, strict=True)), zero)
                return interpolant.to_x0(change, sigma)

            for r, row in zip(places, rows, strict=False):
                at = sigma ** (1 - r) * end**r
                x_r = ddim(x, x0 + x0_change(row), sigma, at)
                changes.append(interpolant.quantity(x_r, denoiser(x_r, at), at) - first)
            return x0_change(rows[-1]).astype(x.dtype)

        delta = lax.cond(sigma_next > 0, stages, lambda: jnp.zeros_like(x0))
        return Step(x0, delta, nfe + len(places) * (sigma_next > 0).astype(jnp.int32)), ()


@pytree
class Heun(RungeKutta):
    """Heun's method. Second order, two evaluations a step, one in a step to sigma = 0.

    Attributes:
      prediction: "epsilon", in sigma (Karras et al. 2022, arXiv:2206.00364, algorithm 1); "flow",
        in the time t = sigma / (1 + sigma) of a rectified flow, for flow networks.
    """

    prediction: str = static(default="epsilon", choices=("epsilon", "flow"), kw_only=True)

    def tableau(self, h: Scalar) -> Tableau:  # noqa: ARG002
        return (1.0,), ((), (0.5,))

"""What the solvers share: the quantity that they interpolate, and the end of every step."""

from collections.abc import Callable
from typing import Any, NamedTuple

from jax import Array

from steindiff_jax._typing import Batch, Scalar, State, Step


class Interpolated(NamedTuple):
    """A quantity that a solver interpolates instead of x0, and the way back.

    of: (x, x0, sigma) -> the quantity; to_x0: (its change, sigma) -> the change of x0 that, in a
    step from sigma, amounts to the same.
    """

    of: Callable[[Batch, Batch, Scalar], Batch]
    to_x0: Callable[[Any, Scalar], Any]


PREDICTIONS = {
    "x0": Interpolated(lambda x, x0, sigma: x0, lambda change, sigma: change),  # noqa: ARG005
    # The noise, which is the slope dx/dsigma.
    "epsilon": Interpolated(
        lambda x, x0, sigma: (x - x0) / sigma, lambda change, sigma: -sigma * change
    ),
    # The velocity noise - x0 of the flow (1 - t) x0 + t noise, t = sigma / (1 + sigma), which is
    # the flow's slope in t.
    "flow": Interpolated(
        lambda x, x0, sigma: (x - x0) / sigma - x0,
        lambda change, sigma: -sigma / (1 + sigma) * change,
    ),
}


def take_step(
    x: Batch,
    x0: Batch,
    delta: Batch,
    sigma: Scalar,
    sigma_next: Scalar,
    *,
    history: Any = (),
    nfe: int | Array = 1,
) -> tuple[State, Step]:
    """x_next = q x + (1 - q)(x0 + delta), q = sigma_next / sigma: DDIM towards x0 + delta.

    At sigma_next = 0 the sample is x0 + delta itself, whatever x is.
    """
    return State(ddim(x, x0 + delta, sigma, sigma_next), history), Step(x0, delta, nfe=nfe)


def ddim(x: Batch, x0: Batch, sigma: Scalar, sigma_next: Scalar) -> Batch:
    """The exact step if the denoiser stayed at x0: q x + (1 - q) x0, q = sigma_next / sigma."""
    q = sigma_next / sigma
    return q * x + (1 - q) * x0

"""The quantities that solvers interpolate: x0, the noise, the velocity of a flow."""

from collections.abc import Callable
from typing import Any, NamedTuple

from steindiff_jax.protocols import Batch, Scalar


class Interpolant(NamedTuple):
    """A quantity that a solver interpolates instead of x0, and the way back.

    quantity: (x, x0, sigma) -> the quantity.
    to_x0: (its change, sigma) -> the change of x0 that makes the same step from sigma.
    """

    quantity: Callable[[Batch, Batch, Scalar], Batch]
    to_x0: Callable[[Any, Scalar], Any]


INTERPOLANTS = {
    "x0": Interpolant(lambda x, x0, sigma: x0, lambda change, sigma: change),  # noqa: ARG005
    # The noise, which is the slope dx/dsigma.
    "epsilon": Interpolant(
        lambda x, x0, sigma: (x - x0) / sigma, lambda change, sigma: -sigma * change
    ),
    # The velocity noise - x0 of the flow (1 - t) x0 + t noise, t = sigma / (1 + sigma), which is
    # the flow's slope in t.
    "flow": Interpolant(
        lambda x, x0, sigma: (x - x0) / sigma - x0,
        lambda change, sigma: -sigma / (1 + sigma) * change,
    ),
}

"""The end of every deterministic step: assemble the next state from its parts."""

from typing import Any

from jax import Array

from steindiff_jax._typing import Batch, Scalar, State, Step


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
    q = sigma_next / sigma
    return State(q * x + (1 - q) * (x0 + delta), history), Step(x0, delta, nfe=nfe)

"""The Stein correction of a solver's step: rules, divergence estimators and the wrapper."""

from steindiff_jax.stein.correction import Stein
from steindiff_jax.stein.divergence import Exact, Hutchinson, Jacobian, Tweedie, from_probes
from steindiff_jax.stein.rules import CleanTarget, PosteriorLength, StepEnergy, first_order

__all__ = [
    "CleanTarget",
    "Exact",
    "Hutchinson",
    "Jacobian",
    "PosteriorLength",
    "Stein",
    "StepEnergy",
    "Tweedie",
    "first_order",
    "from_probes",
]

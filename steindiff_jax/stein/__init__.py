"""The Stein correction of a solver's step: rules, estimators, bases and the wrapper."""

from steindiff_jax.stein.basis import Cosine, Whole, default_basis
from steindiff_jax.stein.correction import Stein
from steindiff_jax.stein.estimators import Exact, Hutchinson, Tweedie, from_probes
from steindiff_jax.stein.rules import CleanTarget, PosteriorLength, StepEnergy

__all__ = [
    "CleanTarget",
    "Cosine",
    "Exact",
    "Hutchinson",
    "PosteriorLength",
    "Stein",
    "StepEnergy",
    "Tweedie",
    "Whole",
    "default_basis",
    "from_probes",
]

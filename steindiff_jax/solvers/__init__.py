"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma."""

from steindiff_jax.solvers.adams import IPNDM, LMS
from steindiff_jax.solvers.dpm import (
    DEIS,
    DPM2,
    DPMpp2M,
    DPMpp2MSDE,
    DPMpp2S,
    DPMpp3M,
    DPMpp3MSDE,
    DPMpp3S,
    DPMppSDE,
)
from steindiff_jax.solvers.runge_kutta import DDIM, Heun
from steindiff_jax.solvers.unipc import UniPC
from steindiff_jax.solvers.wrappers import AnalyticalFirst, Ancestral, Churn

Euler = DDIM

__all__ = [
    "DDIM",
    "DEIS",
    "DPM2",
    "IPNDM",
    "LMS",
    "AnalyticalFirst",
    "Ancestral",
    "Churn",
    "DPMpp2M",
    "DPMpp2MSDE",
    "DPMpp2S",
    "DPMpp3M",
    "DPMpp3MSDE",
    "DPMpp3S",
    "DPMppSDE",
    "Euler",
    "Heun",
    "UniPC",
]

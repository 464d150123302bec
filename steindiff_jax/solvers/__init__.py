"""Solvers of the probability-flow ODE dx/dsigma = (x - D(x, sigma)) / sigma."""

from steindiff_jax.solvers.adams import IPNDM
from steindiff_jax.solvers.dpm import DPMpp2M, DPMpp3M
from steindiff_jax.solvers.runge_kutta import DDIM, Heun

__all__ = ["DDIM", "IPNDM", "DPMpp2M", "DPMpp3M", "Heun"]

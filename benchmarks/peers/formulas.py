"""The formulas of k-diffusion and diff-sampler, on NumPy arrays and torch tensors alike.

A sampler here is (denoise, x, sigmas) -> x: denoise(x, sigma) -> x0 with a Python float sigma, x
(batch, *event) at sigmas[0], sigmas a decreasing sequence of floats. `tests/test_peers.py` holds
them against what those libraries returned.
"""

import math
from itertools import pairwise

import numpy as np


def towards(x, x0, sigma, sigma_next):
    """The first-order step: exact if the denoiser stayed at x0."""
    q = sigma_next / sigma
    return q * x + (1 - q) * x0


def euler(denoise, x, sigmas):
    for sigma, sigma_next in pairwise(sigmas):
        x = towards(x, denoise(x, sigma), sigma, sigma_next)
    return x


def addim(denoise, x, sigmas):
    """aDDIM, arXiv:2403.06807: noise made longer by what one estimate of x0 leaves out.

    Its variance of x0, .1 / (2 + SNR), is the paper's, by hand.
    """
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        noise = (x - x0) / sigma
        square = (noise**2).reshape(len(x), -1).mean(1).reshape(-1, *[1] * (x.ndim - 1))
        variance = (1 - sigma_next / sigma) ** 2 * 0.1 / (2 + sigma**-2)
        x = x0 + (sigma_next**2 + variance / square) ** 0.5 * noise
    return x


def heun(denoise, x, sigmas):
    """Karras et al. 2022, arXiv:2206.00364, algorithm 1."""
    for sigma, sigma_next in pairwise(sigmas):
        slope = (x - denoise(x, sigma)) / sigma
        ahead = x + (sigma_next - sigma) * slope
        if sigma_next > 0:
            slope = (slope + (ahead - denoise(ahead, sigma_next)) / sigma_next) / 2
        x = x + (sigma_next - sigma) * slope
    return x


def dpm2(denoise, x, sigmas):
    """DPM-Solver-2, arXiv:2206.00927: the slope at the geometric mean of the two levels."""
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if sigma_next > 0:
            middle = math.sqrt(sigma * sigma_next)
            inside = towards(x, x0, sigma, middle)
            x = x + (sigma_next - sigma) * (inside - denoise(inside, middle)) / middle
        else:
            x = x0
    return x


def dpmpp_2s(denoise, x, sigmas):
    """DPM-Solver++(2S), arXiv:2211.01095."""
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if sigma_next > 0:
            middle = math.sqrt(sigma * sigma_next)
            x0 = denoise(towards(x, x0, sigma, middle), middle)
        x = towards(x, x0, sigma, sigma_next)
    return x


def dpmpp_2m(denoise, x, sigmas, lower_order_final=False):
    """DPM-Solver++(2M), arXiv:2211.01095; a last step of first order if asked for."""
    before = sigma_before = None
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        x0 = d = denoise(x, sigma)
        last = lower_order_final and i == len(sigmas) - 2
        if before is not None and sigma_next > 0 and not last:
            ratio = math.log(sigma_before / sigma) / math.log(sigma / sigma_next)
            d = x0 + (x0 - before) / (2 * ratio)
        x = towards(x, d, sigma, sigma_next)
        before, sigma_before = x0, sigma
    return x


def dpmpp_3m(denoise, x, sigmas):
    """k-diffusion's DPM-Solver++(3M) with eta = 0."""
    x0s, steps = [], []
    for sigma, sigma_next in pairwise(sigmas):
        x0 = denoise(x, sigma)
        if sigma_next == 0:
            return x0
        h = math.log(sigma / sigma_next)
        x_next = towards(x, x0, sigma, sigma_next)
        phi_2 = math.expm1(-h) / h + 1
        if len(x0s) >= 2:
            r0, r1 = steps[-1] / h, steps[-2] / h
            first, second = (x0 - x0s[-1]) / r0, (x0s[-1] - x0s[-2]) / r1
            slope = first + (first - second) * r0 / (r0 + r1)
            curvature = (first - second) / (r0 + r1)
            x_next = x_next + phi_2 * slope - (phi_2 / h - 0.5) * curvature
        elif x0s:
            x_next = x_next + phi_2 * (x0 - x0s[-1]) * h / steps[-1]
        x0s, steps = [*x0s[-1:], x0], [*steps[-1:], h]
        x = x_next
    return x


def lms(denoise, x, sigmas, order=4):
    """Adams-Bashforth on the actual grid: integrals of the Lagrange polynomials of the slope."""
    slopes = []
    for i, (sigma, sigma_next) in enumerate(pairwise(sigmas)):
        slopes = [(x - denoise(x, sigma)) / sigma, *slopes[: order - 1]]
        nodes = np.asarray(sigmas[i + 1 - len(slopes) : i + 1])[::-1] - sigma
        powers = np.arange(len(slopes))
        integrals = (sigma_next - sigma) ** (powers + 1) / (powers + 1)
        weights = np.linalg.solve(nodes[None] ** powers[:, None], integrals)
        x = x + sum(float(w) * slope for w, slope in zip(weights, slopes, strict=True))
    return x


ADAMS_BASHFORTH = [[1], [3 / 2, -1 / 2], [23 / 12, -16 / 12, 5 / 12]]
ADAMS_BASHFORTH.append([55 / 24, -59 / 24, 37 / 24, -9 / 24])


def ipndm(denoise, x, sigmas, order=3):
    """diff-sampler's iPNDM, arXiv:2202.09778: Adams-Bashforth weights of an even grid."""
    slopes = []
    for sigma, sigma_next in pairwise(sigmas):
        slopes = [(x - denoise(x, sigma)) / sigma, *slopes[: order - 1]]
        weights = ADAMS_BASHFORTH[len(slopes) - 1]
        slope = sum(w * slope for w, slope in zip(weights, slopes, strict=True))
        x = x + (sigma_next - sigma) * slope
    return x

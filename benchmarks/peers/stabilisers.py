"""What others have proposed against unstable few-step sampling, without training.

Epsilon scaling, dynamic thresholding and the analytical first step act on the denoiser, time-shift
sampling on the level that it is told. The values tried of the parameters that the papers search are
at the end; `compare.py` picks by distance, on noise of its own, and counts the evaluations.
"""

import itertools
from functools import partial

import numpy as np

from peers import formulas


def epsilon_scaling(denoise, scale):
    """The noise prediction over `scale` (Ning et al. 2024, arXiv:2308.15321, constant lambda)."""
    return lambda x, sigma: x - (x - denoise(x, sigma)) / scale


def dynamic_threshold(denoise, quantile, limit):
    """x0 clipped at its own quantile and scaled back (Saharia et al. 2022, arXiv:2205.11487)."""

    def thresholded(x, sigma):
        x0 = denoise(x, sigma)
        s = np.quantile(np.abs(x0).reshape(len(x0), -1), quantile, axis=1)
        s = np.maximum(s, limit).reshape(-1, *[1] * (x0.ndim - 1)).astype(x0.dtype)
        return np.clip(x0, -s, s) * (limit / s)

    return thresholded


def analytical_first(denoise, sigma_first):
    """No evaluation at the first level (Dockhorn et al. 2022, arXiv:2210.05475)."""
    norm = np.hypot(1.0, sigma_first)

    def known(x, sigma):
        return x / (norm * (norm + sigma)) if sigma == sigma_first else denoise(x, sigma)

    return known


# The linear schedule of DDPM in continuous time, in which the windows of time-shift sampling count.
BETA_MIN, BETA_MAX = 0.1, 20.0


def level(t):
    """Noise-to-signal ratio at time t in [0, 1]."""
    return np.sqrt(np.expm1(BETA_MIN * t + (BETA_MAX - BETA_MIN) * t**2 / 2))


def time(sigma):
    rate, curve = BETA_MIN, BETA_MAX - BETA_MIN
    return (np.sqrt(rate**2 + 2 * curve * np.log1p(sigma**2)) - rate) / curve


def time_shift(denoise, x, sigmas, window, cutoff, data_variance, order=2):
    """Time-shift sampling (Li et al. 2024, arXiv:2305.15583) of iPNDM.

    Before each step but the first, down to the time `cutoff`, the time is replaced by the one
    within `window` around it at which noisy data have the variance that the state has, in
    variance-preserving coordinates. window, cutoff: in thousandths, as the paper counts;
    data_variance: of a clean sample's entries, mean over samples. The state's variance is likewise
    a mean over the batch; the paper shifts each sample by itself, but the denoisers here share one
    level.
    """
    slopes = []
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        t = time(sigma)
        if i and t > cutoff / 1000:
            state = x / np.hypot(1.0, sigma)
            variance = state.reshape(len(x), -1).var(axis=1).mean()
            times = t + np.linspace(-0.5, 0.5, 65) * window / 1000
            ratios = level(np.clip(times, time(sigma_next) + 1e-3, 1.2))
            expected = (data_variance + ratios**2) / (1 + ratios**2)
            sigma = float(ratios[np.abs(expected - variance).argmin()])
            x = state * np.float64(np.hypot(1.0, sigma)).astype(x.dtype)
        slopes = [(x - denoise(x, sigma)) / sigma, *slopes[: order - 1]]
        weights = formulas.ADAMS_BASHFORTH[len(slopes) - 1]
        slope = sum(w * slope for w, slope in zip(weights, slopes, strict=True))
        x = x + (sigma_next - sigma) * slope
    return x


def with_first(sampler, denoise, x, sigmas):
    return sampler(analytical_first(denoise, sigmas[0]), x, sigmas)


def scaled(sampler, denoise, x, sigmas, scale):
    return sampler(epsilon_scaling(denoise, scale), x, sigmas)


def thresholded(sampler, denoise, x, sigmas, quantile, limit):
    return sampler(dynamic_threshold(denoise, quantile, limit), x, sigmas)


SCALES = [{"scale": s} for s in (0.98, 0.99, 1.0, 1.01, 1.02, 1.05)]
QUANTILES = [{"quantile": q} for q in (0.9, 0.95, 0.99, 0.995)]
SHIFTS = [{"window": w, "cutoff": c} for w, c in itertools.product((20, 80), (200, 400))]

LOWER = partial(formulas.dpmpp_2m, lower_order_final=True)
BASES = {"iPNDM-3": formulas.ipndm, "DPM++ 2M": LOWER}

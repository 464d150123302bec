"""DPM-Solver-v3 (Zheng et al. 2023, arXiv:2310.13268), its statistics and its sampler.

Per pixel, sigma noise = l x + f, and f' = s f + b along the ODE, in lambda = -log sigma: the
statistics l, s and b (the paper's EMS) are least squares over noised data, so that what remains to
be integrated is small. In the coordinates x = x0 + sigma noise, where alpha is 1.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Statistics(NamedTuple):
    """lambdas: (levels,), even; l, s, b: (levels, *event); evaluations: what they took."""

    lambdas: np.ndarray
    l: np.ndarray  # noqa: E741 the paper's name
    s: np.ndarray
    b: np.ndarray
    evaluations: int = 0


def scaled_noise(denoiser, x, lam):
    return x - denoiser(x, jnp.exp(-lam))


@jax.jit
def diagonal(denoiser, x, lam, probe):
    """Sum over the batch of the Jacobian's diagonal, by Rademacher probes."""
    slope = jax.jvp(lambda x: scaled_noise(denoiser, x, lam), (x,), (probe,))[1]
    return (probe * slope).sum(0)


@jax.jit
def products(denoiser, x, lam, l, dl):  # noqa: E741
    """Sums over the batch of f, f', f^2 and f f', with f' the derivative along the ODE."""
    along = -scaled_noise(denoiser, x, lam)
    call = lambda x, lam: scaled_noise(denoiser, x, lam)  # noqa: E731
    value, slope = jax.jvp(call, (x, lam), (along, jnp.ones_like(lam)))
    f, df = value - l[None] * x, slope - l[None] * along - dl[None] * x
    return jnp.stack([f.sum(0), df.sum(0), (f**2).sum(0), (f * df).sum(0)])


def statistics(denoiser, law: np.ndarray, batch: int, levels=121, points=1024) -> Statistics:
    """By noised draws of the law, `batch` at a time, from sigma = 80 to 0.002."""
    rng, dtype = np.random.default_rng(0), law.dtype
    lambdas = np.linspace(-math.log(80.0), -math.log(0.002), levels)
    parts = max(min(points, len(law)) // batch, 1)
    n = parts * batch

    def total(function, *of_level):
        found = []
        for i, lam in enumerate(lambdas):
            noise = rng.standard_normal((n, *law.shape[1:]))
            x = (
                (law[:n] + math.exp(-lam) * noise)
                .astype(dtype)
                .reshape(parts, batch, *law.shape[1:])
            )
            given = [rest(i, x[0].shape) for rest in of_level]
            each = [function(denoiser, part, dtype.type(lam), *given) for part in x]
            found.append(np.sum(each, axis=0, dtype=np.float64) / n)
        return np.stack(found)

    l = total(diagonal, lambda _, shape: rng.choice([-1.0, 1.0], shape).astype(dtype))  # noqa: E741
    dl = np.gradient(l, lambdas, axis=0)
    moments = total(products, lambda i, _: l[i].astype(dtype), lambda i, _: dl[i].astype(dtype))
    f, df, square, product = moments.swapaxes(0, 1)
    variance = square - f**2
    known = variance > 1e-10 * square  # a Gaussian pixel has no f to speak of
    s = np.where(known, (product - f * df) / np.where(known, variance, 1.0), 0.0)
    return Statistics(lambdas, l, s, df - s * f, 5 * levels * n)  # a derivative counts as two


def cumulative(values: np.ndarray, lambdas: np.ndarray) -> np.ndarray:
    """The integral from the first level to each, by trapezoids."""
    widths = np.diff(lambdas).reshape(-1, *[1] * (values.ndim - 1))
    steps = widths * (values[1:] + values[:-1]) / 2
    return np.concatenate([np.zeros_like(values[:1]), np.cumsum(steps, axis=0)])


def derivatives(lambdas, g, pseudo: bool) -> list:
    """g', g'', ... at the first of the nodes: of the polynomial through all, or "pseudo"."""
    n = len(g) - 1
    if pseudo:
        found, d = [], g
        for i in range(1, n + 1):
            d = [(d[j] - d[j + 1]) / (lambdas[j] - lambdas[i + j]) for j in range(n - i + 1)]
            found.append(math.factorial(i) * d[0])
        return found
    powers = np.subtract(lambdas[1:], lambdas[0])[:, None] ** np.arange(1, n + 1)
    solved = np.tensordot(np.linalg.inv(powers), np.stack(g[1:]) - g[0], 1) if n else []
    return [math.factorial(i) * d for i, d in enumerate(solved, 1)]


def sample(denoise, x, sigmas, statistics: Statistics, order: int = 3):
    """As the authors' code for EDM: pseudo derivatives up to 5 steps, a corrector up to 6.

    The levels are rounded to those of the statistics.
    """
    lambdas, l, s, b, _ = statistics  # noqa: E741
    big_l, big_s = cumulative(l, lambdas), cumulative(s, lambdas)
    growth = np.exp(big_l + big_s)
    i_all, b_all = cumulative(growth, lambdas), cumulative(np.exp(-big_s) * b, lambdas)
    c_all = cumulative(growth * b_all, lambdas)
    width = lambdas[1] - lambdas[0]
    indices = np.round((-np.log(sigmas) - lambdas[0]) / width).astype(int)
    steps, dtype = len(sigmas) - 1, x.dtype

    def update(x, nodes, t, pseudo):
        """From the first node's level to t."""
        i = nodes[0][0]
        g = [
            np.exp(big_s[i] - big_s[k]) * f - np.exp(big_s[i]) * (b_all[k] - b_all[i])
            for k, f in nodes
        ]
        gained = i_all[t] - i_all[i]
        x = np.exp(big_l[i] - big_l[t]) * x - np.exp(-big_l[t] - big_s[i]) * gained * g[0]
        x = x - np.exp(-big_l[t]) * (c_all[t] - c_all[i] - b_all[i] * gained)
        here = slice(i, t + 1)
        weight = growth[here] / growth[i]
        for n, slope in enumerate(derivatives(lambdas[[k for k, _ in nodes]], g, pseudo), 1):
            power = (lambdas[here] - lambdas[i]) ** n / math.factorial(n)
            power = power.reshape(-1, *[1] * (weight.ndim - 1))
            integral = cumulative(power * weight, lambdas[here])[-1]
            x = x - np.exp(big_l[i] - big_l[t]) * integral * slope
        return x.astype(dtype)

    past, used, before = [], 0, x
    for step, i in enumerate(indices[:-1], 1):
        f = x - denoise(x, math.exp(-lambdas[i])) - l[i] * x
        past = [(i, f), *past]
        if steps <= 6 and used > 1:
            x = update(before, [past[1], past[0], *past[2:used]], i, pseudo=False)
        used = min(step, order, steps + 1 - step)
        before, x = x, update(x, past[:used], indices[step], pseudo=steps <= 5)
    return x

"""A million samples of a small network through `sample_many`: resident memory on the way."""

import os
from pathlib import Path

import jax
import jax.numpy as jnp

import steindiff_jax as sd

N, BATCH, D = 1_000_000, 10_000, 16


def resident():
    """In MiB; statm counts pages."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGESIZE") / 2**20


def layers(weights, x, t):
    first, last = weights
    return jnp.tanh(x @ first + t[:, None]) @ last


weights = tuple(0.3 * jax.random.normal(jax.random.key(i), (D, D)) for i in range(2))
denoiser = sd.Network(layers, weights, sd.EDM(), "edm")
sigmas = sd.karras_sigmas(4)
count = 0
for batch in sd.sample_many(jax.random.key(2), denoiser, N, BATCH, (D,), sigmas=sigmas):
    count += len(batch)
    if count in (N // 10, N):
        print(f"{count:9,} samples: {resident():.1f} MiB")

"""Rematerialisation in `sample`: the same gradients from less memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import normal

import steindiff_jax as sd

WIDTH, DEPTH, BATCH, STEPS = 64, 3, 128, 6


def network(x, sigma):
    """A denoiser whose intermediate values are far larger than its state."""
    h = x / jnp.hypot(1.0, sigma)
    wide = jnp.tile(h, (1, WIDTH))
    for i in range(DEPTH):
        wide = jnp.sin(wide + i)
    return wide.reshape(*x.shape, WIDTH).mean(-1)


@pytest.mark.parametrize(
    "ending", [(0.0,), pytest.param((0.0, 0.0), marks=pytest.mark.slow)], ids=["exact", "padded"]
)
def test_same_gradient_from_less_memory(ending):
    sigmas = jnp.append(jnp.geomspace(5.0, 0.1, STEPS), jnp.array(ending))
    solver = sd.Stein(sd.DPMpp2M(), estimator=sd.Hutchinson())

    def loss(x, remat):
        solution = sd.sample(
            jax.random.key(0), network, sigmas=sigmas, solver=solver, x_init=x, remat=remat
        )
        return jnp.sin(solution.x).sum()

    x = normal(BATCH, 2, scale=5.0)
    compiled = [
        jax.jit(jax.grad(loss), static_argnums=1).lower(x, remat).compile()
        for remat in (False, True)
    ]
    plain, remat = (c(x) for c in compiled)
    np.testing.assert_allclose(remat, plain, rtol=1e-12)
    kept, light = (c.memory_analysis().temp_size_in_bytes for c in compiled)
    assert light < kept / 2

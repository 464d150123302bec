"""This jaxlib computes right numbers: a release that does not is excluded in pyproject.toml."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest


@pytest.mark.parametrize(("dtype", "rows", "rtol"), [(float, 20_000, 1e-12), ("f4", 40_000, 1e-5)])
def test_mapped_product_and_reduction(dtype, rows, rtol):
    """A vmapped small mat-vec and a sum, under jit on CPU: wrong in jaxlib 0.10.2.

    https://github.com/jax-ml/jax/issues/39103. Every Stein correction is made of such programs.
    """
    rng = np.random.default_rng(0)
    m, x = rng.standard_normal((2, 2)).astype(dtype), rng.standard_normal((rows, 2)).astype(dtype)
    f = jax.jit(lambda x: jax.vmap(lambda r: jnp.sum((jnp.asarray(m) @ r) ** 2))(x))
    expected = np.square(x.astype(float) @ m.T.astype(float)).sum(1)
    np.testing.assert_allclose(f(jnp.asarray(x)), expected, rtol=rtol)

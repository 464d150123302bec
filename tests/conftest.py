"""What every test runs under: float64, no silent rank promotion, checked annotations."""

import jax
import jaxtyping
import pytest

jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")

# Before the first import of the package: its shapes and types are checked wherever it is called.
jaxtyping.install_import_hook("steindiff_jax", "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """A thousand compiled programs in one process exhaust its memory maps, and XLA crashes."""
    yield
    jax.clear_caches()

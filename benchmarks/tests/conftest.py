"""What the tests of the benchmarks run under: the same as the library's, whose helpers they use."""

import sys
from pathlib import Path

import jax
import jaxtyping
import pytest

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / name) for name in ("benchmarks", "tests", "examples")]
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_rank_promotion", "raise")
jaxtyping.install_import_hook("steindiff_jax", "beartype.beartype")


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
    """A thousand compiled programs in one process exhaust its memory maps, and XLA crashes."""
    yield
    jax.clear_caches()

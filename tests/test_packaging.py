"""What a user gets from `pip install` and `import`."""

import inspect
import subprocess
import sys
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

import steindiff_jax as sd

OPTIONAL = ("flax", "diffrax", "matplotlib", "optax", "scipy", "sklearn", "safetensors", "tqdm")
PUBLIC = [value for name, value in vars(sd).items() if not name.startswith("_")]


def test_import_needs_no_optional_package():
    """In an interpreter where importing any of them is an error."""
    block = "".join(f"sys.modules[{name!r}] = None; " for name in OPTIONAL)
    code = f"import sys; {block}import steindiff_jax as sd; sd.IPNDM(3); sd.karras_sigmas(3)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_jaxlib_that_computes_wrong_numbers_is_excluded():
    core = {
        r.name: r.specifier for r in map(Requirement, requires("steindiff_jax")) if not r.marker
    }
    assert set(core) == {"jax", "jaxlib", "numpy", "chex", "jaxtyping"}
    assert "0.10.2" not in core["jaxlib"]
    assert "0.10.1" in core["jaxlib"]


@pytest.mark.parametrize(
    "thing", [p for p in PUBLIC if callable(p)], ids=lambda thing: thing.__name__
)
def test_public_names_are_documented(thing):
    assert inspect.getdoc(thing)

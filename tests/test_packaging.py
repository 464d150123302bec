"""What a user gets from `pip install` and `import`."""

import inspect
import shutil
import subprocess
import sys
from importlib.metadata import requires

import pytest
from packaging.requirements import Requirement

import steindiff_jax as sd

OPTIONAL = ("flax", "diffrax", "matplotlib", "optax", "scipy", "sklearn", "safetensors", "tqdm")


def test_import_needs_no_optional_package():
    """In an interpreter where importing any of them is an error."""
    block = "".join(f"sys.modules[{name!r}] = None; " for name in OPTIONAL)
    code = f"import sys; {block}import steindiff_jax as sd; sd.IPNDM(3); sd.karras_sigmas(3)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_jaxlib_that_computes_wrong_numbers_is_excluded():
    core = {
        r.name: r.specifier for r in map(Requirement, requires("steindiff_jax")) if not r.marker
    }
    assert set(core) == {"jax", "jaxlib", "numpy", "jaxtyping"}
    assert "0.10.2" not in core["jaxlib"]
    assert "0.10.1" in core["jaxlib"]


def test_all_is_what_is_public():
    """What a type checker lets a user import is what there is, no more and no less."""
    modules = {name for name, value in vars(sd).items() if inspect.ismodule(value)}
    public = {name for name in vars(sd) if not name.startswith("_")} - modules
    assert public | {"diagnostics", "__version__"} == set(sd.__all__)
    assert len(sd.__all__) == len(set(sd.__all__))


USER = """
import jax
import steindiff_jax as sd

solver = sd.Stein(sd.IPNDM(3), sd.StepEnergy(), sd.Hutchinson(probes=2), basis=sd.Cosine(3))
schedule: sd.Schedule = sd.VPCosine()
denoiser = sd.Network(lambda p, x, t: p * x, 0.5, schedule, "x0")
solution = sd.sample(
    jax.random.key(0), denoiser, (4, 2), sigmas=sd.karras_sigmas(5), solver=solver
)
samples: jax.Array = solution.x


@sd.pytree
class Mine(sd.Rule):
    gamma: float = sd.number(default=0.5, within="[0, 1]")


sd.Stein(sd.DDIM(), Mine(gamma=0.3))
"""


def test_a_type_checker_accepts_a_user_s_file(tmp_path):
    if not (pyright := shutil.which("pyright")):
        pytest.skip("pyright is in the extra `dev`")
    names = "\n".join(f"sd.{name}" for name in sd.__all__)
    (tmp_path / "user.py").write_text(USER + names + "\n")
    command = [pyright, "--pythonpath", sys.executable, "user.py"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout

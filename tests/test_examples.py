"""Every script of examples/ runs, in a reduced form and under a user's settings."""

import importlib
import re
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from safetensors.numpy import load_file

import steindiff_jax as sd

pytest.importorskip("sklearn", reason="examples need pip install -e '.[dev]'")
HERE = Path(__file__)
# Those that run elsewhere, and where.
ELSEWHERE = {"diffrax_composition": "test_diffrax.py", "multihost": "test_multihost.py"}
# Those of the colour images need data that are not part of the repository.
IMAGES = {"images", "train_images", "images_classifier"}


@pytest.fixture(scope="module", autouse=True)
def _quick_compilation():
    """Most of the time here is XLA's, which need not optimise what runs once."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def _users_settings():
    with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def script(monkeypatch, tmp_path):
    """An example, with arguments and some of its constants replaced; its picture goes elsewhere."""

    def load(name, *arguments, **constants):
        module = importlib.import_module(name)
        if hasattr(module, "PICTURE"):
            constants["PICTURE"] = tmp_path / f"{name}.png"
        for constant, value in constants.items():
            monkeypatch.setattr(module, constant, value)
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        return module

    return load


def test_every_script_is_run():
    folder = HERE.parents[1] / "examples"
    scripts = {path.stem for path in folder.glob("*.py") if "__main__" in path.read_text()}
    here = set(re.findall(r'script\(\s*"(\w+)"', HERE.read_text()))
    assert here | set(ELSEWHERE) == scripts - IMAGES
    assert all(name in (HERE.parent / test).read_text() for name, test in ELSEWHERE.items())


@sd.pytree
class Images:
    """The denoiser of flat samples, for images (batch, 8, 8, 1)."""

    flat: Any

    def __call__(self, x, sigma):
        return self.flat(x.reshape(len(x), -1), sigma).reshape(x.shape)


def blurred_scans(*classes):
    """Blurred digits: their denoiser is exact, and compiles sooner than the network."""
    import digits
    from mixture import Mixture

    x, label = digits.images()
    scans = x.reshape(-1, 64)[np.isin(label, classes)]
    return Mixture(jnp.asarray(scans[:150]), 0.1)  # as many of each, for one program


def test_mixture(script):
    mixture = script("mixture", SAMPLES=500, FINE=50, SOLVERS={"iPNDM-3": sd.IPNDM(3)})
    distances = mixture.main()
    plain, corrected = distances["iPNDM-3"]
    assert corrected < plain / 2
    # A fine solve is about as far from the data as other draws of the data are.
    assert distances["flow"] < 2 * distances["draws"]
    assert mixture.PICTURE.exists()


@pytest.mark.slow
def test_train_your_own(script):
    solvers = {"five": (sd.Stein(sd.IPNDM(3)), 5), "fine solve": (sd.DPMpp2M(), 50)}
    distances = script(
        "train_your_own", UPDATES=200, BATCH=128, SAMPLES=500, SOLVERS=solvers
    ).main()
    # 1 is the distance of a point at the mean.
    assert distances["fine solve"][0] < 0.3
    assert distances["five"][1] < 0.3


def test_own_solver(script):
    own = script("own_solver", SAMPLES=200)
    solvers = {name: own.SOLVERS[name] for name in ("GaussianTwoStep", "Stein(GaussianTwoStep)")}
    table = script("own_solver", SOLVERS=solvers).main()
    assert all(abs(order - 2) < 0.2 for order, _, _ in table.values())
    # Its first step is DDIM's, from sigma = 80. The correction is exact there too.
    assert table["GaussianTwoStep"][1] < 1e-3
    assert table["Stein(GaussianTwoStep)"][1] < 1e-4


def test_own_basis(script):
    own = script("own_basis", SAMPLES=20, FINE=10)
    haar = own.haar(8)
    assert_allclose(haar @ haar.T, np.eye(8), atol=1e-12)
    basis, x = own.Haar(), jnp.ones((3, 8, 8, 2))
    assert_allclose(basis.inverse(basis.transform(x)), x, rtol=1e-5)
    # An image of one brightness lies in the first band.
    partition = basis.partition((8, 8, 2))
    assert_allclose(partition.inner(basis.transform(x), basis.transform(x))[:, 1:], 0, atol=1e-6)
    assert list(partition.sizes) == [2, 6, 24, 96]
    distances = script("own_basis", BASES={"Haar()": basis}).main()
    assert all(distance < 1 for distance in distances["Haar()"])


def linear(matrix, x, sigma):
    del sigma
    return (x.reshape(len(x), -1) @ matrix.T).reshape(x.shape)


class TestOwnEstimator:
    def test_trace(self, script):
        own = script("own_estimator", SAMPLES=100)
        table = script("own_estimator", SOLVERS={"3M": own.SOLVERS["3M"]}).main()
        for sigma in own.SIGMAS:
            error, deviation = table["HutchPlusPlus(4, 4)", sigma]
            # The trace of 64 columns is itself rounded.
            assert abs(error) < 5 * deviation / np.sqrt(own.SAMPLES) + 1e-4
        # Between few modes J is close to a matrix of low rank.
        assert table["HutchPlusPlus(4, 4)", 0.5][1] < 0.7 * table["Hutchinson(12)", 0.5][1]

    def test_exact_cases(self, script):
        """The trace is exact for a Jacobian of at most its rank, and for a multiple of 1."""
        own = script("own_estimator")
        rng = np.random.default_rng(0)
        low = rng.standard_normal((8, 3)) @ rng.standard_normal((3, 8))
        x = jnp.asarray(rng.standard_normal((5, 2, 4)), jnp.float32)
        keys = jax.random.split(jax.random.key(0), len(x))
        for matrix in map(jnp.float32, (low, 0.7 * np.eye(8))):
            denoiser, sigma = jax.tree_util.Partial(linear, matrix), jnp.float32(1)
            estimator = own.HutchPlusPlus(rank=4, probes=2)
            assert_allclose(estimator(keys, denoiser, x, sigma)[0], denoiser(x, sigma), rtol=1e-5)
            found = own.trace(estimator, denoiser, x, sigma)
            assert_allclose(found, jnp.full(5, jnp.trace(matrix)), rtol=1e-4)
        with pytest.raises(ValueError, match="rank must be between 1 and 7, got 8"):
            own.HutchPlusPlus(rank=8)(keys, denoiser, x, sigma)

    def test_rule(self, script):
        """Its coefficient by its definition; 1 where nothing was added."""
        rule = script("own_estimator").FixedShare(0.3)
        moments = jnp.array([2.0, 2.0, -1.0, 2.0]), jnp.array([6.0, 0.1, 1.0, 0.0])
        (gamma,) = rule.coefficients(moments, jnp.ones(4), jnp.ones(()), jnp.ones(()))
        assert_allclose(gamma, [np.sqrt(0.1), 1.0, 0.0, 1.0], rtol=1e-6)


TRACES = []


@sd.pytree
class Counted(sd.Wrapper):
    """A solver that notes when Python runs through it, that is, when it is traced."""

    inner: sd.Solver

    def step(self, *arguments, **options):
        TRACES.append(None)
        return self.inner.step(*arguments, **options)


def test_guidance_sweep(script, monkeypatch):
    conditional, free = Images(blurred_scans(3)), Images(blurred_scans(*range(10)))
    sweep = script("guidance_sweep", SAMPLES=20, SCALES=(1.0,))
    solvers = {name: (Counted(s), min(steps, 20)) for name, (s, steps) in sweep.SOLVERS.items()}
    monkeypatch.setattr(
        sweep.digits, "load", lambda label: free if label[0] == sweep.digits.NULL else conditional
    )
    script("guidance_sweep", SOLVERS=solvers).sweep()
    traced = len(TRACES)
    assert traced >= 3
    distances = script("guidance_sweep", SCALES=(1.0, 2.0, 3.0)).main()
    assert len(TRACES) == traced
    rmse = np.array([rmse for _, rmse in distances])
    assert np.all(rmse[:, 1] < rmse[:, 0])
    assert sweep.PICTURE.exists()


def test_quickstart(script, capsys):
    """At three steps: on this law, of narrow clumps, plain iPNDM-3 is ahead from five on."""
    denoisers = {"all": Images(blurred_scans(*range(10))), "threes": Images(blurred_scans(3))}
    quickstart = script("quickstart", denoisers=denoisers, STEPS=3)
    steps = {"2M": 3, "iPNDM-3": 3, "default": 3, "reference": 100}
    solvers = {name: (solver, steps[name]) for name, (solver, _) in quickstart.solvers.items()}
    script("quickstart", solvers=solvers).main()
    rows = re.findall(r"(iPNDM-3|default|reference) +([.\d]+) +([.\d]+)", capsys.readouterr().out)
    distances = np.array([row[1:] for row in rows], float).reshape(2, 3, 2)
    plain, corrected, reference = np.moveaxis(distances, 1, 0)
    assert np.all(corrected < plain)
    assert_array_equal(reference, 0)
    assert quickstart.PICTURE.exists()


def test_diagnostics(script, monkeypatch, capsys):
    """Draws of the distribution whose denoiser it is: the ratio is 1 at every sigma."""
    data = blurred_scans(1, 7)
    draws = np.float32(data.draw(0, 200)).reshape(-1, 8, 8, 1), np.zeros(200, np.int32)
    length = sd.Stein(sd.IPNDM(2)), sd.Stein(sd.IPNDM(2), sd.PosteriorLength(gamma_max=1.0))
    solvers = dict(zip(("longer", "shorter"), length, strict=True))  # one program
    diagnostics = script("diagnostics", N=100, SOLVERS=solvers)
    monkeypatch.setattr(diagnostics.digits, "images", lambda: draws)
    monkeypatch.setattr(diagnostics.digits, "load", lambda _: Images(data))
    diagnostics.main()
    out = capsys.readouterr().out
    ratio, error = (
        np.array(re.search(rf"{name}((?: +[.\d]+)+)$", out, re.MULTILINE)[1].split(), float)
        for name in ("ratio", "standard error")
    )
    assert len(ratio) == 10
    assert np.all(np.abs(ratio - 1) < 5 * error + 1e-3)  # three digits are printed
    assert diagnostics.PICTURE.exists()


@pytest.mark.slow
def test_train_digits(script, tmp_path):
    import digits

    small = {"CHUNK": 2, "WARMUP": 1, "BATCH": 8, "WEIGHTS": tmp_path / "weights"}
    train = script("train_digits", "--steps", 4, "--directory", tmp_path / "runs", **small)
    train.main()
    found, expected = load_file(train.WEIGHTS), load_file(digits.WEIGHTS)
    assert {k: v.shape for k, v in found.items()} == {k: v.shape for k, v in expected.items()}

    # With a last layer of 0 the loss is E|(x - c_skip y) / c_out|^2, here once more in numpy.
    x, label = (part[:180] for part in digits.images())
    weights = digits.network()[1]["params"]
    weights = weights | {"Conv_1": jax.tree.map(jnp.zeros_like, weights["Conv_1"])}
    rng, losses = np.random.default_rng(0), []
    for _ in range(16):
        sigma = np.exp(train.P_MEAN + train.P_STD * rng.standard_normal((180, 1, 1, 1)))
        y, total = x + sigma * rng.standard_normal(x.shape), sigma**2 + 0.25
        losses.append(((x - 0.25 / total * y) ** 2 * total / sigma**2 / 0.25).mean())
    found = train.validate(weights, (x, label), jax.random.key(0))
    error = np.std(losses) / np.sqrt(16)
    assert abs(found - np.mean(losses)) < 5 * np.sqrt(2) * error

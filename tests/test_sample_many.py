"""`sample_many`: the samples that `sample` draws with their keys, whatever the batches."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import mixture
from damage import Payload, damaged
from numpy.testing import assert_allclose, assert_array_equal
from tqdm import tqdm

import steindiff_jax as sd

KEY, N, D = jax.random.key(3), 21, 2
GRID = sd.karras_sigmas(4, 0.1, 10.0)
DENOISER = mixture()
EACH = sd.Stein(sd.IPNDM(2), statistics="sample")  # with probes of its own
TRACES = []


def layer(parameters, x, t, label):
    """A stand-in for a conditional network, which notes when it is traced."""
    TRACES.append(None)
    return parameters[label] - 0.1 * x * t[:, None]


def many(n=N, batch_size=8, denoiser=DENOISER, solver=EACH, **kwargs):
    return sd.sample_many(KEY, denoiser, n, batch_size, (D,), sigmas=GRID, solver=solver, **kwargs)


def keys(first, last):
    return jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(first, last))


def draw(first, last, denoiser=DENOISER, solver=EACH):
    """Those samples by `sample`, in one batch."""
    shape = last - first, D
    return sd.sample(keys(first, last), denoiser, shape, sigmas=GRID, solver=solver).x


@pytest.fixture(scope="module")
def whole():
    return np.asarray(draw(0, N))


@pytest.mark.parametrize(("batch_size", "sizes"), [(8, [8, 8, 5]), (7, [7, 7, 7]), (100, [21])])
def test_the_same_whatever_the_batch_size(batch_size, sizes, whole):
    batches = list(many(batch_size=batch_size))
    assert [len(batch) for batch in batches] == sizes
    assert all(isinstance(batch, np.ndarray) for batch in batches)
    assert_allclose(np.concatenate(batches), whole, rtol=0, atol=1e-12)


@pytest.mark.parametrize("solver", [sd.DPMpp2MSDE(), sd.Churn()], ids=type)
def test_stochastic_solvers_draw_for_each_sample(solver):
    drawn = np.concatenate(list(many(solver=solver)))
    assert_allclose(drawn, draw(0, N, solver=solver), rtol=0, atol=1e-11)
    assert len(np.unique(drawn, axis=0)) == N


def test_statistics_of_a_ragged_batch():
    """Its own samples fill it, so that nothing made up has a part in gamma."""
    solver = sd.Stein(sd.DPMpp2M(), sd.StepEnergy())
    *_, last = many(solver=solver)
    assert_allclose(last, draw(N - 8, N, solver=solver)[-5:], rtol=0, atol=1e-12)


def test_one_compilation_and_conditioning():
    """Labels follow their samples; all batches run one program."""
    label = np.arange(N) % 3
    means = jnp.asarray([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])

    def network(label):
        return sd.Network(layer, means, sd.EDM(), "x0", cond={"label": jnp.asarray(label)})

    before = len(TRACES)
    drawn = list(many(denoiser=network(label)))
    first = len(TRACES) - before
    many_again = list(many(denoiser=network(label + 0), batch_size=8))
    assert len(TRACES) - before == first > 0
    assert_array_equal(np.concatenate(many_again), np.concatenate(drawn))
    expected = draw(0, N, denoiser=network(label))
    assert_allclose(np.concatenate(drawn), expected, rtol=0, atol=1e-12)
    with pytest.raises(
        ValueError, match=r"one row for each of the n=20 samples, got shape \(21,\)"
    ):
        many(20, denoiser=network(label))


def test_a_guidance_scale_for_each_sample():
    """Its rows go with their samples, whatever the batches."""
    label = np.arange(N) % 3
    means = jnp.asarray([[-1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    one, other = (
        sd.Network(layer, means, sd.EDM(), "x0", cond={"label": jnp.asarray(value)})
        for value in (label, 0 * label)
    )
    denoiser = sd.guided(one, other, jnp.linspace(0.5, 4.0, N))
    drawn = np.concatenate(list(many(denoiser=denoiser)))
    assert_allclose(drawn, draw(0, N, denoiser=denoiser), rtol=0, atol=1e-12)
    assert np.abs(drawn - draw(0, N, denoiser=sd.guided(one, other, 2.0))).max() > 1e-3


def test_progress():
    bars = []

    def progress(batches):
        bars.append(tqdm(batches, disable=True))
        return bars[0]

    stream = many(progress=progress)
    next(stream)
    assert bars[0].total == 3
    assert len(list(stream)) == 2


def written(directory):
    files = sorted(Path(directory).glob("*.npy"))
    return {file.name: file.stat().st_mtime_ns for file in files}, files


def test_directory(tmp_path, whole):
    """Stopped after one batch, with another half written, it goes on; a third run does nothing."""

    def stop(batches):
        yield batches[0]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        many(directory=tmp_path, progress=stop)
    begun, _ = written(tmp_path)
    assert list(begun) == ["000000000000.npy"]
    (tmp_path / "000000000008.npy.0.part").write_bytes(b"half")
    todo = []
    blocks = list(
        many(directory=tmp_path, progress=lambda batches: todo.extend(batches) or batches)
    )
    assert todo == [8, 16]
    assert_allclose(np.concatenate(blocks), whole, rtol=0, atol=1e-12)
    ended, files = written(tmp_path)
    assert begun.items() <= ended.items()
    assert_array_equal(np.concatenate([np.load(file) for file in files]), np.concatenate(blocks))
    assert not list(tmp_path.glob("*.part"))
    again = many(directory=tmp_path, progress=lambda batches: [][: len(batches)])
    assert_array_equal(np.concatenate(list(again)), np.concatenate(blocks))
    assert written(tmp_path)[0] == ended


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"n": 22}, "n is 21 there, got 22"),
        ({"batch_size": 7}, "batch_size is 8 there, got 7"),
        ({"solver": sd.DDIM()}, "solver is"),
        ({"denoiser": mixture(seed=1)}, "denoiser is"),
    ],
)
def test_directory_of_another_run(tmp_path, change, name):
    list(many(directory=tmp_path))
    with pytest.raises(ValueError, match=f"another run: {name}"):
        many(directory=tmp_path, **change)


def test_damaged_files_are_errors(tmp_path, monkeypatch):
    """A hundred of both kinds: samples of the right shape, or a ValueError that names it."""
    list(many(3, 3, directory=tmp_path))
    whole = {file: file.read_bytes() for file in sorted(tmp_path.iterdir())}
    assert [file.name for file in whole] == ["000000000000.npy", "run.json"]
    monkeypatch.setattr(os, "fsync", lambda _: None)  # nothing here has to survive a power cut
    rng, refused = np.random.default_rng(0), 0
    for _ in range(100):
        file = list(whole)[rng.integers(2)]
        file.write_bytes(damaged(rng, file, whole[file]))
        try:
            (x,) = many(3, 3, directory=tmp_path)
        except ValueError as error:
            message = str(error)
            refused += 1
        else:
            message = str(tmp_path)
            assert x.shape == (3, D)
        assert str(tmp_path) in message
        file.write_bytes(whole[file])
    assert refused > 50


def test_a_pickle_is_refused_and_not_run(tmp_path):
    list(many(3, 3, directory=tmp_path))
    payload = Payload(tmp_path / "was here")
    for write in (
        lambda stream: pickle.dump(payload, stream),
        lambda stream: np.save(stream, np.array([payload]), allow_pickle=True),
    ):
        with (tmp_path / "000000000000.npy").open("wb") as stream:
            write(stream)
        with pytest.raises(ValueError, match=r"000000000000.npy is damaged: .* delete it"):
            list(many(3, 3, directory=tmp_path))
    assert not payload.file.exists()


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="where memory is read from")
def test_a_million_samples_need_no_more_memory_than_a_hundred_thousand():
    """In a process of its own. Kept, they would add 55 MiB; the allocator takes and gives a few."""
    soak = Path(__file__).with_name("soak.py")
    run = subprocess.run([sys.executable, soak], capture_output=True, text=True, check=True)
    print(run.stdout)
    first, last = (float(line.split()[-2]) for line in run.stdout.splitlines())
    assert last - first < 16


@pytest.mark.parametrize("name", ["n", "batch_size"])
def test_none(name):
    with pytest.raises(ValueError, match=f"^{name} must be at least 1, got 0"):
        many(**{name: 0})


def test_keys_one_for_each_sample(whole):
    """A sample depends on its own key alone; the number of keys is that of the samples."""
    order = np.random.default_rng(0).permutation(N)
    shuffled = sd.sample(keys(0, N)[order], DENOISER, (N, D), sigmas=GRID, solver=EACH).x
    assert_allclose(shuffled, whole[order], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="one for each of the 4 samples, got 3"):
        sd.sample(keys(0, 3), DENOISER, (4, D), sigmas=GRID, solver=EACH)


def test_start_may_be_donated():
    """In one's own jit the samples then take the place of the noise."""
    x = jnp.ones((N, D))

    def program(x):
        return sd.sample(KEY, DENOISER, sigmas=GRID, solver=EACH, x_init=x).x

    plan = jax.jit(program, donate_argnums=0).lower(x).compile().memory_analysis()
    assert plan.alias_size_in_bytes == x.nbytes


@pytest.mark.slow
def test_old_style_keys():
    """Arrays of two words, one or one for each sample, give what the new ones do."""
    old, new = jax.random.PRNGKey(3), keys(0, 4)
    run = {"sigmas": GRID, "solver": EACH}
    assert_array_equal(
        sd.sample(old, DENOISER, (4, D), **run).x, sd.sample(KEY, DENOISER, (4, D), **run).x
    )
    assert_array_equal(
        sd.sample(jax.random.key_data(new), DENOISER, (4, D), **run).x,
        sd.sample(new, DENOISER, (4, D), **run).x,
    )

"""The Fréchet distance of benchmarks/fid.py, its streams and features, and the paper's table."""

import csv
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_edm
from closed_forms import mixture, normal, run
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from scipy.linalg import sqrtm

import digits
import fid
import paper_table
import steindiff_jax as sd


def random_covariance(rng, d):
    root = rng.standard_normal((d, 2 * d))
    return root @ root.T / d


def test_frechet_distance_is_that_of_scipy():
    rng = np.random.default_rng(0)
    mean, other = rng.standard_normal((2, 12))
    a, b = random_covariance(rng, 12), random_covariance(rng, 12)
    expected = np.sum((mean - other) ** 2) + np.trace(a + b - 2 * sqrtm(a @ b).real)
    found = fid.frechet_distance(fid.Statistics(mean, a), fid.Statistics(other, b))
    assert found == pytest.approx(expected, rel=1e-10)


def test_frechet_distance_of_singular_gaussians():
    """With common axes it is |m|^2 + sum (sqrt(a_i) - sqrt(b_i))^2, also where a_i = 0."""
    rng = np.random.default_rng(1)
    axes = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    a, b = np.array([4.0, 1, 0, 0, 0.5, 9]), np.array([1.0, 0, 0, 2, 0.5, 8])
    mean = rng.standard_normal(6)
    found = fid.frechet_distance(
        fid.Statistics(mean, axes * a @ axes.T), fid.Statistics(np.zeros(6), axes * b @ axes.T)
    )
    assert found == pytest.approx(mean @ mean + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2), rel=1e-7)


def test_frechet_distance_of_draws():
    """Of n draws each of one normal law: (chi^2_(d (d + 1) / 2) + 2 chi^2_d) / n."""
    rng = np.random.default_rng(2)
    n, d = 20_000, 30
    a, b = (fid.statistics(np.split(x, 10), np.asarray) for x in rng.standard_normal((2, n, d)))
    mean, std = d * (d + 1) / 2 + 2 * d, np.sqrt(d * (d + 1) + 8 * d)
    assert n * fid.frechet_distance(a, b) == pytest.approx(mean, abs=5 * std)


@pytest.mark.parametrize("batch", [1, 7, 40])
def test_statistics_stream(batch, monkeypatch):
    monkeypatch.setattr(fid, "KEPT", 10)
    images = 1e3 + np.random.default_rng(3).standard_normal((40, 2, 2, 1))
    stream = (images[i : i + batch] for i in range(0, 40, batch))
    found = fid.statistics(stream, lambda x: x.reshape(len(x), -1))
    flat = images.reshape(40, -1)
    assert_allclose(found.mean, flat.mean(axis=0), rtol=1e-14)
    assert_allclose(found.covariance, np.cov(flat.T), rtol=1e-10)
    assert_array_equal(found.first, np.float32(flat[:10]))


def test_one_image_has_no_covariance():
    with pytest.raises(ValueError, match="two images are needed, got 1"):
        fid.statistics([np.zeros((1, 3))], np.asarray)


def test_images_and_arrays_are_read_in_order(tmp_path):
    images = np.random.default_rng(4).integers(0, 256, (5, 4, 4, 3), np.uint8)
    for i, image in enumerate(images):
        Image.fromarray(image).save(tmp_path / f"{i}.png")
    (tmp_path / "notes.txt").write_text("no image")
    assert_array_equal(np.concatenate(list(fid.read(tmp_path, 2))), images)
    arrays = tmp_path / "arrays"
    x = images / 127.5 - 1
    list(
        sd.sample_many(
            jax.random.key(0), mixture(), 5, 2, (2,), sigmas=np.array([2.0, 0.0]), directory=arrays
        )
    )
    assert sum(map(len, fid.read(arrays))) == 5
    assert_array_equal(fid.as_bytes(x), images)
    assert_array_equal(
        fid.as_bytes(np.array([-2.0, 2.0]).reshape(2, 1, 1, 1))[:, 0, 0, 2], [0, 255]
    )
    (empty := tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="neither arrays"):
        next(fid.read(empty))


def test_features_by_name():
    assert fid.load_features("numpy:asarray") is np.asarray
    with pytest.raises(ValueError, match="module:function, got 'numpy'"):
        fid.load_features("numpy")


def test_features_of_torchscript(tmp_path):
    """Bytes in the order of torch, and its flag for features in place of classes."""
    torch = pytest.importorskip("torch", reason="torch is in the extra `parity`")

    class Network(torch.nn.Module):
        def forward(self, x, return_features: bool = False):
            mean = x.to(torch.float32).mean(dim=(2, 3))
            return mean if return_features else mean[:, :1]

    torch.jit.script(Network()).save(str(tmp_path / "network.pt"))
    images = np.random.default_rng(5).integers(0, 256, (4, 3, 5, 3), np.uint8)
    found = fid.load_features(str(tmp_path / "network.pt"))(images)
    assert_allclose(found, images.mean(axis=(1, 2)), rtol=1e-6)


@pytest.fixture(scope="module")
def scans():
    x, _ = digits.images()
    return x, fid.digits_classifier()


def test_the_classifier_tells_scans_from_noise(scans):
    """Half of the scans are near the other half; noise of their variance is far."""
    x, features = scans
    order = np.random.default_rng(6).permutation(len(x))
    one, other = (fid.statistics([x[half]], features) for half in np.array_split(order, 2))
    noise = np.float32(x.mean() + x.std() * np.random.default_rng(7).standard_normal(x.shape))
    near, precision, recall = fid.compare(one, other)
    far, none, _ = fid.compare(one, fid.statistics([noise], features))
    assert far > 20 * near
    assert min(precision, recall) > 0.8
    assert none < 0.1


@pytest.mark.parametrize("name", paper_table.SOLVERS)
def test_evaluations_of_the_table(name):
    """No more than its column says, and no fewer but for Heun, which takes an odd number."""
    for evaluations in paper_table.EVALUATIONS:
        k = paper_table.steps_of(name, evaluations)
        sigmas = jnp.pad(sd.karras_sigmas(k), (0, 20 - k))  # one program for all
        solution = run(mixture(), sigmas, paper_table.SOLVERS[name], normal(2, 2))
        assert solution.info.nfe == evaluations - (name == "Heun" and evaluations % 2 == 0)


def test_paper_table_takes_a_snapshot(tmp_path):
    """The network asked for class 1 and 2 of its three, and what EDM's code returned."""
    name = test_edm.SMALLEST
    file, shape = test_edm.write(tmp_path, name), (*test_edm.peer.inputs().shape[1:],)
    others = ["--reference", "-", "--features", "-", "--size", "8", "--samples", "3"]
    options = paper_table.parser().parse_args([str(file), *others])
    denoiser, event, ends = paper_table.checkpoint(options)
    assert (event, ends) == (shape, {})
    sigma = test_edm.configuration(name)["sigmas"][1]
    x = test_edm.peer.inputs() * np.hypot(1, np.float32(sigma))
    found = test_edm.evaluate(denoiser.rows(lambda rows: rows[1:]), x, np.float32(sigma))
    assert_allclose(found, test_edm.reference()[f"{name}/outputs"][1], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_paper_table_goes_on_where_it_was(monkeypatch, tmp_path, capsys):
    arguments = ["--samples", "40", "--batch", "20", "--solvers", "2M", "Heun"]
    output = tmp_path / "cells.csv"
    for evaluations in (["5"], ["5", "6"]):
        options = [*arguments, "--output", str(output), "--evaluations", *evaluations]
        monkeypatch.setattr(sys, "argv", ["paper_table.py", *options])
        with jax.enable_x64(False), jax.numpy_rank_promotion("allow"):
            paper_table.main()
    rows = list(csv.reader(output.read_text().splitlines()))
    assert len(rows) == len({tuple(row[:4]) for row in rows}) == 2 * 2 * 2 * 3
    assert "| Heun | paper |" in capsys.readouterr().out

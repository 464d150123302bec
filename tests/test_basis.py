"""Bases: orthonormal transforms, bands, and one of a user."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from closed_forms import Banded, normal, run, unoptimised  # noqa: F401
from numpy.testing import assert_allclose, assert_array_equal
from scipy import fft

import steindiff_jax as sd
from steindiff_jax.stein import default_basis

CASES = [
    (sd.Whole(), (4, 2)),
    (sd.Cosine(), (8, 8, 3)),
    (sd.Cosine(2), (5, 9, 2)),
    (sd.Cosine(8, colour=False), (3, 4, 6, 1)),
    (sd.Cosine(8), (1, 1, 3)),
    (sd.Cosine(1), (7, 1)),
]
cases = pytest.mark.parametrize(("basis", "event"), CASES, ids=str)


@sd.pytree
class Haar(sd.Basis):
    """Of a user: sums and differences of neighbours in a vector, two bands."""

    def labels(self, event):
        return np.arange(event[0]) // (event[0] // 2)

    def transform(self, x):
        even, odd = x[:, ::2], x[:, 1::2]
        return jnp.concatenate([even + odd, even - odd], axis=1) / np.sqrt(2)

    def inverse(self, coefficients):
        sums, differences = jnp.split(coefficients, 2, axis=1)
        pairs = jnp.stack([sums + differences, sums - differences], axis=2) / np.sqrt(2)
        return pairs.reshape(coefficients.shape)


@pytest.mark.parametrize("event", [(8, 8, 3), (5, 9, 2), (3, 4, 6, 1)], ids=str)
def test_the_cosine_transform_is_scipy_s(event):
    x = normal(4, *event)
    axes = range(1, x.ndim)
    assert_allclose(
        sd.Cosine().transform(x), fft.dctn(np.asarray(x), norm="ortho", axes=axes), atol=1e-13
    )


@cases
def test_orthonormal(basis, event):
    x, y = normal(4, *event), normal(4, *event, seed=1)
    assert_allclose(basis.inverse(basis.transform(x)), x, atol=1e-13)
    inner = basis.partition(event).inner
    together = inner(basis.transform(x), basis.transform(y)).sum(1)
    assert_allclose(together, np.sum(x * y, axis=tuple(range(1, x.ndim))), atol=1e-12)


@cases
def test_bands(basis, event):
    """Labels without gaps; sizes, inner products and spreading against loops over the bands."""
    labels, partition = basis.labels(event), basis.partition(event)
    sizes = partition.sizes
    assert labels.shape == event
    assert_array_equal(np.unique(labels), np.arange(len(sizes)))
    assert_array_equal(sizes, [np.sum(labels == k) for k in range(len(sizes))])
    assert sizes.sum() == np.prod(event)
    a, b, values = normal(4, *event), normal(4, *event, seed=1), normal(4, len(sizes))
    products = np.multiply(a, b)
    expected = [[row[labels == k].sum() for k in range(len(sizes))] for row in products]
    assert_allclose(partition.inner(a, b), expected, atol=1e-12)
    for value in (values, values[:1], values[0]):
        rows = np.atleast_2d(value)
        spread = np.broadcast_to(partition.spread(value), (len(rows), *event))
        for k in range(len(sizes)):
            assert np.all(spread[:, labels == k] == rows[:, k, None])


def test_bands_are_octaves_of_frequency():
    """Of a cosine along one axis, all energy is in the band of its octave, whatever the colour."""
    basis, n = sd.Cosine(8), 32
    transform = jax.jit(basis.transform)
    partition = basis.partition((n, n, 3))
    assert len(partition.sizes) == 12
    place, seen = np.arange(n) + 0.5, []
    for frequency in (0, 1, 2, 3, 4, 7, 8, 15, 16, 31):
        wave = np.cos(np.pi * frequency * place / n)[:, None, None]
        grey = np.broadcast_to(wave, (1, n, n, 3))
        coloured = grey * np.array([1.0, -1.0, 0.0])
        energies = [partition.inner(c, c)[0] for c in map(transform, (grey, coloured))]
        bands = [int(np.argmax(energy)) for energy in energies]
        assert_allclose([e[k] / e.sum() for e, k in zip(energies, bands, strict=True)], 1.0)
        assert bands[1] == bands[0] + 6
        seen.append(bands[0])
    assert seen == [0, 1, 2, 2, 3, 3, 4, 4, 5, 5]


def test_an_axis_that_is_shorter_is_of_the_same_frequencies():
    """Frequencies are per length: half as many pixels along one axis, the same picture."""
    wide, half = sd.Cosine(8).labels((16, 16, 1)), sd.Cosine(8).labels((16, 8, 1))
    assert_array_equal(half[:, 0], wide[:, 0])
    assert_array_equal(half[0], wide[0, ::2])


@pytest.mark.parametrize("batch", [1, 4, 64, 1000])
@pytest.mark.parametrize("event", [(32, 32, 3), (16, 16, 1), (8, 64, 64, 4), (28, 28, 1)], ids=str)
def test_the_default_has_numbers_enough(batch, event):
    """200 in a batch for each band, and no finer basis has them."""
    basis = default_basis((batch, *event))
    assert batch * basis.partition(event).sizes.min() >= 200
    if isinstance(basis, sd.Cosine) and basis.bands < 8:
        finer = sd.Cosine(basis.bands + 1).partition(event).sizes
        assert batch * finer.min() < 200 or len(finer) == len(basis.partition(event).sizes)


def test_the_default_by_shape():
    assert len(default_basis((1, 32, 32, 3)).partition((32, 32, 3)).sizes) > 2
    sizes = [len(default_basis((n, 32, 32, 3)).partition((32, 32, 3)).sizes) for n in (1, 16, 256)]
    assert sizes == sorted(set(sizes))
    for shape in ((1000, 2), (1000, 500), (1, 4, 4, 3), (5,), (4, 0, 3)):
        assert default_basis(shape) == sd.Whole()


def test_bands_must_be_counted():
    with pytest.raises(ValueError, match="bands must be at least 1, got 0"):
        sd.Cosine(0)


def test_a_basis_of_the_user():
    """Data that vary more in sums than in differences of neighbours: exact in its own basis."""
    data = Banded(normal(6), jnp.array([4.0, 0.01]), Haar())
    x = normal(8, 6, seed=2, scale=3.0)
    solution = run(data, [3.0, 1.0, 0.2], sd.Stein(sd.DPMpp2M(), basis=Haar()), x)
    assert_allclose(solution.x, data.flow(x, 3.0, 0.2), rtol=1e-8)
    assert solution.info.gamma.shape == (2, 2)
    whole = run(data, [3.0, 1.0, 0.2], sd.Stein(sd.DPMpp2M(), basis=sd.Whole()), x)
    assert jnp.abs(whole.x - solution.x).max() > 1e-2


def test_the_default_basis_in_a_run():
    shape = (16, 16, 16, 3)
    data = Banded(normal(*shape[1:]), 0.5 ** jnp.arange(9.0), sd.Cosine(8))
    solution = sd.sample(jax.random.key(0), data, shape, sigmas=np.array([3.0, 1.0, 0.2]))
    assert solution.info.gamma.shape == (2, len(default_basis(shape).partition(shape[1:]).sizes))

"""Fréchet distance, precision and recall between images, in the features of any network.

    python fid.py                                             # the digits; two minutes
    python fid.py bedrooms samples --features inception-2015-12-05.pt
    python fid.py cifar10-32x32.npz samples --features inception-2015-12-05.pt

A place is a folder of images or of `sample_many`'s arrays, or the .npz of a reference (mu, sigma,
as EDM and pytorch-fid publish them). Features: a TorchScript file that maps (n, 3, h, w) of bytes,
as the Inception of StyleGAN, which defines FID (arXiv:1706.08500); a folder of transformers, as
DINOv2's (FD-DINOv2, arXiv:2306.04675); or `module:function` of your own. FID is biased by the
number of samples: compare at one number alone, 50,000 by custom. Precision and recall
(arXiv:1904.06991, by `prdc`) are those of the first 10,000. Without arguments: scans of digits
against samples of five steps, in the features of a small classifier, which no published figure can
be compared with.
"""

import argparse
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
from sklearn.neural_network import MLPClassifier
from tqdm import tqdm

import _path  # noqa: F401
import digits
import metrics
import steindiff_jax as sd

Features = Callable[[np.ndarray], np.ndarray]  # images (n, h, w, c) -> (n, features)
KEPT, NEIGHBOURS = 10_000, 3


class Statistics(NamedTuple):
    """Mean (k,) and covariance (k, k) of features, and the first of them (at most KEPT, k)."""

    mean: np.ndarray
    covariance: np.ndarray
    first: np.ndarray | None = None


def statistics(batches: Iterable[np.ndarray], features: Features) -> Statistics:
    """Of a stream of images (n, h, w, c); no more of it is held than a batch."""
    count, mean, scatter, first = 0, 0.0, 0.0, []
    for images in batches:
        found = np.float64(features(images))
        n, center = len(found), found.mean(axis=0)
        gap, total = center - mean, count + n
        # Chan, Golub and LeVeque's update: no difference of large sums.
        scatter += (found - center).T @ (found - center) + np.outer(gap, gap) * count * n / total
        mean, count = mean + gap * n / total, total
        first.append(np.float32(found[: max(KEPT + n - total, 0)]))
    if count < 2:
        raise ValueError(f"at least two images are needed, got {count}")
    return Statistics(mean, scatter / (count - 1), np.concatenate(first))


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """||m_a - m_b||^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson and Landau 1982).

    The trace of the root is the sum of the singular values of R_a^T R_b, with C = R R^T: real and
    stable also where a covariance is singular.
    """

    def root(covariance: np.ndarray) -> np.ndarray:
        values, vectors = np.linalg.eigh(covariance)
        return vectors * np.sqrt(np.maximum(values, 0))

    mixed = np.linalg.svd(root(a.covariance).T @ root(b.covariance), compute_uv=False).sum()
    gap = a.mean - b.mean
    return float(gap @ gap + np.trace(a.covariance) + np.trace(b.covariance) - 2 * mixed)


def compare(reference: Statistics, samples: Statistics) -> tuple[float, float, float]:
    """Fréchet distance, precision and recall, these NaN where a reference has no features."""
    distance = frechet_distance(reference, samples)
    if reference.first is None or samples.first is None:
        return distance, np.nan, np.nan
    return distance, *metrics.precision_recall(reference.first, samples.first, NEIGHBOURS)


# --- Images --------------------------------------------------------------------------------------


def read(place: str | Path, batch: int = 256) -> Iterator[np.ndarray]:
    """Batches (n, h, w, 3) of bytes from a folder's images, or as they are from its arrays."""
    folder = Path(place)
    if arrays := sorted(folder.glob("*.npy")):
        for file in arrays:
            images = np.load(file, mmap_mode="r")
            yield from (images[i : i + batch] for i in range(0, len(images), batch))
        return
    from PIL import Image

    known = Image.registered_extensions()
    files = sorted(file for file in folder.rglob("*") if file.suffix.lower() in known)
    if not files:
        raise ValueError(f"{folder} holds neither arrays (.npy) nor images")
    for i in range(0, len(files), batch):
        images = [Image.open(file).convert("RGB") for file in files[i : i + batch]]
        yield np.stack([np.asarray(image) for image in images])


def as_bytes(images: np.ndarray) -> np.ndarray:
    """(n, h, w, 3) in 0 .. 255, from that or from floats in [-1, 1]; gray is repeated."""
    if images.dtype != np.uint8:
        images = np.uint8(np.clip(np.rint(127.5 * (np.float32(images) + 1)), 0, 255))
    return np.broadcast_to(images, (*images.shape[:3], 3))


# --- Features ------------------------------------------------------------------------------------


def load_features(source: str) -> Features:
    """A function of images from what the file's first lines list as features."""
    if source.endswith((".pt", ".pth")):
        return torchscript(source)
    if Path(source).is_dir():
        return transformer(source)
    module, _, name = source.partition(":")
    if not name:
        raise ValueError(
            f"features must be a .pt file, a folder or module:function, got {source!r}"
        )
    return getattr(import_module(module), name)


def torchscript(file: str) -> Features:
    import torch

    network = torch.jit.load(file).eval()
    options = {"return_features": True} if "return_features" in str(network.forward.schema) else {}

    def features(images: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(as_bytes(images).transpose(0, 3, 1, 2)))
        with torch.no_grad():
            return network(x, **options).numpy()

    return features


def transformer(folder: str) -> Features:
    """The class token after the last layer, of images resized as the model was trained."""
    import torch
    from transformers import AutoImageProcessor, AutoModel

    prepare = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    network = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def features(images: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            inputs = prepare(list(as_bytes(images)), return_tensors="pt")
            return network(**inputs).last_hidden_state[:, 0].numpy()

    return features


@cache
def digits_classifier() -> Features:
    """The 64 hidden units of a classifier of the scans: for these digits alone."""
    x, label = digits.images()
    classifier = MLPClassifier((64,), max_iter=500, random_state=0).fit(
        x.reshape(len(x), -1), label
    )
    weights, bias = classifier.coefs_[0], classifier.intercepts_[0]
    return lambda images: np.maximum(images.reshape(len(images), -1) @ weights + bias, 0)


# --- Tables --------------------------------------------------------------------------------------


def digits_rows(n: int) -> list[list[str]]:
    """Scans against scans, and against n samples of the digits network, plain and corrected."""
    features, (x, _) = digits_classifier(), digits.images()
    scans = statistics([x], features)
    order = np.random.default_rng(0).permutation(len(x))
    halves = (statistics([x[half]], features) for half in np.array_split(order, 2))
    rows = [["half of the scans, to the other", *cells(*halves)]]
    for name, solver, steps in (
        ("iPNDM-3, 5 steps", sd.IPNDM(3), 5),
        ("corrected, 5 steps", sd.Stein(sd.IPNDM(3)), 5),
        ("2M, 50 steps", sd.DPMpp2M(), 50),
    ):
        samples = sd.sample_many(
            jax.random.key(0),
            digits.load(np.arange(n) % 10),
            n,
            min(n, 500),
            x.shape[1:],
            sigmas=sd.karras_sigmas(steps),
            solver=solver,
        )
        rows.append([name, *cells(scans, statistics(samples, features))])
    return rows


def cells(reference: Statistics, samples: Statistics) -> list[str]:
    distance, precision, recall = compare(reference, samples)
    return [f"{distance:.3f}", f"{precision:.2f}", f"{recall:.2f}"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("reference", nargs="?", help="folder, or .npz of mu and sigma")
    parser.add_argument("samples", nargs="?", help="folder")
    parser.add_argument("--features", help="file.pt, folder of transformers, module:function")
    parser.add_argument("--n", type=int, default=5_000, help="samples of the digits")
    arguments = parser.parse_args()
    header = ["", "Fréchet distance", "precision", "recall"]
    if arguments.reference is None:
        print("in 64 features of a classifier of these scans: no published FID compares with it")
        print(metrics.table(header, digits_rows(arguments.n)))
        return
    if not (arguments.samples and arguments.features):
        parser.error("two places and --features are needed")
    features = load_features(arguments.features)
    reference = load_reference(arguments.reference, features)
    samples = statistics(tqdm(read(arguments.samples)), features)
    print(metrics.table(header, [[arguments.samples, *cells(reference, samples)]]))


def load_reference(place: str, features: Features) -> Statistics:
    """Published statistics, or those of a folder."""
    if place.endswith(".npz"):
        with np.load(place) as file:
            return Statistics(file["mu"], file["sigma"])
    return statistics(tqdm(read(place)), features)


if __name__ == "__main__":
    main()

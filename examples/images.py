"""A class-conditional U-Net for CIFAR-10, at 16x16 small enough for a laptop's processor.

    import images
    denoise = images.load(jnp.arange(10))               # one sample of each class, 16x16
    x, label = images.images("../shared/data", "test")  # the data, scaled as the network saw it
    images.to_bytes(x)                                  # pictures again

`train_images.py` trains the weights kept in `images16.safetensors`; `images_card.md` says how. The
data are CIFAR-10 compressed as JPEG, and their 2x2 means at 16x16: no figure found with them can be
compared with a published one of CIFAR-10.
"""

import io
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from PIL import Image
from safetensors.flax import load_file

import steindiff_jax as sd

SIGMA_DATA = 0.5
NULL = 10  # the label that stands for "any class", for classifier-free guidance
DATA = Path(__file__).parents[2] / "shared" / "data"
# Standard deviation of the training pixels, in [-1, 1], by the side of the images.
STD = {16: 0.4840, 32: 0.5008}


def images(directory=DATA, split="train", size=16):
    """CIFAR-10, (n, size, size, 3) with standard deviation SIGMA_DATA, and its labels (n,).

    `directory` holds cifar10_jpeg_train.npz (50,000 images) and cifar10_jpeg_test.npz (10,000):
    `jpeg` all files end to end, `offsets` (n + 1) of each, `labels` (n,). They may be sorted by
    class, so that the images come in an order drawn once: the first of them are of all classes.
    """
    path = Path(directory) / f"cifar10_jpeg_{split}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"{path} not found: give the directory of the data (see --help)")
    with np.load(path) as file:
        jpeg, offsets, label = file["jpeg"].tobytes(), file["offsets"], file["labels"]
    files = (io.BytesIO(jpeg[a:b]) for a, b in pairwise(offsets))
    x = np.stack([np.asarray(Image.open(f).convert("RGB")) for f in files])
    k = 32 // size
    x = x.reshape(-1, size, k, size, k, 3).mean(axis=(2, 4), dtype=np.float32)
    order = np.random.default_rng(0).permutation(len(x))
    return from_bytes(x[order]), np.int32(label[order])


def from_bytes(x):
    """Pictures (..., size, size, 3) in 0 .. 255, scaled as the networks see them."""
    return np.float32((x / 127.5 - 1) * (SIGMA_DATA / STD[x.shape[-2]]))


def to_bytes(x):
    """Pictures of bytes again."""
    x = np.asarray(x) * (STD[x.shape[-2]] / SIGMA_DATA)
    return np.uint8(np.clip(np.rint(127.5 * (x + 1)), 0, 255))


class Conv(nn.Module):
    """3x3 convolution, (batch, h, w, c) -> (batch, h, w, features).

    On CPUs as one matrix product, of the same kernel: XLA's own convolution has a slow gradient
    inside a loop there (https://github.com/jax-ml/jax/issues/12868).
    """

    features: int
    dtype: Any = None
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        _, h, w, c = x.shape
        kernel = self.param("kernel", self.kernel_init, (9 * c, self.features))
        bias = self.param("bias", nn.initializers.zeros, (self.features,))
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if jax.default_backend() == "cpu":
            x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
            x = jnp.concatenate([x[:, i : i + h, j : j + w] for i, j in np.ndindex(3, 3)], axis=-1)
            return x @ kernel + bias
        kernel = kernel.reshape(3, 3, c, self.features)
        numbers = ("NHWC", "HWIO", "NHWC")
        return (
            jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=numbers)
            + bias
        )


class Block(nn.Module):
    """Residual block on x (batch, h, w, c), scaled and shifted by the embedding e (batch, k)."""

    attention: bool
    dropout: float
    dtype: Any

    @nn.compact
    def __call__(self, x, e):
        b, h, w, c = x.shape
        norm = lambda: nn.GroupNorm(c // 16, dtype=self.dtype)  # noqa: E731
        scale, shift = jnp.split(nn.Dense(2 * c, dtype=self.dtype)(e)[:, None, None], 2, axis=-1)
        r = Conv(c, self.dtype)(nn.silu(norm()(x)))
        r = nn.silu(norm()(r) * (1 + scale) + shift)
        r = nn.Dropout(self.dropout, deterministic=not self.has_rng("dropout"))(r)
        x = x + Conv(c, self.dtype, nn.initializers.zeros)(r)
        if self.attention:
            pixels = norm()(x).reshape(b, h * w, c)
            attend = nn.MultiHeadDotProductAttention(c // 32, dtype=self.dtype)
            x = x + attend(pixels).reshape(x.shape)
        return x


class UNet(nn.Module):
    """Raw network F of Karras et al. (2022), eq. 7.

    x = c_in y (batch, h, w, 3), t = log(sigma)/4 (batch,), label (batch,) -> (batch, h, w, 3)
    """

    channels: tuple[int, ...]  # of each resolution, each half of the one before
    blocks: tuple[int, ...]  # residual blocks at each, on the way down and again on the way up
    attention: int  # at how many of the lowest resolutions
    patched: bool = False  # work on the 2x2 patches of x
    dropout: float = 0.0  # only where apply is given a key "dropout"
    dtype: Any = None  # of the computation; parameters and output are of single precision

    @nn.compact
    def __call__(self, x, t, label):
        k, levels = 4 * self.channels[0], len(self.channels)
        angle = t[:, None] * 2.0 ** jnp.linspace(-2, 4, 16)[None]
        e = nn.Dense(k)(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1))
        e = nn.silu(nn.Dense(k)(nn.silu(e)) + nn.Embed(NULL + 1, k)(label))

        def blocks(h, level):
            for _ in range(self.blocks[level]):
                h = Block(level >= levels - self.attention, self.dropout, self.dtype)(h, e)
            return h

        x = patches(x) if self.patched else x
        h, skips = Conv(self.channels[0], self.dtype)(x), []
        for level, c in enumerate(self.channels):
            if level:
                skips.append(h)
                h = nn.Dense(c, dtype=self.dtype)(patches(h))
            h = blocks(h, level)
        for level, c in reversed(list(enumerate(self.channels[:-1]))):
            h = unpatched(nn.Dense(4 * c, dtype=self.dtype)(h))
            h = nn.Dense(c, dtype=self.dtype)(jnp.concatenate([h, skips[level]], axis=-1))
            h = blocks(h, level)
        h = nn.silu(nn.GroupNorm(h.shape[-1] // 16)(h))
        h = Conv(x.shape[-1], jnp.float32, nn.initializers.zeros)(h)
        return unpatched(h) if self.patched else h


def patches(x):
    """The 2x2 patches of x: (batch, h, w, c) -> (batch, h/2, w/2, 4c)."""
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).swapaxes(2, 3).reshape(b, h // 2, w // 2, 4 * c)


def unpatched(x):
    """Inverse of `patches`."""
    b, h, w, c = x.shape
    return x.reshape(b, h, w, 2, 2, c // 4).swapaxes(2, 3).reshape(b, 2 * h, 2 * w, c // 4)


# By the side of the images; 32x32 is for a GPU.
NETWORKS = {
    16: UNet((64, 160), blocks=(2, 3), attention=1, patched=True),
    32: UNet((128, 256, 256), blocks=(3, 3, 3), attention=2, dropout=0.1, dtype=jnp.bfloat16),
}


def weights(size):
    """Where the weights are kept."""
    return Path(__file__).with_name(f"images{size}.safetensors")


@cache
def network(size=16):
    """The raw network and its trained variables.

    Read once: `sd.guided` evaluates denoisers that share their arrays in one network call.
    """
    stored = load_file(weights(size))  # in half precision
    params = {name: jnp.float32(value) for name, value in stored.items()}
    return NETWORKS[size], {"params": unflatten_dict(params, sep="/")}


def load(label, size=16):
    """The trained denoiser of x (batch, size, size, 3); label (batch,) is a class, or NULL."""
    return sd.from_linen(
        *network(size),
        schedule=sd.EDM(),
        prediction="edm",
        sigma_data=SIGMA_DATA,
        cond={"label": label},
    )

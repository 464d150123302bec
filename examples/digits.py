"""A score network for scikit-learn's handwritten digits, small enough for a laptop's processor.

    import digits
    denoise = digits.load(jnp.arange(10))  # one sample of each class
    x, label = digits.images()             # the data that it was trained on

`train_digits.py` trains the weights kept in `digits.safetensors`.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax.traverse_util import unflatten_dict
from safetensors.flax import load_file
from sklearn.datasets import load_digits

import steindiff_jax as sd

SIGMA_DATA = 0.5
NULL = 10  # the label that stands for "any class", for classifier-free guidance
WEIGHTS = Path(__file__).with_suffix(".safetensors")


def images(scale=SIGMA_DATA):
    """The 1797 scans (1797, 8, 8, 1) with standard deviation `scale`, and their labels (1797,)."""
    data = load_digits()
    x = data.images[..., None] / 8 - 1
    return np.float32(scale * x / x.std()), np.int32(data.target)


class Conv(nn.Module):
    """3x3 convolution, (batch, h, w, c) -> (batch, h, w, features).

    As one matrix product: on CPUs XLA's own convolution has a slow gradient inside a loop
    (https://github.com/jax-ml/jax/issues/12868).
    """

    features: int
    kernel_init: Callable = nn.initializers.lecun_normal()

    @nn.compact
    def __call__(self, x):
        _, h, w, _ = x.shape
        x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)))
        x = jnp.concatenate([x[:, i : i + h, j : j + w] for i, j in np.ndindex(3, 3)], axis=-1)
        return nn.Dense(self.features, kernel_init=self.kernel_init)(x)


class Block(nn.Module):
    """Residual block on x (batch, h, w, c), scaled and shifted by the embedding e (batch, k)."""

    @nn.compact
    def __call__(self, x, e):
        c = x.shape[-1]
        scale, shift = jnp.split(nn.Dense(2 * c)(e)[:, None, None], 2, axis=-1)
        h = Conv(c)(nn.silu(nn.LayerNorm()(x)))
        h = nn.silu(nn.LayerNorm()(h) * (1 + scale) + shift)
        return x + Conv(c, nn.initializers.zeros)(h)


class DigitsNet(nn.Module):
    """Raw network F of Karras et al. (2022), eq. 7, on the 4x4 grid of 2x2 patches.

    x = c_in y (batch, 8, 8, 1), t = log(sigma)/4 (batch,), label (batch,) -> (batch, 8, 8, 1)
    """

    features: int = 80

    @nn.compact
    def __call__(self, x, t, label):
        angle = t[:, None] * 2.0 ** jnp.linspace(-2, 4, 16)[None]
        e = nn.Dense(128)(jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1))
        e = nn.silu(nn.Dense(128)(nn.silu(e)) + nn.Embed(NULL + 1, 128)(label))

        h = x.reshape(-1, 4, 2, 4, 2).swapaxes(2, 3).reshape(-1, 4, 4, 4)
        h = Block()(Conv(self.features)(h), e)
        pixels = nn.LayerNorm()(h).reshape(-1, 16, self.features)
        attention = nn.MultiHeadDotProductAttention(4, name="SelfAttention_0")
        h = h + attention(pixels).reshape(h.shape)
        h = Block()(Block()(h, e), e)
        h = Conv(4, nn.initializers.zeros)(nn.silu(nn.LayerNorm()(h)))
        return h.reshape(-1, 4, 4, 2, 2).swapaxes(2, 3).reshape(-1, 8, 8, 1)


@cache
def network():
    """The raw network and its trained variables.

    Read once: `sd.guided` evaluates denoisers that share their arrays in one network call.
    """
    return DigitsNet(), {"params": unflatten_dict(load_file(WEIGHTS), sep="/")}


def load(label):
    """The trained denoiser of x (batch, 8, 8, 1); label (batch,) is the digit of each, or NULL."""
    return sd.from_linen(
        *network(),
        schedule=sd.EDM(),
        prediction="edm",
        sigma_data=SIGMA_DATA,
        cond={"label": label},
    )

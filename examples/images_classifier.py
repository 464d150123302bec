"""A small classifier of the 16x16 images of `images.py`, whose features measure samples of them.

    python benchmarks/fid.py pictures samples --features images_classifier:features

where a place holds 16x16 pictures, or arrays scaled as `images.images` gives them. The features are
those of this network alone: no published FID can be compared with a distance in them.

    python examples/images_classifier.py ../shared/data

trains it, in a quarter of an hour on two processor cores, and prints its accuracy.
"""

import argparse
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.flax import load_file, save_file
from tqdm import tqdm

from images import DATA, Conv, from_bytes, images, patches, to_bytes

BATCH, CHUNK = 128, 50
WEIGHTS = Path(__file__).with_name("images16_classifier.safetensors")


class Residual(nn.Module):
    """On x (batch, h, w, c)."""

    @nn.compact
    def __call__(self, x):
        c = x.shape[-1]
        r = Conv(c)(nn.silu(nn.GroupNorm(c // 16)(x)))
        return x + Conv(c, kernel_init=nn.initializers.zeros)(nn.silu(nn.GroupNorm(c // 16)(r)))


class Classifier(nn.Module):
    """x (batch, 16, 16, 3) -> logits (batch, 10) and the features that they come from."""

    channels: tuple[int, ...] = (64, 128)
    blocks: int = 2
    features: int = 96

    @nn.compact
    def __call__(self, x):
        for i, c in enumerate(self.channels):
            x = nn.Dense(c)(patches(x)) if i else Conv(c)(patches(x))
            for _ in range(self.blocks):
                x = Residual()(x)
        x = nn.silu(nn.GroupNorm(x.shape[-1] // 16)(x)).mean(axis=(1, 2))
        x = nn.silu(nn.Dense(self.features)(x))
        return nn.Dense(10)(x), x


@cache
def trained():
    """The compiled network: images -> (logits, features)."""
    stored = {name: jnp.float32(value) for name, value in load_file(WEIGHTS).items()}
    return jax.jit(partial(Classifier().apply, {"params": unflatten_dict(stored, sep="/")}))


def outputs(x, batch=500):
    """Logits (n, 10) and features (n, 96) of images (n, 16, 16, 3), bytes or scaled.

    Scaled ones pass through bytes, as every picture that is stored does.
    """
    x = from_bytes(x if np.asarray(x).dtype == np.uint8 else to_bytes(x))
    found = [trained()(x[i : i + batch]) for i in range(0, len(x), batch)]
    return tuple(np.concatenate(each) for each in zip(*found, strict=True))


def features(x):
    """Features (n, 96), for Fréchet distances, precision and recall."""
    return outputs(x)[1]


def accuracy(x, label):
    """The part of images that the network finds the class of."""
    return np.mean(outputs(x)[0].argmax(axis=1) == label)


def loss(params, x, label):
    logits, _ = Classifier().apply({"params": params}, x)
    target = optax.smooth_labels(jax.nn.one_hot(label, 10), 0.1)
    return optax.softmax_cross_entropy(logits, target).mean()


def step(state, _, data, key):
    """One update on images flipped and moved by up to a pixel, as the step's key draws them."""
    x, label = data
    k_batch, k_flip, k_move = jax.random.split(jax.random.fold_in(key, state.step), 3)
    i = jax.random.randint(k_batch, (BATCH,), 0, len(x))
    x = x[i]
    x = jnp.where(jax.random.bernoulli(k_flip, shape=(BATCH, 1, 1, 1)), x[:, :, ::-1], x)
    x = jnp.pad(x, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    corner = jax.random.randint(k_move, (BATCH, 2), 0, 3)
    x = jax.vmap(lambda x, c: jax.lax.dynamic_slice(x, (*c, 0), (16, 16, 3)))(x, corner)
    value, grads = jax.value_and_grad(loss)(state.params, x, label[i])
    return state.apply_gradients(grads=grads), value


@partial(jax.jit, donate_argnums=0)
def train(state, data, key):
    """CHUNK steps; the new state and the mean loss."""
    state, losses = jax.lax.scan(partial(step, data=data, key=key), state, length=CHUNK)
    return state, losses.mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", default=DATA, help="directory of the data")
    parser.add_argument("--steps", type=int, default=2_500)
    args = parser.parse_args()

    data = jax.device_put(images(args.data))
    key, k_init = jax.random.split(jax.random.key(0))
    params = jax.jit(Classifier().init)(k_init, data[0][:1])["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, args.steps // 20, args.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.05))
    state = TrainState.create(apply_fn=None, params=params, tx=tx)
    print(f"{sum(a.size for a in jax.tree.leaves(params)):,} parameters")
    bar = tqdm(total=args.steps, unit="step", mininterval=10)
    while state.step < args.steps:
        state, value = train(state, data, key)
        bar.set_postfix(loss=f"{value:.3f}")
        bar.update(CHUNK)
    half = {name: jnp.float16(a) for name, a in flatten_dict(state.params, sep="/").items()}
    save_file(half, WEIGHTS)
    print(f"accuracy on the test images {accuracy(*images(args.data, 'test')):.4f}")


if __name__ == "__main__":
    main()

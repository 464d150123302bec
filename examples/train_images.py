"""Train the U-Net of `images.py`: 16x16 on two processor cores (an hour or two) or 32x32 on a GPU.

    python examples/train_images.py ../shared/data
    python examples/train_images.py ../shared/data --batch 1024 --steps 54650  # as shipped
    python examples/train_images.py ../shared/data --size 32 --batch 512 --steps 200000 --minutes 25

A run that was stopped, or that reached its --minutes, goes on from its last checkpoint, with the
same draws, when started again. Every few minutes it writes the average weights, to be tried early,
and a grid of their samples, a column for each class.
"""

import argparse
import time
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.flax import save_file
from tqdm import tqdm

import steindiff_jax as sd
from images import DATA, NETWORKS, NULL, SIGMA_DATA, images, to_bytes, weights

CHUNK = 50  # steps in one compiled loop
WARMUP = 500
P_MEAN, P_STD = -0.8, 1.6  # log sigma; wider than Karras et al.'s, to cover 0.002 to 80
P_NULL = 0.1
EMA_DECAY = 0.999
N_VALIDATION = 1000


class State(TrainState):
    ema: dict


def loss(params, x, label, key, net, dropout=True):
    """Mean over x (batch, h, w, 3) of lambda(sigma) ||D - x||^2, Karras et al. (2022), eq. 8.

    With lambda = 1 / c_out^2 it is the squared error of F against (x - c_skip y) / c_out.
    """
    k_sigma, k_noise, k_dropout = jax.random.split(key, 3)
    sigma = jnp.exp(P_MEAN + P_STD * jax.random.normal(k_sigma, (len(x), 1, 1, 1)))
    y = x + sigma * jax.random.normal(k_noise, x.shape)
    total = sigma**2 + SIGMA_DATA**2
    c_skip, c_out, c_in = SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total**0.5, total**-0.5
    rngs = {"dropout": k_dropout} if dropout else {}
    f = net.apply({"params": params}, c_in * y, jnp.log(sigma.ravel()) / 4, label, rngs=rngs)
    return jnp.mean((f - (x - c_skip * y) / c_out) ** 2)


def step(state, _, data, key, batch, net):
    """One update on a batch drawn with a key that depends on the step alone."""
    x, label = data
    key = jax.random.fold_in(key, state.step)
    k_batch, k_flip, k_null, k_loss = jax.random.split(key, 4)
    i = jax.random.randint(k_batch, (batch,), 0, len(x))
    flipped = jax.random.bernoulli(k_flip, shape=(batch, 1, 1, 1))
    x = x[i]
    x = jnp.where(flipped, x[:, :, ::-1], x)
    label = jnp.where(jax.random.bernoulli(k_null, P_NULL, (batch,)), NULL, label[i])
    value, grads = jax.value_and_grad(loss)(state.params, x, label, k_loss, net)
    state = state.apply_gradients(grads=grads)
    # The average starts with the last steps alone: none of the first weights stay in it.
    decay = jnp.minimum(EMA_DECAY, (1 + state.step) / (10 + state.step))
    ema = optax.incremental_update(state.params, state.ema, 1 - decay)
    return state.replace(ema=ema), value


@partial(jax.jit, static_argnames=("batch", "net"), donate_argnums=0)
def train(state, data, key, batch, net):
    """CHUNK steps; the new state and the mean loss."""
    one = partial(step, data=data, key=key, batch=batch, net=net)
    state, losses = jax.lax.scan(one, state, length=CHUNK)
    return state, losses.mean()


@partial(jax.jit, static_argnames="net")
def validate(params, data, key, net):
    """The loss over held-out data (x, label), one draw of the noise for each image."""
    return loss(params, *data, key, net, dropout=False)


def pictures(params, key, net, size):
    """Ten samples of each class in one picture, a column for each."""
    label = jnp.tile(jnp.arange(10), 10)
    edm = {"schedule": sd.EDM(), "prediction": "edm", "sigma_data": SIGMA_DATA}
    denoiser = sd.from_linen(net, {"params": params}, cond={"label": label}, **edm)
    shape, sigmas = (100, size, size, 3), sd.karras_sigmas(20)
    x = to_bytes(sd.sample(key, denoiser, shape, sigmas=sigmas, solver=sd.DPMpp2M()).x)
    grid = x.reshape(10, 10, size, size, 3).swapaxes(1, 2).reshape(10 * size, 10 * size, 3)
    return Image.fromarray(grid).resize((640, 640), Image.Resampling.NEAREST)


def write(params, path):
    """Weights in half precision, renamed into place: whoever reads them never finds a part."""
    half = {name: jnp.float16(value) for name, value in flatten_dict(params, sep="/").items()}
    save_file(half, path.with_suffix(".tmp"))
    path.with_suffix(".tmp").replace(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, nargs="?", default=DATA, help="directory of the data")
    parser.add_argument("--size", type=int, choices=NETWORKS, default=16, help="of the images")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=8_000, help="in all runs together")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="of this run")
    parser.add_argument("--directory", type=Path, default="runs/images", help="of checkpoints")
    parser.add_argument("--save-every", type=int, default=500, help="steps; a multiple of 50")
    args = parser.parse_args()
    net, start = NETWORKS[args.size], time.monotonic()
    if jax.default_backend() != "cpu":
        net = net.clone(dtype=jnp.bfloat16)  # fast there

    data = jax.device_put(images(args.data, "train", args.size))
    held_out = [a[:N_VALIDATION] for a in images(args.data, "test", args.size)]
    key, k_val, k_sample, k_init = jax.random.split(jax.random.key(0), 4)
    params = jax.jit(net.init)(k_init, data[0][:1], jnp.zeros(1), data[1][:1])["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 1e-3, WARMUP, args.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))
    state = State.create(apply_fn=None, params=params, tx=tx, ema=jax.tree.map(jnp.copy, params))
    print(f"{sum(a.size for a in jax.tree.leaves(params)):,} parameters")

    options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
    with ocp.CheckpointManager(args.directory.absolute(), options=options) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        bar = tqdm(total=args.steps, initial=int(state.step), unit="step", mininterval=10)
        while state.step < args.steps:
            began = time.monotonic()
            state, value = train(state, data, key, args.batch, net)
            now = int(state.step)
            rate = CHUNK * args.batch / (time.monotonic() - began)
            bar.set_postfix(loss=f"{value:.4f}", images_per_second=f"{rate:.0f}")
            bar.update(CHUNK)
            stop = now >= args.steps or time.monotonic() - start > 60 * args.minutes
            if stop or now % args.save_every == 0:
                manager.save(now, args=ocp.args.StandardSave(state))
                write(state.ema, weights(args.size))
                pictures(state.ema, k_sample, net, args.size).save(args.directory / "samples.png")
                fresh = validate(state.ema, held_out, k_val, net)
                bar.write(f"step {now}: loss {value:.4f}, validation {fresh:.4f}, {rate:.0f} img/s")
            if stop:
                break


if __name__ == "__main__":
    main()

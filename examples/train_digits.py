"""Train the score network of `digits.py`; about ten minutes on two processor cores.

    python examples/train_digits.py

A run that was stopped goes on from its last checkpoint, with the same draws, when started again.
"""

import argparse
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import orbax.checkpoint as ocp
from flax.training.train_state import TrainState
from flax.traverse_util import flatten_dict
from safetensors.flax import save_file
from sklearn.model_selection import train_test_split
from tqdm import tqdm

from digits import NULL, SIGMA_DATA, WEIGHTS, DigitsNet, images

BATCH = 128
CHUNK = 100  # steps in one compiled loop
WARMUP = 500
P_MEAN, P_STD = -0.8, 1.6  # log sigma; wider than for photographs, to cover 0.002 to 80
P_NULL = 0.1
EMA_DECAY = 0.999


class State(TrainState):
    ema: dict


def loss(params, x, label, key):
    """Mean over x (batch, 8, 8, 1) of lambda(sigma) ||D - x||^2, Karras et al. (2022), eq. 8.

    With lambda = 1 / c_out^2 it is the squared error of F against (x - c_skip y) / c_out.
    """
    k_sigma, k_noise = jax.random.split(key)
    sigma = jnp.exp(P_MEAN + P_STD * jax.random.normal(k_sigma, (len(x), 1, 1, 1)))
    y = x + sigma * jax.random.normal(k_noise, x.shape)
    total = sigma**2 + SIGMA_DATA**2
    c_skip, c_out, c_in = SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total**0.5, total**-0.5
    f = DigitsNet().apply({"params": params}, c_in * y, jnp.log(sigma.ravel()) / 4, label)
    return jnp.mean((f - (x - c_skip * y) / c_out) ** 2)


def step(state, _, data, key):
    """One update on a batch drawn with a key that depends on the step alone."""
    x, label = data
    key = jax.random.fold_in(key, state.step)
    k_batch, k_null, k_loss = jax.random.split(key, 3)
    i = jax.random.randint(k_batch, (BATCH,), 0, len(x))
    label = jnp.where(jax.random.bernoulli(k_null, P_NULL, (BATCH,)), NULL, label[i])
    value, grads = jax.value_and_grad(loss)(state.params, x[i], label, k_loss)
    state = state.apply_gradients(grads=grads)
    ema = optax.incremental_update(state.params, state.ema, 1 - EMA_DECAY)
    return state.replace(ema=ema), value


@jax.jit
def train(state, data, key):
    """CHUNK steps; the new state and the mean loss."""
    state, losses = jax.lax.scan(partial(step, data=data, key=key), state, length=CHUNK)
    return state, losses.mean()


@jax.jit
def validate(params, data, key):
    """The loss over held-out data (x, label), mean of 16 draws of the noise."""
    return jax.vmap(partial(loss, params, *data))(jax.random.split(key, 16)).mean()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8_000)
    parser.add_argument("--directory", type=Path, default="runs/digits", help="of checkpoints")
    args = parser.parse_args()

    x, x_val, label, label_val = train_test_split(*images(), test_size=0.1, random_state=0)
    key, k_val, k_init = jax.random.split(jax.random.key(0), 3)
    params = jax.jit(DigitsNet().init)(k_init, x[:1], jnp.zeros(1), label[:1])["params"]
    schedule = optax.warmup_cosine_decay_schedule(0.0, 2e-3, WARMUP, args.steps)
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, weight_decay=0.2))
    state = State.create(apply_fn=None, params=params, tx=tx, ema=params)

    options = ocp.CheckpointManagerOptions(max_to_keep=1, save_interval_steps=5 * CHUNK)
    with ocp.CheckpointManager(args.directory.absolute(), options=options) as manager:
        if manager.latest_step() is not None:
            state = manager.restore(manager.latest_step(), args=ocp.args.StandardRestore(state))
        bar = tqdm(total=args.steps, initial=int(state.step), unit="step")
        while state.step < args.steps:
            state, value = train(state, (x, label), key)
            bar.set_postfix(loss=f"{value:.4f}")
            bar.update(CHUNK)
            if manager.save(int(state.step), args=ocp.args.StandardSave(state)):
                held_out = validate(state.ema, (x_val, label_val), k_val)
                bar.write(f"step {state.step}: validation loss {held_out:.4f}")
    save_file(flatten_dict(state.ema, sep="/"), WEIGHTS)


if __name__ == "__main__":
    main()

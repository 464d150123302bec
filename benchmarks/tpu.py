"""What the compiler makes of `sample` for TPU slices, on a machine without one (five minutes).

A diffusion transformer, its weights sharded over `model`, samples a batch sharded over `data`: with
a plain solver, with the default, and both around the flash-attention kernel of Pallas, which has no
forward mode. Of each program: what its chips tell one another in a step beside what the network
has them tell one another; FLOPs of a step on one chip, over the network's; memory on one chip;
seconds of compilation. All of it is the TPU compiler's own word. Nothing runs.

It needs that compiler, `pip install "jax[tpu]"` (210 MB): libtpu 0.0.41 beside jax 0.10.1, 0.0.50
beside jax 0.12.0. There is one for Linux on x86-64 alone.
"""

import argparse
import math
import os
import re
import time
from collections import Counter
from functools import partial

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.flash_attention import flash_attention
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import _path  # noqa: F401
import metrics
import steindiff_jax as sd

STEPS, ROWS = 6, 8  # ROWS on each chip, or on each `model` chips that share a network
EVENT, PATCH, HEAD = (32, 32, 4), 2, 128  # latents of images of 256x256 pixels
INNER = sd.IPNDM(3)
SOLVERS = {"plain": INNER, "default": sd.Stein(INNER)}
COLLECTIVES = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
ARRAY = r"\w+\[[\d,]*\]"  # f32[8,57]
HOST = r" (?:infeed|outfeed|send|recv)(?:-start)?\(|S\(5\)|callback"  # S(5) is the host's memory


# --- The network ---------------------------------------------------------------------------------


def weights(width, depth):
    """Of each weight its shape, and the axis that `model` shards."""
    patch, heads = PATCH**2 * EVENT[-1], width // HEAD
    block = {
        "time": ((64, width), P()),
        "qkv": ((3, width, heads, HEAD), P(None, None, "model")),
        "out": ((heads, HEAD, width), P("model")),
        "inside": ((width, 4 * width), P(None, "model")),
        "outside": ((4 * width, width), P("model")),
    }
    ends = {"first": ((patch, width), P()), "last": ((width, patch), P())}
    return ends | {"blocks": [block] * depth}


def transformer(attention, parameters, x, t):
    """Of latents (batch, *EVENT) at times (batch,), computed in bfloat16."""
    n, c = EVENT[0] // PATCH, EVENT[-1]
    patches = x.astype(jnp.bfloat16).reshape(-1, n, PATCH, n, PATCH, c).swapaxes(2, 3)
    h = patches.reshape(len(x), n * n, -1) @ parameters["first"]
    angle = t[:, None] * 2.0 ** jnp.linspace(-2, 4, 32)[None]
    waves = jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1).astype(h.dtype)
    for p in parameters["blocks"]:
        scaled = normalised(h) * (1 + (waves @ p["time"])[:, None])
        q, k, v = jnp.einsum("btw,iwhd->ibthd", scaled, p["qkv"])
        h += jnp.einsum("bthd,hdw->btw", attention(q, k, v), p["out"])
        h += jax.nn.gelu(normalised(h) @ p["inside"]) @ p["outside"]
    patches = (normalised(h) @ parameters["last"]).reshape(-1, n, n, PATCH, PATCH, c)
    return patches.swapaxes(2, 3).reshape(x.shape)


def normalised(h):
    return jax.nn.standardize(h.astype(jnp.float32)).astype(h.dtype)


def flash(mesh):
    """The kernel on the rows and heads of each chip: the compiler does not divide it."""

    def kernel(*qkv):  # (batch, tokens, heads, head)
        q, k, v = (a.swapaxes(1, 2) for a in qkv)
        return flash_attention(q, k, v, sm_scale=HEAD**-0.5).swapaxes(1, 2)

    over = P("data", None, "model")
    return jax.shard_map(kernel, mesh=mesh, in_specs=over, out_specs=over, check_vma=False)


# --- Its programs --------------------------------------------------------------------------------


class Slice:
    """A slice by its name, and programs for it, with `model` chips to a network."""

    def __init__(self, topology, model, width, depth):
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no metadata server to ask
        description = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        shape = len(description.devices) // model, model
        self.mesh = jax.make_mesh(
            shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=description.devices
        )
        self.parameters = jax.tree.map(
            lambda weight: self.placed(weight[0], weight[1], jnp.bfloat16),
            weights(width, depth),
            is_leaf=lambda weight: isinstance(weight, tuple),
        )
        self.x = self.placed((ROWS * shape[0], *EVENT), P("data"))
        self.attentions = {"XLA": jax.nn.dot_product_attention, "flash": flash(self.mesh)}

    def placed(self, shape, spec, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(self.mesh, spec))

    def network(self, attention):
        apply = partial(transformer, self.attentions[attention])
        return Program(apply, self.parameters, self.x, self.placed(self.x.shape[:1], P("data")))

    def sampler(self, attention, solver):
        apply = partial(transformer, self.attentions[attention])

        def draw(key, parameters, sigmas, x):
            denoiser = sd.Network(apply, parameters, sd.EDM(), "edm")
            return sd.sample(key, denoiser, sigmas=sigmas, solver=solver, x_init=x)

        key, sigmas = self.placed((2,), P(), jnp.uint32), self.placed((STEPS + 1,), P())
        return Program(draw, key, self.parameters, sigmas, self.x)


class Program:
    """A compiled function, and what the compiler says of it.

    Attributes:
      seconds: of compilation.
      text: the program of one chip.
      collectives: (kind, dtype and shape) -> how many; a loop counts as one turn of it.
      once: how many of them are outside of the loop.
      flops: on one chip, a loop counted as one turn of it.
      memory: on one chip, in bytes, arguments and results included.
    """

    def __init__(self, function, *arguments):
        start = time.perf_counter()
        compiled = jax.jit(function).lower(*arguments).compile()
        self.seconds = time.perf_counter() - start
        self.text = compiled.as_text()
        found = re.findall(rf" = (.*?) ({COLLECTIVES})(?:-start)?\((.*)", self.text)
        self.collectives = Counter(
            (kind, array)
            for result, kind, _ in found
            for array in re.findall(r"\w+\[[\d,]*\]", result)
        )
        self.once = sum("/while/body/" not in rest for _, _, rest in found)
        self.flops = compiled.cost_analysis()["flops"]
        plan = compiled.memory_analysis()
        self.memory = (
            plan.argument_size_in_bytes + plan.output_size_in_bytes + plan.temp_size_in_bytes
        )


def size(collectives):
    """Bytes of their results."""

    def of(array):
        bits, *shape = map(int, re.findall(r"\d+", array.replace("pred", "u8")))
        return bits // 8 * math.prod(shape)

    return sum(count * of(array) for (_, array), count in collectives.items())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--topologies", nargs="+", default=["v5e:2x4", "v5e:16x16"])
    parser.add_argument("--model", type=int, default=4, help="chips that share one network")
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--depth", type=int, default=4)
    arguments = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")  # with libtpu at hand JAX looks for a TPU
    print(f"jax {jax.__version__}, batch {ROWS} for every {arguments.model} chips")
    header = ["slice", "attention", "solver", "collectives beside the network's", "bytes"]
    header += ["network's bytes", "FLOPs / network", "MiB", "/ plain", "compile s", "/ network"]
    print(metrics.table(header, []))
    for topology in arguments.topologies:
        chips = Slice(topology, arguments.model, arguments.width, arguments.depth)
        for attention in chips.attentions:
            network = chips.network(attention)
            programs = {name: chips.sampler(attention, solver) for name, solver in SOLVERS.items()}
            for name, program in programs.items():
                more = program.collectives - network.collectives
                told = ", ".join(f"{n} {kind} of {array}" for (kind, array), n in more.items())
                row = [
                    topology,
                    attention,
                    name,
                    told or "none",
                    f"{size(more)}",
                    f"{size(network.collectives) / 2**20:.0f} Mi",
                    f"{program.flops / network.flops:.4f}",
                    f"{program.memory / 2**20:.1f}",
                    f"{program.memory / programs['plain'].memory:.3f}",
                    f"{program.seconds:.1f}",
                    f"{program.seconds / network.seconds:.2f}",
                ]
                print(metrics.table(row, []).split("\n")[0], flush=True)


if __name__ == "__main__":
    main()

"""What a step costs: plain, corrected, probed, from a table (15 minutes on two cores).

Of two networks of three sizes each. All programs of one network are timed in turns, so that what
else runs on the machine hits them alike; a ratio is the median over the turns of that of one turn.
FLOPs and bytes are the compiler's own count of one step, peak memory its own plan. The bare network
is called as often as the loop does, from Python. Floor: the least time that the FLOPs take at the
rate of a large matrix product or the bytes at that of a copy, both measured here, over the time
taken.
"""

import argparse
import dataclasses
import subprocess
import sys
import time
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

import _path  # noqa: F401
import digits
import metrics
import steindiff_jax as sd
from precision import Rounded

INNER = sd.DPMpp2M()
ON_CPU = jax.default_backend() == "cpu"
# On CPUs XLA's own convolution has a slow derivative inside a loop, see `digits.Conv`.
Conv = digits.Conv if ON_CPU else partial(nn.Conv, kernel_size=(3, 3))


class ConvNet(nn.Module):
    """Three residual blocks on x (batch, h, w, c), scaled by the time t (batch,)."""

    width: int

    @nn.compact
    def __call__(self, x, t):
        h = Conv(self.width)(x)
        for _ in range(3):
            scale = nn.Dense(self.width)(embedding(t))[:, None, None]
            h += Conv(self.width)(nn.silu(Conv(self.width)(nn.LayerNorm()(h) * (1 + scale))))
        return Conv(x.shape[-1])(nn.silu(h))


class Transformer(nn.Module):
    """Three blocks of attention over the 2x2 patches of x (batch, h, w, c), as in a DiT."""

    width: int

    @nn.compact
    def __call__(self, x, t):
        b, n, _, c = x.shape
        patches = x.reshape(b, n // 2, 2, n // 2, 2, c).swapaxes(2, 3).reshape(b, -1, 4 * c)
        place = self.param("place", nn.initializers.normal(0.02), (patches.shape[1], self.width))
        h = nn.Dense(self.width)(patches) + place[None]
        for _ in range(3):
            scale = nn.Dense(self.width)(embedding(t))[:, None]
            h += nn.MultiHeadDotProductAttention(max(self.width // 64, 1))(
                nn.LayerNorm()(h) * (1 + scale)
            )
            h += nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(nn.LayerNorm()(h))))
        h = nn.Dense(4 * c)(nn.LayerNorm()(h))
        return h.reshape(b, n // 2, n // 2, 2, 2, c).swapaxes(2, 3).reshape(x.shape)


NETWORKS = {"convolution": ConvNet, "attention": Transformer}
WIDTHS = (32, 64, 128) if ON_CPU else (128, 256, 512)


def embedding(t):
    angle = t[:, None] * 2.0 ** jnp.linspace(-2, 4, 16)[None]
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


class Cost(NamedTuple):
    seconds: list[float]  # of each turn
    flops: float  # of one step
    bytes: float
    memory: int  # peak, in bytes, without the arguments
    compile: float  # seconds


class Program:
    """A compiled function with what the compiler says of it; called `times` in a row."""

    def __init__(self, function, *arguments, times=1):
        start = time.perf_counter()
        self.compiled = jax.jit(function).lower(*arguments).compile()
        self.compile = time.perf_counter() - start
        self.arguments, self.times = arguments, times

    def seconds(self):
        start = time.perf_counter()
        for _ in range(self.times):
            last = self.compiled(*self.arguments)
        jax.block_until_ready(last)
        return time.perf_counter() - start

    def cost(self, seconds):
        analysis, plan = self.compiled.cost_analysis(), self.compiled.memory_analysis()
        return Cost(
            seconds,
            analysis["flops"],
            analysis["bytes accessed"],
            plan.temp_size_in_bytes + plan.output_size_in_bytes,
            self.compile,
        )


def programs(network, shape, steps, dtype):
    """Name -> `Program`: the bare network, and the loop with every way to get gamma.

    Weights and layers are of `dtype`, the state is of float32.
    """
    key, sigmas = jax.random.key(0), sd.karras_sigmas(steps)
    x = sigmas[0] * jax.random.normal(key, shape)
    variables = jax.tree.map(lambda w: w.astype(dtype), network.init(key, x, x[:, 0, 0, 0]))
    apply = Rounded(network.apply, dtype)

    def denoiser(variables):
        found = sd.from_linen(network, variables, schedule=sd.EDM(), prediction="edm")
        return dataclasses.replace(found, apply=apply)

    def loop(variables, x, sigmas, solver):
        return sd.sample(key, denoiser(variables), sigmas=sigmas, solver=solver, x_init=x).x

    stein = sd.Stein(INNER)
    solvers = {
        "plain": INNER,
        "corrected": stein,
        "one band": sd.Stein(INNER, basis=sd.Whole()),
        "table": sd.calibrate(key, denoiser(variables), shape, sigmas, stein),
        **{
            f"one probe, {how}": sd.Stein(INNER, estimator=sd.Hutchinson(derivative=how))
            for how in ("jvp", "vjp", "secant")
        },
    }
    bare = Program(apply, variables, x, x[:, 0, 0, 0], times=steps)
    loops = {name: Program(loop, variables, x, sigmas, s) for name, s in solvers.items()}
    more = Program(loop, variables, x, sd.karras_sigmas(10 * steps), INNER)
    weights = sum(w.size for w in jax.tree.leaves(variables))
    return {"network": bare, **loops}, more.compile / loops["plain"].compile, weights


def measure(programs, turns):
    """Name -> `Cost`, the programs timed one after another in every turn."""
    for program in programs.values():
        program.seconds()
    seconds = {name: [] for name in programs}
    for _ in range(turns):
        for name, program in programs.items():
            seconds[name].append(program.seconds())
    return {name: program.cost(seconds[name]) for name, program in programs.items()}


def ratio(cost, reference):
    return float(np.median(np.divide(cost.seconds, reference.seconds)))


def import_times():
    """Seconds of `import steindiff_jax` and of what it imports, in a new interpreter, by module."""
    command = [sys.executable, "-X", "importtime", "-c", "import steindiff_jax"]
    log = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    rows = (line.split("|") for line in log.splitlines()[1:] if line.startswith("import time"))
    return {name.strip(): 1e-6 * int(cumulative) for _, cumulative, name in rows}


def floors(size):
    """FLOPs and bytes a second, of a matrix product (size, size) and of a copy as large."""
    square = jnp.ones((size, size))
    product, copy = Program(jnp.matmul, square, square, times=3), Program(jnp.copy, square, times=3)
    fastest = [min(p.seconds() for _ in range(5)) / 3 for p in (product, copy)]
    return 2 * size**3 / fastest[0], 2 * square.nbytes / fastest[1]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--networks", nargs="*", default=list(NETWORKS), choices=list(NETWORKS))
    parser.add_argument("--widths", nargs="*", type=int, default=WIDTHS, help="of the networks")
    parser.add_argument("--dtype", default="float32", help="of weights and layers")
    parser.add_argument("--tiny", action="store_true", help="to see that it runs")
    arguments = parser.parse_args()
    widths, turns, steps = arguments.widths, arguments.turns, arguments.steps
    batch, pixels = (64, 16) if ON_CPU else (512, 32)
    if arguments.tiny:
        widths, turns, steps, batch, pixels = (4,), 1, 2, 32, 4
    device = jax.devices()[0]
    rate, bandwidth = floors(256 if arguments.tiny else 2048 if ON_CPU else 8192)
    print(
        f"{device.platform} {device.device_kind}, jax {jax.__version__}, "
        f"{arguments.dtype}, batch {batch}"
    )
    print(f"{rate / 1e9:.0f} GFLOP/s (matrix product), {bandwidth / 1e9:.1f} GB/s (copy)")
    seconds = import_times()
    others = {name: f"{seconds[name]:.2f}" for name in ("jax", "jaxtyping")}
    print(f"import steindiff_jax: {seconds['steindiff_jax']:.2f} s, of which {others}")
    rows = []
    for kind in arguments.networks:
        for width in widths:
            network, shape = NETWORKS[kind](width), (batch, pixels, pixels, 3)
            compiled, growth, weights = programs(network, shape, steps, arguments.dtype)
            costs = measure(compiled, turns)
            bare, plain = costs["network"], costs["plain"]
            for name, cost in costs.items():
                second = float(np.median(cost.seconds)) / steps
                least = max(cost.flops / rate, cost.bytes / bandwidth)
                rows.append(
                    [
                        f"{kind} {width}",
                        name,
                        f"{1e3 * second:.2f}",
                        f"{1e3 * second * steps / batch:.2f}",
                        f"{ratio(cost, bare):.3f}",
                        f"{ratio(cost, plain):.3f}",
                        f"{cost.flops / bare.flops:.3f}",
                        f"{cost.bytes / bare.bytes:.3f}",
                        f"{cost.memory / 2**20:.1f}",
                        f"{cost.compile:.2f}",
                        f"{least / second:.2f}",
                    ]
                )
            print(
                f"{kind} {width}, {weights / 1e6:.1f} million weights: "
                f"{10 * steps} steps compile in {growth:.2f} of {steps} steps'"
            )
    header = ["network", "gamma", "ms / step", "ms / sample", "/ network", "/ plain"]
    header += ["FLOPs / network", "bytes / network", "MiB", "compile s", "floor"]
    print(metrics.table(header, rows))


if __name__ == "__main__":
    main()

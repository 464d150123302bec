"""Guided digits on every device of every host, into one directory; run this on each host.

    python examples/multihost.py samples                          # one machine, all its devices
    python examples/multihost.py samples --cluster                # TPU slice, Slurm, Open MPI ...
    python examples/multihost.py samples --coordinator 10.0.0.1:1234 --processes 2 --process 0

The first process shows a progress bar. A run that was stopped continues when it is started again.
The hosts may share the directory, or each may have its own on its own disk. To read it in order:
np.concatenate([np.load(f) for f in sorted(Path("samples").glob("*.npy"))]).
"""

import argparse
from functools import partial

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

import digits
import steindiff_jax as sd


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("directory")
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--batch", type=int, default=512, help="on all devices together")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--model", type=int, default=1, help="devices that share one network")
    parser.add_argument("--cluster", action="store_true", help="find the other hosts")
    parser.add_argument("--coordinator", help="address:port of the first process")
    parser.add_argument("--processes", type=int)
    parser.add_argument("--process", type=int, help="number of this one, from 0")
    args = parser.parse_args()

    if args.cluster or args.coordinator:  # before anything else touches a device
        jax.distributed.initialize(args.coordinator, args.processes, args.process)

    shape = jax.device_count() // args.model, args.model
    mesh = jax.make_mesh(shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2)

    def place(weights):
        """Replicated over the data axis, the outputs of each layer spread over the model axis."""
        divides = weights.shape[-1] % args.model == 0
        spec = P(*[None] * (weights.ndim - 1), "model") if divides else P()
        return jax.device_put(weights, NamedSharding(mesh, spec))

    module, variables = digits.network()
    network = partial(
        sd.from_linen,
        module,
        jax.tree.map(place, variables),
        schedule=sd.EDM(),
        prediction="edm",
        sigma_data=digits.SIGMA_DATA,
    )
    label = np.arange(args.samples) % 10
    sd.sample_many(
        jax.random.key(0),
        sd.guided(
            network(cond={"label": label}),
            network(cond={"label": np.full_like(label, digits.NULL)}),
            scale=3.0,
        ),
        args.samples,
        args.batch,
        (8, 8, 1),
        sigmas=sd.karras_sigmas(args.steps),
        directory=args.directory,
        sharding=NamedSharding(mesh, P("data")),
        progress=partial(tqdm, unit="batch", disable=jax.process_index() > 0),
    )


if __name__ == "__main__":
    main()

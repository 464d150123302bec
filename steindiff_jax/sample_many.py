"""More samples than memory holds: batch after batch through one compiled program."""

import json
import os
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.multihost_utils import process_allgather
from jax.sharding import Sharding
from jax.typing import ArrayLike

from steindiff_jax import _checks
from steindiff_jax._identity import describe, fingerprint
from steindiff_jax.denoisers import rows
from steindiff_jax.protocols import AnySolver, Denoiser, Key, Numeric
from steindiff_jax.sample import DEFAULT, sample


def sample_many(
    key: Key,
    denoiser: Denoiser,
    n: int,
    batch_size: int,
    event: tuple[int, ...],
    *,
    sigmas: ArrayLike,
    solver: AnySolver | None = None,
    directory: str | os.PathLike | None = None,
    sharding: Sharding | None = None,
    progress: Callable[[list[int]], Iterable[int]] | None = None,
) -> Iterator[np.ndarray]:
    """Draw n samples, `batch_size` at a time, as a stream of arrays or into a directory.

    Sample i has a key of its own, fold_in(key, i). With statistics="sample" and a given basis it is
    the same whatever the batch size; otherwise gamma and the default basis are those of its batch.
    Where n is no multiple of the batch size the last batch overlaps the previous one so that it is
    full; only its new samples are returned.

    Args:
      key: of `jax.random`, one.
      denoiser: as in `sample`; its conditioning has a row for each of the n samples.
      n: number of samples.
      batch_size: how many to sample at once, on all devices together.
      event: shape of one sample.
      sigmas: as in `sample`.
      solver: as in `sample`.
      directory: where to write them, as files of numpy's named by the index of their first sample.
        What is there already is kept, so that a run that was stopped goes on; a file gets its name
        once it is complete.
      sharding: how a batch lies on the devices, over its leading axis, such as
        NamedSharding(mesh, P("data")). Of several hosts each handles the rows on its own devices.
      progress: such as `tqdm.tqdm`, put around the list of batches to compute.

    Returns:
      Iterator over arrays (rows, *event), in the order of the samples and of this host alone. They
      are computed one by one; with a directory they are all written first and mapped from there.

    Raises:
      ValueError: n or batch_size that is not a positive integer; conditioning of other than n rows;
        a directory that holds another run (other arguments or, known on a single host only,
        another denoiser) or damaged files, which it names.
    """
    n, event = _checks.count("n", n), _checks.shape("event", event)
    size = min(_checks.count("batch_size", batch_size), n)
    solver = DEFAULT if solver is None else solver
    denoiser = rows(denoiser, partial(_on_host, n=n))
    spans = _own_rows(sharding, size)

    # The keys lie on the devices as the samples will.
    @partial(jax.jit, out_shardings=sharding)
    def draw(key: Key, first: Numeric) -> Key:
        return jax.vmap(jax.random.fold_in, (None, 0))(key, first + jnp.arange(size))

    def compute(start: int) -> Iterator[np.ndarray]:
        """The samples from `start` to the end of their batch, a block for each of `spans`."""
        first = min(start, n - size)

        def place(cond: Any) -> Any:
            cond = cond[first : first + size]
            if sharding is None:
                return cond
            return jax.make_array_from_callback(cond.shape, sharding, cond.__getitem__)

        keys, some = draw(key, first), rows(denoiser, place)
        x = sample(keys, some, (size, *event), sigmas=sigmas, solver=solver).x
        if sharding is None:
            held = {(0, size): x}
        else:
            x = jax.device_put(x, sharding)
            held = {_span(shard.index[0], size): shard.data for shard in x.addressable_shards}
        return (np.asarray(held[span])[known:] for span, known in fresh(start))

    def fresh(start: int) -> Iterator[tuple[tuple[int, int], int]]:
        """The `spans` that hold new samples, and how many rows of each are known already."""
        overlap = max(start + size - n, 0)
        return ((span, max(overlap - span[0], 0)) for span in spans if overlap < span[1])

    starts = list(range(0, n, size))
    if directory is None:
        batches = (list(compute(start)) for start in (progress or iter)(starts))
        return (np.concatenate(blocks) for blocks in batches if blocks)

    def files(start: int) -> list[Path]:
        first = min(start, n - size)
        return [folder / f"{first + span[0] + known:012d}.npy" for span, known in fresh(start)]

    def read(start: int) -> Iterator[np.ndarray]:
        for file, (span, known) in zip(files(start), fresh(start), strict=True):
            yield _read(file, (span[1] - span[0] - known, *event))

    folder = Path(directory)
    _claim(
        folder,
        {
            "key": np.asarray(jax.random.key_data(key)).tolist(),
            "n": n,
            "batch_size": size,
            "rows of a file": size if sharding is None else sharding.shard_shape((size,))[0],
            "event": list(event),
            "sigmas": np.asarray(sigmas).tolist(),
            "solver": describe(solver),
            # Weights that other hosts hold a part of cannot be read here.
            "denoiser": fingerprint(denoiser) if jax.process_count() == 1 else "",
        },
    )
    done = np.array([all(file.exists() for file in files(start)) for start in starts])
    if jax.process_count() > 1:  # one host's files may be on its own disk
        done = np.all(process_allgather(done), axis=0)
    todo = [start for i, start in enumerate(starts) if not done[i]]
    for start in (progress or iter)(todo):
        for file, block in zip(files(start), compute(start), strict=True):
            _write(file, lambda stream, block=block: np.save(stream, block))
    return (block for start in starts for block in read(start))


def _span(index: slice, size: int) -> tuple[int, int]:
    begin, end, _ = index.indices(size)
    return begin, end


def _own_rows(sharding: Sharding | None, size: int) -> list[tuple[int, int]]:
    """The blocks of rows of a batch that this host is to handle, each of them on one host only."""
    if sharding is None:
        return [(0, size)]
    owner = {}
    for device, (index, *_) in sharding.devices_indices_map((size,)).items():
        owner.setdefault(_span(index, size), device)
    here = jax.process_index()
    return sorted(span for span, device in owner.items() if device.process_index == here)


def _on_host(cond: Any, n: int) -> Any:
    if jnp.shape(cond)[:1] != (n,):
        raise ValueError(
            f"conditioning must have one row for each of the n={n} samples, got shape "
            f"{jnp.shape(cond)}"
        )
    return np.asarray(cond)


def _claim(folder: Path, run: dict) -> None:
    """ValueError if the folder holds another run than this."""
    folder.mkdir(parents=True, exist_ok=True)
    note = folder / "run.json"
    try:
        found = dict(json.loads(note.read_bytes())) if note.exists() else run
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{note} is damaged: {error}; take another directory") from error
    different = [name for name in run if found.get(name) != run[name]]
    if different:
        raise ValueError(
            f"{folder} holds samples of another run: {different[0]} is "
            f"{found.get(different[0])!r} there, got {run[different[0]]!r}; take another directory"
        )
    _write(note, lambda stream: stream.write(json.dumps(run, indent=2).encode()))


def _read(file: Path, shape: tuple[int, ...]) -> np.ndarray:
    """The samples in a file, mapped from there; never a pickle. ValueError if they are not."""
    try:
        samples = np.lib.format.open_memmap(file, mode="r")
    except Exception as error:  # of many kinds, for a header is a Python expression
        raise ValueError(f"{file} is damaged: {error}; delete it and run again") from error
    if samples.shape != shape or not np.issubdtype(samples.dtype, np.floating):
        raise ValueError(
            f"{file} must hold floating point numbers of shape {shape}, got {samples.dtype} of "
            f"shape {samples.shape}; delete it and run again"
        )
    return samples


def _write(file: Path, write: Callable) -> None:
    """Write to a temporary name and rename: a file with its own name is complete."""
    part = file.with_name(f"{file.name}.{jax.process_index()}.part")
    with part.open("wb") as stream:
        write(stream)
        stream.flush()
        os.fsync(stream.fileno())
    part.replace(file)

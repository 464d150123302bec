"""All problems and all timings, each in a process of its own."""

import itertools
import json
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from peers import compare, libraries, report, speed

QUICK = compare.Sizes(
    samples=60,
    network_samples=20,
    evaluations=(3, 5, 8),
    network_evaluations=(3, 5),
    guidance=(1.0, 3.0),
    draws=200,
    fine=30,
)
QUICK_PROBLEMS = ("few clumps", compare.NETWORK)


def prepare(flax: Path | None) -> None:
    """Of a new process: the older diffusers first where it is asked for; few threads."""
    if flax is not None:
        sys.path.insert(0, str(flax))
    elif libraries.installed("torch"):
        import torch

        torch.set_num_threads(1)


def run(quick: bool, seeds: int, jobs: int, output: Path, flax: Path) -> None:
    """Write quality.csv, speed.json and facts.json into `output`."""
    sizes = QUICK if quick else compare.Sizes(seeds=seeds)
    names = QUICK_PROBLEMS if quick else (compare.NETWORK, *compare.EXACT)
    spawn = get_context("spawn")
    # Hundreds of compiled programs in one process exhaust its memory maps.
    options = {"mp_context": spawn, "max_tasks_per_child": 1}
    rows = []
    with ProcessPoolExecutor(jobs, **options, initializer=partial(prepare, None)) as pool:
        tasks = [pool.submit(compare.run, name, sizes) for name in names]
        for task in tqdm(as_completed(tasks), total=len(tasks), desc="problems"):
            rows += task.result()
    compare.write(rows, output / "quality.csv")
    if flax.exists():
        with ProcessPoolExecutor(jobs, **options, initializer=partial(prepare, flax)) as pool:
            tasks = [pool.submit(compare.run, name, sizes, True) for name in names]
            for task in tqdm(as_completed(tasks), total=len(tasks), desc="Flax schedulers"):
                rows += task.result()
        compare.write(rows, output / "quality.csv")
    kinds = [("jax", "torch") if libraries.installed("azula") else ("jax",)]
    kinds += [("flax",)] if flax.exists() else []
    records = []
    for case, together in itertools.product(speed.SHAPES, kinds):
        path = flax if together == ("flax",) else None
        repeats, alone = (2, 2) if quick else (15, 99)
        records += speed.run(together, case, repeats, alone, partial(_path, path))
    (output / "speed.json").write_text(json.dumps(records, indent=1))
    facts = report.facts(sizes, quick, flax)
    (output / "facts.json").write_text(json.dumps(facts, indent=1))


def _path(flax: Path | None) -> None:
    if flax is not None:
        sys.path.insert(0, str(flax))

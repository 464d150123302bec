"""Parts of the comparison, each problem and part in a process of its own, and the timings."""

import datetime
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

from tqdm import tqdm

from peers import compare, libraries, speed

QUICK = compare.Sizes(
    samples=60,
    network_samples=20,
    evaluations=(3, 8),
    network_evaluations=(3,),
    seeds=1,
    law=2000,
    draws=120,
    network_draws=40,
    fine=20,
    levels=61,
    points=120,
    gits=13,
    gits_draws=60,
)
QUICK_PROBLEMS = ("few clumps", "grey patches 8x8", "digits network")
LONGEST = ("images network", "spectrum k^-2, 32x32x3")  # are begun first
NAMES = (
    *("torch", "diffusers", "azula", "diffrax", "dewml", "diffuse-jax", "hackable-diffusion"),
    *("jax", "jaxlib", "numpy", "steindiff_jax"),
)


def file(output: Path, name: str, guidance: float, part: str) -> Path:
    """Where the rows of a part are kept."""
    words = name.replace("^", "").replace(",", "").replace(" ", "-")
    return output / "runs" / f"{words}_{guidance:g}_{part}.jsonl"


def prepare(folder: Path | None = None) -> None:
    """Of a new process: what a part has in a folder of its own first; one thread of torch."""
    _path(folder)
    if folder is None and libraries.installed("torch"):
        import torch

        torch.set_num_threads(1)


def one(name: str, guidance: float, part: str, sizes, output: Path, folder: Path | None) -> str:
    """What went wrong, or nothing."""
    prepare(folder)
    try:
        compare.run(name, guidance, part, sizes, file(output, name, guidance, part))
    except FileNotFoundError as error:
        return f"{name} is left out: {error}"
    except Exception as error:  # the others go on
        return f"{name}, guidance {guidance:g}, {part}: {type(error).__name__}: {error}"
    return ""


def run(problems, parts, sizes, jobs: int, output: Path, folders: dict[str, Path]) -> None:
    """Write rows into `output`/runs, and facts.json; what is there already is not run again.

    folders: of the parts that are not installed with the others, where they are.
    """
    (output / "runs").mkdir(parents=True, exist_ok=True)
    (output / "facts.json").write_text(json.dumps(facts(sizes, folders), indent=1))
    parts = [part for part in parts if part not in folders or folders[part].exists()]
    tasks = [
        (name, w, part)
        for part, name in itertools.product(parts, problems)
        for w in compare.scales(name)
    ]
    tasks.sort(key=lambda task: task[0] not in LONGEST)
    os.environ["NPROC"] = "1"  # XLA's threads, of the new processes
    # Hundreds of compiled programs in one process exhaust its memory maps.
    spawn = {"mp_context": get_context("spawn"), "max_tasks_per_child": 1}
    with ProcessPoolExecutor(jobs, **spawn) as pool:
        futures = [pool.submit(one, *task, sizes, output, folders.get(task[-1])) for task in tasks]
        for future in tqdm(as_completed(futures), total=len(futures)):
            if message := future.result():
                print(message, file=sys.stderr)
    del os.environ["NPROC"]


def time(output: Path, folders: dict[str, Path], repeats: int = 15, alone: int = 99) -> None:
    """Write speed.json, on a machine that does nothing else."""
    flax = folders["flax"]
    # Torch by itself: its threads go on turning for a while after each call.
    kinds = [("jax", "flax") if flax.exists() else ("jax",)]
    kinds += [("torch",)] if libraries.installed("azula") else []
    records = []
    for case, together in itertools.product(speed.SHAPES, kinds):
        path = flax if "flax" in together else None
        records += speed.run(together, case, repeats, alone, partial(_path, path))
    (output / "speed.json").write_text(json.dumps(records, indent=1))


def _path(folder: Path | None) -> None:
    if folder is not None:
        sys.path.insert(0, str(folder))


def facts(sizes: compare.Sizes, folders: dict[str, Path]) -> dict:
    """Of this run: date, machine, versions, sizes."""
    versions = {}
    for name in NAMES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    found = importlib.metadata.distributions(name="diffusers", path=[str(folders["flax"])])
    versions["diffusers (Flax)"] = next((d.version for d in found), None)
    if "maxdiffusion" in folders:
        directory = folders["maxdiffusion"].parent / ".git"
        git = ["git", "--git-dir", str(directory), "rev-parse", "--short", "HEAD"]
        commit = subprocess.run(git, check=False, capture_output=True, text=True).stdout.strip()
        versions["MaxDiffusion"] = commit or "of no known commit"
    processor, information = platform.processor(), Path("/proc/cpuinfo")
    if information.exists():
        models = [x for x in information.read_text().splitlines() if x.startswith("model name")]
        processor = models[0].split(":")[1].strip() if models else processor
    return {
        "date": datetime.date.today().isoformat(),
        "machine": f"{processor}, {os.cpu_count()} cores, {platform.system()}",
        "python": platform.python_version(),
        "versions": versions,
        "sizes": sizes._asdict(),
    }
